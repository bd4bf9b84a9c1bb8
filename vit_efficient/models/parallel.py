"""The attention and the MLP of timm's parallel blocks as modules, whose parameters stay those of the block.

These blocks (Dehghani et al., "Scaling Vision Transformers to 22 Billion Parameters", 2023, arXiv 2302.05442) have one
projection in, to the hidden channels of the MLP, queries, keys and values, and one out, or two. What is here are rows
and columns of them, by reference to the block: the state dict is timm's, with what a mechanism adds to the attention.
"""

from torch import Tensor, nn

from vit_efficient.utils.projections import Part


class ParallelAttention(nn.Module):
    """What stands for the attention of a `ParallelScalingBlock`, with the attributes of timm's `Attention`."""

    gate = None

    def __init__(self, block: nn.Module):
        super().__init__()
        hidden, dim, *_ = block.in_split
        self.num_heads, self.head_dim, self.scale = block.num_heads, block.head_dim, block.scale
        self.fused_attn = block.fused_attn
        self.qkv = Part(block, 'in_proj', rows=slice(hidden, None))
        if block.out_proj is None:
            self.proj = Part(block, 'attn_out_proj')
        else:
            self.proj = Part(block, 'out_proj', columns=slice(dim))
        self.norm = self.proj_drop = nn.Identity()
        # By reference, unregistered, since the block owns them.
        vars(self).update(q_norm=block.q_norm, k_norm=block.k_norm, attn_drop=block.attn_drop)
        self.train(block.training)


class ParallelDiffAttention(ParallelAttention):
    """The same of a `DiffParallelScalingBlock`, with the attributes of timm's `DiffAttention`."""

    def __init__(self, block: nn.Module):
        super().__init__(block)
        self.lambda_init = block.lambda_init
        vars(self).update(block=block, sub_norm=block.sub_norm)

    def _compute_lambda(self) -> Tensor:
        return self.block._compute_lambda()

    def reset_parameters(self) -> None:
        """Nothing: the block resets its own."""


def attention_of_parallel(block: nn.Module) -> ParallelAttention:
    """What stands for the attention of a parallel block of timm's."""
    return (ParallelDiffAttention if hasattr(block, 'sub_norm') else ParallelAttention)(block)


class ParallelMlp(nn.Module):
    """The MLP of a parallel block."""

    flop_role = 'mlp'

    def __init__(self, block: nn.Module):
        super().__init__()
        hidden, dim, *_ = block.in_split
        vars(self)['block'] = block
        self.fc1 = Part(block, 'in_proj', rows=slice(hidden))
        if block.out_proj is None:
            self.fc2 = Part(block, 'mlp_out_proj')
        else:
            self.fc2 = Part(block, 'out_proj', columns=slice(dim, None), has_bias=False)  # that is the attention's
        self.train(block.training)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if self.block.mlp_bias is not None:
            x = x + self.block.mlp_bias
        return self.fc2(self.block.mlp_drop(self.block.mlp_act(x)))
