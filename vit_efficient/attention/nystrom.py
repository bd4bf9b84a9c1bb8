"""Nyström attention: the softmax matrix from its columns and rows at a few landmarks.

Source: Xiong et al., "Nyströmformer: A Nyström-Based Algorithm for Approximating Self-Attention", AAAI 2021, arXiv
2102.03902. With landmarks q̃ of the queries and k̃ of the keys,

    softmax(q kᵀ / √D) ≈ softmax(q k̃ᵀ / √D) · A⁺ · softmax(q̃ kᵀ / √D),   A = softmax(q̃ k̃ᵀ / √D)

Their landmarks are means of segments of the sequence. Ours follow the image: the prefix tokens themselves, and means of
the cells of the patch grid.

Letters: B batch, N tokens, m landmarks, P prefix, C channels, H heads, D = C / H.
"""

from typing import Any

import torch
from timm.layers import register_notrace_function
from torch import Tensor
from torch.nn import functional as F

from vit_efficient.attention.base import GridAttention
from vit_efficient.attention.compressed import LocalMixing
from vit_efficient.attention.functional import attend, attention_weights
from vit_efficient.attention.registry import register_attention
from vit_efficient.attention.rotary import rope_of_kept
from vit_efficient.compress.budget import Budget, kept_grid
from vit_efficient.compress.pool import Down
from vit_efficient.grid import PatchGrid
from vit_efficient.utils.checks import as_integer, as_sides, check_choice, is_integer, is_pair
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.precision import without_autocast

PINV_ITERATIONS = 6  # the paper's
NO_ONNX = "ONNX has no pseudo-inverse for 'nystrom' with pinv='exact'; export to .pt2, or use pinv='iterative'"


