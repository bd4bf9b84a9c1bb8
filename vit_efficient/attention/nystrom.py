"""Nyström attention: the softmax matrix from its columns and rows at a few landmarks.

Source: Xiong et al., "Nyströmformer: A Nyström-Based Algorithm for Approximating Self-Attention", AAAI 2021, arXiv
2102.03902. With landmarks q̃ of the queries and k̃ of the keys,

    softmax(q kᵀ / √D) ≈ softmax(q k̃ᵀ / √D) · A⁺ · softmax(q̃ kᵀ / √D),   A = softmax(q̃ k̃ᵀ / √D)

Their landmarks are means of segments of the sequence. Ours follow the image: the prefix tokens themselves, and means of
the cells of the patch grid.

Letters: B batch, N tokens, m landmarks, P prefix, C channels, H heads, D = C / H.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import register_notrace_function
from torch import Tensor, nn
from torch.nn import functional as F

from vit_efficient.attention import base
from vit_efficient.attention.base import GridAttention
from vit_efficient.attention.registry import register_attention
from vit_efficient.compress import COMPRESSORS
from vit_efficient.compress.budget import Budget
from vit_efficient.grid import PatchGrid
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.precision import without_autocast

PINV_ITERATIONS = 6  # the paper's


class ValueMixing(nn.Conv2d):
    """Convolution of the values over the patch grid, one kernel for all channels of a head.

    It starts at zero, so that the weights of a plain ViT mean what they did; its gradient is not zero there.
    """

    flop_role = 'transform'

    def __init__(self, num_heads: int, kernel_size: tuple[int, int], **kwargs):
        padding = tuple(side // 2 for side in kernel_size)
        super().__init__(num_heads, num_heads, kernel_size, padding=padding, groups=num_heads, bias=False, **kwargs)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, v: Tensor, grid: PatchGrid) -> Tensor:
        """(B, H, height · width, D) → (B, height · width, C)"""
        channels = v.shape[1] * v.shape[3]
        v_BCHW = v.transpose(1, 2).flatten(2).transpose(1, 2).unflatten(2, (grid.height, grid.width)).contiguous()
        kernels = self.weight.repeat_interleave(v.shape[3], dim=0)
        return F.conv2d(v_BCHW, kernels, padding=self.padding, groups=channels).flatten(2).transpose(1, 2)


@register_attention('nystrom')
class NystromAttention(GridAttention):
    """Attention through landmarks: the prefix tokens, and the means of q and of k over the cells of the patch grid.

    qk-norm acts on the tokens, before the means; with every token a landmark and the exact pseudo-inverse this is exact
    attention. There is no N × N matrix for `attn_drop`, and weights dropped from its factors would be noise that A⁺
    amplifies. In training it drops keys instead, each from the outputs of all queries of its head; as in exact
    attention, the weights of the others are scaled up, not normalised again.

    Args:
        dim, num_heads, **kwargs: As timm's `Attention`.
        num_landmarks: Of the patches: the most cells that there may be, h · w of the grid's aspect, or the pair (h, w).
            The prefix tokens come on top.
        pinv: 'iterative', the paper's, which also bounds A⁺ where A is ill-conditioned; or 'exact', slow, for small
            or well-conditioned A: elsewhere its large values make the outputs worse.
        pinv_iterations: Of 'iterative'; 6 by default.
        residual_kernel: Size of a convolution of the values over the patch grid, added to the output, one kernel per
            head: odd, or an odd pair (height, width); 0 for none. Prefix tokens have no part in it.

    Raises:
        UserError: If an option is unknown or out of range.
    """

    def configure(
        self,
        *,
        num_landmarks: int | tuple[int, int] = 64,
        pinv: str = 'iterative',
        pinv_iterations: int | None = None,
        residual_kernel: int | tuple[int, int] = 0,
    ) -> None:
        try:
            budget = Budget(num_tokens=num_landmarks)
        except ValueError:
            raise UserError(
                f'num_landmarks must be a positive integer or a pair (h, w) of them, got {num_landmarks=}'
            ) from None
        self.landmarks = COMPRESSORS['pool'](num_tokens=budget.num_tokens, count_bias=False)
        if pinv not in ('iterative', 'exact'):
            raise UserError(f"pinv must be 'iterative' or 'exact', got {pinv=}")
        if pinv == 'exact' and pinv_iterations is not None:
            raise UserError(f"pinv='exact' has no iterations, got {pinv_iterations=}; leave it out")
        if pinv_iterations is not None and (type(pinv_iterations) is not int or pinv_iterations < 1):
            raise UserError(f'pinv_iterations must be a positive integer, got {pinv_iterations=}')
        kernel = tuple(residual_kernel) if _is_pair(residual_kernel) else (residual_kernel,) * 2
        without = type(residual_kernel) is int and residual_kernel == 0
        if not without and any(type(side) is not int or side < 1 or side % 2 == 0 for side in kernel):
            raise UserError(
                f'residual_kernel must be 0, odd, or a pair (height, width) of odd sizes, got {residual_kernel=}'
            )
        self.pinv = pinv
        self.pinv_iterations = (pinv_iterations or PINV_ITERATIONS) if pinv == 'iterative' else None
        self.local = None
        if not without:
            like = self.qkv.weight
            self.local = ValueMixing(self.num_heads, kernel, device=like.device, dtype=like.dtype)

    @property
    def options(self) -> dict[str, Any]:
        return dict(
            num_landmarks=self.landmarks.budget.options['num_tokens'],
            pinv=self.pinv,
            pinv_iterations=self.pinv_iterations,
            residual_kernel=list(self.local.kernel_size) if self.local is not None else 0,
        )

    def forward(self, x: Tensor, grid: PatchGrid, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        base.check_tokens(self.mechanism, x.shape[1], grid.height, grid.width, grid.prefix, attn_mask, is_causal)
        check_landmarks(grid.height, grid.width, self.landmarks.budget.num_tokens)
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        kept = v
        if self.training and self.attn_drop.p:
            kept = v * self.attn_drop(torch.ones_like(v[..., :1]))

        q_BHmD, k_BHmD = self._means(q, grid).to(v.dtype), self._means(k, grid).to(v.dtype)
        v_BHmD = self._attend(q_BHmD, k, kept)
        v_BHmD = unmix(q_BHmD, k_BHmD, v_BHmD, self.scale, self.pinv_iterations)
        y = self._attend(q, k_BHmD, v_BHmD)

        y_BNC = y.transpose(1, 2).flatten(2)
        if self.local is not None:
            y_BNC = y_BNC + F.pad(self.local(v[:, :, grid.prefix :], grid), (0, 0, grid.prefix, 0))
        y_BNC = self.norm(y_BNC)
        if self.gate is not None:
            y_BNC = y_BNC * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(y_BNC))

    def _means(self, x: Tensor, grid: PatchGrid) -> Tensor:
        """Landmarks of queries or keys: (B, H, N, D) → (B, H, m, D)"""
        patches_BLC = x[:, :, grid.prefix :].transpose(1, 2).flatten(2)  # of all heads at once
        means = self.landmarks.down(patches_BLC, grid).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        means = means.contiguous()  # fused attention takes no other
        return torch.cat([x[:, :, : grid.prefix].to(means.dtype), means], dim=2) if grid.prefix else means

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.fused_attn:
            return F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return ((q * self.scale) @ k.mT).softmax(dim=-1) @ v

    def num_attended(self, grid: PatchGrid) -> int:
        """N: every query sees all keys, through the landmarks.

        Raises:
            UserError: If the landmarks cannot be had on the grid.
        """
        check_landmarks(grid.height, grid.width, self.landmarks.budget.num_tokens)
        return grid.num_tokens

    def export_error(self, suffix: str) -> str | None:
        if suffix == '.onnx' and self.pinv == 'exact':
            return (
                "ONNX has no pseudo-inverse for attention 'nystrom' with pinv='exact'; export to .pt2, or use "
                "pinv='iterative'"
            )
        return None

    def extra_repr(self) -> str:
        return f"pinv='{self.pinv}'" + (f', pinv_iterations={self.pinv_iterations}' if self.pinv_iterations else '')


def _is_pair(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2


# The functions below are leaves for FX, where sizes, dtypes and devices are not known.


@torch.fx.wrap
@register_notrace_function
def check_landmarks(height, width, num_landmarks: int | tuple[int, int]) -> None:
    """Raises UserError if the landmarks cannot be had on a grid."""
    fixed = type(height) is int and type(width) is int
    if isinstance(num_landmarks, tuple):
        if fixed and (num_landmarks[0] > height or num_landmarks[1] > width):
            raise UserError(
                f'{num_landmarks=} exceeds the grid of {height} × {width} patches; give a smaller pair, or an integer, '
                'which follows the grid'
            )
    elif not fixed:
        raise UserError(f'{num_landmarks=} needs a fixed image size; give a pair (h, w)')


@torch.fx.wrap
@register_notrace_function
def unmix(q: Tensor, k: Tensor, v: Tensor, scale: float, iterations: int | None) -> Tensor:
    """A⁺ v, with A = softmax(q kᵀ · scale), in float32 at least: A⁺ magnifies what is rounded off.

    Args:
        q, k, v: (B, H, m, D), of the landmarks.
        scale: 1 / √D
        iterations: Of the iterative pseudo-inverse; None for the exact one.

    Returns:
        (B, H, m, D), of the dtype of v.
    """
    dtype = torch.promote_types(v.dtype, torch.float32)
    with without_autocast(v):
        a = ((q.to(dtype) * scale) @ k.to(dtype).mT).softmax(dim=-1)
        if iterations is None:
            # Singular values below the precision of q and k are noise, which their inverses would magnify.
            inverse = torch.linalg.pinv(a, rtol=None if v.dtype == dtype else torch.finfo(v.dtype).eps)
        else:
            inverse = iterative_pinv(a, iterations)
        return (inverse @ v.to(dtype)).to(v.dtype)


def iterative_pinv(a: Tensor, iterations: int) -> Tensor:
    """The pseudo-inverse of each matrix, by the paper's iteration of third order (its lemma 1).

    Args:
        a: (…, m, m), the rows of each sum to 1.
        iterations: At least 1.
    """
    one = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    # Aᵀ / (‖A‖₁ ‖A‖∞): the largest sum of a column, and of a row, which is 1.
    z = a.mT / a.sum(dim=-2, keepdim=True).amax(dim=-1, keepdim=True)
    for _ in range(iterations):
        az = a @ z
        z = z @ (13 * one - az @ (15 * one - az @ (7 * one - az))) / 4
    return z
