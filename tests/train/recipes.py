"""A recipe for the tests: a model of a few thousand weights, random draws of every kind; and runs of any recipe."""

import csv

import pytest
import yaml

from tests.processes import ROOT, torchrun
from vit_efficient.train import Config, load_recipe, train
from vit_efficient.train.config import EmaConfig, LossConfig, ModelConfig, OptimConfig, SchedConfig
from vit_efficient.train.recipe import to_yaml

# Of this repository, without plans; those that others extend name no model.
PLANS = sorted(ROOT.glob('recipes/**/plan-*.yaml'))
ALL = sorted({*ROOT.glob('recipes/**/*.yaml')} - {*PLANS})
_BASES = {(path.parent / base).resolve() for path in ALL if (base := yaml.safe_load(path.read_text()).get('extends'))}


def load_any(path) -> Config:
    return load_recipe(path, ['model.name=any'] if path in _BASES else [])


TINY = {'img_size': 16, 'patch_size': 4, 'embed_dim': 12, 'depth': 2, 'num_heads': 2}


def tiny_recipe(folder, output, **options) -> Config:
    """Trains on tests.data.trees.write_tree(folder): 24 images in 6 batches of 4, two epochs."""
    config = Config(
        model=ModelConfig('vit_dct_tiny', {**TINY, 'drop_path_rate': 0.2, 'proj_drop_rate': 0.1}),
        optim=OptimConfig(lr=1e-3),
        sched=SchedConfig(epochs=2, warmup_epochs=1),
        loss=LossConfig(mixup=0.8, cutmix=1.0),
        ema=EmaConfig(decay=0.9),
        output=str(output),
        device='cpu',
        threads=1,
        log_every=1,
    )
    config.data.train, config.data.val = f'{folder}/train', f'{folder}/val'
    config.data.batch_size, config.data.workers = 4, 0
    for key, value in options.items():
        setattr(config, key, value)
    return config


def train_on_one_and_two_processes(recipe, tmp_path, batch_size) -> None:
    """Trains what `recipe(output)` returns, less chance, in tmp_path/1 and in tmp_path/2, with the same batches."""
    for count in (1, 2):
        config = recipe(tmp_path / str(count))
        config.loss, config.optim.opt = LossConfig(0.0), 'sgd'
        config.data.batch_size = batch_size // count
        if count == 1:
            train(config)
    (tmp_path / '2.yaml').write_text(to_yaml(config))
    torchrun('tools/train.py', tmp_path / '2.yaml')


def assert_same_predictions(one, other):
    """Those of two runs that share out their batches differently: alike, but for the rounding of probabilities."""
    ours, theirs = (list(csv.DictReader((folder / 'predictions.csv').open())) for folder in (one, other))
    rounded = [[key for key in row if key.endswith('probability')] for row in (ours[0], theirs[0])]
    assert rounded[0] == rounded[1] != []
    for a, b in zip(ours, theirs, strict=True):
        shares = [[float(row.pop(key)) for key in rounded[0]] for row in (a, b)]
        assert shares[0] == pytest.approx(shares[1], abs=1e-4)
    assert ours == theirs
