import threading
from collections.abc import Callable


def at_once(*functions: Callable[[], None]) -> None:
    """Runs each function in a thread of its own, and waits for all."""
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
