"""Performer attention: positive orthogonal random features of the softmax kernel.

Source: Choromanski et al., "Rethinking Attention with Performers", ICLR 2021, arXiv 2009.14794 (FAVOR+, bidirectional).

With q̂ = q / D^¼, k̂ likewise, and r random vectors w, the softmax kernel exp(q · k / √D) is the mean over them of
φ_w(q̂) φ_w(k̂), where φ_w(x) = exp(w · x − ‖x‖² / 2) (lemma 1): positive, so that no denominator vanishes. Then

    out(q) = Σ_w φ_w(q̂) Σ_n φ_w(k̂_n) v_n / Σ_w φ_w(q̂) Σ_n φ_w(k̂_n)
           = softmax_w(w · q̂ + b_w) · u_w,   b_w = log Σ_n φ_w(k̂_n),   u_w = Σ_n φ_w(k̂_n) v_n / Σ_n φ_w(k̂_n)

The second line, which is how it is computed, needs no epsilon: features are exponentials, and a query attends to them
as it would to keys. That runs fused, and the N × r features of the queries are never stored.

Letters: B batch, N tokens, C channels, H heads, D channels of q and k, E of v, r random features.
"""

import math
from functools import partial
from typing import Any

import torch
from timm.layers import register_notrace_function
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vit_efficient.attention.base import GridAttention
from vit_efficient.attention.functional import attend, bias_as_channel
from vit_efficient.attention.registry import register_attention
from vit_efficient.grid import PatchGrid
from vit_efficient.utils.checks import as_integer
from vit_efficient.utils.compat import flash_attention_on_gpu, has_flash_attention, unwrap
from vit_efficient.utils.device import on_gpu
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.precision import without_autocast

KEYS_OF_BLOCK = 1024  # at most, on the CPU
BYTES_OF_BLOCK = 2**29  # on a GPU, of its features: a block of 1,024 keys would take longer to start than to compute


