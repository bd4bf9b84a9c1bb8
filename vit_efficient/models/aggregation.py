"""Pooling by attention: a learned token asks all patches what the image shows, and its weights say where it looks.

Touvron et al., "Augmenting convolutional networks with attention-based aggregation", 2021, arXiv 2112.13692. It is the
class attention of CaiT (Touvron et al., 2021, arXiv 2103.17239) with one head and an MLP three times as wide, so that
timm's block has its parameters, under the same names.

Dimensions: B images, N patches, C channels, K query tokens, h heads.
"""

import math
from typing import Any

import torch
from timm.layers import trunc_normal_
from timm.models.cait import ClassAttn, LayerScaleBlockClassAttn
from torch import Tensor, nn
from torch.nn import functional as F

from vit_efficient.utils.checks import as_integer, check_choice, is_real
from vit_efficient.utils.errors import UserError


class AggregationAttention(ClassAttn):
    """One query token attends to itself and all patches; several, one for each class, to the patches alone."""

    flop_role = 'attention'

    def __init__(self, dim: int, num_heads: int = 1, num_queries: int = 1, **options):
        super().__init__(dim, num_heads, **options)
        self.num_queries = num_queries

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, K + N, C), the query tokens first → (B, K, C)"""
        seen = x if self.num_queries == 1 else x[:, self.num_queries :]
        dropout = self.attn_drop.p if self.training else 0.0
        q, k, v = (self._heads(y) for y in (self.q(x[:, : self.num_queries]), self.k(seen), self.v(seen)))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=self.scale)
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))


class AggregationBlock(LayerScaleBlockClassAttn):
    """timm's block of CaiT for query tokens of any number; its MLP is three times as wide.

    Args:
        dim: C.
        num_heads: h.
        num_queries: K.
        init_values: γ at the start. At 1e-6 the tokens are the same for every image for long, which is right for 300
            epochs; short runs want 1.
        scale: Of scores, by default 1 / √(C / h).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        num_queries: int = 1,
        init_values: float = 1e-4,
        scale: float | None = None,
        **options,
    ):
        check_pool_options(num_heads, init_values)
        if dim % num_heads:
            raise UserError(f'pool_heads must divide embed_dim={dim}, got {num_heads}')
        super().__init__(
            dim,
            num_heads,
            mlp_ratio=3.0,
            qkv_bias=True,
            norm_layer=lambda width, **kwargs: nn.LayerNorm(width, eps=1e-6, **kwargs),
            attn_block=lambda *args, **kwargs: AggregationAttention(*args, num_queries=num_queries, **kwargs),
            init_values=init_values,
            **options,
        )
        if scale is not None:
            self.attn.scale = scale
        self.apply(init_linear)


class Aggregation(nn.Module):
    """Pooling of patches, which timm's ViTs call `attn_pool`.

    Args:
        dim, num_heads, num_queries, init_values: As of `AggregationBlock`.
    """

    def __init__(self, dim: int, num_heads: int = 1, num_queries: int = 1, init_values: float = 1e-4, **place):
        super().__init__()
        self.num_queries = num_queries
        self.cls_token = nn.Parameter(torch.empty(1, num_queries, dim, **place))
        self.block = AggregationBlock(dim, num_heads, num_queries, init_values, **place)
        trunc_normal_(self.cls_token, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) → (B, C); with a token for each class (B, K, C)"""
        pooled = self.block(x, self.cls_token.expand(x.shape[0], -1, -1))
        return pooled[:, 0] if self.num_queries == 1 else pooled


class PoolsByAttention:
    """A ViT of timm's that has `global_pool='aggregate'` as well, an `Aggregation` of its patches; before its class.

    Args:
        pool_heads: h.
        pool_tokens: 'one' query token, or one for each 'class', each of which has a classifier of its own.
        pool_init: γ at the start.

    Raises:
        UserError: If one of these is out of range.
    """

    pool_heads, pool_tokens, pool_init = 1, 'one', 1e-4  # also of a model that is converted

    def __init__(self, *args, pool_heads: int, pool_tokens: str, pool_init: float, **kwargs):
        check_pool_options(pool_heads, pool_init)
        queries_of(pool_tokens)
        aggregates = kwargs.get('global_pool') == 'aggregate'
        if aggregates:  # timm knows a closed list of poolings; with 'avg' the final norm is of what is pooled
            kwargs['global_pool'] = 'avg'
        super().__init__(*args, **kwargs)
        self.pool_heads, self.pool_tokens, self.pool_init = pool_heads, pool_tokens, pool_init
        if aggregates:
            self.reset_classifier(self.num_classes, 'aggregate')

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """As timm's, and for 'aggregate': with a token for each class, these begin anew as the classes do."""
        pool = self.global_pool if global_pool is None else global_pool
        if pool != 'aggregate':
            return super().reset_classifier(num_classes, global_pool)
        queries = queries_of(self.pool_tokens, num_classes)
        super().reset_classifier(num_classes)
        weight = next(self.parameters())
        place = dict(device=weight.device, dtype=weight.dtype)
        if queries > 1 or not isinstance(self.attn_pool, Aggregation) or self.attn_pool.num_queries > 1:
            pool = Aggregation(self.embed_dim, self.pool_heads, queries, self.pool_init, **place)
            self.attn_pool = pool.train(self.training)
        self.global_pool = 'aggregate'
        if queries > 1:
            self.head = ClassHead(self.embed_dim, num_classes, **place).train(self.training)

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """As timm's: (B, prefix tokens + N, C) → (B, C), or (B, K, C)."""
        if isinstance(self.attn_pool, Aggregation):
            return self.attn_pool(x[:, self.num_prefix_tokens :])
        return super().pool(x, pool_type)

    def forward_head(self, x: Tensor | list[Tensor], pre_logits: bool = False) -> Tensor | list[Tensor]:
        """As timm's; without classifier, of a token for each class their mean."""
        x = super().forward_head(x, pre_logits)
        of_classes = isinstance(self.attn_pool, Aggregation) and self.attn_pool.num_queries > 1
        return x.mean(1) if of_classes and pre_logits else x

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | {'attn_pool.cls_token'}

    def construction(self) -> dict[str, Any]:
        pooling = ('pool_heads', 'pool_tokens', 'pool_init') if self.global_pool == 'aggregate' else ()
        return super().construction() | {name: getattr(self, name) for name in pooling}


