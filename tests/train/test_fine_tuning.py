"""From a run at one size to one at another: what depends on the size follows it."""

import pytest
import torch

from tests.data.trees import write_tree
from tests.train.recipes import TINY, tiny_recipe
from vit_efficient.train import load_model, train
from vit_efficient.train.config import ModelConfig


@pytest.mark.parametrize('attention', ['full', 'dct', 'linformer', 'treeformer_tc'])
def test_weights_go_on_at_a_higher_resolution(attention, tmp_path):
    data = write_tree(tmp_path / 'data')

    def recipe(output, **model):
        config = tiny_recipe(data, tmp_path / output)
        config.model = ModelConfig(f'vit_{attention}_tiny', {**TINY, **model.pop('args', {})}, **model)
        config.optim.lr, config.optim.weight_decay, config.sched.min_lr = 1e-9, 0.0, 0.0
        config.sched.epochs, config.sched.warmup_epochs, config.ema.decay = 1, 0, 0.0
        return config

    train(recipe('small'))
    train(recipe('large', init_from=str(tmp_path / 'small'), args={'img_size': [24, 32]}))
    small, large = (load_model(tmp_path / name).eval() for name in ('small', 'large'))
    assert large.patch_embed.grid_size == (6, 8)
    small.set_input_size((24, 32))
    x = torch.randn(2, 3, 24, 32)
    # What is trained on the way is next to nothing.
    torch.testing.assert_close(large(x), small(x), atol=1e-4, rtol=1e-4)
    config = recipe('other', init_from=str(tmp_path / 'small'))
    config.data.img_size = [24, 32]  # the data's size alone is not the model's
    with pytest.raises(ValueError, match=r'data.img_size, model.args'):
        train(config)
