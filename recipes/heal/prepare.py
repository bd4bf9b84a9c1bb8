"""Writes photographs to heal by, and those by which choices are made, from two packages of Debian.

    python recipes/heal/prepare.py [DATA]        # DATA defaults to data/heal

They are the photographs of endless-sky-high-dpi, without those that validate recipes/cutouts, and of mate-backgrounds.
Every tenth of them by name is in DATA/choosing, the others are in DATA/train. A folder that is there is left alone.
Those that results are of are written by recipes/conversion/prepare.py. README.md names licences and sources.
"""

import argparse
import runpy
import sys
import tempfile
from pathlib import Path

_cutouts = runpy.run_path(str(Path(__file__).parents[1] / 'cutouts/prepare.py'))
_conversion = _cutouts['_conversion']
Unavailable = _cutouts['Unavailable']

MATE = _conversion['Source']('mate-backgrounds', 'usr/share/backgrounds/mate/nature/')
ONE_IN = 10  # photographs is for choosing


def read_photographs(archives: list[Path]) -> dict[str, bytes]:
    """Their files by name."""
    of_packages = [_conversion['_photographs'], lambda names: [name for name in names if name.endswith('.jpg')]]
    found = {}
    for source, choose in zip((_cutouts['PHOTOGRAPHS'], MATE), of_packages, strict=True):
        files = dict(source.files(archives))
        names = choose(sorted(files))
        if source is not MATE:
            names = _cutouts['split_photographs'](names)['train']
        if not names:
            raise Unavailable(f'{source.package} has none of its photographs any more')
        found |= {name: files[name] for name in names}
    return dict(sorted(found.items()))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data', nargs='?', type=Path, default=Path('data/heal'), metavar='DATA')
    about = 'folders of .deb files, where the packages are looked for first'
    parser.add_argument('--from', dest='given', nargs='+', type=Path, default=[], metavar='DIR', help=about)
    args = parser.parse_args(argv)
    for folder in args.given:
        if not folder.is_dir():
            parser.error(f'--from {folder}: no such folder')
    if args.data.exists():
        print(f'{args.data}: there')
        return 0
    try:
        args.data.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=args.data.parent, prefix=f'.{args.data.name}-') as folder:
            photographs = read_photographs([*args.given, Path(folder)])
            made = Path(folder) / args.data.name
            for split in ('train', 'choosing'):
                (made / split).mkdir(parents=True)
            for number, (name, content) in enumerate(photographs.items(), 1):
                (made / ('train' if number % ONE_IN else 'choosing') / name.replace('/', '-')).write_bytes(content)
            made.rename(args.data)
    except (OSError, Unavailable) as error:
        reason = f'cannot be written: {error.strerror or error}' if isinstance(error, OSError) else error
        print(f'{args.data}: {reason}', file=sys.stderr)
        return 2
    print(f'{args.data}: written')
    return 0


if __name__ == '__main__':
    sys.exit(main())
