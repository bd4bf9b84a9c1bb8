"""Ctrl-C and SIGTERM, taken between updates only."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """The run was told to stop. `signal` is the signal's number."""

    def __init__(self, number: int, message: str = ''):
        super().__init__(message or signal.Signals(number).name)
        self.signal = number


class Interrupts:
    """Turns the first SIGINT or SIGTERM into `Interrupted`; a second one has its usual effect.

    Inside `held()` the exception waits until the block is done, so that weights, optimiser and counters agree, and the
    queue of TensorBoard's writer is not left in between. In threads other than the main one signals are left as they
    are, as Python requires.
    """

    def __init__(self):
        self._held = False
        self._received: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> 'Interrupts':
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_exception: object) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self._restore()
        self._received = number
        if not self._held:
            raise Interrupted(number)

    @contextmanager
    def held(self) -> Iterator[None]:
        """A block that a signal does not cut in two."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._received is not None:
            raise Interrupted(self._received)
