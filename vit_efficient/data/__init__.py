"""Images to batches: reading, augmentation and order, every random draw a function of (seed, epoch, index)."""

from importlib import import_module
from typing import Any

# Albumentations and OpenCV load with the modules that use them, so each name is imported when it is asked for.
_NAMES = {
    'batches': 'create_loader iterate limit_workers',
    'config': 'AffineConfig AugmentConfig DataConfig SizeConfig',
    'files.coefficients': 'PatchCoefficients read_coefficients takes_coefficients',
    'files.images': 'read_image to_array',
    'files.jpeg': 'QuantizedJpeg ReducedReader read_quantized',
    'megapixel_mnist': 'MegapixelMnist',
    'preprocessing': 'CoefficientTransform EvalTransform Preprocessing eval_input input_shape train_input',
    'sampler': 'EpochSampler shard_order stable_seed',
    'samples': 'Samples check_same_classes class_names has_masks labels_among',
    'sources': 'ReaderImages create_dataset',
    'sources.folders': 'ImageTree',
    'sources.hugging_face': 'HuggingFaceReader',
    'sources.masks': 'MaskedImages',
    'sources.shards': 'ShardReader',
    'transforms': 'DctTruncate TrainTransform',
    'truncation': 'TorchvisionDctTruncate',
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(f'{__name__}.{_MODULE_OF[name]}'), name)
