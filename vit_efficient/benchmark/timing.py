"""Times of both sides of a ratio: they take turns in one process.

A machine has faster and slower phases. Taking turns, all candidates see the same ones; the minimum over rounds is the
time of the code, and what lies above it is the machine's.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
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
_TIMES = ('milliseconds', 'median_milliseconds', 'spread_percent', 'rounds', 'host_milliseconds', 'ratio', 'to_part')

# Forward passes that a work costs: the gradients of activations and of weights take one each.
_FORWARDS = {'forward': 1, 'inference': 1, 'forward+backward': 3, 'training step': 3}

# First calls, in seconds: one of at least LONG is warm-up enough, one of at least VERY_LONG is a turn already.
LONG, VERY_LONG = 1, 10


@dataclass(frozen=True, eq=False)
class Call:
    """A call, and what surrounds it when it is timed.

    Attributes:
        run: The call.
        prepare: What is done before the clock starts, given the number of calls that come.
        context: Makes the context in which they come, which is entered before the clock starts, too.
        graph: What a table says of the call's replay; empty if there was to be none.
    """

    run: Callable[[], object]
    prepare: Callable[[int], object] = lambda count: None
    context: Callable[[], AbstractContextManager] = nullcontext
    graph: str = ''

    def __call__(self) -> None:
        with self.context():
            self.run()


def synchronize(device: torch.device) -> None:
    """Waits for what a GPU was given to do."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


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
    there are fewer, but one at least. On CUDA a first call says nothing of the others, and is only the first of two. A
    function may be a `Call`.
    """

    def turn(call: Callable[[], object], repeats: int) -> float:
        call = call if isinstance(call, Call | _Trial) else Call(call)
        call.prepare(repeats)
        with call.context():
            synchronize(device)  # what came before is none of it
            start = time.perf_counter()
            for _ in range(repeats):
                call.run()
            synchronize(device)
            return (time.perf_counter() - start) / repeats

    begin = time.perf_counter()
    repeats, timed = [], []
    for call in calls:
        took = turn(call, 1)
        plans = device.type == 'cuda'  # kernels, which may take it seconds, however short the call is
        timed.append([took] if took >= VERY_LONG and not plans else [])
        if took < LONG or plans:
            took = turn(call, 1)
        repeats.append(max(1, math.ceil(seconds / max(took, 1e-6))))  # what has failed takes no time
    for done in range(rounds):
        for times, call, count in zip(timed, calls, repeats, strict=True):
            if len(times) == done:
                times.append(turn(call, count))
        next_round = sum(times[-1] * count for times, count in zip(timed, repeats, strict=True))
        if time.perf_counter() - begin + next_round > max_seconds:
            break
    return timed


def host_seconds(call: Call, device: torch.device) -> float:
    """Seconds until a call returns to Python, the GPU having had nothing to do before: the least of five at most."""
    begin, best = time.perf_counter(), math.inf
    for _ in range(5):
        call.prepare(1)
        with call.context():
            synchronize(device)
            start = time.perf_counter()
            call.run()
            best = min(best, time.perf_counter() - start)
            synchronize(device)
        if time.perf_counter() - begin > LONG:
            break
    return best


def compiled_by_now(call: Callable[[], object], compiles: bool, device: torch.device) -> None:
    """Makes a call once if what it calls is compiled: both passes are when they first run, however long that takes.

    What is timed, and whose memory is measured, is the calls after it.
    """
    if compiles:
        # All that is timed has the same code (one class, one forward), which past the limit would run as it is written.
        with without_recompile_limit():
            call()
        synchronize(device)


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
        median; of several rounds), rounds, host_milliseconds (on CUDA: until a call returns), ratio (of the first's
        least time to its own), to_part (of its own least time to that of its part), peak_mib (what a call adds to
        inputs and weights), graph (of a call that is to be replayed), error. None: nothing to say.
    """
    if device.type == 'cuda':
        gc.collect()  # the models of the block before
        torch.cuda.empty_cache()
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
    if device.type == 'cuda':
        for trial in trials:
            trial.host = trial.attempt(host_seconds, trial, device)
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
        self.host: float | None = None
        self._make = make
        self._call: Call | None = None

    def build(self) -> None:
        call = self.attempt(self._make)
        self._call = call if isinstance(call, Call) or call is None else Call(call)

    def run(self) -> None:
        if self._call:
            self.attempt(self._call.run)

    def prepare(self, count: int) -> None:
        if self._call:
            self.attempt(self._call.prepare, count)

    def context(self) -> AbstractContextManager:
        return self._call.context() if self._call else nullcontext()

    def measure_on_cuda(self, device: torch.device) -> None:
        if self._call and self._call.graph != 'replayed':  # whose memory is the graph's, for good
            self.peak = self.attempt(peak_on_cuda, self._call, device)

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
        row['graph'] = self._call.graph or None if self._call else None
        if not self.times:
            return row
        least, median = min(self.times), statistics.median(self.times)
        row |= dict(milliseconds=1e3 * least, median_milliseconds=1e3 * median, rounds=len(self.times))
        if len(self.times) > 1:
            row['spread_percent'] = 100 * (max(self.times) - least) / median
        if self.host is not None:
            row['host_milliseconds'] = 1e3 * self.host
        if first.times:
            row['ratio'] = min(first.times) / least
        if part and part.times:
            row['to_part'] = least / min(part.times)
        return row

    def attempt(self, function: Callable[..., Any], *args) -> Any:
        if self.error is None:
            try:
                return function(*args)
            except Exception as error:  # whose traceback would keep tensors
                self.error = one_line(error)
                self._call = None
            torch.cuda.empty_cache()  # of what it left, for the others; nothing without a GPU
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
    synchronize(device)
    best, begin = math.inf, time.perf_counter()
    while time.perf_counter() - begin < seconds or best == math.inf:
        start = time.perf_counter()
        torch.mm(a, b)
        synchronize(device)
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
    rate_now = partial(matmul_rate, setting.dtype, setting.device, seconds=0.2 if setting.device.type == 'cuda' else 1)
    rate = rate_now()
    measured = compare([makes[i] for i in fit], setting.device, *options, [parts[i] for i in fit if parts])
    rate = max(rate, rate_now())
    of_plan = dict(zip(fit, measured, strict=True))
    blank = dict.fromkeys(_TIMES) | dict(work=work, peak_mib=None, peak_share=None, graph=None)
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
