"""The README says what was measured. What its snippets and commands do is tested with those of the docs."""

import re
from pathlib import Path

import pytest
import timm
import torch

import vit_efficient

pytestmark = pytest.mark.once

ROOT = Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text(encoding='utf-8')
TABLES = [*ROOT.glob('recipes/**/*.md')]


def rows(path):
    return [line for line in path.read_text(encoding='utf-8').splitlines() if line.startswith('|')]


@pytest.mark.parametrize('path', sorted(ROOT.glob('recipes/**/results.md')), ids=lambda path: path.parent.name)
def test_tables_are_those_that_the_tools_printed(path):
    shown = {row for readme in [ROOT / 'README.md', *ROOT.glob('recipes/**/README.md')] for row in rows(readme)}
    assert rows(path) and set(rows(path)) <= shown


def test_results_are_rows_that_the_tools_printed():
    """Each row of a number is one of a table beside a recipe."""
    printed = {row for path in TABLES if path.name != 'README.md' for row in rows(path)}
    shown = [row for row in rows(ROOT / 'README.md') if re.search(r'\| +[\d,.]+ \|', row)]
    assert len(shown) >= 5 and set(shown) <= printed


def test_counts_are_right():
    """The GMACs in the snippet."""
    stated = re.search(r'# (\d+); (\d+) before', README).groups()
    with torch.device('meta'):
        model = timm.create_model('vit_base_patch16_224', img_size=1024)
        before = vit_efficient.count_flops(model, input_size=(3, 1024, 1024)).total
        vit_efficient.convert(model, 'merge', place='x', keep_ratio=1 / 4)
        after = vit_efficient.count_flops(model, input_size=(3, 1024, 1024)).total
    assert [f'{count / 1e9:.0f}' for count in (after, before)] == list(stated)


def test_make_targets_exist():
    makefile = (ROOT / 'Makefile').read_text()
    for target in re.findall(r'`make ([\w-]+)`', README):
        assert re.search(rf'^{target}:', makefile, re.MULTILINE)


def test_public_names():
    assert all(hasattr(vit_efficient, name) for name in vit_efficient.__all__)
