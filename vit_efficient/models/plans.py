"""Plans: which attention each layer of a model has, what that is predicted and measured to cost, and the YAML of it."""

import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from vit_efficient.models.blocks import AttentionSpec
from vit_efficient.utils.checks import is_integer, is_real
from vit_efficient.utils.errors import UserError, one_line
from vit_efficient.utils.files import write_text
from vit_efficient.utils.options import parse_fractions


@dataclass(frozen=True)
class Plan:
    """An attention for each layer of a model, as `vit_efficient.plan` finds it and `vit_efficient.convert` takes it.

    Args:
        layers: The name and the options of each layer's attention; of a `VisionTransformerSAM` those of global blocks.
        model: The architecture that it is for.
        img_size: Height and width, in pixels, of the images that it was measured on.
        unit: What the budget is of: gmacs, ms or keys.
        budget: What was allowed, as a share of the cost of the model as it was.
        share: What it costs, as such a share.
        gmacs: Billions of multiply-accumulates for an image, of the model as it was and with this plan.
        loss: The name of the loss.
        predicted: The loss of the model as it was, and what each layer alone adds to it.
        measured: The loss of the model with this plan.
        fidelity: The measured `vit_efficient.fidelity.Fidelity`, by name, but for what the model has not.
    """

    layers: list[tuple[str, dict[str, Any]]]
    model: str
    img_size: tuple[int, int]
    unit: str
    budget: float
    share: float
    gmacs: tuple[float, float]
    loss: str
    predicted: float
    measured: float
    fidelity: dict[str, float]

    def save(self, path: str | os.PathLike) -> None:
        """Writes it as YAML, numbers rounded to six digits."""
        values = asdict(self)
        layers = [{name: options} if options else name for name, options in values.pop('layers')]
        values = _plain(values, '.6g') | {'layers': _plain(layers)}  # last: they are many
        sides = ' × '.join(map(str, self.img_size))
        about = f'# A plan of vit-efficient plan: {self.share:.3f} of the {self.unit} of {self.model} at {sides} px.\n'
        write_text(path, about + yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=120))

    @classmethod
    def load(cls, path: str | os.PathLike) -> 'Plan':
        """Reads what `save` has written.

        Raises:
            UserError: If there is no such file, or it is none of these.
        """
        try:
            values = yaml.safe_load(Path(path).read_text(encoding='utf-8'))
        except FileNotFoundError as error:
            raise UserError(f'{path}: no such plan') from error
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f'{path}: not a readable plan ({one_line(error)})') from error
        names = [field.name for field in fields(cls)]
        given = list(values) if isinstance(values, dict) else []
        if sorted(map(str, given)) != sorted(names):
            missing = ', '.join(name for name in names if name not in given)
            unknown = ', '.join(str(name) for name in given if name not in names)
            said = '; '.join(f'{what} {which}' for what, which in (('without', missing), ('with', unknown)) if which)
            raise UserError(f'{path}: not a plan of vit-efficient plan ({said})')
        if not isinstance(values['layers'], list):
            raise UserError(f'{path}: layers must be a list, got {values["layers"]!r}')
        values['layers'] = [_layer(layer, path) for layer in values['layers']]
        for name in ('img_size', 'gmacs'):
            if not isinstance(values[name], list) or len(values[name]) != 2:
                raise UserError(f'{path}: {name} must be a list of two numbers, got {values[name]!r}')
            values[name] = tuple(values[name])
        return cls(**values)


def _plain(value: Any, digits: str = '') -> Any:
    """Values as YAML has them, without those of NumPy and fractions; real numbers of so many digits."""
    if isinstance(value, dict):
        return {key: _plain(each, digits) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each, digits) for each in value]
    if is_integer(value):
        return int(value)
    return float(format(float(value), digits)) if is_real(value) else value


def _layer(layer: Any, path: str | os.PathLike) -> tuple[str, dict[str, Any]]:
    if isinstance(layer, str):
        return layer, {}
    if isinstance(layer, dict) and len(layer) == 1:
        [(name, options)] = layer.items()
        if isinstance(name, str) and isinstance(options, dict):
            return name, parse_fractions(options)
    raise UserError(f'{path}: a layer is an attention or {{attention: {{option: value}}}}, got {layer!r}')


def is_plan(attention: Any) -> bool:
    """Whether it is a plan, or the path of the YAML of one."""
    named = isinstance(attention, str) and attention.endswith(('.yaml', '.yml'))
    return named or isinstance(attention, (Plan, os.PathLike))


def as_spec(attention: 'AttentionSpec | Plan | os.PathLike') -> AttentionSpec:
    """The attentions of a plan, or of the YAML file of one; anything else is what it is."""
    if not is_plan(attention):
        return attention
    return (attention if isinstance(attention, Plan) else Plan.load(attention)).layers
