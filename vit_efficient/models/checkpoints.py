"""Checkpoints of plain timm ViTs, loaded into every mechanism."""

import logging
from typing import Any

from timm.layers import resize_rel_pos_bias_table, to_2tuple
from timm.models import (
    Beit,
    Eva,
    NaFlexVit,
    VisionTransformerRelPos,
    VisionTransformerSAM,
    adapt_input_conv,
    beit,
    eva,
    naflexvit,
    vision_transformer,
    vision_transformer_relpos,
    vision_transformer_sam,
)
from torch import Tensor, nn

from vit_efficient.attention import GridAttention
from vit_efficient.compress.base import Compressor
from vit_efficient.compress.maps import Linear, Maps
from vit_efficient.models.aggregation import as_queries
from vit_efficient.models.patch_embed import DctPatchEmbed
from vit_efficient.utils.errors import UserError

logger = logging.getLogger(__name__)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """timm's filter for checkpoints of a model's class. What a mechanism adds to them follows the image size; what a
    checkpoint does not have starts as it is in the model; Linformer's projections beside weights of a plain ViT, as
    means of cells."""
    # timm would rename the scales of aggregation, which are not those of a block.
    pooling = {key: value for key, value in state_dict.items() if key.startswith('attn_pool.')}
    state_dict = _filter_like_timm({key: v for key, v in state_dict.items() if key not in pooling}, model)
    state_dict |= _pooling_of(pooling, state_dict, model)
    for name, module in model.named_modules():
        own = module.state_dict(prefix=f'{name}.') if isinstance(module, Compressor) else {}
        missing, present = sorted(own.keys() - state_dict.keys()), sorted(own.keys() & state_dict.keys())
        if missing and present:
            raise UserError(
                f'the checkpoint lacks {", ".join(missing)} beside {", ".join(present)}: it '
                "was made with other options of the attention; set them as they were, such as sharing='key-value'"
            )
    given, begun = set(state_dict), []
    for name, module in model.named_modules():
        if isinstance(module, Maps) and f'{name}.weight' in state_dict:
            state_dict[f'{name}.weight'] = module.adapt(state_dict[f'{name}.weight'])
        elif isinstance(module, Linear):
            state_dict[f'{name}.weight'] = module.means()
    for name, module in model.named_modules():
        if isinstance(module, GridAttention):
            added = module.added_state(prefix=f'{name}.')
        elif name == 'shared':
            added = module.state_dict(prefix='shared.')
        else:
            continue
        begun += sorted(added.keys() - given)
        state_dict = added | state_dict
    if begun:
        logger.info(
            'not in the weights, so as the attention begins: %s%s',
            ', '.join(begun[:2]),
            f' and {len(begun) - 2} more' * (len(begun) > 2),
        )
    return state_dict


