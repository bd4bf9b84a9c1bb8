"""Images to batches: reading, augmentation and order, every random draw a function of (seed, epoch, index)."""

from vit_efficient.data.config import AffineConfig, AugmentConfig, DataConfig, SizeConfig
from vit_efficient.data.decoding import eval_input, input_shape, train_input
from vit_efficient.data.files.coefficients import (
    CoefficientTransform,
    PatchCoefficients,
    read_coefficients,
    takes_coefficients,
)
from vit_efficient.data.files.images import read_image, to_array
from vit_efficient.data.files.jpeg import QuantizedJpeg, ReducedReader, read_quantized
from vit_efficient.data.megapixel_mnist import MegapixelMnist
from vit_efficient.data.sampler import EpochSampler, stable_seed
from vit_efficient.data.samples import (
    ImageTree,
    ReaderImages,
    Samples,
    check_same_classes,
    class_names,
    create_dataset,
    create_loader,
    iterate,
    shard_order,
)
from vit_efficient.data.sources.hugging_face import HuggingFaceReader
from vit_efficient.data.sources.shards import ShardReader
from vit_efficient.data.transforms import EvalTransform, Preprocessing, TrainTransform
from vit_efficient.data.truncation import DctTruncate, TorchvisionDctTruncate

__all__ = [
    'AffineConfig',
    'AugmentConfig',
    'CoefficientTransform',
    'DataConfig',
    'DctTruncate',
    'EpochSampler',
    'EvalTransform',
    'HuggingFaceReader',
    'ImageTree',
    'MegapixelMnist',
    'PatchCoefficients',
    'Preprocessing',
    'QuantizedJpeg',
    'ReaderImages',
    'ReducedReader',
    'Samples',
    'ShardReader',
    'SizeConfig',
    'TorchvisionDctTruncate',
    'TrainTransform',
    'check_same_classes',
    'class_names',
    'create_dataset',
    'create_loader',
    'eval_input',
    'input_shape',
    'iterate',
    'read_coefficients',
    'read_image',
    'read_quantized',
    'shard_order',
    'stable_seed',
    'takes_coefficients',
    'to_array',
    'train_input',
]
