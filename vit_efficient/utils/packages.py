"""Packages that a single feature needs, which an extra of this one installs; and plug-ins."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

from vit_efficient.utils.errors import UserError


class MissingPackage(UserError, ImportError):
    """An optional package is not installed."""


@contextmanager
def needing(extra: str, purpose: str, package: str = '') -> Iterator[None]:
    """Turns an import of an optional package that is not there into a MissingPackage that says which `extra` has it.

    `purpose` has a verb whose object the package is, such as 'shards are read with'; `package` is its name where that
    is not the first part of the module's.
    """
    try:
        yield
    except ImportError as error:
        package = package or (error.name or '').partition('.')[0]
        raise MissingPackage(
            f"{purpose} the {package} package, which is not installed: pip install 'vit-efficient[{extra}]'"
        ) from error


def import_optional(module: str, purpose: str, extra: str, package: str = '') -> ModuleType:
    """A module of an optional package, or a MissingPackage; see `needing`."""
    with needing(extra, purpose, package or module.partition('.')[0]):
        return import_module(module)


def import_plugins(names: Iterable[str]) -> None:
    """Imports the modules of plug-ins; what they register is then known by name."""
    for name in names:
        if not all(part.isidentifier() for part in name.split('.')):
            raise UserError(f'plugins: the name of a Python module, such as my_package.attentions, got {name!r}')
        try:
            import_module(name)
        except ModuleNotFoundError as error:
            if not f'{name}.'.startswith(f'{error.name}.'):
                raise  # one that the plug-in itself wants
            raise UserError(
                f'plugins: there is no module {name!r}; install it, or add its folder to PYTHONPATH'
            ) from error
