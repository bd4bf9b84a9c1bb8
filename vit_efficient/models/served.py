"""Which models a conversion serves, and of all others why it does not."""

import re
from collections.abc import Callable

import torch
from timm.models import Beit, Eva, NaFlexVit, VisionTransformer, VisionTransformerRelPos, VisionTransformerSAM
from timm.models.deit import VisionTransformerDistilled
from torch import nn

from vit_efficient.models import blocks
from vit_efficient.models.eva import EfficientEva
from vit_efficient.models.forward import backbone_of
from vit_efficient.models.naflex import EfficientNaFlexVit
from vit_efficient.models.relative import EfficientBeit, EfficientVisionTransformerRelPos
from vit_efficient.models.sam import EfficientVisionTransformerSAM
from vit_efficient.models.vit import EfficientVisionTransformer, EfficientVisionTransformerDistilled
from vit_efficient.utils.compat import DATA_PARALLEL, held_model
from vit_efficient.utils.errors import UserError

# A class of timm's, and ours that adds the grid to its forward pass and nothing to its state.
MODELS = {
    VisionTransformer: EfficientVisionTransformer,
    VisionTransformerDistilled: EfficientVisionTransformerDistilled,
    Eva: EfficientEva,
    Beit: EfficientBeit,
    VisionTransformerRelPos: EfficientVisionTransformerRelPos,
    VisionTransformerSAM: EfficientVisionTransformerSAM,
    NaFlexVit: EfficientNaFlexVit,
}
SERVED = {*MODELS, *MODELS.values()}

# By their names: each family of timm has attention and positions of its own.
_ATTENTION = re.compile(r'Attention|Attn|MH\w*A$|MSA|MLA|XCA|GPSA')
_ROTARY = re.compile(r'Rotary|Rope')
_RELATIVE = re.compile(r'rel_pos|relative_position|attention_bias|position_bias')
_TRACED = 'it is a traced graph, whose operations are fixed; convert the model before it is traced'
_OTHERS = "such as 'vit_base_patch16_224', 'deit3_base_patch16_224' or 'vit_base_patch14_dinov2'"


def served_model(model: nn.Module) -> nn.Module:
    """The model that a conversion changes: the one given, or the one in a wrapper of timm or `torch.compile`; or, of
    one with a head for patches (`vit_efficient.dense`), its backbone.

    Raises:
        UserError: If it cannot be served; it names the module and the reason.
    """
    inner = model
    while (held := held_model(inner)) is not None:
        inner = held
    inner = backbone_of(inner)
    if type(inner) not in SERVED:
        kind = type(inner).__name__
        raise UserError(f'cannot convert a {kind}: {_why_not(inner)}')
    try:
        blocks.check_blocks(inner)
    except UserError as error:
        kind = type(inner).__name__
        served = f"those of timm's own blocks and attentions are served, {_OTHERS}"
        raise UserError(f'cannot convert this {kind}: {error}; {served}') from None
    return inner


def _why_not(model: nn.Module) -> str:
    """The reason why a model that is none of `SERVED` cannot be converted, and the way out where there is one."""
    if not isinstance(model, nn.Module):
        return 'it is not an nn.Module; create the model first, by timm.create_model'
    if isinstance(model, (torch.fx.GraphModule, torch.jit.ScriptModule)):
        return _TRACED
    if isinstance(model, DATA_PARALLEL):
        return 'it would not know the parameters that an attention adds; convert the model before it is wrapped'
    if _is_sharded(model):
        return 'its parameters are sharded; convert the model before it is sharded'
    for served in MODELS:
        if isinstance(model, served):
            return (
                f"it is a class derived from timm's {served.__name__}, and its own forward pass would be lost; convert "
                f'a {served.__name__} itself, and put what you add into a module around it'
            )
    for name, module in model.named_modules():
        if type(module) in SERVED:
            return (
                f'it has a {type(module).__name__} as its {name}; convert that, in place: '
                f'convert(model.get_submodule({name!r}), …), and make anew what was captured of it'
            )
    if any(isinstance(module, torch.fx.GraphModule) for module in model.modules()):
        return _TRACED
    for reason in (_no_attention, _grids, _rotary, _relative):
        if said := reason(model):
            return said
    name, module = next(_named(model, _is_attention))
    kind = f'{type(module).__module__}.{type(module).__name__}'
    return f"its attention, {name}, is none of timm's that are served but {kind}; plain ViTs are served, {_OTHERS}"


def _is_sharded(model: nn.Module) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    return isinstance(model, (FSDPModule, FullyShardedDataParallel))


def _named(model: nn.Module, fits: Callable[[str, nn.Module], bool]):
    return ((name, module) for name, module in model.named_modules() if name and fits(name, module))


def _is_attention(name: str, module: nn.Module) -> bool:
    kind = type(module).__name__
    return not kind.endswith('Block') and bool(_ATTENTION.search(kind) or name.rpartition('.')[2] == 'attn')


def _no_attention(model: nn.Module) -> str | None:
    if any(_named(model, _is_attention)):
        return None
    return f'it is not a vision transformer, no attention is found in it; ViTs are served, {_OTHERS}'


def _grids(model: nn.Module) -> str | None:
    stages = [stage for stage in getattr(model, 'feature_info', None) or [] if isinstance(stage, dict)]
    sides = sorted({stage['reduction'] for stage in stages})
    if len(sides) < 2:
        return None
    return (
        f'its tokens lie on several grids (patches of {", ".join(map(str, sides))} pixels, {stages[0]["module"]} to '
        f'{stages[-1]["module"]}), as those of a hierarchy such as Swin; ViTs of one grid are served, {_OTHERS}'
    )


def _rotary(model: nn.Module) -> str | None:
    for name, module in _named(model, lambda _, module: bool(_ROTARY.search(type(module).__name__))):
        return (
            f'it has rotary positions ({name}, {type(module).__name__}) in a class of its own; of ViTs with rotary '
            "positions timm's Eva and NaFlexVit are, such as 'vit_small_patch16_dinov3' or 'eva02_tiny_patch14_224'"
        )
    return None


def _relative(model: nn.Module) -> str | None:
    names = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
    for name in names:
        if _RELATIVE.search(name):
            return (
                f"it has a relative position bias ({name}) in a class of its own; of those with one timm's Beit, "
                "VisionTransformerRelPos and VisionTransformerSAM are served, such as 'beit_base_patch16_224'"
            )
    return None
