"""A recipe for the tests: a model of a few thousand weights, random draws of every kind."""

from vit_efficient.train import Config
from vit_efficient.train.config import EmaConfig, LossConfig, ModelConfig, OptimConfig, SchedConfig

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
