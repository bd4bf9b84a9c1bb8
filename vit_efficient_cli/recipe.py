"""`vit-efficient recipe list|show|copy|keys`."""

import argparse
import json
from pathlib import Path

from vit_efficient_cli.parsing import FORMAT, nearest
from vit_efficient_cli.shipped import find_shipped, list_shipped, needed_by, shipped_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest='what', required=True, metavar='WHAT')

    about = 'list the recipes that come with the package, and the scripts beside them'
    listing = commands.add_parser('list', help=about, description=about)
    listing.add_argument('folder', nargs='?', default='', help='those of a folder (default: the outermost ones)')
    listing.set_defaults(call=_list)

    about = 'print a recipe'
    show = commands.add_parser('show', help=about, description=about)
    show.add_argument('name', metavar='RECIPE', help='as `recipe list` has it, such as images or mnist5k/dct')
    show.set_defaults(call=_show)

    about = 'copy recipes, with those that they extend, or folders of them'
    copy = commands.add_parser('copy', help=about, description=about)
    copy.add_argument('names', nargs='+', metavar='RECIPE', help='as `recipe list` has it, such as images or mnist5k')
    folder = 'that they are copied to (default: recipes); where a file is there and differs, nothing is copied'
    copy.add_argument('--to', type=Path, default=Path('recipes'), metavar='FOLDER', help=folder)
    copy.set_defaults(call=_copy)

    about = 'list the keys of recipes: their types, defaults and ranges, and whether a run may go on with another value'
    keys = commands.add_parser('keys', help=about, description=about)
    keys.add_argument('--like', default='', metavar='WORD', help='those with this in their name or meaning')
    keys.add_argument('--format', **FORMAT)
    keys.set_defaults(call=_keys)


def run(args: argparse.Namespace) -> None:
    args.call(args)


def _list(args: argparse.Namespace) -> None:
    for name, about in list_shipped(args.folder):
        print(f'{name:<32} {about}')


def _show(args: argparse.Namespace) -> None:
    path = find_shipped(args.name)
    if path.is_dir():
        raise FileNotFoundError(f'{args.name} is a folder of recipes; `vit-efficient recipe list {args.name}` has them')
    print(path.read_text(encoding='utf-8'), end='')


def _copy(args: argparse.Namespace) -> None:
    paths = [path for name in args.names for path in needed_by(find_shipped(name))]
    copies = {path: args.to / path.relative_to(shipped_folder()) for path in paths}
    for path, copy in copies.items():
        if copy.exists() and copy.read_bytes() != path.read_bytes():
            raise FileExistsError(f'{copy} is there and differs; remove it, or name another folder by --to')
    for path, copy in copies.items():
        try:
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
        except OSError as error:
            raise OSError(f'{copy} cannot be written: {error.strerror}; name another folder by --to') from error
        print(copy)


def _keys(args: argparse.Namespace) -> None:
    from vit_efficient.report.table import Column, Table
    from vit_efficient.train.config import describe_keys
    from vit_efficient.utils.errors import UserError

    word, known = args.like.lower(), describe_keys()
    rows = [row for row in known if word in row['key'].lower() or word in row['help'].lower()]
    if not rows:
        near = nearest(word, [row['key'] for row in known])
        raise UserError(f'no key has {args.like!r} in its name or meaning{near}')
    if args.format != 'json':  # as a recipe has it
        rows = [row | {'default': json.dumps(row['default'], ensure_ascii=False)} for row in rows]
    columns = ['key', 'type', 'default', 'range', Column('resume', 'may change on resumption')]
    columns.append(Column('help', 'meaning'))
    print(Table(columns, rows).render(args.format), end='')
