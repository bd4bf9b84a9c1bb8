"""Attention layers timed against timm's exact attention in one run."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from timm.layers import Attention, RotaryEmbeddingDinoV3
from torch import Tensor, nn
from torch.nn import functional as F

from vit_efficient.attention import GridAttention, create_attention, layer_options
from vit_efficient.benchmark.peers import PEERS, create_peer
from vit_efficient.benchmark.products import products_of
from vit_efficient.benchmark.timing import CPU, Call, Shared, check_plans, check_request, compiled_by_now, measure_block
from vit_efficient.benchmark.ways import Inputs, check_way, depends_on_data, replayed, sdpa_context, way_of
from vit_efficient.flops import count_flops
from vit_efficient.grid import PatchGrid
from vit_efficient.utils.errors import UserError

PASSES = ('forward', 'forward+backward')


@dataclass(frozen=True)
class Candidate:
    """An attention that is timed: a registered name or one of `peers.PEERS`, after any `ways`, and its options."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        shown = {key: f'{value:.4g}' if isinstance(value, float) else value for key, value in self.options.items()}
        return f'{self.name} ({", ".join(f"{key}={value}" for key, value in shown.items())})' if shown else self.name


#: timm's own layer, against which the others are timed.
EXACT = Candidate('exact (timm)')


