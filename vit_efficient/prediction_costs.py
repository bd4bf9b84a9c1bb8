"""What the masks of an image take, told before it is decoded: from two small images, and the sizes of this one."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from vit_efficient.benchmark.live_memory import LiveMemory
from vit_efficient.benchmark.peak_memory import resident_of_its_own
from vit_efficient.data.files.frames import Frame, Windows
from vit_efficient.data.files.pixels import UnfitImage
from vit_efficient.train.masks import STRIP, padded_size
from vit_efficient.utils.errors import UserError, first_line, is_own

if TYPE_CHECKING:
    from vit_efficient.prediction import Predictor

_SIDES = 32, 64  # in patches, of the two images
_MARGIN = 1.2  # for what kernels take within themselves, and what allocators do not give back
_GIB = 2**30


@dataclass(frozen=True)
class Growth:
    """A quantity that grows with the number of patches, and with its square."""

    linear: float
    square: float

    @classmethod
    def through(cls, small: tuple[int, float], large: tuple[int, float]) -> 'Growth':
        """The one that is so much for so many patches, and so much for more; neither part is negative."""
        (n, a), (m, b) = small, large
        square = max(0.0, (b / m - a / n) / (m - n))
        linear = max(a / n, b / m) if square == 0 else max(0.0, a / n - square * n)
        return cls(linear, square)

    def __call__(self, patches: int) -> float:
        return patches * (self.linear + self.square * patches)


class Costs:
    """Seconds and bytes of the images of a predictor, which sees two blank ones to know.

    Bytes are of the whole process, but for the code of libraries: what it has taken so far, the image as it is decoded,
    the float32 image and the features on the way to the logits, the logits of the whole image, a strip of them at full
    size, the mask, and the overlay if there is one. On a GPU they are of its memory, where neither decoded images nor
    masks are.

    Raises:
        UserError: If the model does not take images of any size.
    """

    def __init__(self, predictor: 'Predictor', overlays: bool = False):
        self.predictor, self.overlays = predictor, overlays
        self.on_gpu = predictor.device.type == 'cuda'
        self.resident = torch.cuda.memory_allocated(predictor.device) if self.on_gpu else resident_of_its_own()
        patch = predictor.task.patch_size
        found = []
        for side in np.repeat(_SIDES, 2).tolist():  # the first of each fills what is kept, such as bases of transforms
            image = np.zeros((side * patch[0], side * patch[1], predictor.channels), np.uint8)
            start = time.perf_counter()
            try:
                with LiveMemory() as memory:
                    logits = predictor.logits(Windows.of(image)).cpu()
            except Exception as error:  # models check what they are given in all ways, or not at all
                if is_own(error):
                    raise
                raise UserError(
                    f'what an image takes is told by images of {image.shape[0]} × {image.shape[1]} px, which the model '
                    f'does not take ({first_line(error)}); train it with model.args.dynamic_img_size=true'
                ) from error
            found.append((side**2, memory.peak, time.perf_counter() - start))
        _, classes, height, width = logits.shape
        self.classes, self.fine = classes, height * width / found[-1][0]
        self.forward, self.seconds = (Growth.through(*((row[0], row[i]) for row in found[1::2])) for i in (1, 2))

    def patches(self, size: tuple[int, int]) -> int:
        """Of an image of so many pixels."""
        sides = zip(padded_size(size, self.predictor.task.patch_size), self.predictor.task.patch_size, strict=True)
        return int(np.prod([side // step for side, step in sides]))

    def bytes(self, frame: Frame, tile: int | None, held: int | None = None) -> int:
        """At most, while the mask of an image is made: whole, or by tiles.

        Args:
            frame: Of the image.
            tile: Side in pixels.
            held: Of the image while its parts are read, as of `Windows`; None: it is there as a whole.
        """
        pixels = frame.height * frame.width
        decoded = 2 * pixels * frame.channels * frame.itemsize if held is None else held
        seen = (frame.height, frame.width) if tile is None else (min(frame.height, tile), min(frame.width, tile))
        logits = 4 * self.classes * self.fine * self.patches(frame.size)
        strip = 4 * 4 * min(STRIP, self.classes * pixels)
        forward = self.forward(self.patches(seen)) + (2 * logits if tile else 0)
        masks = 3 * pixels * (1 if self.classes <= 256 else 2) + 6 * pixels * self.overlays
        beside = 0 if self.on_gpu else decoded + masks
        return round(self.resident + _MARGIN * (beside + max(forward, logits + strip)))

    def largest_tile(self, frame: Frame, held: int | None, limit: int) -> int | None:
        """The side in pixels of the largest tile with which an image stays within so many bytes; None if none does."""
        step = int(np.lcm(*self.predictor.task.patch_size))
        fitting, count = None, max(frame.height, frame.width) // step
        while count >= 4:
            if self.bytes(frame, count * step, held) <= limit:
                fitting = count * step
                break
            count = count * 7 // 8
        return fitting

    def tile_within(self, path: Path, frame: Frame, tile: int | str | None, held: int | None, limit: int) -> int | None:
        """The tile that is asked for, or, of `auto`, the one to take; None for the whole image.

        Raises:
            UnfitImage: If that takes more than the limit; it names the tile that does not.
        """
        asked = None if tile == 'auto' else tile
        needed = self.bytes(frame, asked, None if asked is None else held)
        if needed <= limit:
            return asked
        largest = self.largest_tile(frame, held, limit)
        if tile == 'auto' and largest:
            return largest
        how = 'whole' if asked is None else f'by tiles of {asked} px'
        way = f'--tile {largest} stays within it' if largest else 'no tile stays within it'
        raise UnfitImage(
            f'{path}: {frame.width} × {frame.height} px {how} take about {needed / _GIB:.2f} GiB of memory, and '
            f'--memory is {limit / _GIB:.2f} GiB; {way}'
        )


def duration(seconds: float) -> str:
    """In the unit that suits it: '40 s', '25 min', '3.1 h'."""
    if seconds < 90:
        return f'{seconds:.0f} s'
    return f'{seconds / 60:.0f} min' if seconds < 5400 else f'{seconds / 3600:.1f} h'
