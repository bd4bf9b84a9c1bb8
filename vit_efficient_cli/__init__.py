"""The command line: `vit-efficient COMMAND …`. One module per command, imported only when it is called.

It is a package of its own because importing `vit_efficient` registers models with timm, which takes seconds: help,
slips and missing files are answered before. A command's module defines `add_arguments(parser)` and
`run(args) -> int | None`, which imports what it calls. What a user can mend is a `UserError` (or an `OSError`) and ends
as one line on stderr and exit status 2; anything else is a bug and keeps its traceback.
"""

import argparse
import importlib
import io
import logging
import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from vit_efficient_cli.parsing import Parser

COMMANDS = {
    'train': 'train the model of a recipe',
    'heal': 'give a converted model back the features that it has lost, from images without labels',
    'evaluate': 'measure the accuracy of a trained model',
    'predict': 'write masks of images of any size by a trained model of segmentation',
    'features': 'draw the features that models have of an image: components as colours, and what is like one patch',
    'plan': 'find which attention each layer of a pretrained model can have within a budget, without training',
    'prune': 'set the weights of a trained model that matter least to 0, and print how many are left where',
    'plot': 'draw the curves of runs',
    'leaves': "draw which leaf of Treeformer's trees each patch of an image falls into",
    'attention-map': 'draw where the pooling of a model looks in an image, or its class token',
    'truncate': 'show an image, its truncations, and the energy they keep',
    'export': 'write a trained model as a graph, .onnx or .pt2, that runs without this package',
    'recipe': 'list, show and copy the recipes that come with the package, and list the keys of recipes',
    'table': 'print tables: FLOPs of models, or FLOPs and accuracy of runs',
    'benchmark': 'time a mechanism against exact attention, in one run',
}


def main(argv: Sequence[str] | None = None) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):  # else a name, or a sign, that it does not have would end the command
        sys.stdout.reconfigure(errors='backslashreplace')
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = '--debug' in argv
    argv = [argument for argument in argv if argument != '--debug']
    plugins = []
    while argv[:1] == ['--plugin'] and len(argv) > 1:
        plugins.append(argv[1])
        argv = argv[2:]
    about = 'Efficient attention for timm ViTs.'
    parser = Parser(prog='vit-efficient', description=about, allow_abbrev=False)
    parser.add_argument('--version', action=_Version, nargs=0, help='show the version, and those of PyTorch and timm')
    parser.add_argument('--debug', action='store_true', help='show the traceback of every error; anywhere in the line')
    parser.add_argument('--plugin', metavar='MODULE', help='a Python module that is imported first; before the command')
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if argv[:1] == [name]:
            module = importlib.import_module(f'vit_efficient_cli.{name.replace("-", "_")}')
            module.add_arguments(command)
    args = parser.parse_args(argv)
    if args.command != 'benchmark':  # which times what PyTorch does by itself
        _share_cores()
    logger, lines = logging.getLogger('vit_efficient'), _Lines()
    logger.addHandler(lines)
    logger.setLevel(logging.INFO)
    try:
        if plugins:
            from vit_efficient.utils.packages import import_plugins

            import_plugins(plugins)
        status = module.run(args) or 0
        sys.stdout.flush()
        return status
    except (*_user_errors(), OSError, KeyboardInterrupt) as error:
        if debug:
            raise
        return _end(f'vit-efficient {args.command}', error)
    finally:
        logger.removeHandler(lines)


def is_first_process() -> bool:
    """Whether this is the process that prints, under torchrun."""
    return os.environ.get('RANK', '0') == '0'


def _share_cores() -> None:
    """Has threads of OpenMP that wait for each other sleep after a moment: by turning they would take the core that
    another process has, and those who they wait for wait for it. It counts where PyTorch is not imported yet."""
    if 'OMP_WAIT_POLICY' not in os.environ:
        os.environ.setdefault('GOMP_SPINCOUNT', '1000')


class _Version(argparse.Action):
    """Prints what a report of a bug should name."""

    def __call__(self, parser, *args, **kwargs):
        versions = []
        for package in ('vit-efficient', 'torch', 'timm'):
            try:
                versions.append(f'{package} {version(package)}')
            except PackageNotFoundError:
                versions.append(f'{package} (not installed)')
        print(', '.join(versions))
        parser.exit()


def _user_errors() -> list[type[Exception]]:
    """The class of errors that a user can mend, once the package is imported, which alone raises them."""
    errors = sys.modules.get('vit_efficient.utils.errors')
    return [errors.UserError] if errors else []


def _end(command: str, error: BaseException) -> int:
    """The exit status, once what has to be said of an error is said."""
    if isinstance(error, KeyboardInterrupt):
        print(f'{command}: interrupted', file=sys.stderr)
        return 130  # as shells have it: 128 and the number of the signal
    if isinstance(error, BrokenPipeError) and _has_no_reader():
        return 141
    of_file = getattr(error, 'filename', None) and error.strerror
    said = f'{error.filename}: {error.strerror}' if of_file else str(error)
    print(f'{command}: error: {" ".join(said.splitlines()) or type(error).__name__}', file=sys.stderr)
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
