"""The contract of an attention: timm's `Attention` with the grid of its tokens; and what all mechanisms repeat."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from timm.layers import Attention, register_notrace_function
from timm.models import vision_transformer_sam as sam
from torch import Tensor, nn

from vit_efficient.attention.differential import difference, values_of_maps
from vit_efficient.attention.functional import attend
from vit_efficient.attention.projections import Projection, first_layer, projections
from vit_efficient.attention.registry import get_attention, list_attentions, register_attention
from vit_efficient.attention.relative import (
    SHARED_ARGUMENT,
    RelativeBias,
    check_grid,
    drop_index,
    grid_of_bias,
    own_bias_module,
    relative_bias,
    whole_bias,
    without_index,
)
from vit_efficient.attention.rotary import rotate, table_of
from vit_efficient.grid import PatchGrid
from vit_efficient.utils.checks import argument_names, as_integer, check_options
from vit_efficient.utils.compat import own_names
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.modes import keeping_modes
from vit_efficient.utils.options import write_options
from vit_efficient.utils.projections import kind_of_weights

_TIMM_ARGUMENTS = argument_names(Attention)[0]


class GridAttention(Attention):
    """Base of all attentions here: the parameters of timm's `Attention`, and a patch grid beside the tokens.

    A subclass takes its options in `configure` and defines `forward`; it adds modules and attributes, and leaves
    those of timm as they are, so that checkpoints of plain ViTs load.

    Args:
        dim, num_heads: As timm's.
        mechanism: The name that it is registered by, if it is.
        **kwargs: timm's other arguments, and the options of the mechanism.

    Raises:
        UserError: If heads do not divide the dimension, or an option is unknown or out of range.
    """

    #: The registered name; with `options` it rebuilds the mechanism.
    mechanism: str = ''
    #: Whether it is the block that goes down to fewer tokens and up again, with its `down` and `up`, and `forward` is
    #: given those tokens.
    of_block: bool = False
    #: How FLOPs are named (`vit_efficient.flops.ROLES`): products of two activations apart from projections.
    flop_role: str = 'attention'
    #: Whether rotary positions reach what patches attend to, so that a model may have no others.
    places_patches: bool = True
    #: Whether what it computes depends on the values of its input, so that a count without data is an expectation.
    cost_depends_on_data: bool = False
    #: Whether it can be differential: it attends to `values_of_maps`, of more channels than keys have, and what its
    #: maps read goes through `merge_heads`.
    can_be_differential: bool = False
    #: The class of timm's whose parameters it has.
    source: type[nn.Module] = Attention
    #: Of rotary positions, which channels are pairs: i and i + D / 2, or 2 i and 2 i + 1; as the source has it.
    rotate_half: bool = False

    def __init__(self, dim: int, num_heads: int = 8, *, mechanism: str = '', **kwargs):
        timm_arguments = {name: kwargs.pop(name) for name in list(kwargs) if name in _TIMM_ARGUMENTS}
        dim, num_heads = as_integer('dim', dim), as_integer('num_heads', num_heads)
        if timm_arguments.get('attn_head_dim') is None and dim % num_heads:
            raise UserError(f'num_heads must divide dim, got {dim=}, {num_heads=}')
        if timm_arguments.get('norm_layer') is None:
            for switch in ('qk_norm', 'scale_norm'):
                if timm_arguments.get(switch):
                    raise UserError(f'{switch}=True needs norm_layer, for example norm_layer=nn.LayerNorm')
        super().__init__(dim, num_heads, **timm_arguments)
        self._configure(mechanism, kwargs)

    @classmethod
    def from_attention(cls, attention: Attention, *, mechanism: str = '', **options) -> 'GridAttention':
        """This mechanism around the parameters of an existing attention of timm, which is left as it was.

        What both mechanisms add to timm's under the same name and in the same shape is kept too.

        Args:
            attention: One of timm's `Attention`, `AttentionRope`, `EvaAttention` and `DiffAttention`, those of its
                `Beit`, `VisionTransformerRelPos` and `VisionTransformerSAM`, or of this class.
            mechanism: The name that it is registered by, if it is.
            **options: Those of the mechanism.

        Raises:
            UserError: If an option is wrong, or the attention has positions of its own, is differential, or of another
                class than timm's `Attention`, and the mechanism cannot have that.
        """
        new = cls.__new__(cls)
        for name, value in vars(attention).items():  # own registries of modules and hooks, the same parameters
            new.__dict__[name] = copy.copy(value) if isinstance(value, dict) else value
        if not isinstance(attention, GridAttention):
            new.source = type(attention)
            new._complete()
        for name in (*getattr(attention, '_additions', ()), 'mechanism'):
            if name in own_names(new):
                delattr(new, name)
        if new.is_differential and not cls.can_be_differential:
            name = f'attention {mechanism!r}' if mechanism else cls.__name__
            others = ', '.join(other for other in list_attentions() if get_attention(other).cls.can_be_differential)
            raise UserError(
                f'{name} cannot be differential, as {new.source.__name__} is: its queries cannot read the same values '
                f'by two maps; use one of {others}'
            )
        if mechanism:
            new.mechanism = mechanism
        if new.source is not Attention:
            new._check_source()
        new._configure(mechanism, options)
        if own_bias_module(new) is not None:
            new.check_relative_bias()
        if getattr(new, 'rope', None) is not None:
            new.check_rotary()
        if isinstance(attention, GridAttention):
            new._keep_additions(attention)
        with keeping_modes(attention):  # what both have in common stays in its own
            return new.train(attention.training)

    def _complete(self) -> None:
        """Adds what timm's `Attention` has and other classes of timm leave out."""
        if not hasattr(self, 'head_dim'):
            self.head_dim = self.proj.in_features // self.num_heads
        self.attn_dim = self.num_maps * self.head_dim
        for name in ('q_norm', 'k_norm', 'norm'):
            if not hasattr(self, name):
                setattr(self, name, nn.Identity())
        if not hasattr(self, 'gate'):
            self.gate = None
        if getattr(self, 'relative_position_index', None) is not None:
            drop_index(self)
        if hasattr(self, 'rel_pos'):
            self.rel_pos = without_index(self.rel_pos)

    def _keep_additions(self, attention: 'GridAttention') -> None:
        given = attention.added_state(keep_vars=True)
        for name, own in self.added_state(keep_vars=True).items():
            path, _, leaf = name.rpartition('.')
            module = self.get_submodule(path)
            if name not in given or given[name].shape != own.shape or type(given[name]) is not type(own):
                continue
            if not path or type(module) is type(attention.get_submodule(path)):
                setattr(module, leaf, given[name])

    @classmethod
    def at_layer(cls, options: dict[str, Any], layer: int, depth: int, grid_size: tuple[int, int]) -> dict[str, Any]:
        """The options of one block of a model, from those given for the model.

        Args:
            options: Those of the mechanism, preset included.
            layer: The number of the block, from 0.
            depth: The number of blocks.
            grid_size: Rows and columns of patches that the model is built for.

        Raises:
            UserError: If an option cannot be had at this layer or grid.
        """
        return options

    @classmethod
    def in_trained(cls, options: dict[str, Any]) -> dict[str, Any]:
        """The options in a model that is trained already, from those given (preset included): an option that is not
        given may have another default there, by which outputs change less."""
        return options

    def _configure(self, mechanism: str, options: dict[str, Any]) -> None:
        if mechanism:
            self.mechanism = mechanism
        known, takes_others = argument_names(self.configure)
        if not takes_others:
            check_options(self.title, options, known)
        before = own_names(self)
        self.configure(**options)
        self._additions = (*(own_names(self) - before), '_additions')

    def configure(self) -> None:
        """Takes the options of the mechanism, checks them, and adds what it needs to the module.

        The names of its arguments are those of the options; if it takes any (`**options`), it checks the names too.
        """

    @property
    def title(self) -> str:
        """The mechanism in messages: by its registered name, if it has one."""
        return f'attention {self.mechanism!r}' if self.mechanism else type(self).__name__

    @property
    def options(self) -> dict[str, Any]:
        """All options of the mechanism as they are, defaults too, in types that JSON has."""
        return {}

    def forward(
        self,
        x: Tensor,
        grid: PatchGrid,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Attention among the tokens of a grid.

        Where all blocks of a model share a relative bias, `shared_bias`, a `RelativeBias`, is given too, to those that
        `check_relative_bias` lets pass.

        Args:
            x: (B, N, C), N = grid.num_tokens.
            grid: The layout of the tokens.
            rope: Rotary positions of the patches, as timm hands them to its blocks, or a `Rope`: `rotate` takes both,
                `table_of` makes the first of either (`vit_efficient.attention.rotary`).
            attn_mask, is_causal: As timm's, where the mechanism can have them.

        Returns:
            (B, N, C)

        Raises:
            UserError: If the grid does not have N tokens, or a mask is given to a mechanism that can have none.
        """
        raise NotImplementedError

    def check_rotary(self) -> None:
        """Raises UserError if the mechanism cannot have rotary positions."""
        if 'rope' not in argument_names(self.forward)[0]:
            raise UserError(f'{self.title} takes no rope: its forward knows of no rotary positions')

    def _check_source(self) -> None:
        """Raises UserError if the mechanism may read the parameters of timm's `Attention` where there are others."""
        if 'rope' not in argument_names(self.forward)[0]:
            source = f'{self.source.__module__}.{self.source.__name__}'
            raise UserError(
                f"{self.title} is written for timm's Attention, and would not see all that {source} has; read queries, "
                'keys and values by its project() and rotate(), and give its forward the argument rope'
            )

    def check_relative_bias(self) -> None:
        """Raises UserError if the mechanism cannot have a relative position bias (`attention.relative`)."""
        raise UserError(
            f"{self.title} cannot have the model's relative position bias, an entry for each pair of patches: its "
            f"scores are not those of patches or of cells of them; use 'pool', 'subsample' or 'window', or 'dct' with "
            "domain='space' and axes='2d'"
        )

    def check_call(self, x: Tensor, grid: PatchGrid, attn_mask: Tensor | None = None, is_causal: bool = False) -> None:
        """Raises the errors of `forward`, of a mechanism that can have no mask."""
        check_tokens(self.title, x.shape, grid.height, grid.width, grid.prefix, attn_mask, is_causal)

    def reset_parameters(self) -> None:
        """As those of timm's classes that have parameters beside their layers; called after `to_empty`, say."""
        if self.is_differential:
            self.source.reset_parameters(self)
        for name in ('q_bias', 'v_bias', 'relative_position_bias_table', 'rel_pos_h', 'rel_pos_w'):
            if getattr(self, name, None) is not None:
                nn.init.zeros_(getattr(self, name))
        self.init_non_persistent_buffers()

    def init_weights(self) -> None:
        """What timm's `init_weights` of a ViT calls, after `to_empty` too; those of other models `reset_parameters`."""
        self.reset_parameters()

    def init_non_persistent_buffers(self) -> None:
        """What timm calls where buffers that no checkpoint has hold nothing yet."""
        if getattr(self, 'k_bias', None) is not None:
            self.k_bias.zero_()
        if getattr(self, 'relative_position_index', None) is not None:
            drop_index(self)

    def set_window_size(self, window_size: tuple[int, int]) -> None:
        """What timm's `Beit` calls at another image size."""
        self.source.set_window_size(self, window_size)

    def _init_buffers(self) -> None:
        """What timm's `set_window_size` calls."""
        self.init_non_persistent_buffers()

    def kind_of_weights(self) -> dict[str, Any]:
        """Device and dtype for weights that a mechanism adds: those of the projections."""
        return kind_of_weights(first_layer(self))

    @property
    def is_differential(self) -> bool:
        """Whether a head reads its values by two maps (`vit_efficient.attention.differential`)."""
        return hasattr(self.source, '_compute_lambda')

    def _compute_lambda(self) -> Tensor:
        """λ of differential attention, for which timm's forward pass asks by this name."""
        return self.source._compute_lambda(self)

    @property
    def num_maps(self) -> int:
        """How many heads of `head_dim` channels queries, keys and values have: of a differential head, two."""
        return 2 * self.num_heads if self.is_differential else self.num_heads

    def values_of_maps(self, v: Tensor) -> Tensor:
        """What the heads of queries attend to: (B, H, N, D) → (B, H, N, E), E = D unless it is differential."""
        return values_of_maps(v) if self.is_differential else v

    def merge_heads(self, y: Tensor) -> Tensor:
        """What all heads read, side by side; of differential ones, the differences: (B, H, N, E) → (B, N, C)"""
        if self.is_differential:
            y = difference(y, self._compute_lambda(), self.sub_norm, self.lambda_init)
        return y.transpose(1, 2).flatten(2)

    def project_heads(
        self, x: Tensor, first: int = 0, last: int = 3, through: Callable[[Projection, Tensor], Tensor] | None = None
    ) -> list[Tensor]:
        """Number `first` to `last` - 1 of queries, keys and values, without qk-norm: (B, N, C) → (B, H, N, D) each

        Of fewer heads of keys and values than of queries, each is there as often as it is read.

        Args:
            through: What takes a projection and x, and returns what it projects.
        """
        heads = []
        for projection, parts in projections(self, first, last):
            y = projection(x) if through is None else through(projection, x)
            of_parts = y.unflatten(-1, (parts, -1, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
            heads += [of_parts[i] for i in range(parts)]
        shared = getattr(self, 'num_kv_groups', 1)
        if shared > 1:
            heads = [t if first + i == 0 else t.repeat_interleave(shared, dim=1) for i, t in enumerate(heads)]
        return heads

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, with qk-norm, before any rotation: (B, N, C) → (B, H, N, D), three times"""
        q, k, v = self.project_heads(x)
        return self.q_norm(q), self.k_norm(k), v

    def rotate(self, q: Tensor, k: Tensor, rope: Tensor | None, prefix: int) -> tuple[Tensor, Tensor]:
        """Queries and keys turned by the rotary positions of their patches, if there are any: (B, H, N, D) twice"""
        if rope is None:
            return q, k
        return rotate(q, rope, prefix, self.rotate_half), rotate(k, rope, prefix, self.rotate_half)

    @property
    def drop_rate(self) -> float:
        """The fraction of attention weights that is dropped, in the mode that the module is in."""
        return self.attn_drop.p if self.training else 0.0

    def drop_keys(self, v: Tensor) -> Tensor:
        """In training, values without those of dropped keys: (B, H, N, D) → (B, H, N, D)

        For mechanisms with no N × N matrix that `attn_drop` could act on: it drops keys, each from all queries of its
        head. As in exact attention, the weights of the others are scaled up, not normalised again.
        """
        return v * self.attn_drop(torch.ones_like(v[..., :1])) if self.drop_rate else v

    def norm_and_gate(self, y: Tensor, x: Tensor) -> Tensor:
        """What stands between the heads' outputs y and the output projection; x is the attention's input."""
        y = self.norm(y)
        return y if self.gate is None else y * self.gate(x).sigmoid()

    def finish(self, y: Tensor, x: Tensor) -> Tensor:
        """What follows the heads' outputs y: norm, gate, output projection and its dropout."""
        return self.proj_drop(self.proj(self.norm_and_gate(y, x)))

    def num_attended(self, grid: PatchGrid) -> int:
        """The number of keys that a query attends to."""
        raise NotImplementedError

    def export_error(self, suffix: str) -> str | None:
        """Why the mechanism cannot be exported to a file with this suffix, '.onnx' or '.pt2'; None if it can."""
        return None

    def prepare_counting(self) -> None:
        """Leaves out work that is padding, of a copy whose FLOPs are counted on data."""

    def set_grid_size(self, height: int, width: int) -> None:
        """Follows the model to another patch grid, where there are parameters that have one."""

    def common_part(self) -> nn.Module | None:
        """The part that all layers of a model have in common, if there is one."""
        return None

    def use_common_part(self, owned: nn.Module) -> None:
        """Uses the common part that the model owns instead of its own."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return write_options(self.options)

    def added_state(self, prefix: str = '', keep_vars: bool = False) -> dict[str, Tensor]:
        """The entries of the state dict that timm's `Attention` does not have."""
        state = self.state_dict(prefix=prefix, keep_vars=keep_vars)
        return {key: value for key, value in state.items() if key[len(prefix) :].split('.')[0] in self._additions}


@register_attention('full')
class FullAttention(GridAttention):
    """Exact attention: timm's own, of the class that it was, which needs no grid."""

    can_be_differential = True

    def forward(
        self,
        x: Tensor,
        grid: PatchGrid,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        shared_bias: RelativeBias | None = None,
    ) -> Tensor:
        if self.source in SHARED_ARGUMENT:
            return self._with_relative_bias(x, grid, attn_mask, is_causal, shared_bias)
        if self.source is sam.Attention:
            return self._on_image(x, grid, attn_mask, is_causal)
        positions = {} if rope is None else {'rope': table_of(rope)}
        # timm's plain class knows of no positions, and of a parallel block timm has no module for the attention.
        if not (self.source is Attention and positions) and self.source.forward is not nn.Module.forward:
            return self.source.forward(self, x, **positions, attn_mask=attn_mask, is_causal=is_causal)
        q, k, v = self.project(x)
        q, k = self.rotate(q, k, rope, grid.prefix)
        if is_causal:
            attn_mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        y = attend(q, k, self.values_of_maps(v), self.scale, self.fused_attn, self.attn_drop, attn_mask)
        return self.finish(self.merge_heads(y), x)

    def _with_relative_bias(
        self, x: Tensor, grid: PatchGrid, attn_mask: Tensor | None, is_causal: bool, shared_bias: RelativeBias | None
    ) -> Tensor:
        """By timm's forward, which takes the bias that all blocks share, and no masks."""
        self._check_no_mask(attn_mask, is_causal)
        if (own := own_bias_module(self)) is not None:
            check_grid(self.title, own.window_size, grid.height, grid.width)
        if shared_bias is not None:
            check_grid(self.title, grid_of_bias(shared_bias), grid.height, grid.width)
        shared = None if shared_bias is None else whole_bias(shared_bias, grid.prefix)
        return self.source.forward(self, x, **{SHARED_ARGUMENT[self.source]: shared})

    def _on_image(self, x: Tensor, grid: PatchGrid, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        """By timm's forward of SAM, which takes (B, H, W, C) and no masks, and has its positions itself."""
        self._check_no_mask(attn_mask, is_causal)
        self.check_call(x, grid)
        return self.source.forward(self, x.unflatten(1, (grid.height, grid.width))).flatten(1, 2)

    def _check_no_mask(self, attn_mask: Tensor | None, is_causal: bool) -> None:
        check_no_mask(self.title, f'{self.source.__module__}.{self.source.__name__}', attn_mask, is_causal)

    def _get_rel_pos_bias(self) -> Tensor:
        """What the forward of timm's `Beit` calls."""
        return whole_bias(relative_bias(self), prefix=1)

    def check_relative_bias(self) -> None:
        """It has it as timm's class has."""

    def num_attended(self, grid: PatchGrid) -> int:
        return grid.num_tokens


@torch.fx.wrap
@register_notrace_function
def check_tokens(title: str, shape, height, width, prefix, attn_mask, is_causal) -> None:
    """Raises the errors of `GridAttention.forward`; a leaf for FX, because a traced mask is never None."""
    if len(shape) != 3:
        raise UserError(f'{title} takes x as (B, N, C), got {tuple(shape)}')
    num_tokens = shape[1]
    known = type(num_tokens) is type(height) is type(width) is int
    if attn_mask is None and not is_causal and known and num_tokens == prefix + height * width:
        return
    for argument, given in (('attn_mask', attn_mask is not None), ('is_causal', bool(is_causal))):
        if given:
            raise UserError(
                f'{title} does not compare all queries with all keys and cannot have {argument}; use '
                "'full', or crop the image to its valid patches and set dynamic_img_size=True"
            )
    sizes = (num_tokens, height, width, prefix)
    if all(type(size) is int for size in sizes) and num_tokens != prefix + height * width:
        raise UserError(
            f'x has {num_tokens} tokens, but grid=PatchGrid(height={height}, width={width}, prefix={prefix}) has '
            f'{prefix + height * width}'
        )


@torch.fx.wrap
@register_notrace_function
def check_no_mask(title: str, source: str, attn_mask: Tensor | None, is_causal: bool) -> None:
    """Raises UserError if a mask is given to a class of timm's that takes none; a leaf for FX, likewise."""
    if attn_mask is not None or is_causal:
        argument = 'is_causal' if attn_mask is None else 'attn_mask'
        raise UserError(f"{title} cannot have {argument}: timm's {source} takes no masks")


def trained_options(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options of an attention in a model that is trained already: its preset, those given, and `in_trained`."""
    cls, preset = get_attention(name)
    return cls.in_trained({**preset, **options})


def layer_options(
    name: str, options: dict[str, Any], layer: int, depth: int, grid_size: tuple[int, int]
) -> dict[str, Any]:
    """What `create_attention` takes for one block of a model: the preset of a name, under the options given.

    Args:
        name: One of `list_attentions()`.
        options: Those of the mechanism.
        layer, depth, grid_size: As in `GridAttention.at_layer`.

    Raises:
        UserError: If the name is unknown, or an option cannot be had at this layer or grid.
    """
    cls, preset = get_attention(name)
    return cls.at_layer({**preset, **options}, layer, depth, grid_size)


def create_attention(name: str, dim: int, num_heads: int = 8, **options) -> GridAttention:
    """An attention by its registered name.

    Args:
        name: One of `list_attentions()`.
        dim: C, channels of the tokens.
        num_heads: Attention heads; they divide `dim`.
        **options: Those of the mechanism, over its name's preset; and timm's arguments (`qkv_bias`, `qk_norm`, …).

    Raises:
        UserError: If the name or an option is unknown, or an option is out of range.
    """
    cls, preset = get_attention(name)
    return cls(dim, num_heads, mechanism=name, **{**preset, **options})


def swap_attention(attention: nn.Module, name: str, **options) -> GridAttention:
    """The attention called `name` around the parameters of `attention`, which is left as it was.

    Raises:
        UserError: If the name or an option is unknown, or an option is out of range.
    """
    cls, preset = get_attention(name)
    return cls.from_attention(attention, mechanism=name, **{**preset, **options})
