"""Timing that two sides of a ratio can share: they take turns in one process.

A machine has faster and slower phases. Taking turns, all candidates see the same ones; the minimum over rounds is the
time of the code, and what lies above it is the machine's.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.layers import Attention
from torch import Tensor, nn

from vit_efficient.attention import GridAttention, create_attention, layer_options
from vit_efficient.files import save_figure
from vit_efficient.flops import count_flops
from vit_efficient.grid import PatchGrid
from vit_efficient.peak_memory import Killed, one_line, peak_in_child, peak_on_cuda

PASSES = ('forward', 'forward+backward')
#: What `compare` says of each call.
MEASURED = ('milliseconds', 'median_milliseconds', 'rounds', 'ratio', 'peak_mib', 'error')

# First calls, in seconds: one of at least LONG is warm-up enough, one of at least VERY_LONG is a turn already.
LONG, VERY_LONG = 1, 10


def take_turns(
    calls: Sequence[Callable[[], object]],
    device: torch.device,
    rounds: int,
    seconds: float = 0.1,
    max_seconds: float = math.inf,
) -> list[list[float]]:
    """Times functions in turn.

    Every function is called before the rounds: twice, to warm up and to see how long it takes. A first call of a second
    or more is the only one; one of ten seconds or more, in which warming up is lost, is the first turn.

    Args:
        calls: What is timed.
        device: Waited for before the clock is read.
        rounds: Turns of each.
        seconds: Least length of a turn; a short call is repeated.
        max_seconds: For all of it: there are fewer rounds, but one at least, if another one would take longer.

    Returns:
        (calls, rounds), seconds per call.
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


def compare(
    makes: Sequence[Callable[[], Callable[[], object]]],
    device: torch.device,
    rounds: int = 5,
    max_seconds: float = math.inf,
    memory: bool = True,
) -> list[dict[str, Any]]:
    """Times calls against the first of them, and measures their peak memory. One that fails does not stop the others.

    Args:
        makes: Each makes the weights and inputs of a call and returns it. They are pickled, because on the CPU memory
            is measured in child processes; what calls share is `Shared`.
        device, rounds, max_seconds: Of `take_turns`. The measurement of memory, a call or two of each, comes on top.
        memory: Whether it is measured.

    Returns:
        For each: milliseconds (the least), median_milliseconds, rounds, ratio (of the first's least time to its own),
        peak_mib (what a call adds to inputs and weights), error. None where there is nothing to say.
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
    timed = take_turns(trials, device, rounds, max_seconds=max_seconds)
    least = [min(times) if trial.error is None else None for trial, times in zip(trials, timed, strict=True)]
    return [
        dict(
            milliseconds=mine and 1e3 * mine,
            median_milliseconds=mine and 1e3 * statistics.median(times),
            rounds=mine and len(times),
            ratio=mine and least[0] and least[0] / mine,
            peak_mib=trial.peak and trial.peak / 2**20,
            error=trial.error or trial.remark,
        )
        for trial, times, mine in zip(trials, timed, least, strict=True)
    ]


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

    def __init__(self, make: Callable[[], Callable[[], object]]):
        self.error: str | None = None  # why it cannot be timed
        self.remark: str | None = None  # why its memory is not known
        self.peak: int | None = None
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


# --- layers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """An attention that is timed: a registered name and its options."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        options = ', '.join(
            f'{key}={value:.4g}' if isinstance(value, float) else f'{key}={value}'
            for key, value in self.options.items()
        )
        return f'{self.name} ({options})' if options else self.name


_CPU = torch.device('cpu')
#: timm's own layer, against which the others are timed.
EXACT = Candidate('exact (timm)')


