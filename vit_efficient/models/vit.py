"""The vision transformer whose attentions know the patch grid, and its registered variants.

timm's ViT (Dosovitskiy et al., "An Image is Worth 16x16 Words", 2020, arXiv 2010.11929) with two changes: each block's
attention is one of `vit_efficient.list_attentions()`, and the patch grid goes down through the blocks with the tokens.

    timm.create_model('vit_dct_base', img_size=1024, attention_kwargs=dict(keep_ratio=1 / 16))
    timm.create_model('vit_full_base', attention=['full', ('dct', dict(keep_ratio=0.25)), …])     # a layer each
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.layers import Attention, PatchDropout, register_notrace_function
from timm.models import (
    VisionTransformer,
    adapt_input_conv,
    build_model_with_cfg,
    checkpoint,
    generate_default_cfgs,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models._features import feature_take_indices
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block
from timm.models.vision_transformer import checkpoint_filter_fn as timm_checkpoint_filter_fn
from torch import Tensor, nn

from vit_efficient.attention import GridAttention, layer_options, list_attentions, swap_attention
from vit_efficient.compress.base import Compressor
from vit_efficient.compress.learned import Maps
from vit_efficient.grid import PatchGrid, plain_sizes
from vit_efficient.models.patch_embed import DctPatchEmbed, Keep, patch_embed_layer
from vit_efficient.utils.errors import UserError

LayerSpec = str | tuple[str, dict[str, Any]]  # a name, or a name and its options
AttentionSpec = LayerSpec | Sequence[LayerSpec]  # of all layers, or of each

SIZES = {
    'tiny': dict(embed_dim=192, depth=12, num_heads=3),
    'small': dict(embed_dim=384, depth=12, num_heads=6),
    'base': dict(embed_dim=768, depth=12, num_heads=12),
    'large': dict(embed_dim=1024, depth=24, num_heads=16),
}


class GridBlock(Block):
    """timm's pre-norm block, which hands the grid to its attention, or works on the tokens that this one keeps."""

    def forward(self, x: Tensor, grid: PatchGrid, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if self.attn.of_block:
            y = self.attn.down(x, grid)
            added = self.drop_path1(self.ls1(self.attn(self.norm1(y), grid, attn_mask=attn_mask, is_causal=is_causal)))
            return x + self.attn.up(added + self.drop_path2(self.ls2(self.mlp(self.norm2(y + added)))), grid)
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), grid, attn_mask=attn_mask, is_causal=is_causal)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def attention_per_layer(attention: AttentionSpec, options: dict[str, Any] | None, depth: int) -> list[tuple[str, dict]]:
    """Spells a specification out: a name and its options for each of `depth` layers.

    Raises:
        UserError: If it is none, a list does not have `depth` entries, or options are given twice.
    """
    if isinstance(attention, str):
        return [(attention, dict(options or {}))] * depth
    if options:
        raise UserError(f'attention_kwargs={options} beside {attention=}: put the options there, as (name, options)')
    if _is_layer(attention):
        return [tuple(attention)] * depth
    layers = attention if isinstance(attention, (list, tuple)) else [attention]
    for layer in layers:
        if not _is_layer(layer):
            raise UserError(f"attention: a layer is 'name' or ('name', {{options}}), got {layer!r}")
    if len(layers) != depth:
        raise UserError(f'attention lists {len(layers)} layers, there are {depth}')
    return [(layer, {}) if isinstance(layer, str) else tuple(layer) for layer in layers]


def _is_layer(spec: Any) -> bool:
    if isinstance(spec, str):
        return True
    pair = isinstance(spec, (list, tuple)) and len(spec) == 2
    return pair and isinstance(spec[0], str) and isinstance(spec[1], dict)


def check_blocks(model: VisionTransformer) -> None:
    """Raises UserError, naming the module, if a block or its attention is not timm's plain one, or ours."""
    for i, block in enumerate(model.blocks):
        if type(block) not in (Block, GridBlock):
            raise UserError(f'blocks.{i}: {type(block).__name__} is not the pre-norm Block of timm')
        if type(block.attn) is not Attention and not isinstance(block.attn, GridAttention):
            raise UserError(f'blocks.{i}.attn: {type(block.attn).__name__} is not the plain Attention of timm')


