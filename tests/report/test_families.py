"""Which models of timm a conversion serves, as a table."""

import json

import pytest

from vit_efficient.report.families import families_table
from vit_efficient_cli import main

NAMES = ['vit_tiny_patch16_224', 'vit_tiny_patch16_dinov3_*', 'swin_tiny_patch4_*', 'naflexvit_base_patch16_gap']


def test_by_family():
    """Models of one kind are one row, and each refusal has its reason."""
    text = families_table(NAMES)
    lines = {line.split('|')[1].strip(): line for line in text.splitlines() if line.startswith('|')}
    assert [cell.strip() for cell in lines['vision_transformer'].split('|')[6:8]] == ['1', '1']
    assert 'RotaryEmbeddingDinoV3' in lines['eva'] and 'NaFlexVit' in lines['naflexvit']
    assert [cell.strip() for cell in lines['swin_transformer'].split('|')[6:8]] == ['1', '0']
    assert "3 of 4 are served with attention 'dct' (timm " in text
    assert '\n- swin_tiny_patch4_window7_224: cannot convert a SwinTransformer: its tokens lie on several grids' in text


def test_of_another_attention(capsys, tmp_path):
    """By command: what cannot have rotary positions is a refusal too."""
    command = ['table', 'families', '--models', *NAMES[:2], '--attention', 'dct1d:keep_ratio=1/4']
    assert main([*command, '--format', 'json', '--out', str(tmp_path / 'families.json')]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows == json.loads((tmp_path / 'families.json').read_text())
    served = {row['name']: row['served'] for row in rows}
    assert served == {'vit_tiny_patch16_224': True, 'vit_tiny_patch16_dinov3_qkvb': False}
    assert "place='kv' or 'qkv'" in rows[1]['error']


@pytest.mark.parametrize(
    'arguments, message',
    [
        (dict(patterns=['no_such_*']), "timm knows no model 'no_such_"),
        (dict(patterns=NAMES[:1], attention='dctt'), 'dctt'),
        (dict(patterns=NAMES[:1], options=dict(keep=3)), 'keep'),
        (dict(patterns=['vit_dct_tiny']), 'timm knows no model'),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        families_table(**arguments)