class ValueMixing(LocalMixing):
    """Convolution of the values over the patch grid, one kernel for all channels of a head."""

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
    attention. In training keys are dropped (`drop_keys`): weights dropped from the factors would be noise that A⁺
    amplifies.

    Args:
        dim, num_heads, **kwargs: As timm's `Attention`.
        num_landmarks: The most cells that there may be, h · w of the grid's aspect, or the pair (h, w).
            The prefix tokens come on top.
        pinv: 'iterative', the paper's, which also bounds A⁺ where A is ill-conditioned; or 'exact', slow, for small
            or well-conditioned A: elsewhere its large values make the outputs worse.
        pinv_iterations: How many 'iterative' makes; 6 by default.
        residual_kernel: Size of a convolution of the values over the patch grid, added to the output, one kernel per
            head: odd, or an odd pair (height, width); 0 for none. Prefix tokens have no part in it.
    """

    can_be_differential = True

    def configure(
        self,
        *,
        num_landmarks: int | tuple[int, int] = 64,
        pinv: str = 'iterative',
        pinv_iterations: int | None = None,
        residual_kernel: int | tuple[int, int] = 0,
    ) -> None:
        num_landmarks = as_sides('num_landmarks', num_landmarks)
        self.landmarks = Down(Budget(num_tokens=num_landmarks, argument='num_landmarks'), 'mean')
        check_choice('pinv', pinv, ('iterative', 'exact'))
        if pinv == 'exact' and pinv_iterations is not None:
            raise UserError(f"pinv='exact' has no iterations, got {pinv_iterations=}; leave it out")
        if pinv == 'iterative':
            given = PINV_ITERATIONS if pinv_iterations is None else pinv_iterations
            pinv_iterations = as_integer('pinv_iterations', given)
        kernel = residual_kernel if is_pair(residual_kernel) else (residual_kernel,) * 2
        without = is_integer(residual_kernel) and residual_kernel == 0
        if not without and not all(is_integer(side, 1) and side % 2 for side in kernel):
            raise UserError(
                f'residual_kernel must be 0, odd, or a pair (height, width) of odd sizes, got {residual_kernel=}'
            )
        self.pinv = pinv
        self.pinv_iterations = pinv_iterations
        sides = tuple(int(side) for side in kernel)
        self.local = None if without else ValueMixing(self.num_maps, sides, **self.kind_of_weights())

    @property
    def options(self) -> dict[str, Any]:
        return dict(
            num_landmarks=self.landmarks.budget.options['num_tokens'],
            pinv=self.pinv,
            pinv_iterations=self.pinv_iterations,
            residual_kernel=list(self.local.kernel_size) if self.local is not None else 0,
        )

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
        v_dropped = self.drop_keys(self.values_of_maps(v))

        q_BHmD, k_BHmD = self._means(q, grid).to(v.dtype), self._means(k, grid).to(v.dtype)
        if rope is not None:
            kept = kept_grid(grid.height, grid.width, self.landmarks.budget)
            of_landmarks = rope_of_kept(rope, grid.height, grid.width, kept, 'means')
            q_BHmD, k_BHmD = self.rotate(q_BHmD, k_BHmD, of_landmarks, grid.prefix)
            q, k = self.rotate(q, k, rope, grid.prefix)
        v_BHmD = attend(q_BHmD, k, v_dropped, self.scale, self.fused_attn)
        v_BHmD = unmix(q_BHmD, k_BHmD, v_BHmD, self.scale, self.pinv_iterations)
        y = attend(q, k_BHmD, v_BHmD, self.scale, self.fused_attn)

        y_BNC = self.merge_heads(y)
        if self.local is not None:
            y_BNC = y_BNC + F.pad(self.local(v[:, :, grid.prefix :], grid), (0, 0, grid.prefix, 0))
        return self.finish(y_BNC, x)

    def _means(self, x: Tensor, grid: PatchGrid) -> Tensor:
        """Landmarks of queries or keys: (B, H, N, D) → (B, H, m, D)"""
        patches_BLC = x[:, :, grid.prefix :].transpose(1, 2).flatten(2)  # of all heads at once
        means = self.landmarks(patches_BLC, grid)[0].unflatten(2, (self.num_maps, -1)).transpose(1, 2)
        means = means.contiguous()  # fused attention takes no other
        return torch.cat([x[:, :, : grid.prefix].to(means.dtype), means], dim=2) if grid.prefix else means

    def num_attended(self, grid: PatchGrid) -> int:
        """N: every query sees all keys, through the landmarks.

        Raises:
            UserError: If the landmarks cannot be had on the grid.
        """
        kept_grid(grid.height, grid.width, self.landmarks.budget)
        return grid.num_tokens

    def export_error(self, suffix: str) -> str | None:
        return NO_ONNX if suffix == '.onnx' and self.pinv == 'exact' else None


# A leaf for FX, where dtypes and devices are not known.
@torch.fx.wrap
@register_notrace_function
def unmix(q: Tensor, k: Tensor, v: Tensor, scale: float, iterations: int | None) -> Tensor:
    """A⁺ v, with A = softmax(q kᵀ · scale), in float32 at least: A⁺ magnifies what is rounded off.

    Args:
        q, k, v: (B, H, m, D), of the landmarks.
        scale: 1 / √D
        iterations: How many the pseudo-inverse makes; None for the exact one.

    Returns:
        (B, H, m, D), of the dtype of v.
    """
    dtype = torch.promote_types(v.dtype, torch.float32)
    with without_autocast(v):
        a = attention_weights(q.to(dtype), k.to(dtype), scale)
        if iterations is None:
            # Singular values below the precision of q and k are noise, which their inverses would magnify.
            inverse = torch.linalg.pinv(a, rtol=None if v.dtype == dtype else torch.finfo(v.dtype).eps)
        else:
            inverse = iterative_pinv(a, iterations)
        return (inverse @ v.to(dtype)).to(v.dtype)


def iterative_pinv(a: Tensor, iterations: int) -> Tensor:
    """The pseudo-inverse of each matrix, by the paper's iteration of third order (its lemma 1).

    Args:
        a: (B, H, m, m), the rows of each sum to 1.
        iterations: At least 1.
    """
    shape, a = a.shape, a.flatten(0, -3)
    one = torch.eye(shape[-1], dtype=a.dtype, device=a.device)
    seven, fifteen, quarter_of_thirteen = 7 * one, 15 * one, 13 / 4 * one
    # Aᵀ / (‖A‖₁ ‖A‖∞): the largest sum of a column, and of a row, which is 1.
    z = a.mT / a.sum(dim=-2, keepdim=True).amax(dim=-1, keepdim=True)
    for _ in range(iterations):
        # z (13 − az (15 − az (7 − az))) / 4, in few operators: GPUs wait for each.
        az = torch.bmm(a, z)
        y = torch.baddbmm(fifteen, az, seven - az, alpha=-1)
        z = torch.bmm(z, torch.baddbmm(quarter_of_thirteen, az, y, alpha=-0.25))
    return z.view(shape)