@dataclass(frozen=True)
class LayerSetting:
    """What layers that are compared have in common."""

    dim: int = 768
    num_heads: int = 12
    batch_size: int = 1
    dtype: torch.dtype = torch.float32
    device: torch.device = _CPU

    def layer(self, candidate: Candidate, tokens: int, device: torch.device | str | None = None) -> nn.Module:
        """A layer that is called with (B, tokens, dim).

        Raises:
            ValueError: If the name or an option is unknown, or an option does not fit the grid.
        """
        kwargs = dict(qkv_bias=True, device=device or self.device, dtype=self.dtype)
        grid = squarest_grid(tokens)
        if candidate == EXACT:
            return _OnGrid(Attention(self.dim, self.num_heads, **kwargs), grid)
        size = (grid.height, grid.width)
        options = layer_options(candidate.name, candidate.options, layer=0, depth=1, grid_size=size)
        return _OnGrid(create_attention(candidate.name, self.dim, self.num_heads, **kwargs, **options), grid)

    def inputs(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Tokens, and the gradient of what a layer makes of them."""
        x = torch.randn(self.batch_size, tokens, self.dim, dtype=self.dtype, device=self.device)
        return x.requires_grad_(), torch.randn_like(x)


def squarest_grid(tokens: int) -> PatchGrid:
    """The grid of `tokens` patches whose sides are closest to each other."""
    height = next(h for h in range(math.isqrt(tokens), 0, -1) if tokens % h == 0)
    return PatchGrid(height, tokens // height)


class _OnGrid(nn.Module):
    """An attention with its grid, so that it is called with the tokens alone."""

    def __init__(self, attention: Attention, grid: PatchGrid):
        super().__init__()
        self.attn = attention
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        # Counting FLOPs gives an image of `dim` channels.
        x = x.flatten(2).mT if x.ndim == 4 else x
        return self.attn(x, self.grid) if isinstance(self.attn, GridAttention) else self.attn(x)


def benchmark_layer(
    candidates: Sequence[Candidate],
    tokens: Sequence[int],
    setting: LayerSetting | None = None,
    rounds: int = 5,
    max_seconds: float = math.inf,
    memory: bool = True,
) -> Iterator[list[dict[str, Any]]]:
    """Times attention layers, projections included, against timm's `Attention` in the same run.

    Args:
        candidates: What is compared.
        tokens: Numbers of patches N; the grid is the squarest of N.
        setting: Of the layers and their input.
        rounds, max_seconds, memory: Of each block, as in `compare`.

    Returns:
        The blocks of rows, one for each N and pass, as they are measured; in a block a row for timm's layer and for
        each candidate: tokens, work, attention, attended, gmacs, and what `compare` returns. A layer that fails, or
        cannot be had at this N, has an error instead of times.

    Raises:
        ValueError: If a number is out of range, or a candidate has a name or option that is not known, or can be had
            at none of the N. This is known before anything is timed.
    """
    setting = setting or LayerSetting()
    numbers = dict(dim=setting.dim, num_heads=setting.num_heads, batch_size=setting.batch_size, rounds=rounds)
    for name, value in [*numbers.items(), *(('tokens', n) for n in tokens)]:
        if type(value) is not int or value < 1:
            raise ValueError(f'{name} must be a positive integer, got {name}={value!r}')
    if setting.dim % setting.num_heads:
        raise ValueError(f'num_heads must divide dim, got dim={setting.dim}, num_heads={setting.num_heads}')
    if not max_seconds > 0:
        raise ValueError(f'max_seconds must be above 0, got {max_seconds=}')
    candidates = [EXACT, *candidates]
    for given in ([str(candidate) for candidate in candidates], tokens):
        for value in given:
            if given.count(value) > 1:
                raise ValueError(f'{value} is given twice')
    plans = [[_plan(candidate, n, setting) for n in tokens] for candidate in candidates]
    for of_candidate in plans:
        if all(plan['error'] for plan in of_candidate):
            raise ValueError(of_candidate[0]['error'])
    return _blocks(candidates, plans, setting, rounds, max_seconds, memory)


def _plan(candidate: Candidate, tokens: int, setting: LayerSetting) -> dict[str, Any]:
    """What is known of a row before anything runs."""
    plan = dict(tokens=tokens, attention=str(candidate), attended=None, gmacs=None, error=None)
    try:
        layer = setting.layer(candidate, tokens, device='meta')
        macs = count_flops(layer, (setting.dim, layer.grid.height, layer.grid.width), setting.batch_size).total
    except ValueError as error:
        return plan | dict(error=str(error))
    return plan | dict(attended=tokens if candidate == EXACT else layer.attn.num_attended(layer.grid), gmacs=macs / 1e9)


def _blocks(
    candidates: Sequence[Candidate],
    plans: Sequence[Sequence[dict[str, Any]]],
    setting: LayerSetting,
    *options,
) -> Iterator[list[dict[str, Any]]]:
    for of_tokens in zip(*plans, strict=True):
        n = of_tokens[0]['tokens']
        inputs = Shared(partial(setting.inputs, n))
        for work in PASSES:
            rows = [{**plan, 'work': work, **dict.fromkeys(MEASURED), 'error': plan['error']} for plan in of_tokens]
            fit = [i for i, row in enumerate(rows) if row['error'] is None]
            makes = [partial(_layer_call, candidates[i], n, setting, work, inputs) for i in fit]
            for i, measured in zip(fit, compare(makes, setting.device, *options), strict=True):
                rows[i].update(measured)
            yield rows


def _layer_call(
    candidate: Candidate, tokens: int, setting: LayerSetting, work: str, inputs: Shared
) -> Callable[[], object]:
    x, gradient = inputs()
    module = setting.layer(candidate, tokens).train(work != 'forward')
    if work == 'forward':

        def call() -> None:
            with torch.inference_mode():
                module(x)
    else:

        def call() -> None:
            module(x).backward(gradient)
            module.zero_grad()
            x.grad = None

    return call


# --- the plot ------------------------------------------------------------------------------------------------------

# Okabe and Ito, "Color Universal Design", 2008, but for yellow, and black, which is the exact layer's.
_COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')
_STYLES = ('-', '--', ':')  # one for each time around the colours
_MARKERS = 'os^DvPX'


def plot_times(rows: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Saves a plot of time against N, both logarithmic, as PNG: a panel for each pass, a line for each attention.

    Args:
        rows: Of `benchmark_layer`; those without times are left out.
        path: Of the file.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter, NullLocator, StrMethodFormatter

    rows = [row for row in rows if row['milliseconds'] is not None]
    works = list(dict.fromkeys(row['work'] for row in rows))
    labels = list(dict.fromkeys(row['attention'] for row in rows if row['attention'] != str(EXACT)))
    styles: dict[str, dict[str, Any]] = {str(EXACT): dict(color='black', marker='*', markersize=9, linewidth=2)}
    for i, label in enumerate(labels):
        line = _STYLES[i // len(_COLOURS) % len(_STYLES)]
        styles[label] = dict(color=_COLOURS[i % len(_COLOURS)], marker=_MARKERS[i % len(_MARKERS)], linestyle=line)
    figure = Figure(figsize=(11, 5), dpi=150, layout='constrained')
    panels = figure.subplots(1, max(1, len(works)), sharey=True, squeeze=False)[0]
    handles = {}
    for axes, work in zip(panels, works, strict=False):
        for label, style in styles.items():
            points = sorted(
                (r['tokens'], r['milliseconds']) for r in rows if (r['work'], r['attention']) == (work, label)
            )
            if points:
                handles[label] = axes.plot(*zip(*points, strict=True), label=label, **style)[0]
        axes.set_xscale('log')
        axes.set_yscale('log')
        axes.set_xticks(sorted({row['tokens'] for row in rows}))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(StrMethodFormatter('{x:,.0f}'))
        axes.yaxis.set_major_formatter(StrMethodFormatter('{x:,g}'))
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))  # none over more than a decade
        axes.set_title(work)
        axes.set_xlabel('N')
        axes.grid(which='both', alpha=0.25)
        axes.spines[['top', 'right']].set_visible(False)
    panels[0].set_ylabel('ms')
    # The legend from the slowest down, as the lines end on the right.
    ends = {row['attention']: (row['tokens'], row['milliseconds']) for row in sorted(rows, key=lambda r: r['tokens'])}
    order = sorted(handles, key=ends.get, reverse=True)
    figure.legend([handles[label] for label in order], order, loc='outside right center', frameon=False)
    save_figure(figure, path)
