"""`vit-efficient recipe keys`."""

import argparse
import json

from vit_efficient.cli.parsing import FORMAT
from vit_efficient.report.table import Column, Table
from vit_efficient.utils.checks import nearest
from vit_efficient.utils.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest='what', required=True, metavar='WHAT')
    about = 'list the keys of recipes: their types, defaults and ranges, and whether a run may go on with another value'
    keys = commands.add_parser('keys', help=about, description=about)
    keys.add_argument('--like', default='', metavar='WORD', help='those with this in their name or meaning')
    keys.add_argument('--format', **FORMAT)


def run(args: argparse.Namespace) -> None:
    from vit_efficient.train.config import describe_keys

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
