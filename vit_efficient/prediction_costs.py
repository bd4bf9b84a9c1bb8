"""What the masks of an image take, told before it is decoded: from two small images, and the sizes of this one."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vit_efficient.benchmark.live_memory import LiveMemory
from vit_efficient.benchmark.peak_memory import resident_of_its_own
from vit_efficient.data.files.frames import Frame, Windows
from vit_efficient.data.files.pixels import UnfitImage
from vit_efficient.train.masks import STRIP, padded_size

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
    size, and the mask.
    """

    def __init__(self, predictor: 'Predictor'):
        self.predictor = predictor
        self.resident = resident_of_its_own()
        patch = predictor.task.patch_size
        found = []
        for side in _SIDES:
            image = np.zeros((side * patch[0], side * patch[1], predictor.channels), np.uint8)
            start = time.perf_counter()
            with LiveMemory() as memory:
                logits = predictor.logits(Windows.of(image))
            found.append((side**2, memory.peak, time.perf_counter() - start))
        _, classes, height, width = logits.shape
        self.classes, self.fine = classes, height * width / found[1][0]
        self.forward, self.seconds = (Growth.through(*((row[0], row[i]) for row in found)) for i in (1, 2))

    def patches(self, size: tuple[int, int]) -> int:
        """Of an image of so many pixels."""
        sides = zip(padded_size(size, self.predictor.task.patch_size), self.predictor.task.patch_size, strict=True)
        return int(np.prod([side // step for side, step in sides]))

    def bytes(self, frame: Frame, tile: int | None, windows: bool) -> int:
        """At most, while the mask of an image is made: whole, or by tiles.

        Args:
            frame: Of the image.
            tile: Side in pixels.
            windows: Whether parts of the image are read, and it is never there as a whole.
        """
        pixels = frame.height * frame.width
        decoded = 0 if windows else 2 * pixels * frame.channels * frame.itemsize
        seen = (frame.height, frame.width) if tile is None else (min(frame.height, tile), min(frame.width, tile))
        logits = 4 * self.classes * self.fine * self.patches(frame.size)
        strip = 4 * 4 * min(STRIP, self.classes * pixels)
        forward = self.forward(self.patches(seen)) + (2 * logits if tile else 0)
        masks = 3 * pixels * (1 if self.classes <= 256 else 2)
        return round(self.resident + _MARGIN * (decoded + max(forward, logits + strip) + masks))

    def largest_tile(self, frame: Frame, windows: bool, limit: int) -> int | None:
        """The side in pixels of the largest tile with which an image stays within so many bytes; None if none does."""
        step = int(np.lcm(*self.predictor.task.patch_size))
        fitting, count = None, max(frame.height, frame.width) // step
        while count >= 4:
            if self.bytes(frame, count * step, windows) <= limit:
                fitting = count * step
                break
            count = count * 7 // 8
        return fitting

    def tile_within(self, path: Path, frame: Frame, tile: int | str | None, windows: bool, limit: int) -> int | None:
        """The tile that is asked for, or, of `auto`, the one to take; None for the whole image.

        Raises:
            UnfitImage: If that takes more than the limit; it names the tile that does not.
        """
        asked = None if tile == 'auto' else tile
        needed = self.bytes(frame, asked, windows and asked is not None)
        if needed <= limit:
            return asked
        largest = self.largest_tile(frame, windows, limit)
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
