"""Pooling by attention: a learned token asks all patches what the image shows, and its weights say where it looks.

Touvron et al., "Augmenting convolutional networks with attention-based aggregation", 2021, arXiv 2112.13692. It is the
class attention of CaiT (Touvron et al., 2021, arXiv 2103.17239) with one head and an MLP three times as wide, so that
timm's block has its parameters, under the same names.

Dimensions: B images, N patches, C channels, K query tokens, h heads.
"""

import torch
from timm.models.cait import ClassAttn, LayerScaleBlockClassAttn
from torch import Tensor, nn
from torch.nn import functional as F

from vit_efficient.utils.checks import as_integer
from vit_efficient.utils.errors import UserError


class AggregationAttention(ClassAttn):
    """One query token attends to itself and all patches; several, one for each class, to the patches alone.

    Attributes:
        scale: Of scores, 1 / √(C / h). Weights of the authors' first release need another one.
    """

    flop_role = 'attention'

    def __init__(self, dim: int, num_heads: int = 1, num_queries: int = 1, **options):
        super().__init__(dim, num_heads, **options)
        self.num_queries = num_queries

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _asked(self, x: Tensor) -> Tensor:
        return x if self.num_queries == 1 else x[:, self.num_queries :]

    def forward(self, x: Tensor) -> Tensor:
        """(B, K + N, C), the query tokens first → (B, K, C)"""
        seen, dropout = self._asked(x), self.attn_drop.p if self.training else 0.0
        q, k, v = (self._heads(y) for y in (self.q(x[:, : self.num_queries]), self.k(seen), self.v(seen)))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=self.scale)
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))

    def weights(self, x: Tensor) -> Tensor:
        """What each query gives to what it asks: (B, h, K, 1 + N), itself first, or (B, h, K, N); they sum to 1."""
        q, k = self._heads(self.q(x[:, : self.num_queries])), self._heads(self.k(self._asked(x)))
        return (self.scale * q @ k.transpose(-2, -1)).softmax(-1)


class AggregationBlock(LayerScaleBlockClassAttn):
    """timm's block of CaiT for query tokens of any number; its MLP is three times as wide.

    Args:
        dim: C.
        num_heads: h.
        num_queries: K.
        init_values: γ at the start. At 1e-6 the tokens are the same for every image for long, which is right for 300
            epochs; short runs want 1e-4 or 0.1.
    """

    def __init__(self, dim: int, num_heads: int = 1, num_queries: int = 1, init_values: float = 1e-4, **options):
        if num_heads < 1 or dim % num_heads:
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

    def weights(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Those of its attention, of patches (B, N, C) and query tokens (B, K, C)."""
        return self.attn.weights(self.norm1(torch.cat((tokens, x), dim=1)))


def check_pooling(pool_tokens: str, num_classes: int) -> int:
    """The number of query tokens.

    Raises:
        UserError: If `pool_tokens` is neither 'one' nor 'class', or there are no classes to have a token each.
    """
    if pool_tokens not in ('one', 'class'):
        raise UserError(f"pool_tokens must be 'one' or 'class', got {pool_tokens!r}")
    if pool_tokens == 'one':
        return 1
    if num_classes < 2:
        raise UserError(f"pool_tokens='class' has a token for each class, two at least, got num_classes={num_classes}")
    return as_integer('num_classes', num_classes)
