"""What is used of dependencies beyond their public names: here they can break, and only here."""

import tarfile
from collections.abc import Iterator
from typing import Any

from PIL import Image
from torch import nn

_TAR_BLOCK = 512  # bytes


def model_args(model: nn.Module) -> dict[str, Any]:
    """A copy of the arguments that timm recorded when it built a model, none being left out."""
    return dict(getattr(model, '_model_args', {}))


def pil_decoder_arguments(image: Image.Image) -> tuple[Any, ...]:
    """What PIL hands to the decoder of an image that it has opened and not yet loaded; empty if that is no tuple."""
    args = image.tile[0][3] if image.tile else ()
    return args if isinstance(args, tuple) else ()


def tar_members(path: str) -> Iterator[tarfile.TarInfo]:
    """The members of an uncompressed tar file, of which none is held in memory.

    Raises:
        OSError, tarfile.TarError: If the file cannot be read, or is damaged or cut off between its members too, which
            tarfile takes for its end.
    """
    with tarfile.open(path, 'r:') as archive:
        for member in archive:
            yield member
            archive.members = []
        # tarfile takes a damaged header for the end, which is an empty block.
        archive.fileobj.seek(archive.offset)
        if archive.fileobj.read(_TAR_BLOCK) != bytes(_TAR_BLOCK):
            raise tarfile.ReadError(f'damaged or cut off at byte {archive.offset}')
