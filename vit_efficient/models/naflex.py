"""timm's `NaFlexVit` with attentions that know the patch grid of each image.

Sources: Beyer et al., "FlexiViT", CVPR 2023, arXiv 2212.08013; Dehghani et al., "Patch n' Pack: NaViT, a Vision
Transformer for any Aspect Ratio and Resolution", NeurIPS 2023, arXiv 2307.06304. A NaFlex batch holds the patches of
images of several sizes, padded to one length. Here the padding is left out: images lie one after the other in one
sequence, those of one size together, and each is attended to by itself. No mask is needed, and none is made.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import NaFlexVit
from torch import Tensor, nn
from torch.nn import functional as F

from vit_efficient.grid import PackedGrids, PatchGrid, plain_sizes
from vit_efficient.models.forward import Batch, GridForward, as_timm_returns, groups_of
from vit_efficient.models.rope_steps import with_steps
from vit_efficient.utils.errors import UserError


class EfficientNaFlexVit(GridForward, NaFlexVit):
    """timm's `NaFlexVit` with any registered attention in each block; what `convert` makes of it."""

    @property
    def rope_mixed(self) -> bool:
        return self.rope_is_mixed

    def grid_of(self, height: int, width: int) -> PatchGrid:
        return PatchGrid(*self.embeds.dynamic_feat_size((height, width)), prefix=self.num_prefix_tokens)

    def construction(self) -> dict[str, Any]:
        return dict(
            num_classes=self.num_classes,
            global_pool=self.global_pool,
            depth=len(self.blocks),
            in_chans=self.in_chans,
            fc_norm=not isinstance(self.fc_norm, nn.Identity),
            final_norm=not (isinstance(self.norm, nn.Identity) and isinstance(self.fc_norm, nn.Identity)),
        )

    def set_input_size(self, *args, **kwargs) -> None:
        """Raises UserError: it takes images of any size."""
        raise UserError('a NaFlexVit takes images of any size as it is; leave set_input_size out')

    def embed(self, x: Tensor) -> tuple[Tensor, PatchGrid, Tensor | None]:
        grid = self.grid_of(*plain_sizes(x.shape[-2:]))
        rope = None if self.rope is None else self.rope.get_embed(shape=(grid.height, grid.width))
        if rope is not None and not self.rope_is_mixed:
            rope = with_steps(rope, self.rope, grid.height, grid.width)
        return self.norm_pre(self.embeds(x)[0]), grid, rope

    def _embed_patches(
        self, patches: Tensor, patch_coord: Tensor, patch_valid: Tensor | None, attn_mask: Tensor | None
    ) -> tuple[Tensor, Batch, list | None]:
        """A NaFlex batch → its tokens in one sequence (1, T, C), without padding; where they are; their positions."""
        if attn_mask is not None:
            raise UserError('attn_mask cannot be had with a NaFlex batch: each image is attended to by itself')
        sizes = grid_sizes(patch_coord, patch_valid)
        x = self.norm_pre(self.embeds(patches, patch_coord=patch_coord, patch_valid=patch_valid)[0])
        groups = groups_of(sizes)
        sizes = [sizes[group[0]] for group in groups]
        grids = [PatchGrid(*size, prefix=self.num_prefix_tokens) for size in sizes]
        parts = [x[group, : grid.num_tokens] for group, grid in zip(groups, grids, strict=True)]
        packed = PackedGrids(tuple((grid, len(group)) for grid, group in zip(grids, groups, strict=True)))
        return PackedGrids.join(parts), Batch(groups, packed), self._ropes(sizes, x.dtype)

    def _ropes(self, sizes: list[tuple[int, int]], dtype: torch.dtype) -> list | None:
        """Rotary positions of each size; where each block has its own, for each block those of each size."""
        if self.rope is None:
            return None
        if self.rope_is_mixed:
            return list(zip(*(self.rope.get_embed(shape=size, dtype=dtype) for size in sizes), strict=True))
        if hasattr(self.rope, 'get_batch_embeds'):
            ropes = self.rope.get_batch_embeds(sizes, dtype=dtype)
        else:
            ropes = [self.rope.get_embed(shape=size, dtype=dtype) for size in sizes]
        return [with_steps(rope, self.rope, *size) for rope, size in zip(ropes, sizes, strict=True)]

    def forward_features(
        self,
        patches: Tensor | Sequence[Tensor],
        patch_coord: Tensor | None = None,
        patch_valid: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor | list[Tensor] | dict[str, Tensor | None]:
        """As timm's, of images or of a NaFlex batch, whose padding becomes zeros; or of a list of images."""
        if is_causal and (patch_coord is not None or (self.training and self.patch_drop is not None)):
            raise UserError('is_causal=True cannot be had with a NaFlex batch, nor with patch dropout')
        if self.training and self.patch_drop is not None and not isinstance(patches, (list, tuple)):
            # Then every attention is 'full', and needs no grid.
            return NaFlexVit.forward_features(self, patches, patch_coord, patch_valid, attn_mask)
        if patch_coord is None:
            return super().forward_features(patches, attn_mask, is_causal)
        x, batch, rope = self._embed_patches(patches, patch_coord, patch_valid, attn_mask)
        for i in range(len(self.blocks)):
            x = self.run_block(i, x, batch.grids, rope)
        return {'patches': self._padded(self.norm(x), batch, patch_coord), 'patch_valid': patch_valid}

    def forward_head(
        self, patches: Tensor | list[Tensor], pre_logits: bool = False, patch_valid: Tensor | None = None
    ) -> Tensor | list[Tensor]:
        return super().forward_head(patches, pre_logits=pre_logits, patch_valid=patch_valid)

    def forward_intermediates(
        self,
        x: Tensor | dict[str, Tensor],
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
        output_dict: bool = False,
        patch_coord: Tensor | None = None,
        patch_valid: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ):
        """Arguments and results as timm's `NaFlexVit.forward_intermediates`."""
        options = indices, return_prefix_tokens, norm, stop_early, output_fmt, intermediates_only, output_dict
        if self.training and self.patch_drop is not None and not isinstance(x, (list, tuple)):
            return NaFlexVit.forward_intermediates(self, x, *options, patch_coord, patch_valid, attn_mask)
        if not isinstance(x, dict) and patch_coord is None:
            return super().forward_intermediates(x, *options, attn_mask=attn_mask)
        if isinstance(x, dict):
            patch_valid, attn_mask = x.get('patch_valid', patch_valid), x.get('attn_mask', attn_mask)
            x, patch_coord = x['patches'], x['patch_coord']
        if output_fmt != 'NLC':
            raise UserError(
                f"output_fmt must be 'NLC' of a NaFlex batch, whose images have several grids, got {output_fmt=}"
            )
        x, batch, rope = self._embed_patches(x, patch_coord, patch_valid, attn_mask)
        x, features = self.run_blocks(x, batch.grids, rope, indices, norm, stop_early)
        features = [self._padded(f, batch, patch_coord) for f in features]
        prefix = self.num_prefix_tokens
        prefixes = [f[:, :prefix] for f in features] if prefix and return_prefix_tokens else None
        features = [f[:, prefix:] for f in features]
        final = None if intermediates_only else self._padded(self.norm(x), batch, patch_coord)
        return as_timm_returns(features, prefixes, final, output_dict, patch_valid=patch_valid)

    def _padded(self, x: Tensor, batch: Batch, patch_coord: Tensor) -> Tensor:
        """(1, T, C) → (B, P + N, C), with the patches of a NaFlex batch and zeros in the place of its padding"""
        length = self.num_prefix_tokens + patch_coord.shape[1]
        return torch.stack([F.pad(tokens, (0, 0, 0, length - len(tokens))) for tokens in batch.unpack(x)])


def grid_sizes(patch_coord: Tensor, patch_valid: Tensor | None) -> list[tuple[int, int]]:
    """Rows and columns of each image of a NaFlex batch.

    Args:
        patch_coord: Row and column of each patch, (B, N, 2).
        patch_valid: Which of them are no padding, (B, N); all by default.

    Raises:
        UserError: If the patches of an image are not a whole grid, in row-major order and before the padding, or the
            padding lies outside of it.
    """
    if patch_coord.is_floating_point():
        raise UserError(f'patch_coord must hold integers, rows and columns of patches, got {patch_coord.dtype}')
    place = torch.arange(patch_coord.shape[1], device=patch_coord.device)
    valid = patch_coord.new_ones(patch_coord.shape[:2]) if patch_valid is None else patch_valid
    valid = valid.bool()
    rows, columns = (patch_coord * valid[..., None]).amax(dim=1).add(1).unbind(dim=-1)
    is_patch = place < (rows * columns)[:, None]
    in_order = patch_coord[..., 0] * columns[:, None] + patch_coord[..., 1] == place
    # timm makes embeddings for the grid of all coordinates, those of the padding too.
    inside = (patch_coord.amax(dim=1) + 1 == torch.stack([rows, columns], dim=-1)).all(dim=1)
    whole = torch.where(is_patch, valid & in_order, ~valid).all(dim=1) & inside
    sizes = torch.stack([rows, columns, whole], dim=1).tolist()  # the one time that a GPU is waited for
    for i, (h, w, is_whole) in enumerate(sizes):
        if not is_whole:
            raise UserError(
                f'patch_coord, patch_valid: the patches of image {i} of the batch are not a whole grid of {h} × {w} in '
                "row-major order, before padding at (0, 0); leave out a loader's patch dropout"
            )
    return [(h, w) for h, w, _ in sizes]
