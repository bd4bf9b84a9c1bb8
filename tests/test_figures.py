"""Figures that the docs have in tables of their own are those of the committed tables that the page links to."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NUMBER = re.compile(r'\d+(?:,\d{3})*(?:\.\d+)?')


def rows(path: Path) -> list[list[str]]:
    lines = re.findall(r'^\|(.*)\|$', path.read_text(encoding='utf-8'), re.MULTILINE)
    return [[cell.strip() for cell in line.split('|')] for line in lines]


def words(row: list[str]) -> set[str]:
    """Words, and numbers of thousands, by which rows about the same are found; exact attention has two names."""
    text = ' '.join(row).lower().replace('exact', 'exact full')
    return set(re.findall(r'[a-z][a-z0-9]*|\d+,\d{3}', text.replace('_', ' ')))


def numbers(cell: str) -> list[tuple[float, float]]:
    """The numbers in a cell, those in seconds as milliseconds, and half a unit of the last digit of each."""
    unit = 1000 if cell.endswith(' s') else 1
    found = [(text.replace(',', ''), len(text.partition('.')[2])) for text in NUMBER.findall(cell)]
    return [(float(text) * unit, 0.5 * unit / 10**digits) for text, digits in found]


@pytest.mark.parametrize('page', ['choosing', 'speed', 'treeformer'])
def test_figures_are_measured(page):
    """Each is, rounded, in a row of a table that the page links to, and that has a word of its own row's first cell."""
    path = ROOT / f'docs/{page}.md'
    links = set(re.findall(r'\]\(\.\./(recipes/[\w./-]+\.md)', path.read_text(encoding='utf-8')))
    measured = [(words(row), row) for link in links for row in rows(ROOT / link)]
    checked = 0
    for label, *cells in rows(path):
        about = [each for known, row in measured if known & words([label]) for cell in row for each in numbers(cell)]
        for cell in cells:
            for figure, half in numbers(cell) if re.fullmatch(r'[\d.,–± ×s]+', cell) else ():
                checked += 1
                assert any(abs(figure - found) <= half + fine + 1e-9 for found, fine in about), f'{label}: {cell}'
    assert checked >= 5