class Aggregation2d(nn.Module):
    """`Aggregation` and the norm of what it gives in the place of timm's pooling of maps.

    Args:
        dim, num_heads, init_values: As of `AggregationBlock`.
        flatten: Whether it gives (B, C); else maps of one pixel.
        channels_last: Whether maps are (B, H, W, C).
    """

    def __init__(self, dim: int, num_heads: int, init_values: float, flatten: bool, channels_last: bool, **place):
        super().__init__()
        self.aggregation = Aggregation(dim, num_heads, 1, init_values, **place)
        self.norm = nn.LayerNorm(dim, eps=1e-6, **place)
        self.flattens, self.channels_last = flatten, channels_last

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W), or (B, H, W, C) → (B, C), or maps of one pixel"""
        patches = x.flatten(1, 2) if self.channels_last else x.flatten(2).transpose(1, 2)
        pooled = self.norm(self.aggregation(patches))
        if self.flattens:
            return pooled
        return pooled[:, None, None] if self.channels_last else pooled[:, :, None, None]

    # What timm's classifiers ask their pooling.
    pool_type = 'aggregate'  # which those that make it anew in `reset_classifier` refuse

    def is_identity(self) -> bool:
        return False

    def feat_mult(self) -> int:
        return 1


class ClassHead(nn.Module):
    """A classifier of pooled tokens, one for each class: each has a linear map of its own to its logit."""

    def __init__(self, dim: int, num_classes: int, **place):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, dim, **place))
        self.bias = nn.Parameter(torch.zeros(num_classes, **place))
        trunc_normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(B, K, C) → (B, K)"""
        return (x * self.weight).sum(-1) + self.bias


def init_linear(module: nn.Module) -> None:
    """Initialises a linear layer as timm's ViTs do."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def queries_of(pool_tokens: str, num_classes: int = 0) -> int:
    """The number of query tokens of a model; without classes 1.

    Raises:
        UserError: If `pool_tokens` is neither 'one' nor 'class', or there is one class alone to have a token.
    """
    check_choice('pool_tokens', pool_tokens, ('one', 'class'))
    if pool_tokens == 'one' or not num_classes:
        return 1
    return as_integer('num_classes', num_classes, 2, "two at least for pool_tokens='class', a token for each class")


def as_queries(saved: Tensor, wanted: Tensor) -> Tensor:
    """Query tokens (1, K, C) that were saved, for a model with `wanted`: one begins them all, several their mean; those
    of other classes do not go on."""
    if saved.shape[1] == wanted.shape[1] or saved.shape[1] == 1:
        return saved.expand_as(wanted)
    return saved.mean(1, keepdim=True) if wanted.shape[1] == 1 else wanted


def check_pool_options(heads: Any, init: Any) -> None:
    """Raises UserError for a number of heads that is none, or a scale at the start that is not finite."""
    as_integer('pool_heads', heads)
    if not is_real(init) or not math.isfinite(init):
        raise UserError(f'pool_init must be a finite number, such as 1e-4, got pool_init={init!r}')
