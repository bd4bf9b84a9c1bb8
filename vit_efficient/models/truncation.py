"""Truncations whose size is learned: what they cost, and what they become once they are.

See `vit_efficient.dct.window`. Two parts of a model can have one: its patch embedding
(`patch_embed='dct', patch_window=True`) and the DCT compressor of each layer (`attention_kwargs=dict(learned=True)`).

Letters: N tokens, m kept, C channels, H × W patches.
"""

from typing import Any

import torch
from torch import Tensor, nn

from vit_efficient.attention import CompressedAttention, swap_attention
from vit_efficient.compress.budget import kept_grid
from vit_efficient.dct.window import FrequencyWindow
from vit_efficient.grid import PatchGrid
from vit_efficient.models.blocks import OnGrid
from vit_efficient.models.patch_embed import DctPatchEmbed
from vit_efficient.utils.compat import DATA_PARALLEL, unwrap
from vit_efficient.utils.errors import UserError

# By the name of each part that learns a truncation: coefficients kept of each channel, or of the patch grid.
Sizes = dict[str, tuple[int, int] | list[tuple[int, int]]]


def count_windows(model: nn.Module) -> int:
    """How many parts of the model have a truncation whose size is learned."""
    return _learns(getattr(model, 'patch_embed', None)) + len(_layers(model))


def has_windows(model: nn.Module) -> bool:
    """Whether a part of the model has one."""
    return count_windows(model) > 0


def copy_sizes(source: nn.Module, target: nn.Module) -> None:
    """Copies what a model has learned of sizes to a copy of it, such as an average of its weights."""
    with torch.no_grad():
        for ours, theirs in zip(source.modules(), target.modules(), strict=True):
            if isinstance(ours, FrequencyWindow):
                theirs.share.copy_(ours.share)


def _learns(embedding: nn.Module | None) -> bool:
    return isinstance(embedding, DctPatchEmbed) and embedding.window is not None


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks whose attention learns one, by its name in the model."""
    return {
        f'blocks.{i}.{name}': block
        for i, block in enumerate(getattr(model, 'blocks', ()))
        if isinstance(block, OnGrid)
        for name, attention in block.own_attentions().items()
        if isinstance(attention, CompressedAttention) and getattr(attention.compress, 'window', None) is not None
    }


def soft_cost(model: nn.Module, hard: bool = False) -> Tensor:
    """The multiply-accumulates of the parts with a learned truncation, as a share of those that they would have whole.

    Parts are patch embedding and attentions (at place 'block', with the MLP), their transforms included; where both
    learn, it is the share of their sum, at the image size of the model. Differentiable in the sizes that are learned,
    which are not rounded; with `hard`, what would be left if the truncations were frozen. With windows wide open the
    scalar is a little above 1 where the whole needs no transform (domain 'space').
    """
    if not has_windows(model):
        raise UserError('the model learns no truncation; set patch_window=True, or learned=True of the attention dct')
    embedding = model.patch_embed
    grid = PatchGrid(*embedding.grid_size, prefix=model.num_prefix_tokens)
    parts = []
    if _learns(embedding):
        size_of = embedding.window.hard_size if hard else embedding.window.soft_size
        cut = embedding.macs([size_of(f, g) for f, g in embedding.truncation])
        parts.append((grid.num_patches * cut, grid.num_patches * embedding.macs(embedding.truncation)))
    for name, block in _layers(model).items():
        attention = model.get_submodule(name)
        size = kept_grid(grid.height, grid.width, attention.compress.budget)
        window = attention.compress.window
        cut = (window.hard_size if hard else window.soft_size)(*size)
        parts.append(tuple(_attention_macs(attention, grid, *sides, block.mlp_macs()) for sides in (cut, size)))
    return torch.as_tensor(sum(cut for cut, _ in parts) / sum(whole for _, whole in parts))


def _attention_macs(attention: CompressedAttention, grid: PatchGrid, h, w, mlp: int):
    """Multiply-accumulates of an attention among h × w coefficients; at place 'block', with those of the MLP.

    An axis that keeps all its tokens is not transformed in the domain 'space'; if its size is soft, it may be.
    """
    N, C, m = grid.num_tokens, attention.attn_dim, grid.prefix + h * w
    in_space = attention.compress.domain == 'space'
    rows = 0 if in_space and type(h) is int and h == grid.height else C * grid.num_patches * h
    columns = 0 if in_space and type(w) is int and w == grid.width else C * h * grid.width * w
    down = rows + columns
    local = 0 if attention.local is None else attention.local.weight.numel() * grid.num_patches
    if attention.place == 'kv':
        return 2 * N * C**2 + 2 * m * C**2 + 2 * N * m * C + down + local
    return 4 * m * C**2 + 2 * m**2 * C + 2 * down + local + (m * mlp if attention.of_block else 0)


def freeze_truncation(model: nn.Module, sizes: Sizes | None = None) -> Sizes:
    """Turns each learned truncation of a model into a hard one, in place: what is outside the window is cut.

    A patch embedding keeps the gains of the coefficients that are left, in its weights: its outputs are what they were.
    An attention keeps its weights, gives the coefficients that are left a gain of 1 and, in the domain 'space', has as
    many tokens: what that changes, some training mends (in a recipe, a stage with `freeze: true`). How many an
    attention keeps is from then on a number, that for the image size of the model: set another one before
    (`set_input_size`).

    Args:
        model: A registered or converted model, wrapped or not.
        sizes: What an earlier call returned, instead of what this model has learned. Parts that it does not name are
            frozen to what they have learned.

    Returns:
        By the name of each part the coefficients left: of each channel, or of the patch grid.

    Raises:
        UserError: If no part of the model has a learned truncation, what was learned is not a number, or `sizes` names
            what is no such part or does not fit it. The model is then as it was.
    """
    *wrappers, model = unwrap(model)
    if any(isinstance(wrapper, DATA_PARALLEL) for wrapper in wrappers):
        raise UserError('data parallelism would not know the new weights; freeze the model, then wrap it')
    if not has_windows(model):
        raise UserError('the model learns no truncation that could be frozen')
    parts = [*['patch_embed'] * _learns(model.patch_embed), *_layers(model)]
    unknown = sorted(set(sizes or {}) - set(parts))
    if unknown:
        raise UserError(f'sizes names {", ".join(unknown)}; the truncations that are learned are {", ".join(parts)}')
    left, made = {}, {}
    for name in parts:
        part, size = model.get_submodule(name), (sizes or {}).get(name)
        try:
            with torch.no_grad():
                if name == 'patch_embed':
                    made[name] = part.freeze(size)
                    left[name] = made[name].truncation
                else:
                    made[name], left[name] = _freeze_attention(part, model.patch_embed.grid_size, size)
        except UserError as error:
            raise UserError(f'{name}: {error}') from error
    for name, module in made.items():
        model.set_submodule(name, module)
    return left


def _freeze_attention(attention: CompressedAttention, grid_size: tuple[int, int], size: Any) -> tuple[nn.Module, Any]:
    """What takes the place of an attention, and its size."""
    whole = kept_grid(*grid_size, attention.compress.budget)
    size = attention.compress.window.hard_size(*whole) if size is None else tuple(size)
    if len(size) != 2 or not all(1 <= side <= most for side, most in zip(size, whole, strict=True)):
        raise UserError(f'its size must be rows and columns of at most {whole}, got {size}')
    dropped = ('learned', 'keep_ratio', 'num_tokens')
    options = {name: value for name, value in attention.options.items() if name not in dropped}
    return swap_attention(attention, attention.mechanism, **options, num_tokens=size), size
