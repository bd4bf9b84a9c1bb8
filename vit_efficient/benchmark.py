"""Timing that two sides of a ratio can share: they take turns in one process.

A machine has faster and slower phases. Taking turns, all candidates see the same ones; the minimum over rounds is the
time of the code, and what lies above it is the machine's.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from timm.layers import Attention
from torch import Tensor, nn

from vit_efficient.attention import create_attention
from vit_efficient.flops import count_flops
from vit_efficient.grid import PatchGrid

PASSES = ('forward', 'forward+backward')


def take_turns(
    calls: Sequence[Callable[[], object]], device: torch.device, rounds: int, seconds: float = 0.1
) -> list[list[float]]:
    """Times functions in turn.

    Args:
        calls: What is timed; each has one call to warm up.
        device: Waited for before the clock is read.
        rounds: Turns of each.
        seconds: Least length of a turn; a short call is repeated.

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

    repeats = []
    for call in calls:
        turn(call, 1)
        repeats.append(math.ceil(seconds / turn(call, 1)))
    timed: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for times, call, count in zip(timed, calls, repeats, strict=True):
            times.append(turn(call, count))
    return timed


@dataclass(frozen=True)
class Candidate:
    """An attention that is timed: a registered name and its options."""

    name: str
    options: dict

    def __str__(self) -> str:
        options = ', '.join(
            f'{key}={value:.4g}' if isinstance(value, float) else f'{key}={value}'
            for key, value in self.options.items()
        )
        return f'{self.name} ({options})' if options else self.name


def squarest_grid(tokens: int) -> PatchGrid:
    """The grid of `tokens` patches whose sides are closest to each other."""
    height = next(h for h in range(math.isqrt(tokens), 0, -1) if tokens % h == 0)
    return PatchGrid(height, tokens // height)


class _OnGrid(nn.Module):
    """An attention with its grid, so that it is called with the tokens alone."""

    def __init__(self, attention: nn.Module, grid: PatchGrid):
        super().__init__()
        self.attn = attention
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        # Counting FLOPs gives an image of `dim` channels.
        return self.attn(x.flatten(2).mT if x.ndim == 4 else x, self.grid)


def benchmark_layer(
    candidates: Sequence[Candidate],
    tokens: Sequence[int],
    dim: int = 768,
    num_heads: int = 12,
    batch_size: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = 'cpu',
    rounds: int = 5,
) -> list[dict]:
    """Times attention layers, projections included, against timm's `Attention` in the same run.

    Args:
        candidates: What is compared.
        tokens: Numbers of patches N, one block of rows each; the grid is the squarest of N.
        dim, num_heads, batch_size, dtype, device: Of the layers and their input.
        rounds: Turns of each layer.

    Returns:
        A row for each N, pass and layer: tokens, pass, attention, attended, gmacs, milliseconds (the least),
        median_milliseconds, ratio (of timm's least time to this one's).

    Raises:
        ValueError: If a number is below 1, or a candidate has a name or option that is not known.
    """
    numbers = dict(dim=dim, num_heads=num_heads, batch_size=batch_size, rounds=rounds)
    for name, value in [*numbers.items(), *(('tokens', n) for n in tokens)]:
        if type(value) is not int or value < 1:
            raise ValueError(f'{name} must be a positive integer, got {name}={value!r}')
    device = torch.device(device)
    place = dict(device=device, dtype=dtype)
    layers = [create_attention(c.name, dim, num_heads, qkv_bias=True, **place, **c.options) for c in candidates]
    exact = Attention(dim, num_heads, qkv_bias=True, **place)

    rows = []
    for n in tokens:
        grid = squarest_grid(n)
        x = torch.randn(batch_size, n, dim, **place)
        gradient = torch.randn_like(x)
        modules = [exact, *(_OnGrid(layer, grid) for layer in layers)]
        full = create_attention('full', dim, num_heads, qkv_bias=True, device='meta')
        counted = [_OnGrid(layer, grid) for layer in (full, *layers)]
        macs = [batch_size * count_flops(m, (dim, grid.height, grid.width)).total for m in counted]
        attended = [n, *(layer.num_attended(grid) for layer in layers)]
        for work in PASSES:
            timed = take_turns([_call(m, x, gradient, work) for m in modules], device, rounds)
            for i, times in enumerate(timed):
                rows.append(
                    dict(
                        tokens=n,
                        work=work,
                        attention='exact (timm)' if i == 0 else str(candidates[i - 1]),
                        attended=attended[i],
                        gmacs=macs[i] / 1e9,
                        milliseconds=1e3 * min(times),
                        median_milliseconds=1e3 * sorted(times)[len(times) // 2],
                        ratio=min(timed[0]) / min(times),
                    )
                )
    return rows


def _call(module: nn.Module, x: Tensor, gradient: Tensor, work: str) -> Callable[[], object]:
    if work == 'forward':

        def call() -> None:
            with torch.inference_mode():
                module(x)
    else:
        x = x.clone().requires_grad_()

        def call() -> None:
            module(x).backward(gradient)
            module.zero_grad()
            x.grad = None

    return call
