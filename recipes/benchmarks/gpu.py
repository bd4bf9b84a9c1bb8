"""A GPU for a quarter of an hour: is everything right on it, how fast is it, does it train. Prints one summary.

    python recipes/benchmarks/gpu.py --out DIR  # on a machine with a GPU
    OMP_NUM_THREADS=1 python recipes/benchmarks/gpu.py --out DIR --device cpu --tiny  # does the script itself run

Parts are in the order of their worth. Each runs in a process of its own, so that an illegal access or a hang ends one
part and not the others; each has a deadline and looks at the clock between its cases. A row is written as soon as it is
known: DIR/rows.jsonl, and DIR/summary.md after each part. The exit status is 1 if a part failed, was cut short, or
measured an error beyond its limit.
"""

import argparse
import contextlib
import copy
import json
import math
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault('NO_ALBUMENTATIONS_UPDATE', '1')  # it would ask the network
os.environ.setdefault('PYTORCH_ALLOC_CONF', 'expandable_segments:True')
os.environ.setdefault('PYTORCH_NVML_BASED_CUDA_CHECK', '1')  # to ask for a GPU must not spoil the fork

import numpy as np
import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import vit_efficient
from vit_efficient.benchmark.layers import EXACT, Candidate, LayerSetting
from vit_efficient.benchmark.peak_memory import peak_on_cuda
from vit_efficient.benchmark.timing import synchronize
from vit_efficient.benchmark.ways import BACKENDS
from vit_efficient.dct.bases import memo
from vit_efficient.report.table import Table
from vit_efficient.train import load_recipe, run, train
from vit_efficient.train.distributed import Processes
from vit_efficient.utils import device as devices
from vit_efficient.utils.environment import describe_environment, one_line
from vit_efficient.utils.errors import first_line

BEGIN = time.monotonic()


# --- rows and clocks -------------------------------------------------------------------------------------------------


class Part:
    """What a part writes, and how long it has."""

    def __init__(self, args: argparse.Namespace, name: str, seconds: float):
        self.args, self.name, self.end = args, name, time.monotonic() + seconds
        self.device = torch.device(args.device)
        self.cuda, self.tiny = self.device.type == 'cuda', args.tiny

    def left(self) -> float:
        return self.end - time.monotonic()

    def row(self, what: str, **values: Any) -> None:
        row = {'part': self.name, 'seconds': round(time.monotonic() - BEGIN, 1), 'what': what, **values}
        with open(Path(self.args.out) / 'rows.jsonl', 'a') as file:
            file.write(json.dumps(row, default=str) + '\n')
        print(json.dumps(row, default=str), flush=True)

    @contextlib.contextmanager
    def case(self, what: str, seconds: float = 5, **values: Any) -> Iterator[Callable[..., None]]:
        """A case that may fail, whose error is a row then; yields what writes its row.

        Raises:
            OutOfTime: If the part has less than `seconds` left.
        """
        if self.left() < seconds:
            raise OutOfTime
        try:
            yield lambda **found: self.row(what, **values, **found)
        except Exception as error:  # whatever it is, the next case goes on
            frames = traceback.extract_tb(error.__traceback__)[-4:]
            where = [f'{Path(frame.filename).name}:{frame.lineno}' for frame in frames]
            self.row(what, **values, failed=describe(error), where=where)
        if self.cuda:
            torch.cuda.empty_cache()


class OutOfTime(Exception):
    """Of a part, before a case."""


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def describe(error: BaseException) -> str:
    return f'{type(error).__name__}: {first_line(error)}'


def bench(part: Part, call: Callable[[], object], seconds: float = 0.12, graph: bool = False) -> dict[str, Any]:
    """Median milliseconds of a call as it is launched, of the host alone, and, captured, of the device alone."""
    call()
    synchronize(part.device)
    start = time.perf_counter()
    call()
    synchronize(part.device)
    took = time.perf_counter() - start
    inner = max(1, min(200, int(seconds / 5 / max(took, 1e-6))))
    times, host = [], []
    for _ in range(5 if took < 1 else 1):
        start = time.perf_counter()
        for _ in range(inner):
            call()
        host.append((time.perf_counter() - start) / inner)
        synchronize(part.device)
        times.append((time.perf_counter() - start) / inner)
    found: dict[str, Any] = dict(ms=1e3 * statistics.median(times), host_ms=1e3 * min(host))
    if graph and part.cuda:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            call()
        found['graph_ms'] = bench(part, captured.replay, seconds)['ms']
    return {key: round(value, 4) for key, value in found.items()}


def peak(part: Part, call: Callable[[], object]) -> float | None:
    """MiB that a call adds."""
    if not part.cuda:
        return None
    return round(peak_on_cuda(call, part.device) / 2**20, 1)


