"""What a reader of timm's kind reads, as a data set."""

from pathlib import Path

import numpy as np
from PIL import Image
from timm.data.readers.reader import Reader
from torch.utils.data import Dataset

from vit_efficient.data.files.images import read_image
from vit_efficient.utils.errors import UserError


class ReaderImages(Dataset):
    """The images of a reader. (timm's ImageDataset hands out the next image in the place of a corrupt one.)

    Items are (image, label), the image as `read_image` gives it.

    Args:
        reader: By index, an open file and a label. It may know the names of its classes, and its groups of samples
            that lie together.
    """

    def __init__(self, reader: Reader):
        self.reader = reader
        self.loader = read_image
        labels = getattr(reader, 'class_to_idx', None) or getattr(reader, 'class_name_to_idx', None) or {}
        self.classes = getattr(reader, 'classes', None) or sorted(labels, key=labels.get)
        self.groups = getattr(reader, 'groups', None)
        self.root = getattr(reader, 'root', None) or ''

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Image.Image | np.ndarray, int]:
        try:
            file, label = self.reader[index][:2]
            with file:
                return self.loader(file), label
        except UserError as error:
            raise type(error)(f'{Path(self.root, self.filename(index))}: {error}') from error

    def filename(self, index: int) -> str:
        return str(self.reader.filename(index))

    def digest(self) -> str | None:
        """A hash of the names and the order of the samples, where the reader has one."""
        digest = getattr(self.reader, 'digest', None)
        return digest() if digest else None
