"""Times of both sides of a ratio: they take turns in one process.

A machine has faster and slower phases. Taking turns, all candidates see the same ones; the minimum over rounds is the
time of the code, and what lies above it is the machine's.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from vit_efficient.benchmark.peak_memory import Killed, one_line, peak_in_child, peak_on_cuda
from vit_efficient.utils.checks import as_integer
from vit_efficient.utils.compat import without_recompile_limit
from vit_efficient.utils.errors import UserError

CPU = torch.device('cpu')
Make = Callable[[], Callable[[], object]]
Row = dict[str, Any]

# What is known of a call that was timed.
_TIMES = ('milliseconds', 'median_milliseconds', 'spread_percent', 'rounds', 'ratio', 'to_part')

# Forward passes that a work costs: the gradients of activations and of weights take one each.
_FORWARDS = {'forward': 1, 'inference': 1, 'forward+backward': 3, 'training step': 3}

# First calls, in seconds: one of at least LONG is warm-up enough, one of at least VERY_LONG is a turn already.
LONG, VERY_LONG = 1, 10


def take_turns(
    calls: Sequence[Callable[[], object]],
    device: torch.device,
    rounds: int,
    seconds: float = 0.1,
    max_seconds: float = math.inf,
) -> list[list[float]]:
    """Times functions in turn, on a device that is waited for: (calls, rounds), seconds per call.

    Every function is called before the rounds: twice, to warm up and to see how long it takes. A first call of a second
    or more is the only one; one of ten seconds or more, in which warming up is lost, is the first turn. A turn takes at
    least `seconds`: a short call is repeated. If another round would take longer than `max_seconds` for all of it,
    there are fewer, but one at least.
    """

    def turn(call: Callable[[], object], repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        if device.type == 'cuda':
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / repeats

    begin = time.perf_counter()
    repeats, timed = [], []
    for call in calls:
        took = turn(call, 1)
        timed.append([took] if took >= VERY_LONG else [])
        if took < LONG:
            took = turn(call, 1)
        repeats.append(math.ceil(seconds / took))
    for done in range(rounds):
        for times, call, count in zip(timed, calls, repeats, strict=True):
            if len(times) == done:
                times.append(turn(call, count))
        next_round = sum(times[-1] * count for times, count in zip(timed, repeats, strict=True))
        if time.perf_counter() - begin + next_round > max_seconds:
            break
    return timed


def compiled_by_now(call: Callable[[], object], setting: Any) -> Callable[[], object]:
    """A call, made once if what it calls is compiled: both passes are when they first run, however long that takes.

    What is timed, and whose memory is measured, is the calls after it.
    """
    if setting.compiled:
        # All that is timed has the same code (one class, one forward), which past the limit would run as it is written.
        with without_recompile_limit():
            call()
        if setting.device.type == 'cuda':
            torch.cuda.synchronize(setting.device)
    return call


def compare(
    makes: Sequence[Make],
    device: torch.device,
    rounds: int = 5,
    max_seconds: float = math.inf,
    memory: bool = True,
    parts: Sequence[Make] = (),
) -> list[Row]:
    """Times calls against the first of them, and measures their peak memory. One that fails does not stop the others.

    Args:
        makes: Each makes the weights and inputs of a call and returns it. They are pickled, because on the CPU memory
            is measured in child processes; what several calls use is `Shared`.
        device, rounds, max_seconds: Of `take_turns`. The measurement of memory, a call or two of each, comes on top.
        memory: Whether it is measured.
        parts: Makes calls that take turns too, one for each of the others: what they are to be compared with.

    Returns:
        For each: milliseconds (the least), median_milliseconds, spread_percent (from the least to the most, of the
        median; of several rounds), rounds, ratio (of the first's least time to its own), to_part (of its own least
        time to that of its part), peak_mib (what a call adds to inputs and weights), error. None: nothing to say.
    """
    trials = [_Trial(make) for make in makes]
    if memory and device.type != 'cuda':
        for trial in trials:
            trial.measure_in_child(device)
    for trial in trials:
        trial.build()
    if memory and device.type == 'cuda':
        for trial in trials:
            trial.measure_on_cuda(device)
    others = [_Trial(make) for make in parts]
    for trial in others:
        trial.build()
    timed = take_turns([*trials, *others], device, rounds, max_seconds=max_seconds)
    for trial, times in zip([*trials, *others], timed, strict=True):
        trial.times = times if trial.error is None else []
    return [trial.row(trials[0], part) for trial, part in zip(trials, others or [None] * len(trials), strict=True)]


class Shared:
    """A value that is made when it is first asked for; in another process, anew."""

    def __init__(self, make: Callable[[], Any]):
        self._make = make
        self._value: Any = None

    def __call__(self) -> Any:
        if self._value is None:
            self._value = self._make()
        return self._value

    def __reduce__(self):
        return Shared, (self._make,)


class _Trial:
    """A call that may fail: then it says why and does nothing any more, so that the others can go on."""

    def __init__(self, make: Make):
        self.error: str | None = None  # why it cannot be timed
        self.remark: str | None = None  # why its memory is not known
        self.peak: int | None = None
        self.times: list[float] = []
        self._make = make
        self._call: Callable[[], object] | None = None

    def build(self) -> None:
        self._call = self._attempt(self._make)

    def __call__(self) -> None:
        self._attempt(self._call)

    def measure_on_cuda(self, device: torch.device) -> None:
        self.peak = self._attempt(peak_on_cuda, self._call, device)

    def measure_in_child(self, device: torch.device) -> None:
        if device.type != 'cpu':
            self.remark = f'memory: not measured on {device.type}'
            return
        try:
            self.peak = peak_in_child(self._make)
        except Killed as error:
            self.error = one_line(error)
        except RuntimeError as error:  # perhaps only the child's
            self.remark = f'memory: {error}'

    def row(self, first: '_Trial', part: '_Trial | None') -> Row:
        row = dict.fromkeys(_TIMES) | dict(peak_mib=self.peak and self.peak / 2**20, error=self.error or self.remark)
        if not self.times:
            return row
        least, median = min(self.times), statistics.median(self.times)
        row |= dict(milliseconds=1e3 * least, median_milliseconds=1e3 * median, rounds=len(self.times))
        if len(self.times) > 1:
            row['spread_percent'] = 100 * (max(self.times) - least) / median
        if first.times:
            row['ratio'] = min(first.times) / least
        if part and part.times:
            row['to_part'] = least / min(part.times)
        return row

    def _attempt(self, function: Callable[..., Any], *args) -> Any:
        if self.error is None:
            try:
                return function(*args)
            except Exception as error:  # whose traceback would keep tensors
                self.error = one_line(error)
                self._call = None
        return None


def slope(points: Sequence[tuple[float, float]]) -> float | None:
    """Of log y against log x, by least squares: the exponent of a power law. None for fewer than two points."""
    if len(points) < 2:
        return None
    return statistics.linear_regression(*zip(*((math.log(x), math.log(y)) for x, y in points), strict=True)).slope


def matmul_rate(dtype: torch.dtype, device: torch.device, side: int | None = None, seconds: float = 1.0) -> float:
    """Multiply-accumulates per second of a square matrix product, the best of some within so many seconds.

    The side of the matrices is 2,048 on a CPU by default, 8,192 elsewhere.
    """
    side = side or (2048 if device.type == 'cpu' else 8192)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best, begin = math.inf, time.perf_counter()
    while time.perf_counter() - begin < seconds or best == math.inf:
        start = time.perf_counter()
        torch.mm(a, b)
        if device.type == 'cuda':
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return side**3 / best


def measure_block(
    plans: Sequence[Row], work: str, makes: Sequence[Make], setting: Any, options: Sequence, parts: Sequence[Make] = ()
) -> list[Row]:
    """The rows of what is compared at one size and work: what is known of each, and what is measured.

    Of what has an error already, nothing is measured. `options` are rounds, max_seconds and memory of `compare`.
    """
    fit = [i for i, plan in enumerate(plans) if plan['error'] is None]
    # The machine may be slower before than after.
    rate = matmul_rate(setting.dtype, setting.device)
    measured = compare([makes[i] for i in fit], setting.device, *options, [parts[i] for i in fit if parts])
    rate = max(rate, matmul_rate(setting.dtype, setting.device))
    of_plan = dict(zip(fit, measured, strict=True))
    blank = dict.fromkeys(_TIMES) | dict(work=work, peak_mib=None, peak_share=None)
    rows = [plan | blank | of_plan.get(i, dict(error=plan['error'])) for i, plan in enumerate(plans)]
    for row in rows:
        if row['milliseconds'] and row['gmacs']:
            row['peak_share'] = _FORWARDS[work] * row['gmacs'] * 1e9 / (row['milliseconds'] / 1e3) / rate
    return rows


def check_request(numbers: Iterable[tuple[str, Any]], max_seconds: float, distinct: Iterable[Iterable[Any]]) -> None:
    """Raises a UserError if a number is not a positive integer, or something is asked for twice."""
    for name, value in numbers:
        as_integer(name, value)
    if not max_seconds > 0:
        raise UserError(f'max_seconds must be above 0, got {max_seconds=}')
    for given in map(list, distinct):
        for value in given:
            if given.count(value) > 1:
                raise UserError(f'{value} is given twice')


def check_plans(plans: Iterable[Sequence[Row]]) -> None:
    """Raises a UserError for the first candidate that can be had at no size."""
    for of_candidate in plans:
        if all(plan['error'] for plan in of_candidate):
            raise UserError(of_candidate[0]['error'])
