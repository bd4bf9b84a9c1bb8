"""Packages that a single feature needs, which an extra of this one installs."""

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
