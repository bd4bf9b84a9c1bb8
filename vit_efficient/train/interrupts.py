"""Ctrl-C and SIGTERM, taken between updates only."""

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

from vit_efficient.train.distributed import Processes


class Interrupted(KeyboardInterrupt):
    """The run was told to stop. `signal` is the signal's number."""

    def __init__(self, number: int, message: str = ''):
        super().__init__(message or f'stopped by {signal.Signals(number).name} before an update')
        self.signal = number

    @property
    def exit_status(self) -> int:
        """After SIGTERM 75 (EX_TEMPFAIL of sysexits.h: try again), for schedulers; otherwise what a shell gives."""
        return 75 if self.signal == signal.SIGTERM else 128 + self.signal


class Interrupts:
    """Turns the first SIGINT or SIGTERM into `Interrupted`; a second one has its usual effect.

    Inside `held()` the exception waits until the block is done, so that weights, optimiser and counters agree, and the
    queue of TensorBoard's writer is not left in between. In threads other than the main one signals are left as they
    are, as Python requires.

    Of several processes, once they `join` it, all stop at the same point, the next `check()` or `obey()`, whichever
    was told to. They ignore further signals: a scheduler may send each process one, and torchrun one more (and kills
    those that are not gone in time).
    """

    def __init__(self):
        self._processes: Processes | None = None
        self.received = 0  # the number of the signal that this process was sent
        self._held = False
        self._heard = 0
        self._previous = ExitStack()  # the handlers that were there before

    def __enter__(self) -> 'Interrupts':
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous.callback(signal.signal, number, signal.signal(number, self._handle))
        return self

    def __exit__(self, *_exception: object) -> None:
        self._previous.close()

    def join(self, processes: Processes) -> None:
        """From here on, the processes of a run have something to lose, and stop together."""
        self._processes = processes if processes.world_size > 1 else None

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.received = self.received or number
        if not self._processes:
            self._previous.close()
            if not self._held:
                raise Interrupted(number)

    @contextmanager
    def held(self, and_after: bool = False) -> Iterator[None]:
        """A block that a signal does not cut in two; with `and_after` it waits for the next `obey`."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if not and_after:
            self.obey(heard=False)

    def hear(self, signals: Iterable[int]) -> None:
        """Takes note of what all processes have received, at the same point; they stop at the next `obey`."""
        self._heard = self._heard or (max(signals, default=0) if self._processes else 0)

    def obey(self, heard: bool = True) -> None:
        """Raises Interrupted if this process, a single one, was told to stop; or one of several, once all `heard`."""
        number = self._heard * heard if self._processes else self.received
        if number:
            raise Interrupted(number)

    def check(self) -> None:
        """Raises Interrupted if a process has been told to stop; all processes call it at the same points."""
        if self._processes:
            self.hear([int(self._processes.max(self.received))])
        self.obey()
