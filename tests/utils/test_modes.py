import pytest
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader

from vit_efficient import convert, convert_patch_embed
from vit_efficient.attention.treeformer.leaves import find_leaves
from vit_efficient.train.distributed import has_unused_parameters
from vit_efficient.train.evaluation import evaluate
from vit_efficient.utils.modes import evaluating

IMAGES = torch.randn(2, 3, 32, 32)


class Merged(nn.Linear):
    """An adapter's layer that is another one in evaluation mode."""

    merged = False

    def train(self, mode=True):
        self.merged = not mode
        return super().train(mode)


def build(name='vit_treeformer_tc_tiny'):
    return timm.create_model(name, img_size=32, embed_dim=16, depth=2, num_heads=2, num_classes=3)


def modes(model):
    return {name: module.training for name, module in model.named_modules()}


@pytest.mark.parametrize(
    'use',
    [
        lambda model: find_leaves(model, IMAGES),
        lambda model: has_unused_parameters(model, IMAGES),
        lambda model: evaluate(model, DataLoader([(IMAGES[0], 0, 0), (IMAGES[1], 1, 1)], 2), progress=False),
    ],
    ids=['find_leaves', 'has_unused_parameters', 'evaluate'],
)
@pytest.mark.parametrize('mode', [True, False])
def test_each_module_comes_back_in_its_mode(use, mode):
    model = build().train(mode)
    model.blocks[0].mlp.train(not mode)
    before = modes(model)
    seen = []
    model.head.register_forward_hook(lambda *_: seen.append({module.training for module in model.modules()}))
    use(model)
    assert modes(model) == before
    assert seen and all(during == {False} for during in seen)
    model.head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        use(model)
    assert modes(model) == before


def test_modules_that_do_more_than_change_their_mode():
    model = nn.Sequential(nn.Sequential(Merged(2, 2), nn.Linear(2, 2)), Merged(2, 2).eval(), nn.Linear(2, 2))
    model[0].training = False
    before = modes(model)
    with evaluating(model):
        assert model[0][0].merged and not any(modes(model).values())
    assert modes(model) == before
    assert not model[0][0].merged and model[1].merged


def test_a_module_in_two_places():
    shared = nn.Linear(2, 2)
    model = nn.Sequential(nn.Sequential(shared), nn.Sequential(shared))
    model[1].training = False
    before = modes(model)
    with evaluating(model):
        pass
    assert modes(model) == before


@pytest.mark.parametrize('change', [lambda model: convert(model, 'dct'), convert_patch_embed])
def test_conversion_leaves_modes_as_they_are(change):
    model = build('vit_tiny_patch16_224').train()
    for name in ('blocks.0.attn.proj_drop', 'blocks.1.attn.qkv', 'patch_embed.norm'):
        model.get_submodule(name).eval()
    before = modes(model)
    change(model)
    after = modes(model)
    assert all(after[name] == before[name] for name in after.keys() & before.keys())
    assert {after[name] for name in after.keys() - before.keys()} == {True}
