import csv
import io
import json
import math

import pytest

from vit_efficient.report.table import Column, Table

pytestmark = pytest.mark.once

TABLE = Table(
    [Column('model'), Column('gmacs', 'GMACs', 2), Column('top1', 'top-1', 1, spread='std'), Column('std'), 'seed'],
    [
        {'model': 'a|b', 'gmacs': 1234.5678, 'top1': 97.25, 'std': 0.12, 'seed': 0},
        {'model': 'c', 'gmacs': math.nan, 'top1': 9.0},
    ],
)


def test_markdown_is_aligned():
    assert TABLE.render() == (
        '| model |    GMACs |      top-1 | seed |\n'
        '| ----- | -------: | ---------: | ---: |\n'
        '| a\\|b  | 1,234.57 | 97.2 ± 0.1 |    0 |\n'
        '| c     |        – |        9.0 |    – |\n'
    )


def test_csv_and_json_are_unrounded():
    first, second = csv.DictReader(io.StringIO(TABLE.render('csv')))
    assert first == {'model': 'a|b', 'gmacs': '1234.5678', 'top1': '97.25', 'std': '0.12', 'seed': '0'}
    assert second['gmacs'] == second['std'] == second['seed'] == ''
    first, second = json.loads(TABLE.render('json'))
    assert first['gmacs'] == 1234.5678 and second['gmacs'] is None


def test_a_table_without_rows_has_its_heads():
    assert Table(['a', 'b']).render().count('\n') == 2


def test_unknown_formats_and_keys_are_named():
    with pytest.raises(ValueError, match='html'):
        TABLE.render('html')
    with pytest.raises(ValueError, match="'c'"):
        Table(['a', 'b'], [{'c': 1}])
