"""PatchConvNet: a column of equal convolutional blocks at one resolution, and pooling by attention.

Touvron et al., "Augmenting convolutional networks with attention-based aggregation", 2021, arXiv 2112.13692. Its cost
grows with the number of patches, and it has no positions, so that it takes images of any size. Parameters have the
names that the authors' weights have.

    timm.create_model('patch_convnet_s60', num_classes=10)

Dimensions: B images, H × W patches, N of them, C channels, K query tokens.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, trunc_normal_
from timm.models import checkpoint, generate_default_cfgs, register_model
from torch import Tensor, nn

from vit_efficient.grid import PatchGrid
from vit_efficient.models.aggregation import AggregationBlock, as_queries, check_pool_options, init_linear, queries_of
from vit_efficient.models.registered import build_model, default_cfgs
from vit_efficient.utils.checks import as_integer, is_real
from vit_efficient.utils.compat import feature_indices
from vit_efficient.utils.errors import UserError

WIDTHS, DEPTHS = {'s': 384, 'b': 768, 'l': 1024}, (60, 120)
_PATCH = 16
_STEM = 4  # convolutions, each of which halves the resolution


class ConvStem(nn.Module):
    """Patches of 16 pixels that overlap: (B, in_chans, height, width) → (B, C, H, W)."""

    def __init__(self, in_chans: int, embed_dim: int, **place):
        super().__init__()
        widths = [in_chans, *(embed_dim // 2**k for k in reversed(range(_STEM)))]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Sequential(nn.Conv2d(before, after, 3, 2, 1, bias=False, **place)), nn.GELU()]
        self.proj = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class SqueezeExcite(nn.Module):
    """Channels scaled by what their means say. The bottleneck has C / 4 channels, which timm would round to eights."""

    def __init__(self, dim: int, **place):
        super().__init__()
        self.conv_reduce = nn.Conv2d(dim, dim // 4, 1, **place)
        self.conv_expand = nn.Conv2d(dim // 4, dim, 1, **place)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv_expand(self.conv_reduce(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class ConvMixer(nn.Module):
    """What a block adds, before its scale; `attn` of the authors, though nothing attends."""

    flop_role = 'rest'

    def __init__(self, dim: int, **place):
        super().__init__()
        self.qkv_pos = nn.Sequential(
            nn.Conv2d(dim, dim, 1, **place),
            nn.GELU(),
            nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **place),
            nn.GELU(),
            SqueezeExcite(dim, **place),
            nn.Conv2d(dim, dim, 1, **place),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) → the same"""
        return self.qkv_pos(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class PatchConvBlock(nn.Module):
    def __init__(self, dim: int, drop_path: float, init_values: float, **place):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **place)
        self.attn = ConvMixer(dim, **place)
        self.gamma_1 = nn.Parameter(init_values * torch.ones(dim, **place))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) → the same"""
        return x + self.drop_path(self.gamma_1 * self.attn(self.norm1(x)))


class PatchConvNet(nn.Module):
    """The network, with the methods that timm's models have.

    Args:
        num_classes: 0 leaves the classifier out.
        in_chans, embed_dim, depth: Channels of images, C, blocks.
        global_pool: 'aggregate'; or '', which leaves the tokens of patches as they are.
        pool_tokens: 'one' query token, or one for each 'class', whose weights are a map of it.
        pool_scale: Of the scores of pooling, by default 1 / √C; weights of the authors' first release have another one.
        init_values: γ at the start, of all blocks.
        drop_rate: Of what the classifier is given.
        drop_path_rate: The same in all blocks.
        device, dtype: Of the parameters.

    Raises:
        UserError: If an argument is out of range.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        embed_dim: int = 384,
        depth: int = 60,
        global_pool: str = 'aggregate',
        pool_tokens: str = 'one',
        pool_scale: float | None = None,
        init_values: float = 1e-6,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        place = dict(device=device, dtype=dtype)
        as_integer('in_chans', in_chans)
        if as_integer('embed_dim', embed_dim) % 8:
            raise UserError(f'embed_dim must be a multiple of 8, got {embed_dim}')
        as_integer('depth', depth)
        for name, rate in (('drop_rate', drop_rate), ('drop_path_rate', drop_path_rate)):
            if not is_real(rate) or not 0 <= rate < 1:
                raise UserError(f'{name} must be a number with 0 ≤ {name} < 1, got {rate!r}')
        if pool_scale is not None and not is_real(pool_scale):
            raise UserError(f'pool_scale must be a number, got {pool_scale!r}')
        check_pool_options(1, init_values)
        self.in_chans, self.embed_dim, self.pool_tokens = in_chans, embed_dim, pool_tokens
        self._of_block = dict(init_values=init_values, scale=pool_scale)
        self.num_features = self.head_hidden_size = embed_dim
        self.grad_checkpointing = False
        self.patch_embed = ConvStem(in_chans, embed_dim, **place)
        blocks = (PatchConvBlock(embed_dim, drop_path_rate, init_values, **place) for _ in range(depth))
        self.blocks = nn.ModuleList(blocks)
        names = [f'blocks.{i}' for i in range(depth)]
        self.feature_info = [dict(num_chs=embed_dim, reduction=_PATCH, module=name) for name in names]
        self.head_drop = nn.Dropout(drop_rate)
        self.apply(init_linear)
        self.global_pool, self.cls_token = '', None
        self.reset_classifier(num_classes, global_pool)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """As timm's. With a token for each class, all that pools begins anew as well; with '' nothing pools."""
        pool = self.global_pool if global_pool is None else global_pool
        if pool not in ('aggregate', ''):
            raise UserError(f"global_pool of a PatchConvNet must be 'aggregate' or '', got {pool!r}")
        if not pool and num_classes:
            raise UserError(f"num_classes must be 0 with global_pool='', which leaves the tokens, got {num_classes}")
        queries = queries_of(self.pool_tokens, as_integer('num_classes', num_classes, 0))
        weight, dim = self.blocks[0].gamma_1, self.embed_dim
        place = dict(device=weight.device, dtype=weight.dtype)
        if not pool:
            self.cls_token, self.blocks_token_only, self.norm = None, nn.ModuleList(), nn.Identity()
        elif self.cls_token is None or queries > 1 or self.cls_token.shape[1] > 1:
            self.cls_token = nn.Parameter(torch.empty(1, queries, dim, **place))
            trunc_normal_(self.cls_token, std=0.02)
            self.blocks_token_only = nn.ModuleList([AggregationBlock(dim, 1, queries, **self._of_block, **place)])
            self.norm = nn.LayerNorm(dim, eps=1e-6, **place)
        self.global_pool, self.num_classes = pool, num_classes
        if queries > 1:
            self.head = nn.ModuleList(nn.Linear(dim, 1, **place) for _ in range(num_classes))
        else:
            self.head = nn.Linear(dim, num_classes, **place) if num_classes else nn.Identity()
        self.head.apply(init_linear)
        for made in (self.blocks_token_only, self.norm, self.head):
            made.train(self.training)

    def get_classifier(self) -> nn.Module:
        return self.head

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        return {'cls_token'}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """As timm's: which layer a parameter is of, by its name."""
        blocks = [(r'^blocks\.(\d+)', None), (r'^cls_token|^blocks_token_only|^norm', (99999,))]
        return dict(stem=r'^patch_embed', blocks=blocks)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, height, width), sides of any size from 1 → (B, C, H, W)"""
        x = self._embed(x)
        for block in self.blocks:
            x = self._run(block, x)
        return x.permute(0, 3, 1, 2)

    def grid_of(self, height: int, width: int) -> PatchGrid:
        """The layout of the patches of an image, given its sides in pixels."""
        return PatchGrid(-(-height // _PATCH), -(-width // _PATCH))

    def _embed(self, x: Tensor) -> Tensor:
        return self.patch_embed(x).permute(0, 2, 3, 1)

    def _run(self, block: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(block, x) if self.grad_checkpointing and torch.is_grad_enabled() else block(x)

    def pooled(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, K, C)"""
        tokens = self.cls_token.expand(x.shape[0], -1, -1)
        return self.norm(self.blocks_token_only[0](x.flatten(2).transpose(1, 2), tokens))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, C, H, W) → (B, classes), or (B, C), the mean over tokens of classes, without classifier."""
        if not self.global_pool:
            return x
        pooled = self.head_drop(self.pooled(x))
        if pre_logits or not self.num_classes:
            return pooled.mean(1)
        if isinstance(self.head, nn.ModuleList):
            weight, bias = (torch.stack([getattr(each, name)[0] for each in self.head]) for name in ('weight', 'bias'))
            return (pooled * weight).sum(-1) + bias  # names of the authors, where `ClassHead` has one tensor
        return self.head(pooled[:, 0])

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ):
        """Arguments and results as timm's, of its convolutional networks; `norm` is that of what is pooled, and is not
        of patches."""
        if output_fmt != 'NCHW':
            raise UserError(f"output_fmt of a PatchConvNet must be 'NCHW', got {output_fmt!r}")
        if norm:
            raise UserError('norm=True: a PatchConvNet norms what it pools, not its patches; set norm=False')
        taken, last = feature_indices(len(self.blocks), indices)
        features, x = [], self._embed(x)
        for i, block in enumerate(self.blocks):
            if stop_early and i > last:
                break
            x = self._run(block, x)
            if i in taken:
                features.append(x.permute(0, 3, 1, 2))
        return features if intermediates_only else (x.permute(0, 3, 1, 2), features)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """As timm's: what comes after the last block that is read is taken away."""
        taken, last = feature_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_head:
            self.reset_classifier(0, '')
        return taken