def kernels(call: Callable[[], object], calls: int = 5) -> tuple[float, str]:
    """Milliseconds of all kernels of a call together, and the table of the longest."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    averages = profiled.key_averages()
    total = sum(event.self_device_time_total for event in averages) / calls / 1e3
    rows = sorted(averages, key=lambda event: -event.self_device_time_total)[:14]
    lines = [
        f'{row.self_device_time_total / calls:9.1f} µs  {row.count / calls:5.1f} ×  {row.key[:110]}' for row in rows
    ]
    return total, '\n'.join(lines)


def error_of(ours: Tensor, theirs: Tensor) -> float:
    """‖ours − theirs‖ / ‖theirs‖ in float64; NaN never passes."""
    a, b = ours.detach().double().cpu(), theirs.detach().double().cpu()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def host_ways() -> Any:
    """A context in which tensors of a GPU take the ways that are meant for a CPU: the only ones once."""
    return mock.patch.object(devices, 'HOSTS', ('cpu', 'cuda'))


def backend_of(name: str | None) -> Any:
    return sdpa_kernel([BACKENDS[name]]) if name else contextlib.nullcontext()


# --- the machine, and what fused attention does on it ----------------------------------------------------------------


def environment(part: Part) -> None:
    part.row('environment', **describe_environment(part.device))


def machine(part: Part) -> None:
    if not part.cuda:
        return
    a, b = (torch.randn(8192, 8192, device='cuda', dtype=torch.bfloat16) for _ in range(2))
    ms = bench(part, lambda: a @ b)['ms']
    big = torch.randn(2**29, device='cuda')
    copied = bench(part, lambda: big.clone())['ms']
    part.row('ceilings', matmul_tflops=round(2 * 8192**3 / ms / 1e9), copy_tbs=round(2 * big.nbytes / copied / 1e9, 2))
    for n in (4096, 16384):
        qkv = torch.randn(1, n, 3, 12, 64, device='cuda', dtype=torch.bfloat16, requires_grad=True)
        for name in (None, 'cudnn', 'flash', 'efficient'):
            with part.case('sdpa', n=n, backend=name or 'default') as write, backend_of(name):

                def forward(qkv=qkv):
                    q, k, v = qkv.unbind(2)
                    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))

                def both(qkv=qkv):
                    y = forward()
                    y.backward(y.detach())
                    qkv.grad = None

                with torch.no_grad():
                    f = bench(part, forward)['ms']
                fb, flop = bench(part, both)['ms'], 4 * n * n * 768
                backward = round(2.5 * flop / max(fb - f, 1e-6) / 1e9)
                write(ms=f, tflops=round(flop / f / 1e9), fb_ms=fb, backward_tflops=backward)
    probe(part)


def probe(part: Part) -> None:
    """What the mechanisms ask of fused attention beyond the large and dense: is it right, how fast, and how long does
    the first call of a shape take."""
    g = torch.Generator('cuda').manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device='cuda', dtype=torch.bfloat16, generator=g).requires_grad_()

    probes = {
        '1 query, 16,385 keys': (normal(1, 12, 1, 64), normal(1, 12, 16385, 64), None),
        '1 query, 65,537 keys': (normal(1, 12, 1, 64), normal(1, 12, 65537, 64), None),
        '64 queries, 16,384 keys': (normal(1, 12, 64, 64), normal(1, 12, 16384, 64), None),
        '16,384 queries, 64 keys': (normal(1, 12, 16384, 64), normal(1, 12, 64, 64), None),
        'bias (1, 1,025)': (normal(1, 12, 4097, 64), normal(1, 12, 1025, 64), normal(1, 1025).detach()),
        'bias (1, 1,088)': (normal(1, 12, 4097, 64), normal(1, 12, 1088, 64), normal(1, 1088).detach()),
        '40 groups, mask (40, 1, 1, 192)': (
            normal(40, 1, 150, 64),
            normal(40, 1, 192, 64),
            torch.rand(40, 1, 1, 192, device='cuda', generator=g) < 0.7,
        ),
        '324 windows of 49': (normal(324, 12, 49, 64), normal(324, 12, 49, 64), None),
        '68 channels': (normal(1, 12, 4096, 68), normal(1, 12, 1024, 68), None),
        '72 channels': (normal(1, 12, 4096, 72), normal(1, 12, 1024, 72), None),
    }
    for what, (q, k, mask) in probes.items():
        exact = exact_attention(q, k, mask)
        for name in (None, 'cudnn', 'flash', 'efficient'):
            # A backend that cannot do it is a result.
            if (name == 'flash' and mask is not None) or (name in ('cudnn', 'efficient') and q.shape[-1] % 8):
                continue
            with part.case('probe', probe=what, backend=name or 'default') as write, backend_of(name):
                start = time.perf_counter()
                y = F.scaled_dot_product_attention(q, k, k, attn_mask=mask)
                torch.cuda.synchronize()
                first = 1e3 * (time.perf_counter() - start)
                y.backward(torch.ones_like(y))
                errors = [error_of(a, b) for a, b in zip((y, q.grad, k.grad), exact, strict=True)]
                q.grad = k.grad = None
                with torch.no_grad():
                    call = bench(part, lambda q=q, k=k, m=mask: F.scaled_dot_product_attention(q, k, k, m), 0.05)
                beyond = [e for e in errors if not e < 1e-2]
                write(ms=call['ms'], first_call_ms=round(first, 1), errors=[f'{e:.1e}' for e in errors], beyond=beyond)
    for name in ('cudnn', 'flash', 'efficient'):
        with part.case('new shapes', backend=name) as write, backend_of(name):
            took = []
            for i in range(6):
                q, k = normal(7 + i, 1, 131 + i, 64), normal(7 + i, 1, 203 + i, 64)
                m = None if name == 'flash' else torch.ones(7 + i, 1, 1, 203 + i, dtype=torch.bool, device='cuda')
                torch.cuda.synchronize()
                start = time.perf_counter()
                F.scaled_dot_product_attention(q, k, k, attn_mask=m).sum().backward()
                torch.cuda.synchronize()
                took.append(round(1e3 * (time.perf_counter() - start), 1))
            write(ms_forward_and_backward=took)


def exact_attention(q: Tensor, k: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    """The output, and the gradients of queries and keys, in float64."""
    q, k = (t.detach().double().requires_grad_() for t in (q, k))
    bias = mask if mask is None or mask.dtype == torch.bool else mask.double()
    with sdpa_kernel([SDPBackend.MATH]):
        y = F.scaled_dot_product_attention(q, k, k, attn_mask=bias)
    y.backward(torch.ones_like(y))
    return y.detach(), q.grad, k.grad


# --- is it right -----------------------------------------------------------------------------------------------------

CASES = [
    *((name, {}) for name in vit_efficient.list_attentions()),
    ('dct', dict(keep_ratio=1 / 16)),
    ('dct', dict(domain='frequency')),
    ('dct', dict(place='qkv')),
    ('dct', dict(place='kv')),
    ('dct', dict(local=3)),
    ('dct', dict(domain='frequency', learned=True)),
    ('dct', dict(learned=True)),
    ('dct1d', dict(keep_ratio=0.99)),
    ('linformer', dict(projection='conv')),
    ('linformer', dict(projection='max')),
    ('linformer', dict(sharing='none')),
    ('pool', dict(num_tokens=60)),
    ('pool', dict(summary='local')),
    ('merge', dict(place='x', local_first=True)),
    ('combiner', dict(window_size=4, cell_size=2, reach=1, shift=True)),
    ('combiner', dict(pattern='axial')),
    ('subsample', dict(num_tokens=60)),
    ('nystrom', dict(residual_kernel=3)),
    ('window', dict(shift=True)),
    ('window', dict(window_size=8)),
    ('window', dict(window_size=8, shift=True)),
    ('treeformer_tc', dict(tree_height=7)),
    ('treeformer_tf', dict(tree_height=2, num_leaves=2)),
    ('treeformer_tf', dict(tree_height=7)),
]
LIMITS = {'float32': 2e-4, 'bfloat16': 3e-2, 'autocast': 3e-2}
# In half precision trees move 0.3 % of their leaves, and patches merge with others that are as near; the window of a
# learned truncation has few terms in its gradient.
LOOSE = {'merge': 0.3, 'treeformer_tc': 0.5, 'treeformer_tf': 0.3, 'linformer': 0.08, 'learned': 0.2}


def right(part: Part) -> None:
    """All mechanisms against float64 on the CPU, on the same rounded numbers."""
    torch.backends.cudnn.allow_tf32 = False
    for rows, columns, prefix in ((16, 16, 1), (12, 10, 0)) if part.tiny else ((32, 32, 1), (24, 20, 0)):
        for name, options in CASES:
            n = rows * columns
            what = dict(attention=str(Candidate(name, options)), n=n, prefix=prefix)
            with part.case('right', **what) as write:
                torch.manual_seed(0)
                setting = LayerSetting(192, 3, 2, torch.float32, torch.device('cpu'), prefix=prefix)
                state = setting.layer(Candidate(name, options), n).state_dict()
                x, g = torch.randn(2, 2, prefix + n, 192).unbind()
                for kind, limit in LIMITS.items():
                    loose = [v for k, v in LOOSE.items() if (k == name or k in options) and kind != 'float32']
                    found = compare(part, Candidate(name, options), n, prefix, kind, state, x, g)
                    beyond = [k for k, e in found['errors'].items() if not e < max([limit, *loose])]
                    write(kind=kind, beyond=beyond, **found)
    if part.cuda:
        constants_under_capture(part)
        leaves_under_tf32(part)


def compare(part: Part, candidate: Candidate, n: int, prefix: int, kind: str, state, x, g) -> dict[str, Any]:
    rounded = torch.bfloat16 if kind == 'bfloat16' else torch.float32
    state = {key: value.to(rounded) for key, value in state.items()}

    def one(device: torch.device, dtype: torch.dtype):
        layer = LayerSetting(192, 3, 2, dtype, device, prefix=prefix).layer(candidate, n)
        layer.load_state_dict(state)
        z = x.to(rounded).to(device, dtype, copy=True).requires_grad_()
        # A context for each: in one, PyTorch 2.10 would train with weights that were cast without a gradient.
        cast = partial(torch.autocast, device.type, torch.bfloat16, kind == 'autocast' and dtype != torch.float64)
        with torch.no_grad(), cast():
            folded = layer.eval()(z)
        with cast():
            y = layer.train()(z)
        y.backward(g.to(device, y.dtype))
        gradients = {key: p.grad for key, p in layer.named_parameters() if p.grad is not None}
        leaves = None
        if hasattr(layer.attn, 'leaves'):
            leaves = torch.stack(layer.attn.leaves(z.detach(), layer.grid)).cpu()
        return dict(eval=folded, train=y, dx=z.grad), gradients, leaves

    ours, our_gradients, our_leaves = one(part.device, rounded)
    theirs, their_gradients, their_leaves = one(torch.device('cpu'), torch.float64)
    errors = {key: error_of(ours[key], theirs[key]) for key in theirs}
    errors['dw'] = max(error_of(our_gradients[key], their_gradients[key]) for key in their_gradients)
    moved = None if our_leaves is None else float((our_leaves != their_leaves).double().mean())
    return dict(errors={key: float(f'{e:.1e}') for key, e in errors.items()}, leaves_moved=moved)


def constants_under_capture(part: Part) -> None:
    """Bases that are built inside of a capture hold nothing until it is replayed: eager calls must not read them."""
    with part.case('constants under capture') as write, torch.no_grad():
        setting = LayerSetting(192, 3, 1, torch.bfloat16, part.device)
        layer, x = setting.layer(Candidate('dct'), 900), setting.inputs(900)[0]
        good = copy.deepcopy(layer).double()(x.double())
        setting.layer(Candidate('dct'), 784)(x[:, :784])  # libraries are there
        layer(x)
        memo.clear()
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            layer(x)
        error = error_of(layer(x), good)
        write(error=error, beyond=[error] if not error < LIMITS['bfloat16'] else [])


def leaves_under_tf32(part: Part) -> None:
    """Decisions are of float32, also where TF32 is allowed."""
    with part.case('leaves under TF32') as write:
        setting = LayerSetting(192, 3, 1, torch.float32, part.device)
        layer, x = setting.layer(Candidate('treeformer_tc'), 1024), setting.inputs(1024)[0]
        torch.set_float32_matmul_precision('high')
        qkv = layer.attn.project(x)
        with mock.patch.object(layer.attn, 'project', lambda _: qkv):
            high = layer.attn.leaves(x, layer.grid)
            torch.set_float32_matmul_precision('highest')
            highest = layer.attn.leaves(x, layer.grid)
        moved = [float((a != b).double().mean()) for a, b in zip(high, highest, strict=True)]
        write(moved=moved, beyond=[share for share in moved if share])


# --- layers ----------------------------------------------------------------------------------------------------------

LAYERS = [
    ('dct', {}),
    ('dct', dict(keep_ratio=1 / 16)),
    ('treeformer_tc', {}),
    ('treeformer_tf', dict(tree_height=7)),
    ('performer', {}),
    ('window', dict(window_size=8)),
    ('linformer', {}),
    ('pool', {}),
    ('nystrom', {}),
    ('dct', dict(place='kv')),
    ('dct1d', {}),
    ('window', {}),
    ('subsample', {}),
    ('dct', dict(num_tokens=256)),
    ('treeformer_tc', dict(tree_height=7)),
]
TWO_WAYS = ('treeformer_tc', 'performer', 'window')  # the host's and a GPU's


def layers(part: Part) -> None:
    """Layers of ViT-B's width against the faster exact attention; those with two ways by both."""
    sizes = [(1, 16384, 0), (1, 65536, 0), (8, 16384, 0), (1, 4096, 1), (8, 4096, 0), (1, 1024, 0)]
    for batch, n, prefix in [(1, 256, 0)] if part.tiny else sizes:
        exact = (math.inf, math.inf)
        for backend in (None, 'flash') if part.cuda else (None,):
            found = layer(part, EXACT, batch, n, prefix, backend, False, (math.nan, math.nan))
            exact = tuple(map(min, exact, found))
        for name, options in LAYERS:
            ways = (False, True) if name in TWO_WAYS and (batch, n) == (1, 16384) else (False,)
            for old in ways:
                layer(part, Candidate(name, options), batch, n, prefix, None, old, exact)