@register_attention('performer')
class PerformerAttention(GridAttention):
    """Attention by random features of the softmax kernel; prefix tokens are tokens like the others.

    The features are drawn from torch's random state when the module is built, and stay as they are, in training too,
    until `redraw_features`. They are a buffer and part of the state dict, one for all heads of a layer.
    In training keys are dropped (`drop_keys`), each from the sums of all queries of its head.

    Args:
        dim, num_heads, **kwargs: As timm's `Attention`.
        num_features: r. The error falls as 1/√r. By default ⌊D ln D⌋, as in the public implementations: 266 for D = 64.
    """

    can_be_differential = True

    def configure(self, *, num_features: int | None = None) -> None:
        if num_features is None:
            num_features = max(1, int(self.head_dim * math.log(self.head_dim)))
        num_features = as_integer('num_features', num_features)
        self.register_buffer('features', torch.empty(num_features, self.head_dim, **self.kind_of_weights()))
        self.redraw_features()

    @property
    def options(self) -> dict[str, Any]:
        return dict(num_features=self.features.shape[0])

    @torch.no_grad()
    def redraw_features(self, generator: torch.Generator | None = None) -> None:
        """Draws other features, in place. Between steps: a backward pass needs those of its forward pass.

        Args:
            generator: On the CPU, whatever the device of the module; torch's global one by default.
        """
        if not self.features.is_meta:
            self.features.copy_(orthogonal_features(*self.features.shape, generator))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.redraw_features()

    def forward(
        self,
        x: Tensor,
        grid: PatchGrid,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        self.check_call(x, grid, attn_mask, is_causal)
        q, k, v = self.project(x)
        q, k = self.rotate(q, k, rope, grid.prefix)
        v = self.drop_keys(self.values_of_maps(v))
        y = attend_features(q, k, v, self.features, self.scale, self.fused_attn)
        return self.finish(self.merge_heads(y), x)

    def num_attended(self, grid: PatchGrid) -> int:
        """N: every query sees all keys, through the features."""
        return grid.num_tokens


def redraw_features(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """Draws other features for every Performer attention of a model, in place.

    An average of weights, such as timm's `ModelEmaV3`, averages features too, and those of different draws average to
    none: after a call, copy the features to it.

    Args:
        model: Or any module.
        generator: On the CPU; torch's global one by default. Give each process of a distributed run the same.

    Raises:
        UserError: If there is none.
    """
    *_, model = unwrap(model)
    attentions = [module for module in model.modules() if isinstance(module, PerformerAttention)]
    if not attentions:
        raise UserError(f"{type(model).__name__} has no attention 'performer' whose features could be redrawn")
    for attention in attentions:
        attention.redraw_features(generator)


def orthogonal_features(num_features: int, dim: int, generator: torch.Generator | None = None) -> Tensor:
    """Rows of independent standard normal vectors' law each, orthogonal within blocks of `dim` (section 2.4).

    Args:
        num_features: r
        dim: D
        generator: On the CPU; torch's global one by default.

    Returns:
        (r, D), float64, on the CPU.
    """
    normal = dict(generator=generator, dtype=torch.float64, device='cpu')
    blocks = -(-num_features // dim)
    q, r = torch.linalg.qr(torch.randn(blocks, dim, dim, **normal))
    # LAPACK's own choice of signs would favour one side of the sphere (Mezzadri, 2007, arXiv math-ph/0609050).
    directions = (q * r.diagonal(dim1=1, dim2=2).sgn()[:, None]).flatten(0, 1)[:num_features]
    return directions * torch.randn(num_features, dim, **normal).norm(dim=1, keepdim=True)


# A leaf for FX, where dtypes and devices are not known.
@torch.fx.wrap
@register_notrace_function
def attend_features(q: Tensor, k: Tensor, v: Tensor, features: Tensor, scale: float, fused: bool) -> Tensor:
    """The equations of this module, in float32 at least: an exponential of rounded scores would be far off.

    Args:
        q, k, v: (B, H, N, D), v (B, H, N, E)
        features: (r, D)
        scale: 1 / √D
        fused: Whether the queries' softmax may be `scaled_dot_product_attention`.

    Returns:
        (B, H, N, E), of the dtype of v.
    """
    if fused and v.shape[-1] <= k.shape[-1] and all_half(q, k, v, features):
        return attend_twice(q, k, v, features, scale)
    dtype = torch.promote_types(v.dtype, torch.float32)
    with without_autocast(v):
        w_BHrD = (features.to(dtype) * scale**0.5).expand(*k.shape[:2], -1, -1)
        sums, largest = sum_over_keys(w_BHrD, k.to(dtype), v.to(dtype), scale)
        dim = v.shape[-1]
        total = sums[..., dim : dim + 1]
        u_BHrD, b_BHr1 = sums[..., :dim] / total, total.log() + largest

        # w · q̂ + b_w, as one product too.
        q, w_and_b = bias_as_channel(q.to(dtype), w_BHrD, b_BHr1, 1.0)
        y = attend(q, w_and_b, u_BHrD, 1.0, fused)
    return y.to(v.dtype)


def all_half(*tensors: Tensor) -> bool:
    """Whether all are bfloat16 on a GPU, with no gradient to compute: products of the like are exact in its kernels.

    And whether flash attention, which says what its total was, takes them: 256 channels at most, two for a bias.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return False
    takes = all(on_gpu(t) and t.dtype == torch.bfloat16 and t.shape[-1] <= 254 for t in tensors)
    return takes and has_flash_attention(tensors[0].device)


def attend_twice(q: Tensor, k: Tensor, v: Tensor, features: Tensor, scale: float) -> Tensor:
    """`attend_features` with no N × r matrix: features attend to keys, then queries to features.

    What features read are the sums over keys divided by their total, whose logarithm attention knows too.
    """
    w = features.expand(*k.shape[:2], -1, -1)
    half_square = k.float().square().sum(dim=-1, keepdim=True) * (-0.5 * scale**0.5)
    u, log_total = flash_attention_on_gpu(*_with_bias(w, k, half_square), v, scale**0.5)
    return attend(*_with_bias(q, w, log_total.unsqueeze(-1) * scale**-0.5), u, scale**0.5, True)


def _with_bias(q: Tensor, k: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """As `bias_as_channel`, of bfloat16, with the bias (…, keys, 1) in float32: as the sum of two channels."""
    high = bias.to(k.dtype)
    k = torch.cat([k, high, (bias - high).to(k.dtype)], dim=-1)
    more = -k.shape[-1] % 8
    return F.pad(q, (0, 2 + more), value=1.0), F.pad(k, (0, more))


def sum_over_keys(w: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Σ_n φ_w(k̂_n) (v_n, 1) of each feature, divided by the exponential of its largest score.

    Keys are taken in blocks, so that their N × r features are never there at once; a backward pass computes those of a
    block again. A graph that is compiled or exported has one block, which it keeps: it would grow with their number.

    Args:
        w: (B, H, r, D)
        k, v: (B, H, N, D) and (B, H, N, E), of the dtype of w.
        scale: 1 / √D

    Returns:
        The sums, (B, H, r, E + 1 or more, all the same), and the largest scores, (B, H, r, 1).
    """
    if torch.compiler.is_compiling() or k.shape[2] <= KEYS_OF_BLOCK:
        return sum_over_block(w, k, v, scale)
    size = KEYS_OF_BLOCK
    if on_gpu(k):
        size = max(size, BYTES_OF_BLOCK // max(1, w[..., 0].nbytes))
    of_block, count = sum_over_block, -(-k.shape[2] // size)
    if torch.is_grad_enabled():
        of_block = partial(checkpoint, of_block, use_reentrant=False, preserve_rng_state=False)
    kv_blocks = zip(k.chunk(count, dim=2), v.chunk(count, dim=2), strict=True)
    blocks = [of_block(w, *kv, scale) for kv in kv_blocks]
    if count == 1:
        return blocks[0]
    largest = torch.stack([of_block for _, of_block in blocks]).amax(dim=0)
    return sum(sums * (of_block - largest).exp() for sums, of_block in blocks), largest


def sum_over_block(w: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`sum_over_keys` of keys that are taken at once."""
    # w · k̂ − ‖k̂‖² / 2, as one product.
    minus_half_square = k.square().sum(dim=-1, keepdim=True) * (-0.5 * scale)
    with without_autocast(v):  # a backward pass computes this again, outside of its callers
        if on_gpu(k):
            w, k = bias_as_channel(w, k, minus_half_square, 1.0)
        else:
            w, k = F.pad(w, (0, 1), value=1.0), torch.cat([k, minus_half_square], dim=-1)
        scores_BHrN = w @ k.mT
        largest = scores_BHrN.detach().amax(dim=-1, keepdim=True)
        weights_BHrN = scores_BHrN.sub_(largest).exp_()
        ones = max(1, w.shape[-1] - v.shape[-1])
        return weights_BHrN @ F.pad(v, (0, ones), value=1.0), largest
