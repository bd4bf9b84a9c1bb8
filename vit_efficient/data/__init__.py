"""Images to batches: reading, augmentation and order, every random draw a function of (seed, epoch, index)."""

from vit_efficient.data.config import AffineConfig, AugmentConfig, DataConfig
from vit_efficient.data.datasets import (
    ImageTree,
    Samples,
    check_same_classes,
    class_names,
    create_dataset,
    create_loader,
    iterate,
)
from vit_efficient.data.images import read_image, to_array
from vit_efficient.data.megapixel_mnist import MegapixelMnist
from vit_efficient.data.sampler import EpochSampler, stable_seed
from vit_efficient.data.transforms import EvalTransform, Preprocessing, TrainTransform
from vit_efficient.data.truncation import DctTruncate, TorchvisionDctTruncate

__all__ = [
    'AffineConfig',
    'AugmentConfig',
    'DataConfig',
    'DctTruncate',
    'EpochSampler',
    'EvalTransform',
    'ImageTree',
    'MegapixelMnist',
    'Preprocessing',
    'Samples',
    'TorchvisionDctTruncate',
    'TrainTransform',
    'check_same_classes',
    'class_names',
    'create_dataset',
    'create_loader',
    'iterate',
    'read_image',
    'stable_seed',
    'to_array',
]