def _pooling_of(saved: dict[str, Tensor], state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """What a model pools by attention with, where weights are of one that pools otherwise, as `convert_pool` has it.

    It begins as it is, with the class token for its own; in `state_dict` the final norm becomes that of what is pooled.
    """
    own = {key: value for key, value in model.state_dict().items() if key.startswith(('attn_pool.', 'fc_norm.'))}
    wanted, token = {key: value for key, value in own.items() if key.startswith('attn_pool.')}, 'attn_pool.cls_token'
    if token in wanted and token in saved:
        return saved | {token: as_queries(saved[token], wanted[token])}
    if not wanted or wanted.keys() <= saved.keys():
        return saved
    for key in own.keys() - wanted.keys() - state_dict.keys():
        if (other := key.removeprefix('fc_')) in state_dict:
            state_dict[key] = state_dict.pop(other)
    if token in wanted and 'cls_token' in state_dict:
        wanted[token] = state_dict['cls_token'].expand_as(wanted[token])
    logger.info('not in the weights, so as it begins: attn_pool, with which %s pools', type(model).__name__)
    return wanted


class _SeenByTimm:
    """A model as timm's filter expects it: its patch embedding a convolution over pixels."""

    def __init__(self, model: nn.Module):
        self._model = model
        self.patch_embed = model.patch_embed.empty_conv(device='meta')

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _filter_of_timm(state_dict: dict[str, Tensor], model: nn.Module, seen: Any) -> dict[str, Tensor]:
    """What timm makes of a checkpoint for a model of this class; `seen` is the model as it is to look."""
    if isinstance(model, Eva):
        return eva.checkpoint_filter_fn(state_dict, seen)
    if isinstance(model, (Beit, VisionTransformerRelPos)):
        return _filter_with_tables(state_dict, model, seen)
    if isinstance(model, NaFlexVit):
        return naflexvit.checkpoint_filter_fn(state_dict, seen)
    if isinstance(model, VisionTransformerSAM):
        return vision_transformer_sam.checkpoint_filter_fn(state_dict, seen)
    return vision_transformer.checkpoint_filter_fn(state_dict, seen, adapt_layer_scale=True)


def _filter_with_tables(state_dict: dict[str, Tensor], model: nn.Module, seen: Any) -> dict[str, Tensor]:
    """timm's filter, but for tables of relative biases whose grid is known, or that fit: their entries do not tell the
    grid, and timm would take one that could be a square's for it."""
    own, of_timm = model.state_dict(), beit if isinstance(model, Beit) else vision_transformer_relpos
    saved = _saved_grid(model, state_dict.get('patch_embed.proj.weight'))
    tables = {}
    for key, value in state_dict.items():
        if not key.endswith('relative_position_bias_table') or key not in own:
            continue
        size = model.get_submodule(key.rpartition('.')[0]).window_size
        if saved is not None and saved != tuple(size):
            shape = {'new_window_size': size, 'new_bias_shape': own[key].shape}
            tables[key] = resize_rel_pos_bias_table(value, **shape, old_window_size=saved)
        elif value.shape == own[key].shape:
            tables[key] = value
    others = {key: value for key, value in state_dict.items() if key not in tables}
    return of_timm.checkpoint_filter_fn(others, seen) | tables


def _saved_grid(model: nn.Module, kernel: Tensor | None) -> tuple[int, int] | None:
    """The patch grid that a model folder's weights are for, which its config tells; None of other checkpoints."""
    size = getattr(model, 'pretrained_model_args', {}).get('img_size')
    if size is None or kernel is None:
        return None
    return tuple(side // patch for side, patch in zip(to_2tuple(size), kernel.shape[-2:], strict=True))


def _filter_like_timm(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """timm's filter, for a patch embedding of pixels or of coefficients; kernels of pixels load into the latter."""
    embedding = getattr(model, 'patch_embed', None)
    if not isinstance(embedding, DctPatchEmbed):
        return _filter_of_timm(state_dict, model, model)
    own = {key: value for key, value in state_dict.items() if key.startswith('patch_embed.linear.')}
    if own:
        weight, expected = own.get('patch_embed.linear.weight'), embedding.linear.weight.shape
        if weight is None or weight.shape != expected:
            shape = None if weight is None else tuple(weight.shape)
            raise UserError(
                f'the checkpoint has a patch embedding of {shape} (output channels, coefficients), the model, with '
                f'patch_keep={embedding.options["keep"]} of {embedding.in_chans} channels, one of {tuple(expected)}; '
                'set patch_keep and in_chans to what they were'
            )
        # From its shape timm knows the patch grid that position embeddings are for.
        state_dict = {**state_dict, 'patch_embed.proj.weight': embedding.empty_conv(device='meta').proj.weight}
    seen = _SeenByTimm(model)
    state_dict = _filter_of_timm(state_dict, model, seen)
    kernel = state_dict.pop('patch_embed.proj.weight', None)
    if own:
        state_dict.update(own)
    elif kernel is not None:
        if kernel.shape[1] != embedding.in_chans:
            kernel = adapt_input_conv(embedding.in_chans, kernel, base_chans=kernel.shape[1])
        state_dict['patch_embed.linear.weight'] = embedding.coefficients_of(kernel)
        if 'patch_embed.proj.bias' in state_dict:
            state_dict['patch_embed.linear.bias'] = state_dict.pop('patch_embed.proj.bias')
    if embedding.window is not None and 'patch_embed.window.share' not in state_dict:
        if own:
            state_dict['patch_embed.linear.weight'] = embedding.before_gains(own['patch_embed.linear.weight'])
        state_dict['patch_embed.window.share'] = embedding.window.share.detach()
    return state_dict
