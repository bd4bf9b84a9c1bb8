import re

import numpy as np
import pytest
from PIL import Image

from tests.data.trees import pixels
from vit_efficient import dct
from vit_efficient_cli import main


def save(path, image):
    if path.suffix == '.npy':
        np.save(path, image)
    else:
        Image.fromarray(image).save(path)
    return path


def cells(text):
    """The rows of the table: lists of cells."""
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in text.splitlines() if line[0] == '|']
    return rows[2:]


@pytest.mark.parametrize(
    ('name', 'shape', 'dtype'),
    [
        ('grey.png', (24, 32), 'uint8'),
        ('rgb.png', (24, 32, 3), 'uint8'),
        ('deep.png', (24, 32), 'uint16'),
        ('many.npy', (24, 32, 6), 'float32'),
        ('tall.npy', (90, 3, 1), 'uint8'),
    ],
)
def test_figure_and_table(name, shape, dtype, tmp_path, capsys):
    image = pixels(0, shape, dtype)
    path = save(tmp_path / name, image)
    out = tmp_path / 'new' / 'out.png'
    assert main(['truncate', str(path), '--keep', '1/4', '0.1', '1', '--out', str(out)]) == 0
    printed = capsys.readouterr()
    assert printed.err == '' and f'saved {out}' in printed.out
    assert out.read_bytes().startswith(b'\x89PNG')
    rows = cells(printed.out)
    assert [row[0] for row in rows] == ['1/4', '0.1', '1']
    x = image.astype('f8')
    for row, ratio in zip(rows, (1 / 4, 0.1, 1), strict=True):
        assert row[1] == '{} × {}'.format(*dct.kept_coefficients(*shape[:2], ratio=ratio)[:2])
        for cell, y in ((row[2], x), (row[3], x - x.mean((0, 1)))):
            kept = dct.truncate(y, dims=(0, 1), ratio=ratio)
            assert float(cell) == pytest.approx(100 * np.square(kept).sum() / np.square(y).sum(), abs=0.006)
    width, height = Image.open(out).size
    assert width > height or shape[0] > shape[1]


@pytest.mark.parametrize(
    ('shape', 'first'),
    [
        *(((3, 24, 32), True), ((1, 24, 32), True), ((5, 24, 32), True), ((6, 7, 32), True)),
        *(((24, 32, 3), False), ((24, 32, 6), False), ((3, 32, 4), False), ((2, 64, 3), False)),
    ],
)
def test_arrays_have_channels_first_or_last(shape, first, tmp_path, capsys):
    image = pixels(0, shape)
    path = save(tmp_path / 'image.npy', image)
    assert main(['truncate', str(path), '--keep', '1/4', '--out', str(tmp_path / 'out.png')]) == 0
    rows, columns = shape[1:] if first else shape[:2]
    text = capsys.readouterr().out
    assert f'coefficients, of {rows} × {columns}' in text
    x = (np.moveaxis(image, 0, -1) if first else image).astype('f8')
    kept = dct.truncate(x, dims=(0, 1), ratio=1 / 4)
    assert float(cells(text)[0][2]) == pytest.approx(100 * np.square(kept).sum() / np.square(x).sum(), abs=0.006)


def test_blocks_of_an_image_that_they_do_not_divide(tmp_path, capsys):
    image = pixels(0, (21, 30))
    path = save(tmp_path / 'image.png', image)
    options = ['--keep', '1/5', '--block', '8', '--order', 'zigzag', '--out', str(tmp_path / 'out.png')]
    assert main(['truncate', str(path), *options]) == 0
    text = capsys.readouterr().out
    assert 'coefficients, of 8 × 8' in text
    [row] = cells(text)
    padded = np.pad(image, ((0, 3), (0, 2)), mode='edge')
    share = 100 * dct.kept_energy(padded, block=8, ratio=1 / 5, order='zigzag')
    assert row[1] == '12' and float(row[2]) == pytest.approx(share, abs=0.006)


@pytest.mark.parametrize('value', [0, 7])
def test_of_one_pixel_everything_is_kept(value, tmp_path, capsys):
    path = save(tmp_path / 'pixel.png', np.full((1, 1, 3), value, np.uint8))
    for options in ([], ['--block', '16', '--order', 'zigzag']):
        assert main(['truncate', str(path), *options, '--out', str(tmp_path / 'out.png')]) == 0
        assert all(row[2:] == ['100.00', '100.00'] for row in cells(capsys.readouterr().out))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['image.png', '--keep', '2'], "--keep must be shares above 0 and at most 1, such as 1/16, got '2'"),
        (['image.png', '--keep', '1/0'], "got '1/0'"),
        (['image.png', '--keep', 'all'], "got 'all'"),
        (['image.png', '--block', '0'], 'block must be a positive integer.*got block=0'),
        (['image.png', '--out', 'out.xyz'], "Format 'xyz' is not supported"),
        (['none.png'], r'none\.png: no such image'),
        (['text.png'], r'text\.png: not a readable image'),
        (['bright.npy'], r'bright\.npy: floating-point samples must lie in \[0, 1\]'),
    ],
)
def test_errors_are_one_line(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / 'image.png', pixels(0, (8, 8)))
    save(tmp_path / 'bright.npy', np.full((8, 8), 3.0))
    (tmp_path / 'text.png').write_text('text')
    before = set(tmp_path.iterdir())
    assert main(['truncate', *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == ''
    assert re.fullmatch(f'vit-efficient truncate: error: .*{message}.*\n', printed.err)
    assert set(tmp_path.iterdir()) == before


def test_a_block_that_would_not_fit_into_memory(tmp_path, capsys):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / 'small.png')
    assert main(['truncate', str(tmp_path / 'small.png'), '--block', '100000', '--out', str(tmp_path / 'o.png')]) == 2
    assert '--block must be at most 1024 for this image, got 100000' in capsys.readouterr().err
