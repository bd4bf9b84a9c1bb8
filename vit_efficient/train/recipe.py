"""Recipes: YAML files checked against the typed keys of `train.config`.

A recipe may start from another (`extends: base.yaml`, relative to its own folder) and be overridden from the command
line (`optim.lr=1e-3`). Numbers may be fractions (`1/16`). What a key takes as text is text as it stands, also where
YAML has a number or a switch for it (`output=007`, `data.train=no`). Whatever does not fit is a UserError that names
the key and its source.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml

from vit_efficient.train.config import MAX_NUMBER, Config
from vit_efficient.train.rules import validate
from vit_efficient.train.same_attention import SOURCES
from vit_efficient.utils.checks import nearest
from vit_efficient.utils.errors import UserError, first_line, one_line
from vit_efficient.utils.keys import element_of, flatten, walk
from vit_efficient.utils.options import parse_fractions
from vit_efficient.utils.packages import import_plugins, needing

with needing('train', 'recipes are read with'):
    from omegaconf import OmegaConf
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

# Entries of mappings that take text, or a list of texts.
_OF_DATA = ('classes', 'input_key', 'target_key', 'name', 'revision', 'cache_dir', 'data_dir')
TEXTS = {'data.args': _OF_DATA, 'data.val_args': _OF_DATA, 'model.args': ('checkpoint_path',)}


class _TextLoader(yaml.SafeLoader):
    """Reads YAML with numbers and switches as they are spelt; null is none."""


for _kind in ('bool', 'int', 'float', 'timestamp'):
    _TextLoader.add_constructor(f'tag:yaml.org,2002:{_kind}', yaml.SafeLoader.construct_scalar)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a recipe.

    Args:
        path: The YAML file.
        overrides: `key=value` with dots in the key; the value is YAML, or all of it a text where the key takes one.
            Another `model.attention` than the recipe's comes without its options, and weights to start from
            (`model.init_from`, or `model.args.pretrained` or `checkpoint_path`) come in the place of the recipe's.

    Raises:
        UserError: For a file that cannot be read, an unknown key, or a value of the wrong type or out of its range.
    """
    path = Path(path)
    config = OmegaConf.structured(Config)
    for layer_path, layer, spelt in _layers(path):
        config = _merge(config, layer, spelt, str(layer_path))
    layer, spelt, kinds = OmegaConf.create(), OmegaConf.create(), {name: item.type for name, item, _ in walk(Config())}
    for override in overrides:
        key, equals, value = override.partition('=')
        if not equals or not key:
            raise UserError(f'command line: expected key=value, got {override!r}')
        try:
            if _stands_for_itself(value, kinds.get(key)):
                OmegaConf.update(layer, key, value)
                OmegaConf.update(spelt, key, value)
            else:
                layer.merge_with_dotlist([override])
                OmegaConf.update(spelt, key, yaml.load(value, _TextLoader))
        except Exception as error:  # see `_layers`
            raise UserError(f'command line: {override!r} is not valid: {first_line(error)}') from error
    config = _merge(config, layer, OmegaConf.to_container(spelt), 'command line')
    try:
        recipe = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise UserError(f'{path}: {_key_of(error)}{first_line(error)}') from error
    recipe.recipe = path.as_posix()
    if not recipe.output:
        recipe.output = default_output(path).as_posix()
    validate(recipe)
    import_plugins(recipe.plugins)
    return recipe


