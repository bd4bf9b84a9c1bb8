"""Figures that the docs have in tables of their own are those of the committed tables that the page links to."""

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

ROOT = Path(__file__).parent.parent
NUMBER = re.compile(r'\d+(?:,\d{3})*(?:\.\d+)?')


def rows(text: str) -> list[list[str]]:
    lines = re.findall(r'^\|(.*)\|$', text, re.MULTILINE)
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


def is_in(row: list[str], figures: list[tuple[float, float]]) -> bool:
    """Whether all figures are numbers of a row, rounded."""
    found = [number for cell in row for number in numbers(cell)]
    return all(any(abs(figure - each) <= half + 1e-9 for each, _ in found) for figure, half in figures)


@pytest.mark.parametrize('page', ['choosing', 'speed', 'treeformer'])
def test_figures_are_measured(page):
    """Those of a row are in one row about the same, of a table that their section links to.

    Where the first cell is a number, such as of patches, or a row sums up several, each figure is in a row of its own.
    """
    checked = 0
    for section in re.split('^## ', (ROOT / f'docs/{page}.md').read_text(encoding='utf-8'), flags=re.MULTILINE):
        links = re.findall(r'\]\(\.\./(recipes/[\w./-]+\.md)', section)
        measured = [(words(row), row) for link in links for row in rows((ROOT / link).read_text(encoding='utf-8'))]
        titles: list[str] = []
        for label, *cells in rows(section):
            figures = [numbers(cell) if re.fullmatch(r'[\d.,–± ×s]+', cell) else [] for cell in cells]
            if not any(figures):
                titles = titles if set(cells[0]) <= set('-: ') else cells
                continue
            by_title = label[0].isdigit()
            several = by_title or label.count('`') > 2 or any(', ' in cell for cell in cells)
            each = [(title, figure) for title, found in zip(titles, figures, strict=True) for figure in found]
            groups = [(title, [figure]) for title, figure in each] if several else [('', [f for _, f in each])]
            for title, group in groups:
                about = [row for known, row in measured if known & words([label])]
                about = [row for row in about if words([title]) & words(row)] if by_title else about
                assert any(is_in(row, group) for row in about), f'{label}: {group}'
                checked += 1
    assert checked >= 5
