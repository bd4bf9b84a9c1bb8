"""`vit-efficient table flops …` and `vit-efficient table accuracy …`."""

import argparse
import difflib
import sys
from pathlib import Path
from typing import Any

from vit_efficient.utils.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    tables = parser.add_subparsers(dest='table', required=True, metavar='TABLE')

    about = 'multiply-accumulates of models at several image sizes; nothing is executed'
    flops = tables.add_parser('flops', help=about, description=about)
    flops.add_argument(
        '--models',
        nargs='+',
        required=True,
        metavar='NAME[:KEY=VALUE,…]',
        help='names as in timm.create_model, and its further arguments, such as patch_embed=dct,patch_keep=8',
    )
    flops.add_argument(
        '--img-sizes', nargs='+', type=int, default=[224], metavar='PX', help='heights of square images (default: 224)'
    )
    flops.add_argument(
        '--attention-kwargs',
        nargs='+',
        default=[],
        metavar='KEY=VALUE',
        help='options of the attention, such as keep_ratio=1/16, for all models of this package but vit_full_*',
    )
    flops.add_argument('--format', choices=('markdown', 'csv', 'json'), default='markdown')
    flops.add_argument('--out', type=Path, metavar='FILE', help='write the table to this file')
    flops.set_defaults(make=flops_table)

    about = 'train the models of recipes, once for each seed, and compare accuracy, FLOPs and speed'
    accuracy = tables.add_parser(
        'accuracy',
        help=about,
        description=about,
        epilog='key=value, anywhere, overrides a key of all recipes',
        takes_overrides=True,
    )
    accuracy.add_argument('recipes', nargs='+', type=Path, metavar='RECIPE', help='the first one is compared against')
    accuracy.add_argument('--seeds', nargs='+', type=int, metavar='SEED', help="(default: each recipe's own)")
    accuracy.add_argument(
        '--runs',
        type=Path,
        metavar='DIR',
        help="the runs' parent folder (default: runs/ and the first recipe's folder)",
    )
    accuracy.add_argument('--out', type=Path, metavar='DIR', help='for results.md, .csv, .png (default: --runs)')
    accuracy.set_defaults(make=_accuracy_table)


def run(args: argparse.Namespace) -> int | None:
    return args.make(args)


def _accuracy_table(args: argparse.Namespace) -> int | None:
    from vit_efficient.report.accuracy import accuracy_table
    from vit_efficient.train import Interrupted

    try:
        print(accuracy_table(args.recipes, args.overrides, args.seeds, args.runs, args.out), end='')
    except Interrupted as stop:
        print(f'vit-efficient table: {stop}; the same command goes on', file=sys.stderr)
        return stop.exit_status
    return None


def flops_table(args: argparse.Namespace) -> None:
    from vit_efficient.attention.treeformer.tf import LeafAttention
    from vit_efficient.flops import ROLES, count_flops
    from vit_efficient.models.patch_embed import input_size
    from vit_efficient.report.table import Column, Table
    from vit_efficient.utils.files import write_text
    from vit_efficient.utils.options import parse_option, parse_spec

    options = dict(parse_option(text) for text in args.attention_kwargs)
    for size in args.img_sizes:
        if size < 1:
            raise UserError(f'--img-sizes must be at least 1, got {size}')
    models = [(spec, *parse_spec(spec)) for spec in args.models]
    for _, name, _ in models:
        _check_name(name)
    rows: list[dict[str, Any]] = []
    expected: list[str] = []  # models whose cost depends on the data
    for size in args.img_sizes:
        first = None
        for spec, name, arguments in models:
            model = _create_on_meta(name, size, options, arguments)
            try:
                count = count_flops(model, input_size(model, size))
            except ValueError as error:
                raise UserError(f'{spec} at {size} px: {error}') from error
            first = first or count.total
            expected += [spec] * any(isinstance(module, LeafAttention) for module in model.modules())
            rows.append(
                {
                    'model': spec,
                    'img_size': size,
                    'parameters_m': sum(p.numel() for p in model.parameters()) / 1e6,
                    'tokens': _tokens(model),
                    'gmacs': count.total / 1e9,
                    'ratio': count.total / first,
                    'attention_gmacs': count.attention / 1e9,
                    **{_role_key(role): macs / 1e9 for role, macs in count.by_role.items()},
                }
            )
    columns = [
        Column('model'),
        Column('img_size', 'px'),
        Column('parameters_m', 'parameters (M)', 2),
        Column('tokens'),
        Column('gmacs', 'GMACs', 3),
        Column('ratio', '÷ first', 3),
        Column('attention_gmacs', 'in attention', 3),
        *(Column(_role_key(role), role, 3) for role in ROLES),
    ]
    text = Table(columns, rows).render(args.format)
    if args.format == 'markdown' and expected:
        text += f'\nIn expectation, as if all leaves held as many patches: {", ".join(dict.fromkeys(expected))}.\n'
    print(text, end='')
    if args.out:
        write_text(args.out, text)


def _role_key(role: str) -> str:
    return f'{role.replace(" ", "_")}_gmacs'


def _check_name(name: str) -> None:
    import timm

    import vit_efficient  # noqa: F401 (registers its models)

    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise UserError(f'no model {name!r}' + (f'; did you mean {", ".join(near)}?' if near else ''))


def _create_on_meta(name: str, size: int, options: dict[str, Any], arguments: dict[str, Any]):
    """The model for images of one size, without data.

    Raises:
        UserError: If its patches do not divide the image, or it does not have the arguments or options.
    """
    import timm
    import torch

    kwargs = dict(arguments)
    ours = timm.models.model_entrypoint(name).__module__.startswith('vit_efficient.')
    if options and ours and not name.startswith('vit_full_'):  # exact attention has no options
        kwargs['attention_kwargs'] = options
    with torch.device('meta'):
        try:
            model = timm.create_model(name, img_size=size, **kwargs)
        except TypeError as error:
            if 'img_size' not in str(error):
                raise UserError(f'{name}: {error}') from error
            model = _create_at_any_size(name, kwargs)  # convolutional
        except AssertionError as error:
            raise UserError(f'{name} at {size} px: {error}') from error
    patch = getattr(getattr(model, 'patch_embed', None), 'patch_size', None)
    for side in patch if isinstance(patch, (tuple, list)) else ():
        if size % side:
            raise UserError(f'{name}: image size {size} is not a multiple of its patch size {side}')
    return model


def _create_at_any_size(name: str, kwargs: dict[str, Any]):
    import timm

    try:
        return timm.create_model(name, **kwargs)
    except TypeError as error:
        raise UserError(f'{name}: {error}') from error


def _tokens(model) -> int | None:
    """Tokens that a plain vision transformer works on; None for other models."""
    patches = getattr(getattr(model, 'patch_embed', None), 'num_patches', None)
    prefix = getattr(model, 'num_prefix_tokens', None)
    return None if patches is None or prefix is None else patches + prefix
