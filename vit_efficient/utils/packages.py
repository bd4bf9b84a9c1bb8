"""Packages that a single feature needs, which an extra of this one installs; and plug-ins."""

from collections.abc import Iterable
from importlib import import_module
from types import ModuleType

from vit_efficient.utils.errors import UserError


class MissingPackage(UserError, ImportError):
    """An optional package is not installed."""


def import_optional(module: str, purpose: str, extra: str, package: str = '') -> ModuleType:
    """A module of an optional package, or a MissingPackage that says which `extra` installs it.

    `purpose` has a verb whose object the package is, such as 'shards are read with'; `package` is its name where that
    is not the first part of the module's.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = package or module.partition('.')[0]
        raise MissingPackage(
            f"{purpose} the {package} package, which is not installed: pip install 'vit-efficient[{extra}]'"
        ) from error


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