def to_yaml(config: Config) -> str:
    """The resolved recipe, as load_recipe reads it."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))


def default_output(path: Path) -> Path:
    """runs/… where the recipe is recipes/…; of recipes elsewhere, their folder and name."""
    parts = path.resolve().with_suffix('').parts
    below = parts[::-1].index('recipes') if 'recipes' in parts else 2
    return Path('runs', *parts[-below:])


def _layers(path: Path, below: tuple[Path, ...] = ()) -> Iterator[tuple[Path, Any, dict]]:
    """The recipes that this one extends, the most basic first, then this one: each as it is, and as it is spelt."""
    if path.resolve() in below:
        raise UserError(f'{path}: extends itself')
    try:
        text = path.read_text(encoding='utf-8')
        layer, spelt = OmegaConf.load(io.StringIO(text)), yaml.load(text, _TextLoader) or {}
    except OSError as error:
        raise UserError(f'{path}: cannot read the recipe: {error.strerror or first_line(error)}') from error
    except Exception as error:  # a value that is not of the type its tag tells raises anything
        raise UserError(f'{path}: not valid YAML: {one_line(error)}') from error
    if not OmegaConf.is_dict(layer):
        raise UserError(f'{path}: a recipe is a mapping of keys to values')
    base = spelt.get('extends')
    if 'extends' in spelt:
        del layer['extends']
    if base is not None:
        if not isinstance(base, str):
            raise UserError(f'{path}: extends must name a recipe, got {base!r}')
        yield from _layers(path.parent / base, (*below, path.resolve()))
    yield path, layer, spelt


def _stands_for_itself(value: str, kind: Any) -> bool:
    """Whether the value of an override is a text, other than one in quotes."""
    null = ('null', '~') if kind is str else ('null', '~', '')
    return kind in (str, str | None) and value not in null and value[:1] not in ('"', "'")


def _merge(config: Any, layer: Any, spelt: Any, source: str) -> Any:
    """The configuration under a layer of keys; `spelt` is the same layer as `_TextLoader` reads it."""
    layer = OmegaConf.create(_checked(Config(), OmegaConf.to_container(layer), spelt, source))
    attention, model = config.model.attention, layer.get('model', {})
    if model.get('attention', attention) != attention:
        config.model.attention_kwargs = {}
        config.model.layers = config.model.layers if model['attention'] else None
    args = model.get('args') or {}
    if model.get('init_from'):
        config.model.args = {key: value for key, value in config.model.args.items() if key not in SOURCES}
    elif args.get('pretrained') or args.get('checkpoint_path'):
        config.model.init_from = ''
    try:
        _empty(config, layer)
        return OmegaConf.merge(config, layer)
    except (ConfigKeyError, ConfigAttributeError) as error:
        key = str(error.full_key)
        raise UserError(f'{source}: unknown key {key}{_suggestion(key)}') from error
    except TypeError as error:  # OmegaConf's, of a list under a mapping or the other way round
        raise UserError(f'{source}: {first_line(error)}; a list is replaced as a whole') from error
    except OmegaConfBaseException as error:
        raise UserError(f'{source}: {_key_of(error)}{first_line(error)}') from error


def _empty(config: Any, layer: Any) -> None:
    """Empties the mappings of any keys, such as data.args, that a layer gives as {}: a merge adds to them alone."""
    for key, value in layer.items():
        if not OmegaConf.is_dict(value) or not OmegaConf.is_dict(config.get(key)):
            continue
        if value:
            _empty(config[key], value)
        elif OmegaConf.get_type(config[key]) is dict:
            config[key] = {}


def _key_of(error: OmegaConfBaseException) -> str:
    return f'{error.full_key}: ' if error.full_key else ''


def _checked(config: Any, layer: Any, spelt: Any, source: str, section: str = '') -> dict[Any, Any]:
    """A section of a recipe with its fractions as numbers, and its texts as they are spelt.

    Raises:
        UserError: For what OmegaConf does not name: a section that is none, a section in a list, an integer beyond
            floats.
    """
    if not isinstance(layer, dict):
        raise UserError(f'{source}: {section} must be a section of keys, got {layer!r}')
    items, prefix = {item.name: item for item in fields(config)}, f'{section}.' if section else ''
    checked = {}
    for key, value in layer.items():
        name = f'{prefix}{key}'
        if key not in items:
            raise UserError(f'{source}: unknown key {name}{_suggestion(name, [prefix + item for item in items])}')
        default, part = getattr(config, key), element_of(items[key])
        if is_dataclass(default):
            checked[key] = _checked(default, value, spelt[key], source, name)
        elif part:
            if not isinstance(value, list):
                given = f'got {value!r}; it is replaced as a whole'
                raise UserError(f'{source}: {name} must be a list of sections, {given}')
            pairs = enumerate(zip(value, spelt[key], strict=True))
            checked[key] = [_element(part, *pair, source, f'{name}[{i}]') for i, pair in pairs]
        else:
            checked[key] = _leaf(items[key].type, value, spelt.get(key), f'{source}: {name}', TEXTS.get(name, ()))
    return checked


def _element(part: type, value: Any, spelt: Any, source: str, name: str) -> dict[Any, Any]:
    value = _checked(part(), value, spelt, source, name)
    try:
        OmegaConf.merge(OmegaConf.structured(part), value)
    except OmegaConfBaseException as error:
        raise UserError(f'{source}: {name}.{_key_of(error)}{first_line(error)}') from error
    return value


def _as_spelt(value: Any, spelt: Any) -> Any:
    """A text, or a list of texts, as it is spelt."""
    if isinstance(value, list):
        return [_as_spelt(*pair) for pair in zip(value, spelt, strict=True)]
    return spelt if isinstance(value, bool | int | float) else value


def _leaf(kind: Any, value: Any, spelt: Any, name: str, texts: Sequence[str]) -> Any:
    origins = {get_origin(each) for each in (kind, *get_args(kind))}
    for origin, what in ((list, 'a list'), (dict, 'a mapping of keys to values')):
        if origin in origins and not isinstance(value, (origin, type(None))):
            raise UserError(f'{name} must be {what}, got {value!r}')
    if str in (kind, *get_args(kind)) and dict not in origins:
        value = _as_spelt(value, spelt)
    else:
        as_texts = {key: _as_spelt(value[key], spelt[key]) for key in texts if key in (value or {})}
        value = parse_fractions(value)
        if as_texts:
            value |= as_texts
    for number in value if isinstance(value, list) else [value]:
        if number is not value and isinstance(number, (dict, list)):
            raise UserError(f'{name} must be a list of single values, got {value!r}')
        if isinstance(number, int) and abs(number) > MAX_NUMBER:
            raise UserError(f'{name} must be at most {MAX_NUMBER:g} in size')
    return value


def _suggestion(key: str, beside: Sequence[str] = ()) -> str:
    known = [*flatten(Config()), *beside]
    sections = {name.rpartition('.')[0] for name in known} - {''}
    # A key in the wrong section is the other common slip.
    moved = next((name for name in known if name.rpartition('.')[2] == key.rpartition('.')[2]), None)
    return nearest(key, [*known, *sections]) or (f'; did you mean {moved}?' if moved else '')
