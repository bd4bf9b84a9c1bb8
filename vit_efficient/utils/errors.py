"""What a user can mend, told apart from bugs; and what errors say, on one line."""

import sys
from traceback import walk_tb


class UserError(ValueError):
    """What the caller can mend: an argument, a file, a key of a recipe. Its message names it, and the way out.

    The command line prints it on one line; any other exception is a bug, and keeps its traceback.
    """


def first_line(error: BaseException) -> str:
    """The first line of what an error says; its type if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def one_line(error: BaseException, most: int = 300) -> str:
    """What an error says, on one line of at most so many characters; its type if it says nothing."""
    return ' '.join(str(error).split())[:most] or type(error).__name__


# Libraries that check, in their own ways, what a user gives them.
_LIBRARIES = {'vit_efficient', 'timm', 'torch', 'torchvision', 'numpy', 'safetensors', 'huggingface_hub', 'omegaconf'}


def is_bug_of_plugin(error: BaseException) -> bool:
    """Whether code took part in an error that is neither ours, nor a library's, nor Python's."""
    packages = {frame.f_globals.get('__name__', '').partition('.')[0] for frame, _ in walk_tb(error.__traceback__)}
    return not packages <= _LIBRARIES | sys.stdlib_module_names


def is_own(error: BaseException) -> bool:
    """Whether it was raised in code of this package, and is for no user to mend: a bug of ours."""
    *_, (frame, _) = walk_tb(error.__traceback__)
    return frame.f_globals.get('__name__', '').startswith('vit_efficient') and not isinstance(error, UserError)