@dataclass(frozen=True)
class LayerSetting:
    """What layers that are compared have in common."""

    dim: int = 768
    num_heads: int = 12
    batch_size: int = 1
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU
    compiled: bool = False  # time `torch.compile`d layers; compiling is not timed
    prefix: int = 0  # tokens before the patches (class token, registers)
    sdpa: str | None = None  # the only backend of SDPA that may run, of `ways.BACKENDS`
    graph: bool = False  # on CUDA: time the forward pass as the replay of a graph
    rope: bool = False  # with rotary positions, DINOv3's; of our layers

    def layer(self, candidate: Candidate, tokens: int, device: torch.device | str | None = None) -> nn.Module:
        """A layer that is called with (B, prefix + tokens, dim).

        Raises:
            UserError: If the name or an option is unknown, an option does not fit the grid, place='block' is asked for,
                which is no layer's, or the device cannot do what the setting or the name's ways ask for.
        """
        factory = dict(device=device or self.device, dtype=self.dtype)
        grid = squarest_grid(tokens, self.prefix)
        name, setting = way_of(candidate.name, self)
        check_way(setting, self.dim // self.num_heads)
        if setting.rope and name in PEERS:
            raise UserError(f'{candidate}: rope/NAME is of the attentions here; of exact attention it is rope/full')
        if candidate == EXACT:
            return LayerOnGrid(Attention(self.dim, self.num_heads, qkv_bias=True, **factory), grid)
        if name in PEERS:
            peer = create_peer(name, self.dim, self.num_heads, grid, candidate.options)
            return LayerOnGrid(peer.to(**factory), grid)
        size = (grid.height, grid.width)
        options = layer_options(name, candidate.options, layer=0, depth=1, grid_size=size)
        attention = create_attention(name, self.dim, self.num_heads, qkv_bias=True, **factory, **options)
        if attention.of_block:
            raise UserError(
                f"{candidate}: at place='block' it is the block that goes down and up, with its MLP, and no layer to "
                "time alone; time it in a model (benchmark model, attention_kwargs={'place':'block'})"
            )
        return LayerOnGrid(attention, grid, self._rope(attention, grid) if setting.rope else None)

    def _rope(self, attention: GridAttention, grid: PatchGrid) -> Tensor:
        """Rotary positions of the patches, (N, 2 · head_dim)."""
        if attention.head_dim % 4:
            heads = f'dim={self.dim}, num_heads={self.num_heads}'
            raise UserError(
                f'rope/NAME needs a multiple of 4 channels for each head, got {heads}: {attention.head_dim}'
            )
        attention.check_rotary()
        attention.rotate_half = True
        embedding = RotaryEmbeddingDinoV3(attention.head_dim, feat_shape=(grid.height, grid.width))
        return embedding.get_embed().to(attention.kind_of_weights()['device'])

    def inputs(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Tokens, and the gradient of what a layer makes of them."""
        x = torch.randn(self.batch_size, self.prefix + tokens, self.dim, dtype=self.dtype, device=self.device)
        return x.requires_grad_(), torch.randn_like(x)


def squarest_grid(tokens: int, prefix: int = 0) -> PatchGrid:
    """The grid of `tokens` patches whose sides are closest to each other, after `prefix` other tokens."""
    height = next(h for h in range(math.isqrt(tokens), 0, -1) if tokens % h == 0)
    return PatchGrid(height, tokens // height, prefix)


class LayerOnGrid(nn.Module):
    """An attention with its grid and rotary positions, if any, so that it is called with the tokens alone."""

    def __init__(self, attention: Attention, grid: PatchGrid, rope: Tensor | None = None):
        super().__init__()
        self.attn = attention
        self.grid = grid
        self.register_buffer('rope', rope, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 4:  # counting FLOPs gives an image of `dim` channels
            x = F.pad(x.flatten(2).mT, (0, 0, self.grid.prefix, 0))
        if not isinstance(self.attn, GridAttention):
            return self.attn(x)
        positions = {} if self.rope is None else {'rope': self.rope}
        return self.attn(x, self.grid, **positions)


def benchmark_layer(
    candidates: Sequence[Candidate],
    tokens: Sequence[int],
    setting: LayerSetting | None = None,
    rounds: int = 5,
    max_seconds: float = math.inf,
    memory: bool = True,
    products: bool = False,
) -> Iterator[list[dict[str, Any]]]:
    """Times attention layers, projections included, against timm's `Attention` in the same run.

    Args:
        candidates: What is compared.
        tokens: Numbers of patches N; the grid is the squarest of N.
        setting: Of the layers and their input.
        rounds, max_seconds, memory: Of each block, as in `compare`.
        products: Time the matrix products of each layer alone, too (see `products_of`).

    Returns:
        The blocks of rows, one for each N and pass, as they are measured; in a block a row for timm's layer and for
        each candidate: tokens, work, attention, attended, gmacs, sdpa (the backend, if one was asked for), fresh_inputs
        (whether it has another input on each call, because its cost depends on it), what `compare` returns (to_part: to
        its products alone), and peak_share: the multiply-accumulates per second, as a share of those of a large matrix
        product. A layer that fails, or cannot be had at this N, has an error instead of times.

    Raises:
        UserError: If a number is out of range, or a candidate has a name or option that is not known, or can be had
            at none of the N. This is known before anything is timed.
    """
    setting = setting or LayerSetting()
    numbers = dict(dim=setting.dim, num_heads=setting.num_heads, batch_size=setting.batch_size, rounds=rounds)
    candidates = [EXACT, *candidates]
    check_request([*numbers.items(), *(('tokens', n) for n in tokens)], max_seconds, [map(str, candidates), tokens])
    if setting.dim % setting.num_heads:
        raise UserError(f'num_heads must divide dim, got dim={setting.dim}, num_heads={setting.num_heads}')
    plans = [[_plan(candidate, n, setting) for n in tokens] for candidate in candidates]
    check_plans(plans)

    def blocks() -> Iterator[list[dict[str, Any]]]:
        for n, of_tokens in zip(tokens, zip(*plans, strict=True), strict=True):
            inputs = Shared(partial(setting.inputs, n))
            for work in PASSES:
                given = [(candidate, n, setting, work, inputs) for candidate in candidates]
                makes = [partial(layer_call, *arguments) for arguments in given]
                parts = [partial(_products, *arguments) for arguments in given if products]
                yield measure_block(of_tokens, work, makes, setting, (rounds, max_seconds, memory), parts)

    return blocks()


def _plan(candidate: Candidate, tokens: int, setting: LayerSetting) -> dict[str, Any]:
    """What is known of a row before anything runs."""
    name, in_its_way = way_of(candidate.name, setting)
    plan = dict(tokens=tokens, attention=str(candidate), attended=None, gmacs=None, error=None)
    plan |= dict(sdpa=in_its_way.sdpa, fresh_inputs=None)
    of_peer = name in PEERS
    try:
        layer = setting.layer(candidate, tokens, device='meta')
        with suppress(Exception) if of_peer else nullcontext():  # not all of them run without data
            size = setting.dim, layer.grid.height, layer.grid.width
            plan['gmacs'] = count_flops(layer, size, setting.batch_size).total / 1e9
    except UserError as error:
        return plan | dict(error=str(error))
    plan['fresh_inputs'] = depends_on_data(layer) or None
    if not of_peer:
        plan['attended'] = layer.grid.num_tokens if candidate == EXACT else layer.attn.num_attended(layer.grid)
    return plan


def _products(candidate: Candidate, tokens: int, setting: LayerSetting, work: str, inputs: Shared):
    # Of the layer as it is written: what it was compiled to shows no operators.
    name, setting = way_of(candidate.name, setting)
    candidate, setting = replace(candidate, name=name), replace(setting, compiled=False, graph=False)
    return products_of(partial(layer_call, candidate, tokens, setting, work, inputs, guard=torch.no_grad))


def layer_call(
    candidate: Candidate,
    tokens: int,
    setting: LayerSetting,
    work: str,
    inputs: Shared,
    guard: Callable[[], Any] = torch.inference_mode,
) -> Call:
    _, setting = way_of(candidate.name, setting)
    x, gradient = inputs()
    module = setting.layer(candidate, tokens).train(work != 'forward')
    of_call = Inputs(x, depends_on_data(module))
    context, graph = sdpa_context(setting), ''
    run = torch.compile(module, dynamic=False) if setting.compiled else module
    if work == 'forward':

        def call() -> None:
            with guard():
                run(of_call())
    else:
        graph = 'not the backward pass' * setting.graph

        def call() -> None:
            x = of_call()
            run(x).backward(gradient)
            module.zero_grad()
            x.grad = None

    compiles = setting.compiled or getattr(module.attn, 'compiles', False)
    compiled_by_now(Call(call, context=context), compiles, setting.device)
    if setting.graph and not graph:
        with context():
            run, graph = replayed(run, x.detach())
    return Call(call, of_call.prepare, context, graph)
