"""Evaluation of a saved model, as the recipe of its run says."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from vit_efficient import data
from vit_efficient.models import create_from_spec
from vit_efficient.train import Config, Evaluation, evaluate, load_model
from vit_efficient.train.distributed import processes
from vit_efficient.train.run_folder import RunFolder
from vit_efficient.train.tasks import Task
from vit_efficient.train.tiles import Tiled
from vit_efficient.utils.checks import multiples_around
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.options import parse_spec

logger = logging.getLogger(__name__)


class SavedModel:
    """A trained model, and what a recipe says of its images.

    Args:
        path: A run folder, or a model folder: one of a run, or any other, for which the recipe's defaults hold.
        config: A recipe instead of the run's.
        img_size: Height and width of the images, instead of those of training.

    Attributes:
        model: In evaluation mode.
        preprocessing: Of its images.

    Raises:
        UserError: If there is no such model.
    """

    def __init__(self, path: str | Path, config: Config | None = None, img_size: Sequence[int] | None = None):
        run = RunFolder.of_model(path)
        self.config = config or (run.config if run else Config())
        sizes = {}
        if img_size is not None:
            self.config.data.img_size, sizes = list(img_size), {'img_size': tuple(img_size)}
        self.model = load_model(path, **sizes).eval()
        self.preprocessing = data.Preprocessing.of(self.model, self.config.data)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """The shape of what the model takes, (C, H, W)."""
        return data.input_shape(self.model, self.preprocessing)

    def open_data(self, name: str) -> Dataset:
        """A folder of class folders, or of images and masks if the run had those; shards; or a split of the data set
        that the recipe names."""
        config = self.config.data
        options = {**config.args, **config.val_args}
        if config.dataset == 'masks':
            root = '' if Path(name).exists() else config.root
            return data.create_dataset(name, config.dataset, root, '--data', options)
        if not config.dataset or Path(name).is_dir():
            return data.create_dataset(name, key='--data', args=options if name.endswith('.tar') else None)
        return data.create_dataset(name, config.dataset, config.root, '--data', options)

    def open_image(self, name: str, folder: str | None = None) -> torch.Tensor:
        """An image as the model takes it, (C, H, W): a file or, with a data set as of `open_data`, a number in it."""
        if data.takes_coefficients(self.model):
            raise UserError('the model takes DCT coefficients of patches, and pictures are drawn on pixels')
        if folder is None:
            image = data.read_image(name)
        else:
            dataset = self.open_data(folder)
            if not name.isdecimal() or int(name) >= len(dataset):
                raise UserError(f'IMAGE must be a number from 0 to {len(dataset) - 1} with --data, got {name!r}')
            image = dataset[int(name)][0]
        channels = self.preprocessing.input_size[0]
        return data.EvalTransform(self.preprocessing)(data.to_array(image, channels), 0, 0)

    def as_seen(self, image: torch.Tensor) -> torch.Tensor:
        """What the model is given of an image, (C, H, W), in [0, 1]."""
        mean, std = (
            torch.tensor(values)[:, None, None] for values in (self.preprocessing.mean, self.preprocessing.std)
        )
        return image * std + mean

    def samples(self, dataset: Dataset, on_error: str, **options: Any) -> data.Samples:
        """The images of a data set as the model takes them."""
        decode = 'coefficients' if data.takes_coefficients(self.model) else self.config.data.decode
        inputs = data.eval_input(dataset, self.model, self.preprocessing, decode, data.has_masks(dataset))
        channels = self.preprocessing.input_size[0]
        return data.Samples(*inputs, channels, self.model.num_classes, on_error=on_error, **options)


def evaluate_saved(
    saved: SavedModel,
    split: str,
    batch_size: int | None = None,
    workers: int = 0,
    device: str = 'auto',
    amp: str = 'none',
    on_error: str = 'error',
    tile: int | None = None,
    overlap: float = 0.25,
    keep: Callable[[str, np.ndarray], None] | None = None,
) -> Evaluation:
    """Measures a saved model on labelled images, in this process or in those that torchrun has started.

    Args:
        saved: The model.
        split: As `SavedModel.open_data` takes it.
        batch_size: Images at once: by default 64, or of whole images with masks 1.
        workers, device, amp, on_error: As the keys of a recipe.
        tile, overlap: Of images with masks: as of `Tiled`; without a tile they are seen whole.
        keep: Of images with masks: called with the name of each and the class of each of its pixels, (H, W).

    Raises:
        UserError: If the data, their classes or the device do not fit the model.
    """
    config, model = saved.config, saved.model
    dataset = saved.open_data(split)
    classes = data.class_names(dataset)
    names = model.pretrained_cfg.get('label_names')
    labels = data.labels_among(names, classes, 'the model', split)
    if classes and not names:
        logger.warning(
            'the model does not name its %d classes: the first %d are taken for those of the data, %s … %s',
            *(model.num_classes, len(classes), classes[0], classes[-1]),
        )
    of_pixels = data.has_masks(dataset)
    task = Task.of(config.task, model, saved.preprocessing, names or classes, config.loss.patch_weight, of_pixels)
    with torch.no_grad():
        task.check_logits(model(torch.zeros(1, *saved.input_shape)))
    if tile is not None:
        if not of_pixels:
            raise UserError(f'{tile=}: tiles are for images with masks, which {split} has not')
        model = Tiled(model, task, tile, overlap)
    workers = data.limit_workers(workers, '--workers')
    check_target = task.check_target if task.of_patches else None
    samples = saved.samples(dataset, on_error, check_target=check_target, labels=labels)
    with processes(device) as team:
        sampler = data.EpochSampler(len(samples), shuffle=False, rank=team.rank, world_size=team.world_size, even=False)
        batch_size = batch_size or (1 if of_pixels else 64)
        loader = data.create_loader(samples, sampler, batch_size, workers, pin=team.device.type == 'cuda')
        named = keep and (lambda index, classes: keep(samples.filename(index), classes))
        return evaluate(model.to(team.device), loader, team, amp, task, keep=named)


def open_model(name: str, img_size: int) -> tuple[nn.Module, data.Preprocessing]:
    """A pretrained model for images of a size, and their preprocessing.

    Args:
        name: A name of timm, with options or without; or a run or model folder, after 'local-dir:' or not.
        img_size: Side of square images, in pixels.

    Raises:
        UserError: If there is no such model, its weights cannot be had, or its patches do not divide the images.
    """
    folder = name.removeprefix('local-dir:')
    if folder != name or Path(folder).is_dir() or '/' in name.partition(':')[0]:  # which no name of timm has
        saved = SavedModel(folder, img_size=(img_size, img_size))
        model, preprocessing = saved.model, saved.preprocessing
    else:
        name, options = parse_spec(name)
        model = create_from_spec(name, {'pretrained': True, **options}, img_size)
        preprocessing = data.Preprocessing.of(model)
        # Of a model that takes any size it says the model's own.
        preprocessing = replace(preprocessing, input_size=(preprocessing.input_size[0], img_size, img_size))
    if data.takes_coefficients(model):
        raise UserError(f'{name}: it takes DCT coefficients, and is to be given pixels')
    for side in getattr(getattr(model, 'patch_embed', None), 'patch_size', ()):
        if img_size % side:
            instead = multiples_around(img_size, side)
            raise UserError(f'{img_size=} is not a multiple of the patch size {side}; use {instead}')
    return model.eval(), preprocessing
