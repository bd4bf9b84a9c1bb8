"""The command line: `vit-efficient COMMAND …`. One module per command, imported only when it is called.

A command's module defines `add_arguments(parser)` and `run(args) -> int | None`. What a user can get wrong is a
`ValueError` (or an `OSError`) and ends as one line on stderr and exit status 2; anything else is a bug and keeps its
traceback.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    'train': 'train the model of a recipe',
    'evaluate': 'measure the accuracy of a trained model',
    'plot': 'draw the curves of runs',
    'leaves': "draw which leaf of Treeformer's trees each patch of an image falls into",
    'truncate': 'show an image, its truncations, and the energy they keep',
    'export': 'write a trained model as a graph, .onnx or .pt2, that runs without this package',
    'table': 'print tables: FLOPs of models, or FLOPs and accuracy of runs',
    'benchmark': 'time a mechanism against exact attention, in one run',
}


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog='vit-efficient', description='Efficient attention for timm ViTs.')
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if argv[:1] == [name]:  # only the command that runs pays for its imports
            module = importlib.import_module(f'vit_efficient.cli.{name}')
            module.add_arguments(command)
    args = parser.parse_args(argv)
    try:
        return module.run(args) or 0
    except (ValueError, OSError) as error:
        print(f'vit-efficient {args.command}: error: {error}', file=sys.stderr)
        return 2
