"""Arguments of commands: those that several have, and argparse, which names the nearest thing that it knows."""

import argparse
import difflib
import re
from pathlib import Path
from typing import NoReturn

FORMAT = dict(choices=('markdown', 'csv', 'json'), default='markdown')
DATA = dict(
    metavar='FOLDER',
    help="a folder of class folders, or a split of the data set that the run's recipe names, such as val",
)
MODELS = dict(
    nargs='+',
    required=True,
    metavar='NAME[:KEY=VALUE,…]',
    help='names as in timm.create_model; options of the attention, such as keep_ratio=1/16, and arguments of '
    'timm.create_model (patch_embed=dct); convert:NAME:ATTENTION[,KEY=VALUE,…] is one that is converted, '
    'in all blocks or those that layers=6-11 says; the first is what the others are compared to',
)
MODEL = 'run or model folder'  # what paths must be, in errors
RECIPE = '; `vit-efficient recipe list` shows those that come with the package'
IMG_SIZES = dict(nargs='+', type=int, default=[224], metavar='PX', help='sides of square images (default: 224)')


def nearest(name: str, known: list[str]) -> str:
    """'; did you mean …?' with the name that is nearest to one that is not known; empty if none is near."""
    close = difflib.get_close_matches(name, known, n=1)
    return f'; did you mean {close[0]}?' if close else ''


def check_exists(path: str | Path, what: str, way_out: str = '') -> None:
    """Raises FileNotFoundError for a path where nothing is, which commands do before they import what takes seconds."""
    path = Path(path)
    if not path.exists():
        beside = [str(path.parent / each.name) for each in path.parent.iterdir()] if path.parent.is_dir() else []
        raise FileNotFoundError(f'{path}: no such {what}{nearest(str(path), beside)}{way_out}')


class Parser(argparse.ArgumentParser):
    """A parser of a command, and of its subcommands.

    Args:
        takes_overrides: Take `key=value` wherever it stands, as `overrides`: argparse wants positional arguments
            together.
    """

    def __init__(self, *args, takes_overrides: bool = False, **kwargs):
        self.takes_overrides = takes_overrides
        self.options: list[str] = []
        self.has_commands = False
        super().__init__(*args, **kwargs)

    def add_argument(self, *args, **kwargs) -> argparse.Action:
        action = super().add_argument(*args, **kwargs)
        self.options += action.option_strings
        return action

    def add_subparsers(self, **kwargs):
        self.has_commands = True
        return super().add_subparsers(**kwargs)

    def parse_known_args(self, args=None, namespace=None):
        if not self.has_commands:
            self._check_options(args)
        overrides = [arg for arg in args if self.takes_overrides and re.match(r'[\w.]+=', arg)]
        namespace, extra = super().parse_known_args([arg for arg in args if arg not in overrides], namespace)
        if self.takes_overrides:
            namespace.overrides = overrides
        return namespace, extra

    def _check_options(self, args: list[str]) -> None:
        """Before argparse misses the required option that one of these was meant to be."""
        for arg in args[: args.index('--') if '--' in args else None]:
            option = arg.partition('=')[0]
            if option.startswith('--') and not any(known.startswith(option) for known in self.options):
                self.error(f'unknown option {option}{nearest(option, self.options)}')

    def error(self, message: str) -> NoReturn:
        if choice := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            given, known = choice.groups()
            message += nearest(given, [name.strip('\'"') for name in known.split(', ')])
        if re.search(r'arguments are required: recipe\b', message, re.IGNORECASE):
            message += RECIPE
        self.exit(2, f'{self.prog}: error: {message} (see {self.prog} --help)\n')
