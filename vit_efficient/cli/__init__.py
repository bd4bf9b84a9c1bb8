"""The command line: `vit-efficient COMMAND …`. One module per command, imported only when it is called.

A command's module defines `add_arguments(parser)` and `run(args) -> int | None`. What a user can mend is a `UserError`
(or an `OSError`) and ends as one line on stderr and exit status 2; anything else is a bug and keeps its traceback.
"""

import importlib
import logging
import os
import sys
from collections.abc import Sequence

from vit_efficient.cli.parsing import Parser
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.packages import import_plugins

COMMANDS = {
    'train': 'train the model of a recipe',
    'evaluate': 'measure the accuracy of a trained model',
    'plot': 'draw the curves of runs',
    'leaves': "draw which leaf of Treeformer's trees each patch of an image falls into",
    'truncate': 'show an image, its truncations, and the energy they keep',
    'export': 'write a trained model as a graph, .onnx or .pt2, that runs without this package',
    'recipe': 'list the keys of recipes',
    'table': 'print tables: FLOPs of models, or FLOPs and accuracy of runs',
    'benchmark': 'time a mechanism against exact attention, in one run',
}


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = '--debug' in argv
    argv = [argument for argument in argv if argument != '--debug']
    plugins = []
    while argv[:1] == ['--plugin'] and len(argv) > 1:
        plugins.append(argv[1])
        argv = argv[2:]
    parser = Parser(prog='vit-efficient', description='Efficient attention for timm ViTs.')
    parser.add_argument('--debug', action='store_true', help='show the traceback of every error; anywhere in the line')
    parser.add_argument('--plugin', metavar='MODULE', help='a Python module that is imported first; before the command')
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if argv[:1] == [name]:  # only the command that runs pays for its imports
            module = importlib.import_module(f'vit_efficient.cli.{name}')
            module.add_arguments(command)
    args = parser.parse_args(argv)
    logger, lines = logging.getLogger('vit_efficient'), _Lines()
    logger.addHandler(lines)
    logger.setLevel(logging.INFO)
    try:
        import_plugins(plugins)
        status = module.run(args) or 0
        sys.stdout.flush()
        return status
    except (UserError, OSError, KeyboardInterrupt) as error:
        if debug:
            raise
        return _end(f'vit-efficient {args.command}', error)
    finally:
        logger.removeHandler(lines)


def is_first_process() -> bool:
    """Whether this is the process that prints, under torchrun."""
    return os.environ.get('RANK', '0') == '0'


def _end(command: str, error: UserError | OSError | KeyboardInterrupt) -> int:
    """The exit status, once what has to be said of an error is said."""
    if isinstance(error, KeyboardInterrupt):
        print(f'{command}: interrupted', file=sys.stderr)
        return 130  # as shells have it: 128 and the number of the signal
    if isinstance(error, BrokenPipeError) and _has_no_reader():
        return 141
    print(f'{command}: error: {" ".join(str(error).splitlines()) or type(error).__name__}', file=sys.stderr)
    return 2


def _has_no_reader() -> bool:
    """Whether stdout is a pipe that is closed at its other end, as `head` does. What is left of it is dropped."""
    try:
        print(flush=True)  # a pipe that is broken elsewhere leaves an empty line
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would flush it when it ends
        return True
    return False


class _Lines(logging.Handler):
    """Prints what the package has to say on stderr, in the first process, above the progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        if is_first_process():
            bars = sys.modules.get('tqdm')
            (bars.tqdm.write if bars else print)(self.format(record), file=sys.stderr)