def layer(part: Part, candidate, batch: int, n: int, prefix: int, backend: str | None, old: bool, exact) -> tuple:
    """Milliseconds of the forward pass, the least of eager and replayed, and with the backward pass."""
    times = (math.inf, math.inf)
    dim, heads = (48, 3) if part.tiny else (768, 12)
    what = dict(n=n, batch=batch, prefix=prefix, attention=str(candidate), way=backend or ('host' if old else ''))
    with part.case('layer', **what) as write, host_ways() if old else contextlib.nullcontext(), backend_of(backend):
        setting = LayerSetting(dim, heads, batch, torch.bfloat16, part.device, prefix=prefix)
        torch.manual_seed(0)
        module = setting.layer(candidate, n)
        x, g = setting.inputs(n)
        inputs = [
            torch.randn_like(x) for _ in range(4 if candidate.name == 'treeformer_tf' else 1)
        ]  # its shapes follow

        def forward() -> None:
            inputs.append(inputs.pop(0))
            with torch.inference_mode():
                module(inputs[0])

        def both() -> None:
            module(x).backward(g)
            module.zero_grad()
            x.grad = None

        module.eval()
        f, memory = bench(part, forward, graph=candidate.name != 'treeformer_tf'), peak(part, forward)
        module.train()
        fb = bench(part, both)
        times = (min(f['ms'], f.get('graph_ms', math.inf)), fb['ms'])
        ratios = dict(x=exact[0] / f['ms'], x_graph=exact[0] / f.get('graph_ms', math.nan), x_fb=exact[1] / fb['ms'])
        ratios = {key: round(value, 2) for key, value in ratios.items() if not math.isnan(value)}
        write(**f, **ratios, fb_ms=fb['ms'], fb_host_ms=fb['host_ms'], mib=memory, fb_mib=peak(part, both))
    return times


