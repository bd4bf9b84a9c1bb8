"""The register of attentions, and who follows it."""

import pytest

from vit_efficient import create_attention, list_attentions, register_attention
from vit_efficient.attention import FullAttention, on_register, registry


@pytest.fixture
def register(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(registry, 'ATTENTIONS', dict(registry.ATTENTIONS))
    monkeypatch.setattr(registry, 'OBSERVERS', [])


def test_observers_hear_of_every_attention(register):
    heard = []
    on_register(heard.append)
    assert heard == list_attentions()
    register_attention('mine', preset=1)(FullAttention)
    assert heard[-1] == 'mine' and sorted(heard) == list_attentions()


def test_a_name_is_taken_once(register):
    heard = []
    on_register(heard.append)
    with pytest.raises(ValueError, match="'dct' is registered already: CompressedAttention"):
        register_attention('dct')(FullAttention)
    assert heard == list_attentions()


@pytest.mark.parametrize(
    ('name', 'options', 'onnx', 'program'),
    [
        ('full', {}, None, None),
        ('dct', {}, None, None),
        ('combiner', {}, None, None),
        ('monarch', {}, None, None),
        ('nystrom', {}, None, None),
        ('nystrom', dict(pinv='exact'), "pinv='iterative'", None),
        ('treeformer_tf', {}, "'treeformer_tc'", "'treeformer_tc'"),
    ],
)
def test_what_cannot_be_exported_says_why(name, options, onnx, program):
    attention = create_attention(name, 12, 3, **options)
    for suffix, way_out in (('.onnx', onnx), ('.pt2', program)):
        error = attention.export_error(suffix)
        assert error is None if way_out is None else f"'{name}'" in error and way_out in error