def _weights_of(checkpoint: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The weights; those of other classes than the model's are left out, where each has a token."""
    weights = dict(checkpoint.get('model', checkpoint))
    token, own = weights.get('cls_token'), model.state_dict()
    if token is None:
        return weights
    if 'cls_token' not in own:  # nothing pools
        pooling = ('cls_token', 'blocks_token_only', 'norm', 'head')
        return {key: value for key, value in weights.items() if key.partition('.')[0] not in pooling}
    if token.shape == own['cls_token'].shape:
        return weights
    weights = {key: value for key, value in weights.items() if key.partition('.')[0] != 'head'}
    begun = {key: value for key, value in own.items() if key.partition('.')[0] == 'head'}
    return weights | begun | {'cls_token': as_queries(token, own['cls_token'])}


def _register(size: str, depth: int) -> None:
    name = f'patch_convnet_{size}{depth}'

    def entry_point(pretrained: bool = False, **kwargs) -> nn.Module:
        arguments = dict(embed_dim=WIDTHS[size], depth=depth) | kwargs
        return build_model(PatchConvNet, name, pretrained, _weights_of, **arguments)

    entry_point.__name__ = entry_point.__qualname__ = name
    entry_point.__doc__ = f'PatchConvNet-{size.upper()}{depth}.'
    entry_point.model_cls = PatchConvNet
    config = dict(url='', num_classes=1000, input_size=(3, 224, 224), pool_size=(14, 14), crop_pct=1.0)
    config |= dict(interpolation='bicubic', mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD)
    config |= dict(first_conv='patch_embed.proj.0.0', classifier='head', license='apache-2.0')
    default_cfgs.update(generate_default_cfgs({name: config}))
    register_model(entry_point)


for _size in WIDTHS:
    for _depth in DEPTHS:
        _register(_size, _depth)