# --- models ----------------------------------------------------------------------------------------------------------

_BLOCK = ['dct', dict(keep_ratio=1 / 16, place='block')]
MODELS = {
    'exact (timm)': ('vit_base_patch16_224', {}),
    'dct N/4': ('vit_dct_base', {}),
    'dct N/16': ('vit_dct_base', dict(attention_kwargs=dict(keep_ratio=1 / 16))),
    'dct N/16, block': ('vit_dct_base', dict(attention=[['dct', dict(keep_ratio=1 / 16)]] + [_BLOCK] * 11)),
    'swin_base': ('swin_base_patch4_window7_224', {}),
    'hiera_base': ('hiera_base_224', {}),
}


def build(part: Part, kind: str, px: int, dtype: torch.dtype, training: bool) -> nn.Module:
    name, args = MODELS[kind]
    if part.tiny:
        args = dict(args, embed_dim=48, num_heads=3)
    torch.manual_seed(0)
    with part.device:
        return timm.create_model(name, img_size=px, **args).to(dtype).train(training)


def inference(model: nn.Module, x: Tensor) -> Callable[[], None]:
    def call() -> None:
        with torch.inference_mode():
            model(x)

    return call


def update(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """An update in mixed precision, by fused AdamW."""
    labels = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-6, fused=x.is_cuda or None)

    def call() -> None:
        with torch.autocast(x.device.type, torch.bfloat16):
            loss = F.cross_entropy(model(x).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return call


def models(part: Part) -> None:
    """ViT-B: inference in bfloat16, eager and replayed, and updates in mixed precision."""
    plan = [
        (2048, 1, 'inference'),
        (2048, 1, 'training step'),
        (1024, 1, 'inference'),
        (1024, 8, 'inference'),
        (1024, 4, 'training step'),
        (4096, 1, 'inference'),
        (224, 1, 'inference'),
        (224, 64, 'inference'),
        (4096, 1, 'training step'),
        (224, 64, 'training step'),
    ]
    for px, batch, work in [(64, 1, 'inference'), (64, 1, 'training step')] if part.tiny else plan:
        exact: dict[str, float] = {}
        peers = ('swin_base', 'hiera_base') if (px, batch, work) == (1024, 1, 'inference') else ()
        for kind in ('exact (timm)', 'dct N/4', 'dct N/16', 'dct N/16, block', *peers):
            with part.case('model', 8, px=px, batch=batch, work=work, model=kind) as write:
                found = time_model(part, kind, px, batch, work)
                exact = exact or found
                ratios = {
                    f'x_{k}': round(exact[k] / found[k], 2) for k in ('ms', 'graph_ms') if k in found and k in exact
                }
                write(**found, **ratios, images_s=round(1e3 * batch / found['ms'], 2))


def time_model(part: Part, kind: str, px: int, batch: int, work: str, compiled: bool = False) -> dict[str, Any]:
    """A model as it is launched, and inference replayed from a graph; if compiled, its first call."""
    training, found = work != 'inference', {}
    dtype = torch.float32 if training else torch.bfloat16
    model = build(part, kind, px, dtype, training)
    x = torch.randn(batch, 3, px, px, device=part.device, dtype=dtype)
    call = update(model, x) if training else inference(model, x)
    if compiled:
        vit_efficient.models.compile_blocks(model)
        start = time.perf_counter()
        call()
        synchronize(part.device)
        found['first_call_s'] = round(time.perf_counter() - start, 1)
    found.update(bench(part, call, 0.3), mib=peak(part, call))
    if part.cuda and not training:
        replayed = vit_efficient.graphed(model, x)
        found['graph_ms'] = bench(part, inference(replayed, x), 0.3)['ms']
        if replayed.reasons:
            raise RuntimeError(f'no graph: {replayed.reasons}')
    return found


# --- does it train ---------------------------------------------------------------------------------------------------


class One(int):
    """1 that is taken for several: a process group of one, whose collectives, DDP and FSDP are not skipped."""

    def __new__(cls) -> 'One':
        return super().__new__(cls, 1)

    def __gt__(self, other: object) -> bool:
        return True if other == 1 else int(self) > int(other)

    def __eq__(self, other: object) -> bool:
        return False if isinstance(other, int) and int(other) == 1 else int.__eq__(self, other)

    __hash__ = int.__hash__


def write_images(folder: Path, count: int, px: int) -> None:
    from PIL import Image

    random = np.random.default_rng(0)
    for split, number in (('train', count), ('val', 32)):
        for i in range(number):
            path = folder / split / f'class{i % 4}' / f'{i:05}.jpg'
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = random.integers(0, 256, (px // 8, px // 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
            pixels[..., 0] = np.maximum(pixels[..., 0], 60 * (i % 4))
            Image.fromarray(pixels).save(path, quality=90)


def training(part: Part) -> None:
    """NCCL, DDP, FSDP2 and their checkpoints in a group of one; a recipe by the command line, stopped and resumed."""
    folder, tiny = Path(tempfile.mkdtemp()), part.tiny
    write_images(folder / 'images', 64 if tiny else 1536, 64 if tiny else 320)
    size, batch = (64, 8) if tiny else (224, 64)

    def overrides(name: str, *more: str) -> list[str]:
        model = ['model.args.embed_dim=48', 'model.args.num_heads=3', 'model.args.depth=2'] if tiny else []
        data = [f'data.train={folder}/images/train', f'data.val={folder}/images/val', f'data.batch_size={batch}']
        run_ = ['sched.epochs=2', 'sched.warmup_epochs=0', 'log_every=1', 'amp=bf16', f'device={part.args.device}']
        workers = f'data.workers={0 if tiny else 14}'
        return [*data, *run_, workers, f'output={folder}/{name}', f'model.args.img_size={size}', *model, *more]

    def metrics(name: str) -> dict[str, Any]:
        lines = read_rows(folder / name / 'metrics.jsonl')
        steps = [line for line in lines if line['kind'] == 'train']
        rate = statistics.median([line['images_per_second'] for line in steps[3:] or steps])
        top1 = [line['top1'] for line in lines if 'top1' in line]
        losses = dict(first_loss=steps[0]['loss'], last_loss=steps[-1]['loss'])
        return dict(updates=len(steps), images_s=round(rate), top1=top1[-1] if top1 else None, **losses)

    workers = f'data.workers={0 if tiny else 4}'
    small = ['model.args.depth=2', 'sched.epochs=1', workers, 'ema.decay=0.9', 'loss.mixup=0.8']

    @contextlib.contextmanager
    def team(_device: str) -> Iterator[Processes]:
        if not dist.is_initialized():
            backend = 'cpu:gloo,cuda:nccl' if part.cuda else 'gloo'
            dist.init_process_group(backend, init_method=f'file://{folder}/group', rank=0, world_size=1)
        yield Processes(torch.device(part.device.type, 0) if part.cuda else part.device, 0, One())

    runs = {
        'fsdp': ['parallel=fsdp'],
        'ddp': ['parallel=ddp'],
        'treeformer_tc': ['model.name=vit_treeformer_tc_small'],
        'treeformer_tf': ['model.name=vit_treeformer_tf_small'],
        'window': ['model.name=vit_window_small'],
        'learned': ['model.args.attention_kwargs={learned: true}', 'truncation.penalty=0.1'],
        'compiled': ['compile=true', 'ema.decay=0', 'loss.mixup=0'],
        'ddp compiled': ['parallel=ddp', 'compile=true', 'ema.decay=0', 'loss.mixup=0'],
    }
    for name, more in runs.items():
        if tiny and 'compile=true' in more and name != 'compiled':
            continue
        with part.case('train', 12, run=name) as write, contextlib.ExitStack() as stack:
            if 'parallel' in more[0]:
                stack.enter_context(mock.patch.object(run, 'processes', team))
            train(load_recipe('recipes/images.yaml', overrides(name.replace(' ', '_'), *small, *more)))
            write(**metrics(name.replace(' ', '_')))
        if name == 'fsdp':
            with part.case('train', 12, run='fsdp to one process') as write:
                train(load_recipe('recipes/images.yaml', overrides('fsdp', *small, 'resume=auto')))
                write(**metrics('fsdp'))
    if dist.is_initialized():
        dist.destroy_process_group()
    with part.case('train', 25, run='by the command line, stopped by SIGTERM, resumed') as write:
        write(**stopped_and_resumed(folder / 'cli', overrides('cli', 'checkpoint_steps=4')), **metrics('cli'))


def stopped_and_resumed(folder: Path, overrides: list[str]) -> dict[str, int]:
    command = [sys.executable, '-m', 'vit_efficient', 'train', 'recipes/images.yaml', *overrides]
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join([os.getcwd(), os.environ.get('PYTHONPATH', '')])}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    waited = time.monotonic()
    while not (folder / 'checkpoint.pt').exists() and process.poll() is None and time.monotonic() - waited < 60:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=40)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90)
    if done.returncode:
        raise RuntimeError(done.stderr[-300:])
    return dict(stopped_with=process.returncode, resumed_with=done.returncode)


