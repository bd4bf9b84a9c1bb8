"""Packages that a single feature needs, which an extra of this one installs."""

from importlib import import_module
from types import ModuleType

from vit_efficient.utils.errors import UserError


class MissingPackage(UserError, ImportError):
    """An optional package is not installed."""


def import_optional(module: str, purpose: str, extra: str, package: str = '') -> ModuleType:
    """A module of an optional package.

    Args:
        module: Its name.
        purpose: What it is for, with a verb whose object it is, such as 'shards are read with'.
        extra: The extra that installs it.
        package: By default, the first part of the module's name.

    Raises:
        MissingPackage: If it is not installed. The message says how to install it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = package or module.partition('.')[0]
        raise MissingPackage(
            f"{purpose} the {package} package, which is not installed: pip install 'vit-efficient[{extra}]'"
        ) from error
