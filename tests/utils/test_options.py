import numpy as np
import pytest
import timm

from vit_efficient import save_model
from vit_efficient.models.create import create_from_spec
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.options import parse_spec, parse_value, write_spec
from vit_efficient.utils.packages import import_plugins
from vit_efficient_cli import main

pytestmark = pytest.mark.once


@pytest.mark.parametrize(
    ('text', 'value'),
    [
        ('1/16', 0.0625),
        ('[1/4, 2]', [0.25, 2]),
        ('{keep_ratio: 1e-1}', {'keep_ratio': 0.1}),
        ("{'keep_ratio': '1/16'}", {'keep_ratio': 0.0625}),
        ('(1, 2)', (1, 2)),
        ('true', True),
        ('null', None),
        ('mean', 'mean'),
    ],
)
def test_values_are_those_of_recipes(text, value):
    assert parse_value(text) == value


@pytest.mark.parametrize(
    ('text', 'options'),
    [
        ('pool', {}),
        ('dct:keep_ratio=1/4,place=block', dict(keep_ratio=0.25, place='block')),
        ('pool:keep_ratio=1/3', dict(keep_ratio=1 / 3)),
        ('pool:keep_ratio=0.30000000000000004', dict(keep_ratio=0.1 + 0.2)),
        ('window:window_size=[4,8],shift=True', dict(window_size=[4, 8], shift=True)),
        ('pool:num_tokens=None,scale=2.0', dict(num_tokens=None, scale=2.0)),
    ],
)
def test_specs_are_read_as_they_are_written(text, options):
    name = text.partition(':')[0]
    assert write_spec(name, options) == text
    assert parse_spec(text) == (name, options)


def test_attention_kwargs_are_a_mapping():
    with pytest.raises(
        UserError, match='attention_kwargs of vit_dct_tiny must be a mapping of options to values, got 3'
    ):
        create_from_spec('vit_dct_tiny', {'attention_kwargs': 3})


def test_integers_of_numpy_build_and_save_models(tmp_path):
    model = timm.create_model('vit_dct_tiny', depth=np.int64(1), num_heads=np.int64(3), img_size=np.int64(32))
    save_model(model, tmp_path)
    assert len(timm.create_model(f'local-dir:{tmp_path}', pretrained=True).blocks) == 1


@pytest.mark.parametrize('name', ['', '.relative', 'vit_efficient.nope.further', 'there_is_none'])
def test_plugins_that_are_not_there_are_named(name, capsys):
    with pytest.raises(UserError, match='plugins: '):
        import_plugins([name])
    assert main(['--plugin', name, 'table', 'flops', '--models', 'vit_full_tiny']) == 2
    assert 'error: plugins: ' in capsys.readouterr().err


def test_an_option_before_the_command_is_not_shortened(capsys):
    with pytest.raises(SystemExit):
        main(['--deb', 'train'])
    assert 'unrecognized arguments: --deb' in capsys.readouterr().err
