"""Writes images with exact masks: photographic cut-outs of animals, vehicles, flowers, fruit, … pasted on photographs.

    python recipes/cutouts/prepare.py [DATA] [--size 504]    # DATA defaults to data/cutouts/504, by the size

DATA/{train,val}/images and /masks are what `data.dataset=masks` reads; DATA/{train,val}/objects.csv has a line for each
object. Everything in an image follows from (seed, split, index, size). Cut-outs and photographs are of two Debian
packages, fetched by apt-get, or lie in folders that are named. README.md says what is made, and names licences. A tree
that is complete is left alone.
"""

import argparse
import csv
import io
import json
import runpy
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from vit_efficient.data.files.mask_files import write_mask

_conversion = runpy.run_path(str(Path(__file__).parents[1] / 'conversion/prepare.py'))
Source, Unavailable = _conversion['Source'], _conversion['Unavailable']

STAMPS = Source('tuxpaint-stamps-default', 'usr/share/tuxpaint/stamps/')
PHOTOGRAPHS = Source('endless-sky-high-dpi', _conversion['_SKY'])
SPLITS = ('train', 'val')
NONE = 'none'  # the class of pixels that no object covers

# Photographs among the stamps whose longer side, cut to what is opaque, has 120 pixels or more: no drawings, no mirror
# images. A + joins those that show the same subject, which go to the same split.
CUTOUTS = {
    'mammal': """
        chimp gorilla tamarin_emperor dolphin orca otter sea_lion whale badger bear european-bear bison bull cow
        cow_white gnu-baby+gnu-baby-stand gnu-sitting gnu-stand goat indian_blackbuck mountaingoat ram sheep sheep_lamb
        yak zebu camel dromedary lion+lion-2 tiger tiger_sumatran caribou deer doe wapiti dog fox elephant donkey
        donkey_eating horse zebra ferret giraffe hippopotamus pig pig_golden+pig_golden2 rabbit_little rhino_black
        beaver capybara marmot mouse rabbit rabbit-2 rat squirrel wildboar koala wombat
    """,
    'bird': """
        albino_peahen blackbird chicken_profile crow crowned_crane cuckoo drake duck gander guineafowl
        helmeted_guineafowl hen heron_greatblue+heron_greatblue_flying lark little-penguin magellanic_penguin nandou
        ostrich owl peacock pelican penguin pigeon pink_flamingo quetzal rainbow-lorikeet rooster seagull tucan turkey
        vulture
    """,
    'vehicle': """
        sedan sportscar2 truck dumper firetruck balloon360 747 garbagetruck green_korean_bus indycar chineseJunk
        walnutBoat bradley f22_raptor infantry-stryker ww2_german_gun
    """,
    'flower': """
        adeenia anemone_red anthoorium plants/flowers/daffodil flower1 flower2 flower3 flower4 flower5 flower6 flower7
        flower8 flower9 flower10 iris marigold red-gazania rose whitestar-petunia
    """,
    'fruit': """
        Apricot_whole apricot Cherry_Stella Strawberry2 avocado cherimoya kiwi orange_seville corn broccoli ginger
        rambutan
    """,
    'other': """
        frog frog-1 bluegroper butterflyfish coraltrout dolphinfish lionfish lobster seahorse stripedfish Brown_slug
        Woodlouse grasshopper hornet hoverfly mantis xanthia cep+cep-1+cep-2 binoculars camera_35mm trumpet
        cymbal_crash drum_tomtom_floor+drumkit cello violin guitar2+guitar_classical+guitar_electric bassoon Lightbulb
        cylinder home_compost_bin toilet cementmixer hammer plyers saw toolbox wheelie_bin stethoscope grannysmith
        Mince_Pie Roast_turkey Christmas_pudding German_Christmas_toy inukshuk-photo traffic_cone usps_mailbox
    """,
}
CLASSES = (NONE, *CUTOUTS)

LEAST, MOST = 16, 400  # px, of the longer side of an object
OBJECTS = (4, 9)  # on an area of 504 × 504 px
_UNIT = 504
_TRIES = 30  # to find room for an object, before it is halved
_VAL_SHARE, _VAL_LEAST = 0.25, 5  # of the cut-outs of a class
_VAL_PHOTOGRAPHS = 1 / 5


@dataclass(frozen=True)
class PlacedObject:
    """An object in an image: its box in pixels, and how many of them its mask has."""

    image: str
    label: str
    cutout: str
    top: int
    left: int
    height: int
    width: int
    pixels: int