# --- compiled, others' ways, kernels ---------------------------------------------------------------------------------


def compiled(part: Part) -> None:
    """Models compiled block by block: one graph for equal blocks."""
    plan = [
        (1024, 'dct N/16, block', 'inference', 1),
        (1024, 'exact (timm)', 'inference', 1),
        (1024, 'dct N/4', 'inference', 1),
        (1024, 'dct N/4', 'training step', 4),
        (1024, 'exact (timm)', 'training step', 4),
    ]
    for px, kind, work, batch in [(64, 'dct N/4', 'inference', 1)] if part.tiny else plan:
        with part.case('compiled', 20, px=px, batch=batch, work=work, model=kind) as write:
            torch.compiler.reset()
            write(**time_model(part, kind, px, batch, work, compiled=True))


PEERS = [('tome', {}), ('flex_window', dict(window_size=8))]


def peers(part: Part) -> None:
    """Layers of others, beside ours in `layers`."""
    for name, options in PEERS if part.cuda else PEERS[:1]:  # FlexAttention has no backward pass on a CPU
        layer(part, Candidate(name, options), 1, 256 if part.tiny else 16384, 0, None, False, (math.nan, math.nan))


def transforms(part: Part) -> None:
    """Down to fewer tokens and up again, with either axis first."""
    side, dim = (16, 48) if part.tiny else (128, 768)
    x = torch.randn(1, side, side, dim, device=part.device, dtype=torch.bfloat16)
    for kept in (side // 4, side // 2):
        y = torch.randn(1, kept, kept, dim, device=part.device, dtype=torch.bfloat16)
        for direction, z, size in (('down', x, kept), ('up', y, side)):
            for first, dims in (('rows', (-3, -2)), ('columns', (-2, -3))):
                with (
                    part.case('transform', direction=direction, kept=kept, first=first) as write,
                    torch.inference_mode(),
                ):
                    call = partial(vit_efficient.dct.resample, z, (size, size), dims=dims)
                    write(**bench(part, call, graph=True))


def profiled(part: Part) -> None:
    """Kernels by time, their sum, and how much longer a replayed graph takes."""
    if not part.cuda:
        return
    text = ''
    plan = [
        ('dct', {}),
        ('dct', dict(keep_ratio=1 / 16)),
        ('treeformer_tc', {}),
        ('treeformer_tf', dict(tree_height=7)),
    ]
    for name, options in [*plan, ('performer', {}), ('window', dict(window_size=8))]:
        candidate, n = Candidate(name, options), 16384
        with part.case('profile', attention=str(candidate), n=n) as write:
            setting = LayerSetting(768, 12, 1, torch.bfloat16, part.device)
            call = inference(setting.layer(candidate, n).eval(), setting.inputs(n)[0].detach())
            total, table = kernels(call)
            graph = bench(part, call, graph=name != 'treeformer_tf').get('graph_ms')
            write(kernels_ms=round(total, 4), graph_ms=graph, overhead=round(graph / total, 3) if graph else None)
            text += f'{candidate}, {n} patches: {total:.4f} ms of kernels, {graph} ms replayed\n{table}\n\n'
    for px, kind in ((2048, 'dct N/16, block'), (2048, 'dct N/4')):
        with part.case('profile', 8, attention=f'ViT-B, {kind}', n=(px // 16) ** 2) as write:
            x = torch.randn(1, 3, px, px, device=part.device, dtype=torch.bfloat16)
            call = inference(build(part, kind, px, torch.bfloat16, False), x)
            total, table = kernels(call)
            graph = bench(part, call, graph=True)['graph_ms']
            write(kernels_ms=round(total, 4), graph_ms=graph, overhead=round(graph / total, 3))
            text += f'ViT-B, {kind}, {px} px: {total:.4f} ms of kernels, {graph} ms replayed\n{table}\n\n'
    (Path(part.args.out) / 'profile.txt').write_text(text)


# --- all of it -------------------------------------------------------------------------------------------------------

PARTS: dict[str, tuple[float, Callable[[Part], None]]] = {  # seconds at most; in the order of their worth
    'environment': (20, environment),
    'machine': (45, machine),
    'right': (60, right),
    'layers': (110, layers),
    'models': (100, models),
    'training': (110, training),
    'transforms': (10, transforms),
    'profiled': (25, profiled),
    'compiled': (90, compiled),
    'peers': (40, peers),
}
TABLES = {
    'ceilings': ['matmul_tflops', 'copy_tbs'],
    'sdpa': ['n', 'backend', 'ms', 'tflops', 'fb_ms', 'backward_tflops'],
    'probe': ['probe', 'backend', 'ms', 'first_call_ms', 'errors'],
    'new shapes': ['backend', 'ms_forward_and_backward'],
    'layer': [
        'n',
        'batch',
        'prefix',
        'attention',
        'way',
        'ms',
        'host_ms',
        'graph_ms',
        'x',
        'x_graph',
        'fb_ms',
        'x_fb',
        'mib',
        'fb_mib',
    ],
    'model': ['px', 'batch', 'work', 'model', 'ms', 'host_ms', 'graph_ms', 'x_ms', 'x_graph_ms', 'images_s', 'mib'],
    'compiled': ['px', 'batch', 'work', 'model', 'first_call_s', 'ms', 'graph_ms', 'mib'],
    'transform': ['direction', 'kept', 'first', 'ms', 'host_ms', 'graph_ms'],
    'profile': ['attention', 'n', 'kernels_ms', 'graph_ms', 'overhead'],
    'train': ['run', 'updates', 'images_s', 'first_loss', 'last_loss', 'top1'],
    'constants under capture': ['error'],
    'leaves under TF32': ['moved'],
}


def summarise(out: Path) -> tuple[str, bool]:
    """The rows as tables, and whether all that was asked for was measured, without a failure, within its limits."""
    rows = read_rows(out / 'rows.jsonl')
    lines = ['# GPU check', '']
    for row in rows:
        if row['what'] == 'environment':
            lines += [f'{one_line(row)}.', '']
    for what, columns in TABLES.items():
        found = [row for row in rows if row['what'] == what and 'failed' not in row]
        if found:
            table = Table(columns, [{column: row.get(column) for column in columns} for row in found])
            lines += [f'## {what}', '', table.render()]
    compared = [row for row in rows if row['what'] == 'right' and 'kind' in row]
    beyond = [row for row in rows if row.get('beyond')]
    worst = {kind: [max(r['errors'].values()) for r in compared if r['kind'] == kind] for kind in LIMITS}
    worst = {kind: max(errors) for kind, errors in worst.items() if errors}
    lines += [
        f'## right: {len(compared)} comparisons, largest errors {worst}, {len(beyond)} rows beyond their limit',
        '',
    ]
    lines += [f'- {json.dumps(row)}' for row in beyond]
    failed = [row for row in rows if 'failed' in row]
    lines += ['', f'## failed or cut short: {len(failed)}', '', *(f'- {json.dumps(row)[:400]}' for row in failed)]
    text = '\n'.join(lines) + '\n'
    (out / 'summary.md').write_text(text)
    return text, not beyond and not failed


def run_part(part: Part, function: Callable[[Part], None]) -> None:
    if part.cuda and torch.cuda._is_in_bad_fork():  # something has asked for a GPU in the parent: a new process
        os.execv(sys.executable, [sys.executable, __file__, *sys.argv[1:], '--alone', part.name])
    try:
        function(part)
    except OutOfTime:
        part.row(part.name, failed='cut short: out of time')
    except BaseException as error:
        part.row(part.name, failed=describe(error), where=traceback.format_exc()[-600:])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', required=True, help='a folder')
    parser.add_argument('--device', default='cuda')
    parser.add_argument('--budget', type=float, default=480, help='seconds for all parts')
    parser.add_argument('--parts', nargs='*', choices=PARTS, default=list(PARTS))
    parser.add_argument('--tiny', action='store_true', help='sizes that a CPU can do')
    parser.add_argument('--stretch', type=float, default=1, help='the factor of all deadlines')
    parser.add_argument('--alone', choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if args.alone:
        run_part(Part(args, args.alone, PARTS[args.alone][0] * args.stretch), PARTS[args.alone][1])
        return 0
    (out / 'rows.jsonl').unlink(missing_ok=True)
    fork = multiprocessing.get_context('fork')  # of a parent that has imported everything and asked for no GPU
    for name in dict.fromkeys([*list(PARTS)[:1], *args.parts]):  # the environment, whatever is asked for
        seconds, function = PARTS[name]
        left = args.budget - (time.monotonic() - BEGIN)
        part = Part(args, name, min(seconds * args.stretch, left - 5))
        if left < 10:
            part.row(name, failed='not begun: out of time')
            continue
        process = fork.Process(target=run_part, args=(part, function))
        process.start()
        process.join(part.left() + 15)
        if process.is_alive():  # it hangs, or is in a long call
            process.kill()
            process.join()
            part.row(name, failed='killed: beyond its time')
        elif process.exitcode:
            part.row(name, failed=f'ended with {process.exitcode}')
        summarise(out)
    text, good = summarise(out)
    print(text[-11000:])
    return 0 if good else 1


if __name__ == '__main__':
    sys.exit(main())
