"""Where a model looks: the weights of its pooling, or those of its class token in a block, as maps over the image.

Fused attention gives no weights. What it is called with is recorded, and they are computed from that, of timm's
attentions as of ours.

Dimensions: B images, h heads, K query tokens, H × W patches.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from vit_efficient.attention.functional import attention_weights
from vit_efficient.conversion import sharing_weights, swap_attentions
from vit_efficient.models import blocks
from vit_efficient.models.aggregation import Aggregation2d, AggregationAttention
from vit_efficient.models.forward import GridForward
from vit_efficient.models.patch_convnet import PatchConvNet
from vit_efficient.models.pooled_cnn import pooled_maps
from vit_efficient.models.served import MODELS, served_model
from vit_efficient.utils.checks import is_integer
from vit_efficient.utils.compat import unwrap
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.modes import evaluating

_POOLING = (AggregationAttention, AttentionPoolLatent)


class AttentionMaps(NamedTuple):
    """Weights of queries, of which patches and others together sum to 1.

    Attributes:
        patches: (B, h, K, H, W).
        others: (B, h, K), what goes to tokens that are no patches: prefix tokens, or the query itself.
        source: What looks, in words.
    """

    patches: Tensor
    others: Tensor
    source: str


@torch.no_grad()
def attention_maps(model: nn.Module, images: Tensor, block: int | None = None) -> AttentionMaps:
    """Where a model looks in images.

    Args:
        model: A ViT, as for `convert`, a `PatchConvNet`, or a network that `convert_pool` has converted; also in its
            wrapper. It is run in evaluation mode, and left in the mode that it was in.
        images: (B, channels, height, width), preprocessed, on its device.
        block: Whose class token asks, negative ones counted from the end; its attention must be exact. By default the
            pooling does, of a model that pools by attention, else the class token of the last block.

    Raises:
        UserError: If there is no such block, its attention is not exact, or nothing in the model asks for patches.
    """
    if not isinstance(images, Tensor) or images.ndim != 4:
        raise UserError('images must be a batch of one size, (B, channels, height, width)')
    model = _on_grid(model)
    pooling = [module for module in model.modules() if isinstance(module, _POOLING)]
    if block is None and pooling:
        source = 'aggregation' if isinstance(pooling[0], AggregationAttention) else "timm's attention pooling"
        grids: list[tuple[int, int]] = []
        with _noting_grids(model, grids):
            weights = recorded_weights(model, pooling[:1], images)[0]
        height, width = grids[0] if grids else _grid(model, images)
    else:
        source, asked = _class_token(model, -1 if block is None else block)
        weights = torch.cat([each[:, :, :1] for each in recorded_weights(model, asked, images)], 1)
        height, width = _grid(model, images)
    others = weights.shape[-1] - height * width
    patches = weights[..., others:].unflatten(-1, (height, width))
    return AttentionMaps(patches, weights[..., :others].sum(-1), source)


def _on_grid(model: nn.Module) -> nn.Module:
    *_, model = unwrap(model)
    if isinstance(model, GridForward):
        return model
    if isinstance(model, PatchConvNet):
        if not model.global_pool:
            raise UserError("a PatchConvNet with global_pool='' pools nothing, and looks nowhere")
        return model
    if not isinstance(model, tuple(MODELS)) and (pools := pooled_maps(model)):
        if not isinstance(model.get_submodule(pools[0]), Aggregation2d):
            kind = type(model).__name__
            raise UserError(f'a {kind} takes the mean of its maps, and looks nowhere; convert_pool() it, and train it')
        return model
    model = sharing_weights(served_model(model))
    swap_attentions(model, 'full', layers=[])
    return model


def _grid(model: nn.Module, images: Tensor) -> tuple[int, int]:
    grid = model.grid_of(*images.shape[-2:])
    return grid.height, grid.width


@contextmanager
def _noting_grids(model: nn.Module, grids: list[tuple[int, int]]) -> Iterator[None]:
    """A context in which pooling of maps notes how large they are."""

    def note(module: Aggregation2d, args: tuple[Tensor, ...]) -> None:
        grids.append(tuple(args[0].shape[1:3] if module.channels_last else args[0].shape[2:]))

    pools = [module for module in model.modules() if isinstance(module, Aggregation2d)]
    handles = [module.register_forward_pre_hook(note) for module in pools]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _class_token(model: nn.Module, block: int) -> tuple[str, list[nn.Module]]:
    """What the class token of a block asks by, in words, and the attentions."""
    if not hasattr(model, 'blocks') or not isinstance(model, GridForward):
        raise UserError(f'block={block}: a {type(model).__name__} has no class token in its blocks; leave block out')
    depth = len(model.blocks)
    if not is_integer(block, -depth) or block >= depth:
        raise UserError(f'block: the model has blocks 0 … {depth - 1}, got {block!r}')
    if getattr(model, 'cls_token', None) is None:
        raise UserError(
            f'a {type(model).__name__} with global_pool={model.global_pool!r} and no class token has nothing that asks '
            "for patches; of a VisionTransformer, convert_pool(model, 'aggregate') adds it"
        )
    number = block % depth
    attentions = [*blocks.attentions_of(model.blocks[number]).values()]
    if others := {each.mechanism for each in attentions} - {'full'}:
        exact = [i for i, each in blocks.grid_blocks(model).items() if blocks.first_attention(each).mechanism == 'full']
        instead = f'exact are {", ".join(map(str, exact))}' if exact else 'no block is exact'
        raise UserError(f'block={block} has attention {others.pop()!r}, whose keys are not the patches; {instead}')
    return f'class token, block {number}', attentions


def recorded_weights(model: nn.Module, attentions: list[nn.Module], *args: Any) -> list[Tensor]:
    """The weights (B, h, queries, keys) of attentions in a model, each of which calls fused attention once.

    Args:
        model: Called with `args`, in evaluation mode.
        attentions: Modules in it, or itself.
    """
    recorder, handles, fused = _Recorder(), [], {}
    for module in attentions:
        handles.append(module.register_forward_pre_hook(recorder.start))
        handles.append(module.register_forward_hook(recorder.stop, always_call=True))
        fused[module], module.fused_attn = module.fused_attn, True
    try:
        with evaluating(model):
            model(*args)
    finally:
        for handle in handles:
            handle.remove()
        for module, before in fused.items():
            module.fused_attn = before
    if len(recorder.weights) != len(attentions):
        kinds = ', '.join(sorted({type(module).__name__ for module in attentions}))
        raise UserError(
            f'{kinds}: of {len(attentions)} attentions {len(recorder.weights)} softmaxes were seen, not one of each; '
            'of what is compiled none is'
        )
    return recorder.weights


class _Recorder(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.weights: list[Tensor] = []

    def start(self, *_: Any) -> None:
        self.__enter__()

    def stop(self, *_: Any) -> None:
        self.__exit__(None, None, None)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            self.weights.append(_weights(*args, **kwargs))
        return function(*args, **kwargs)


def _weights(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *_, scale: float | None = None, **__):
    kind = torch.promote_types(q.dtype, torch.float32)
    return attention_weights(q.to(kind), k.to(kind), q.shape[-1] ** -0.5 if scale is None else scale, attn_mask)
