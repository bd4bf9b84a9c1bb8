"""Which attention each layer of a model has: a name, a name and its options, or one of these for each layer."""

from collections.abc import Sequence
from typing import Any

from vit_efficient.utils.errors import UserError

LayerSpec = str | tuple[str, dict[str, Any]]  # a name, or a name and its options
AttentionSpec = LayerSpec | Sequence[LayerSpec]  # of all layers, or of each


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