def check_patch_dropout(model: VisionTransformer, layers: Sequence[tuple[str, dict]]) -> None:
    """Raises UserError if a layer needs the whole patch grid and the model drops patches."""
    mixing = sorted({name for name, _ in layers} - {'full'})
    if mixing and isinstance(model.patch_drop, PatchDropout):
        raise UserError(
            f'patch_drop_rate={model.patch_drop.prob}: attention {mixing[0]!r} needs the whole patch grid; '
            "set patch_drop_rate=0, or use attention 'full'"
        )


def common_part(attentions: Sequence[nn.Module], owned: nn.Module | None = None) -> nn.Module | None:
    """The part that the layers of a model share; one model can have one.

    Args:
        attentions: Of the layers.
        owned: The part that the model has. It stays, if it is of use; otherwise it is that of the first layer.

    Raises:
        UserError: If the layers want parts of different shapes.
    """
    parts = {i: attn.common_part() for i, attn in enumerate(attentions) if isinstance(attn, GridAttention)}
    parts = {i: part for i, part in parts.items() if part is not None}
    if not parts:
        return None
    shapes = {i: [tuple(p.shape) for p in part.parameters()] for i, part in parts.items()}
    first = next(iter(parts))
    for i, shape in shapes.items():
        if shape != shapes[first]:
            raise UserError(
                f'blocks {first} and {i} share their projection and want it in two shapes, {shapes[first]} and '
                f"{shape}; give them the same num_tokens, or sharing='key-value'"
            )
    return next((part for part in parts.values() if part is owned), parts[first])


def own_common_part(model: VisionTransformer) -> None:
    """Makes the model the one owner of what its layers share, under the name `shared`."""
    part = common_part([block.attn for block in model.blocks], getattr(model, 'shared', None))
    if hasattr(model, 'shared'):
        del model.shared
    if part is not None:
        model.shared = part
        for block in model.blocks:
            if isinstance(block.attn, GridAttention) and block.attn.common_part() is not None:
                block.attn.use_common_part(part)


# A leaf for FX, where sizes are not yet numbers.
@torch.fx.wrap
@register_notrace_function
def check_image_size(height, width, patch_size: tuple[int, int]) -> None:
    """Raises UserError if the patches do not divide the image."""
    for side, size, patch in (('height', height, patch_size[0]), ('width', width, patch_size[1])):
        if type(size) is int and size % patch:
            raise UserError(
                f'image {side} {size} is not a multiple of the patch size {patch}; '
                f'use {size // patch * patch} or {(size // patch + 1) * patch}, or dynamic_img_pad=True to pad'
            )