class Material:
    """Cut-outs by class, and photographs, of the two splits.

    Args:
        stamps: RGBA images of the stamps, by their path without the ending.
        photographs: Files of images, by name.
    """

    def __init__(self, stamps: dict[str, Image.Image], photographs: dict[str, bytes]):
        self.cutouts = {split: {} for split in SPLITS}
        for label, names in CUTOUTS.items():
            groups = [[_cut(stamps, name) for name in group.split('+')] for group in names.split()]
            order = np.random.default_rng(0).permutation(len(groups))
            wanted = max(_VAL_LEAST, round(_VAL_SHARE * sum(map(len, groups))))
            val = _first(order, [len(group) for group in groups], wanted)
            for split in SPLITS:
                chosen = [i for i in range(len(groups)) if (i in val) == (split == 'val')]
                self.cutouts[split][label] = [cutout for i in chosen for cutout in groups[i]]
        of_splits = split_photographs(photographs)
        self.photographs = {split: [photographs[name] for name in names] for split, names in of_splits.items()}


def split_photographs(names: Iterable[str]) -> dict[str, list[str]]:
    """Which photographs each split is put on."""
    every = sorted(names)
    order = np.random.default_rng(0).permutation(len(every))
    val = set(order[: round(_VAL_PHOTOGRAPHS * len(every))].tolist())
    return {split: [name for i, name in enumerate(every) if (i in val) == (split == 'val')] for split in SPLITS}


def _first(order: np.ndarray, sizes: list[int], wanted: int) -> set[int]:
    """The first groups of an order that together have as many as are wanted."""
    chosen, total = set(), 0
    for i in order.tolist():
        if total >= wanted:
            break
        chosen.add(i)
        total += sizes[i]
    return chosen


def _cut(stamps: dict[str, Image.Image], name: str) -> tuple[str, Image.Image]:
    """A stamp without its transparent margins, its colours multiplied by its opacity (mode RGBa)."""
    found = [path for path in stamps if path == name or path.endswith(f'/{name}')]
    if len(found) != 1:
        raise Unavailable(f'{STAMPS.package} has {len(found)} stamps {name}.png, where one is meant')
    image = stamps[found[0]]
    image = image.crop(image.getchannel('A').point(lambda opacity: 255 * (opacity >= 128)).getbbox())
    return Path(name).name, image.convert('RGBa')


