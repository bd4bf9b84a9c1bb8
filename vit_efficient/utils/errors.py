"""What a user can mend, told apart from bugs; and what errors say, on one line."""


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


def is_bug_of_plugin(error: BaseException) -> bool:
    """Whether an error was raised by code that is neither ours nor that of a library which checks our arguments."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    module = frame.tb_frame.f_globals.get('__name__', '') if frame is not None else ''
    return module.partition('.')[0] not in ('vit_efficient', 'timm', 'torch', 'torchvision', 'numpy', 'inspect', 'json')