class GridForward:
    """The forward passes of timm's `VisionTransformer`, with the patch grid made once and handed down."""

    def _embed(self, x: Tensor) -> tuple[Tensor, PatchGrid]:
        """Images (B, channels, height, width) → tokens (B, N, C), and where they lie."""
        height, width = plain_sizes((x.shape[-2], x.shape[-1]))
        if isinstance(self.patch_embed, DctPatchEmbed):
            height, width = self.patch_embed.pixel_size(height, width)
        if self.dynamic_img_size and not self.patch_embed.dynamic_img_pad:
            check_image_size(height, width, self.patch_embed.patch_size)
        grid = PatchGrid(*self.patch_embed.dynamic_feat_size((height, width)), prefix=self.num_prefix_tokens)
        x = self._pos_embed(self.patch_embed(x))
        return self.norm_pre(self.patch_drop(x)), grid

    def _run_block(self, block: GridBlock, x: Tensor, grid: PatchGrid, attn_mask, is_causal) -> Tensor:
        if self.grad_checkpointing and torch.is_tensor(x):  # FX traces with proxies, which cannot be checkpointed
            return checkpoint(block, x, grid, attn_mask, is_causal)
        return block(x, grid, attn_mask=attn_mask, is_causal=is_causal)

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        x, grid = self._embed(x)
        for block in self.blocks:
            x = self._run_block(block, x, grid, attn_mask, is_causal)
        return self.norm(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ):
        """Arguments and results as timm's `VisionTransformer.forward_intermediates`."""
        if output_fmt not in ('NCHW', 'NLC'):
            raise UserError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt=}")
        taken, last = feature_take_indices(len(self.blocks), indices)
        x, grid = self._embed(x)
        features = []
        for i, block in enumerate(self.blocks):
            if stop_early and i > last:
                break
            x = self._run_block(block, x, grid, attn_mask, is_causal)
            if i in taken:
                features.append(self.norm(x) if norm else x)

        prefixes = [f[:, : grid.prefix] for f in features] if grid.prefix and return_prefix_tokens else None
        features = [f[:, grid.prefix :] for f in features]
        if output_fmt == 'NCHW':
            features = [f.transpose(1, 2).unflatten(2, (grid.height, grid.width)).contiguous() for f in features]

        if output_dict:
            result = {'image_intermediates': features}
            if prefixes is not None:
                result['image_intermediates_prefix'] = prefixes
            if not intermediates_only:
                result['image_features'] = self.norm(x)
            return result
        if prefixes is not None:
            features = list(zip(features, prefixes, strict=True))
        return features if intermediates_only else (self.norm(x), features)

    def set_input_size(
        self, img_size: tuple[int, int] | None = None, patch_size: tuple[int, int] | None = None
    ) -> None:
        """As timm's; weights that are maps over the patch grid follow it.

        Raises:
            UserError: If the patches do not divide the image, or are too few for an attention's options. Nothing is
                changed then.
        """
        pair = [(v, v) if isinstance(v, int) else v for v in (img_size, patch_size)]
        size, patch = pair[0] or self.patch_embed.img_size, pair[1] or self.patch_embed.patch_size
        if not self.patch_embed.dynamic_img_pad:
            check_image_size(*size, patch)
        grid = PatchGrid(size[0] // patch[0], size[1] // patch[1], prefix=self.num_prefix_tokens)
        for block in self.blocks:
            block.attn.num_attended(grid)  # raises here rather than halfway
        super().set_input_size(img_size=pair[0], patch_size=pair[1])
        for block in self.blocks:
            block.attn.set_grid_size(*self.patch_embed.grid_size)

    def load_pretrained(self, checkpoint_path: str, prefix: str = '') -> None:
        """As timm's, of .npz files, whose patch embeddings are convolutions."""
        embedding = self.patch_embed
        if not isinstance(embedding, DctPatchEmbed):
            return super().load_pretrained(checkpoint_path, prefix)
        self.patch_embed = embedding.to_conv()
        try:
            super().load_pretrained(checkpoint_path, prefix)
            embedding.load_state_dict(self.patch_embed.state_dict())
        finally:
            self.patch_embed = embedding

    def prune_intermediate_layers(self, *args, **kwargs) -> list[int]:
        """As timm's; what only the layers that go have shared goes with them."""
        taken = super().prune_intermediate_layers(*args, **kwargs)
        own_common_part(self)
        return taken

    def attention_spec(self) -> list[tuple[str, dict[str, Any]]]:
        """The attention of each block as it stands: its registered name and its options."""
        return [(block.attn.mechanism, block.attn.options) for block in self.blocks]


class EfficientVisionTransformer(GridForward, VisionTransformer):
    """timm's `VisionTransformer` with any registered attention in each block.

    Args:
        *args, **kwargs: As timm's `VisionTransformer`.
        attention: A registered attention's name, or (name, options), or a list with one of these per layer.
        attention_kwargs: Options of a single attention, such as `keep_ratio`.
        patch_embed: 'conv', timm's, or 'dct', a `DctPatchEmbed`, whose arguments are
        patch_keep, patch_color, patch_input, patch_window: its `keep`, `color`, `input` and `window`.

    Raises:
        UserError: If an attention, a patch embedding or an option of theirs is unknown or out of range, or the patches
            do not divide the image.
    """

    def __init__(
        self,
        *args,
        attention: AttentionSpec = 'full',
        attention_kwargs: dict[str, Any] | None = None,
        patch_embed: str = 'conv',
        patch_keep: Keep = None,
        patch_color: str = 'rgb',
        patch_input: str = 'pixels',
        patch_window: bool = False,
        **kwargs,
    ):
        dim, heads = kwargs.get('embed_dim', 768), kwargs.get('num_heads', 12)
        if heads < 1 or dim % heads:
            raise UserError(f'num_heads must divide embed_dim, got embed_dim={dim}, num_heads={heads}')
        layer = patch_embed_layer(patch_embed, patch_keep, patch_color, patch_input, patch_window)
        if patch_embed != 'conv' and 'embed_layer' in kwargs:
            raise UserError(f'embed_layer cannot be had with {patch_embed=}: leave out one of them')
        kwargs.setdefault('embed_layer', layer)
        super().__init__(*args, block_fn=kwargs.pop('block_fn', GridBlock), **kwargs)
        if not self.patch_embed.dynamic_img_pad:
            check_image_size(*self.patch_embed.img_size, self.patch_embed.patch_size)
        check_blocks(self)
        layers = attention_per_layer(attention, attention_kwargs, len(self.blocks))
        check_patch_dropout(self, layers)
        for i, (block, (name, options)) in enumerate(zip(self.blocks, layers, strict=True)):
            options = layer_options(name, options, i, len(self.blocks), self.patch_embed.grid_size)
            block.attn = swap_attention(block.attn, name, **options)
        own_common_part(self)


class EfficientVisionTransformerDistilled(GridForward, VisionTransformerDistilled):
    """DeiT's distilled ViT, class and distillation token both prefix tokens; what `convert` makes of it."""


def kept_tokens(model: nn.Module, img_size: int | tuple[int, int] | None = None) -> list[int]:
    """The number of keys each block's queries attend to, prefix tokens included.

    Args:
        model: A registered or converted model.
        img_size: In pixels; that of the model by default.

    Raises:
        UserError: If the model is not one of ours, or the patches do not divide the image.
    """
    if not isinstance(model, GridForward):
        raise UserError(f'{type(model).__name__} is not a model of vit_efficient; convert() makes it one')
    size = model.patch_embed.img_size if img_size is None else img_size
    size = (size, size) if isinstance(size, int) else tuple(size)
    if not model.patch_embed.dynamic_img_pad:
        check_image_size(*size, model.patch_embed.patch_size)
    grid = PatchGrid(*model.patch_embed.dynamic_feat_size(size), prefix=model.num_prefix_tokens)
    return [block.attn.num_attended(grid) for block in model.blocks]


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """timm's filter for ViT checkpoints. What a mechanism adds to them follows the image size; what a checkpoint does
    not have starts as it is in the model.

    Raises:
        UserError: If what a mechanism adds was made with other options.
    """
    state_dict = _filter_like_timm(state_dict, model)
    for name, module in model.named_modules():
        if isinstance(module, Compressor):
            _check_whole(name, module, state_dict)
    for name, module in model.named_modules():
        if isinstance(module, Maps) and f'{name}.weight' in state_dict:
            state_dict[f'{name}.weight'] = module.adapt(state_dict[f'{name}.weight'])
        if isinstance(module, GridAttention):
            added = module.added_state(prefix=f'{name}.')
        elif name == 'shared':
            added = module.state_dict(prefix='shared.')
        else:
            continue
        for key, value in added.items():
            state_dict.setdefault(key, value)
    return state_dict


class _SeenByTimm:
    """A model as timm's filter expects it: its patch embedding a convolution over pixels."""

    def __init__(self, model: nn.Module):
        self._model = model
        self.patch_embed = model.patch_embed.empty_conv(device='meta')

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _filter_like_timm(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """timm's filter, for a patch embedding of pixels or of coefficients; kernels of pixels load into the latter."""
    embedding = model.patch_embed
    if not isinstance(embedding, DctPatchEmbed):
        return timm_checkpoint_filter_fn(state_dict, model, adapt_layer_scale=True)
    own = {key: value for key, value in state_dict.items() if key.startswith('patch_embed.linear.')}
    if own:
        embedding.check_weight(own.get('patch_embed.linear.weight'))
        # From its shape timm knows the patch grid that position embeddings are for.
        state_dict = {**state_dict, 'patch_embed.proj.weight': embedding.empty_conv(device='meta').proj.weight}
    seen = _SeenByTimm(model)
    state_dict = timm_checkpoint_filter_fn(state_dict, seen, adapt_layer_scale=True)
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


def _check_whole(name: str, compressor: Compressor, state_dict: dict[str, Tensor]) -> None:
    """Raises UserError if a checkpoint has some of a compressor's weights and not the others."""
    own = compressor.state_dict(prefix=f'{name}.')
    missing = sorted(own.keys() - state_dict.keys())
    if missing and len(missing) < len(own):
        raise UserError(
            f'the checkpoint lacks {", ".join(missing)} beside {", ".join(sorted(own.keys() & state_dict.keys()))}: it '
            "was made with other options of the attention; set them as they were, such as sharing='key-value'"
        )


def build_model(model_cls, variant: str, pretrained: bool = False, **kwargs) -> nn.Module:
    """timm's builder, for registered and converted models alike.

    Raises:
        RuntimeError: If weights are asked for that do not exist.
    """
    if pretrained:
        config = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
        if not (config.has_weights or config.state_dict):
            raise RuntimeError(
                f'No pretrained weights exist for {variant}. Use `pretrained=False` for random init, or convert a '
                "pretrained timm model: vit_efficient.convert(timm.create_model('vit_base_patch16_224', "
                "pretrained=True), 'dct')."
            )

    def build(**arguments) -> nn.Module:
        model = model_cls(**arguments)
        # What rebuilds it: the arguments of the entry point too, and not only those of create_model.
        model._model_args = {**getattr(model, '_model_args', {}), **arguments}
        for name in ('device', 'dtype'):
            model._model_args.pop(name, None)
        return model

    return build_model_with_cfg(
        build,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        pretrained_strict=kwargs.pop('pretrained_strict', True),
        feature_cfg=dict(out_indices=kwargs.pop('out_indices', 3), feature_cls='getter'),
        **kwargs,
    )


DEFAULT_CFG = dict(
    url='',
    num_classes=1000,
    input_size=(3, 224, 224),
    pool_size=None,
    crop_pct=0.9,
    interpolation='bicubic',
    fixed_input_size=True,
    mean=IMAGENET_INCEPTION_MEAN,
    std=IMAGENET_INCEPTION_STD,
    first_conv='patch_embed.proj',
    classifier='head',
    license='apache-2.0',
)

# Variants of a mechanism: what they add to its name, its description and the arguments.
VARIANTS = {
    '': ('ViT-{size}/16 with attention {attention!r}.', {}),
    '_dctpatch32': (
        'ViT-{size}/32 with attention {attention!r} and an embedding of the 16 × 16 lowest frequencies of each patch.',
        dict(patch_size=32, patch_embed='dct', patch_keep=16),
    ),
}
NAMES = [
    (attention, size, suffix)
    for suffix, attentions in (('', list_attentions()), ('_dctpatch32', ('full', 'dct')))
    for attention in attentions
    for size in SIZES
]

default_cfgs = generate_default_cfgs(
    {f'vit_{attention}_{size}{suffix}': DEFAULT_CFG for attention, size, suffix in NAMES}
)


def _register(attention: str, size: str, suffix: str) -> None:
    variant = f'vit_{attention}_{size}{suffix}'
    description, own = VARIANTS[suffix]

    def entry_point(pretrained: bool = False, **kwargs) -> EfficientVisionTransformer:
        arguments = dict(patch_size=16, **SIZES[size], attention=attention)
        arguments = {**arguments, **own, **kwargs}
        # A model whose embedding was swapped for a convolution, and saved.
        if arguments.get('patch_embed') == 'conv' and 'patch_keep' not in kwargs:
            arguments.pop('patch_keep', None)
        return build_model(EfficientVisionTransformer, variant, pretrained, **arguments)

    entry_point.__name__ = entry_point.__qualname__ = variant
    entry_point.__doc__ = description.format(size=size.capitalize(), attention=attention)
    register_model(entry_point)


for _name in NAMES:
    _register(*_name)