def draw(
    material: Material, seed: int, split: str, index: int, size: int
) -> tuple[Image.Image, Image.Image, list[PlacedObject]]:
    """An image of size × size px, its mask and its objects."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index, size])
    canvas, mask = _background(rng, material.photographs[split], size), Image.new('L', (size, size))
    scale = (size / _UNIT) ** 2
    count = int(rng.integers(round(OBJECTS[0] * scale), round(OBJECTS[1] * scale), endpoint=True))
    drawn = []
    for _ in range(max(count, 1)):
        label = str(rng.choice(list(CUTOUTS)))
        of_class = material.cutouts[split][label]
        name, cutout = of_class[rng.integers(len(of_class))]
        length = np.exp(rng.uniform(np.log(LEAST), np.log(MOST)))
        drawn.append((min(length, *(max(cutout.size), 0.8 * size)), label, name, cutout))
    boxes = np.zeros((0, 4), int)
    objects = []
    for length, label, name, cutout in sorted(drawn, key=lambda item: -item[0]):
        for sides in _halved(cutout.size, length):
            place = _place(rng, boxes, sides, size)
            if place:
                break
        else:
            continue  # there is no room, not even for a small one
        left, top = place
        boxes = np.concatenate([boxes, [[left, top, left + sides[0], top + sides[1]]]])
        shown = cutout.resize(sides, Image.Resampling.LANCZOS).convert('RGBA')
        if rng.random() < 0.5:
            shown = shown.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        gain = float(rng.uniform(0.8, 1.2))
        opacity = shown.getchannel('A')
        lit = shown.convert('RGB').point(lambda level, gain=gain: min(255, round(gain * level)))
        canvas.paste(lit, place, opacity)
        opaque = opacity.point(lambda level: 255 * (level >= 128)).convert('1')
        mask.paste(CLASSES.index(label), place, opaque)
        pixels = int(np.asarray(opaque).sum())
        objects.append(PlacedObject(_stem(index), label, name, top, left, sides[1], sides[0], pixels))
    return canvas, mask, objects


def _stem(index: int) -> str:
    return f'{index:05d}'


def _halved(whole: tuple[int, int], length: float) -> Iterator[tuple[int, int]]:
    """Width and height of an object whose longer side has that length, and half of it, and so on."""
    while length >= LEAST:
        yield tuple(max(1, round(side * length / max(whole))) for side in whole)
        length /= 2


def _place(rng: np.random.Generator, boxes: np.ndarray, sides: tuple[int, int], size: int) -> tuple[int, int] | None:
    """The left upper corner of a box that touches no other, if a few draws find one."""
    width, height = sides
    for _ in range(_TRIES):
        left, top = int(rng.integers(size - width + 1)), int(rng.integers(size - height + 1))
        apart = (boxes[:, 0] > left + width) | (boxes[:, 2] < left) | (boxes[:, 1] > top + height) | (boxes[:, 3] < top)
        if apart.all():
            return left, top
    return None


def _background(rng: np.random.Generator, photographs: list[bytes], size: int) -> Image.Image:
    """A part of a photograph at its own resolution; or, of what is larger than photographs, several side by side."""
    canvas, top = Image.new('RGB', (size, size)), 0
    while top < size:
        left, heights = 0, []
        while left < size:
            photograph = Image.open(io.BytesIO(photographs[rng.integers(len(photographs))])).convert('RGB')
            width, height = (min(a, b) for a, b in zip(photograph.size, (size - left, size - top), strict=True))
            x, y = rng.integers(photograph.width - width + 1), rng.integers(photograph.height - height + 1)
            part = photograph.crop((x, y, x + width, y + height))
            if rng.random() < 0.5:
                part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            canvas.paste(part, (left, top))
            left += width
            heights.append(height)
        top += min(heights)
    return canvas


def write_split(material: Material, root: Path, seed: int, split: str, count: int, size: int) -> None:
    images, masks = (root / split / name for name in ('images', 'masks'))
    images.mkdir(parents=True)
    masks.mkdir()
    objects = []
    for index in tqdm(range(count), split, disable=None):
        canvas, mask, placed = draw(material, seed, split, index, size)
        canvas.save(images / f'{_stem(index)}.png', compress_level=3)
        write_mask(masks / f'{_stem(index)}.png', np.asarray(mask))
        objects += placed
    with open(root / split / 'objects.csv', 'w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, [field.name for field in fields(PlacedObject)], lineterminator='\n')
        writer.writeheader()
        writer.writerows(map(asdict, objects))


def read_material(archives: list[Path], stamps: Path | None, photographs: Path | None) -> Material:
    """Of the packages, or of folders as these have them."""
    of_stamps = _files(stamps) if stamps else STAMPS.files(archives)
    of_photographs = _files(photographs) if photographs else PHOTOGRAPHS.files(archives)
    wanted = {Path(name).name for names in CUTOUTS.values() for name in names.replace('+', ' ').split()}
    cutouts = {
        name.removesuffix('.png'): Image.open(io.BytesIO(content)).convert('RGBA')
        for name, content in of_stamps
        if name.endswith('.png') and Path(name).stem in wanted and 'cartoon' not in name
    }
    scenes = {name: content for name, content in of_photographs if name.endswith('.jpg')}
    if not scenes:
        raise Unavailable(f'{photographs or PHOTOGRAPHS.package} has no photograph, .jpg')
    return Material(cutouts, scenes)


def _files(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.rglob('*')):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path.read_bytes()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data', nargs='?', type=Path, metavar='DATA')
    parser.add_argument('--size', type=int, default=504, help='px of a side, 64 to 4096 (default: %(default)s)')
    parser.add_argument('--train', type=int, default=500, metavar='COUNT', help='images (default: %(default)s)')
    parser.add_argument('--val', type=int, default=200, metavar='COUNT', help='images (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='of all draws (default: %(default)s)')
    about = 'folders of .deb files, where the packages are looked for first'
    parser.add_argument('--from', dest='given', nargs='+', type=Path, default=[], metavar='DIR', help=about)
    parser.add_argument('--stamps', type=Path, metavar='DIR', help=f'the folder {STAMPS.folder}, unpacked')
    about = 'a folder of photographs, .jpg, instead of those of the package'
    parser.add_argument('--photographs', type=Path, metavar='DIR', help=about)
    args = parser.parse_args(argv)
    for folder in [*args.given, *filter(None, (args.stamps, args.photographs))]:
        if not folder.is_dir():
            parser.error(f'{folder}: no such folder')
    if not 64 <= args.size <= 4096 or min(args.train, args.val, args.seed) < 0:
        parser.error('--size must be from 64 to 4096, the other numbers at least 0')
    root = args.data or Path('data/cutouts') / str(args.size)
    settings = {'size': args.size, 'train': args.train, 'val': args.val, 'seed': args.seed}
    settings |= {'stamps': str(args.stamps or STAMPS.package)}
    settings |= {'photographs': str(args.photographs or PHOTOGRAPHS.package)}
    said = root / 'settings.json'
    try:
        if root.exists():
            if not said.is_file() or json.loads(said.read_text()) != settings:
                raise Unavailable('holds something else; name another folder')
            print(f'{root}: complete')
            return 0
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root.parent, prefix=f'.{root.name}-') as folder:
            material = read_material([*args.given, Path(folder)], args.stamps, args.photographs)
            made = Path(folder) / root.name
            for split in SPLITS:
                write_split(material, made, args.seed, split, settings[split], args.size)
            (made / said.name).write_text(json.dumps(settings) + '\n')
            made.rename(root)
    except (OSError, ValueError, Unavailable) as error:
        reason = f'cannot be written: {error.strerror or error}' if isinstance(error, OSError) else error
        print(f'{root}: {reason}', file=sys.stderr)
        return 2
    print(f'{root}: written')
    return 0


if __name__ == '__main__':
    sys.exit(main())
