"""The table of fidelity: what stands in a row, what is measured again, and which photographs are taken."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from PIL import Image

from tests.data.trees import pixels
from vit_efficient import convert, count_flops, save_model
from vit_efficient.conversion import sharing_weights
from vit_efficient.data.preprocessing import Preprocessing
from vit_efficient.data.squares import find_photographs
from vit_efficient.fidelity import fidelity, final_tokens
from vit_efficient.report import fidelity as table
from vit_efficient.report.evaluation import open_model
from vit_efficient.report.fidelity import fidelity_table, read_attentions
from vit_efficient.utils.errors import UserError
from vit_efficient_cli import main


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    """A model, two photographs of at least 64 pixels, and one that is smaller."""
    folder = tmp_path_factory.mktemp('prepared')
    torch.manual_seed(0)
    model = timm.create_model('test_vit', num_classes=0, depth=3)
    save_model(model, folder / 'model')
    for i, (height, width) in enumerate([(64, 90), (100, 70), (40, 300)]):
        path = folder / 'photos' / 'inside' / f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(i, (height, width, 3))).save(path)
    return folder


@pytest.fixture
def rows(prepared):
    def measure(attentions, sizes=(64,), **options):
        options = {'format': 'json', **options}
        return json.loads(fidelity_table(str(prepared / 'model'), [prepared / 'photos'], sizes, attentions, **options))

    return measure


@pytest.fixture
def runs(monkeypatch):
    """The models that were run, once for each time; what they cost is not counted."""
    calls = []

    def counted(model, images):
        calls.append(model)
        return final_tokens(model, images)

    monkeypatch.setattr(table, 'final_tokens', counted)
    monkeypatch.setattr(table, 'count_flops', lambda model, size: SimpleNamespace(total=1))
    return calls


def test_rows_are_what_a_user_would_measure(prepared, rows):
    found = rows(['full', 'subsample:keep_ratio=1/16', 'subsample:layers=1-2,keep_ratio=1/4'], sizes=[64, 48])
    assert [(row['img_size'], row['attention'].partition(':')[0]) for row in found] == [
        (size, name) for size in (64, 48) for name in ('as it is', 'full', 'subsample', 'subsample')
    ]
    own, full, few, late = found[:4]
    assert own['centred'] == own['patch'] == pytest.approx(1) and full['centred'] == pytest.approx(1)
    assert own['keys'] == 16 and own['speed_ratio'] == own['gmacs_ratio'] == 1 and own['milliseconds'] > 0
    assert few['keys'] == 1 and few['keys_percent'] == 100 / 16
    assert late['keys'] == (1 * 16 + 2 * 4) / 3

    exact = timm.create_model(f'local-dir:{prepared / "model"}', pretrained=True, img_size=64)
    converted = convert(copy.deepcopy(exact), 'subsample', keep_ratio=1 / 16)
    preprocessing = Preprocessing.of(exact)
    images = [each.square(preprocessing) for each in find_photographs([prepared / 'photos'])[:2]]
    kept = [fidelity(*both, 1) for both in zip(*(final_tokens(m, images) for m in (exact, converted)), strict=True)]
    for name in ('patch', 'centred', 'prefix'):
        assert few[name] == pytest.approx(sum(getattr(each, name) for each in kept) / 2, abs=1e-6)
    assert few['centred'] < late['centred'] < 1
    assert few['gmacs'] == count_flops(converted, (3, 64, 64)).total / 1e9
    assert few['gmacs_ratio'] == few['gmacs'] / own['gmacs']


def test_a_converted_model_as_it_is_has_the_keys_that_it_has(prepared, tmp_path, runs):
    model = timm.create_model(f'local-dir:{prepared / "model"}', pretrained=True, img_size=64)
    save_model(convert(model, 'subsample', keep_ratio=1 / 4), tmp_path)
    text = fidelity_table(str(tmp_path), [prepared / 'photos'], [64], ['full'], 'json')
    assert [(row['keys'], row['keys_percent']) for row in json.loads(text)] == [(4, 25), (16, 100)]


def test_nothing_is_measured_twice(rows, tmp_path, runs):
    measured = tmp_path / 'measured.json'
    first = rows(['subsample'], measured=measured)
    assert len(runs) == 4  # two photographs, each as it is and subsampled
    assert rows(['subsample'], measured=measured) == first and len(runs) == 4
    both = rows(['pool', 'subsample:keep_ratio=1/4'], measured=measured)  # the latter is the default
    assert len(runs) == 8
    assert [row['centred'] for row in both[::2]] == [row['centred'] for row in first]
    rows(['pool'], sizes=[48], measured=measured)
    assert len(runs) == 12


def test_what_was_measured_outlives_a_kill(rows, tmp_path, monkeypatch, runs):
    measured = tmp_path / 'measured.json'
    counted = table.final_tokens

    def killed(model, images):
        if len(runs) == 3:
            raise KeyboardInterrupt
        return counted(model, images)

    monkeypatch.setattr(table, 'final_tokens', killed)
    with pytest.raises(KeyboardInterrupt):
        rows(['subsample'], measured=measured)
    monkeypatch.setattr(table, 'final_tokens', counted)
    rows(['subsample'], measured=measured)
    assert len(runs) == 3 + 2


def test_photographs_are_never_enlarged_unless_asked(prepared, capsys, tmp_path):
    command = ['table', 'fidelity', str(prepared / 'model'), '--images', str(prepared / 'photos'), '--img-size', '64']
    command += ['--attention', 'subsample', '--no-times', '--measured', str(tmp_path / 'measured.json')]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert '64 px: 2 photographs; 1 of a shorter side below that are left out, the first one 2.png.\n' in said
    assert ' ms ' not in said
    assert main([*command, '--enlarge']) == 0
    assert '64 px: 3 photographs; 1 of a shorter side below that are enlarged' in capsys.readouterr().out


def test_a_square_is_the_middle_of_a_photograph(tmp_path):
    image = pixels(0, (64, 96, 3))
    Image.fromarray(image).save(tmp_path / '0.png')
    (photograph,) = find_photographs([tmp_path, tmp_path])
    assert photograph.shorter_side == 64
    square = photograph.square(Preprocessing((3, 64, 64), (0.0,) * 3, (1.0,) * 3, 'bicubic', 0.9, 'squash'))
    torch.testing.assert_close(square, torch.from_numpy(image[:, 16:80]).permute(2, 0, 1) / 255)


def test_images_are_of_the_size_asked_for_where_a_model_takes_any():
    for name in ('naflexvit_base_patch16_gap', 'vit_tiny_patch16_224'):
        _, preprocessing = open_model(f'{name}:pretrained=false,depth=1', 64)
        assert preprocessing.input_size == (3, 64, 64)


def test_a_model_without_a_class_token(prepared, tmp_path):
    model = timm.create_model('test_vit', num_classes=0, depth=1, class_token=False, global_pool='avg')
    save_model(model, tmp_path)
    text = fidelity_table(str(tmp_path), [prepared / 'photos'], [64], ['subsample'], 'json')
    own, few = json.loads(text)
    assert few['prefix'] is own['prefix'] is None and (own['keys'], few['keys']) == (16, 4)


def test_files_and_a_file_of_attentions(prepared, tmp_path, capsys):
    (tmp_path / 'few.txt').write_text('# keys\npool\n\nsubsample:keep_ratio=1/4\nsubsample:keep_ratio=1/16\n')
    command = ['table', 'fidelity', str(prepared / 'model'), '--images', str(prepared / 'photos'), '--img-size', '64']
    assert main([*command, '--attention', f'@{tmp_path / "few.txt"}', 'full', '--out', str(tmp_path / 'out')]) == 0
    printed = capsys.readouterr().out
    assert (tmp_path / 'out/fidelity.md').read_text() == printed
    assert [path.name for path in sorted((tmp_path / 'out').glob('[!.]*'))] == [
        *('fidelity.csv', 'fidelity.md', 'fidelity.png', 'measured.json')
    ]
    names = [line.split(',')[1] for line in (tmp_path / 'out/fidelity.csv').read_text().splitlines()]
    assert names == ['attention', 'as it is', 'pool', 'subsample:keep_ratio=1/4', 'subsample:keep_ratio=1/16', 'full']


def test_a_line_of_the_plot_joins_budgets():
    texts = ['dct:place=kv,keep_ratio=1/4', 'dct:keep_ratio=1/16,place=kv', 'dct', 'window:window_size=8', 'window']
    assert [each.curve for each in read_attentions(texts)] == ["dct (place='kv')"] * 2 + ['dct', 'window', 'window']


def test_the_attentions_of_the_recipe_can_be_had():
    recipe = Path(__file__).parents[2] / 'recipes/conversion/attentions.txt'
    with torch.device('meta'):
        model = timm.create_model('vit_small_patch14_dinov2', img_size=504, depth=1)
        for each in read_attentions([f'@{recipe}']):
            convert(model, each.attention, **each.options)


def test_copies_share_their_weights_and_the_model_stays():
    model = timm.create_model('test_vit')
    converted = convert(sharing_weights(model), 'pool')
    given = dict(model.named_parameters())
    assert all(parameter is given[name] for name, parameter in converted.named_parameters())
    assert type(model) is not type(converted) and type(model.blocks[0].attn) is not type(converted.blocks[0].attn)


@pytest.mark.parametrize(
    ('change', 'named'),
    [
        (dict(attentions=['subsampel']), 'subsampel at 64 px: unknown attention'),
        (dict(attentions=['pool', 'pool']), 'pool is given twice'),
        (dict(attentions=['dct:keep_ratio=2']), 'dct:keep_ratio=2 at 64 px: keep_ratio'),
        (dict(img_sizes=[1024]), 'none of 3 has 1024 pixels on each side; take larger ones'),
        (dict(img_sizes=[64, 64]), 'one twice'),
        (dict(img_sizes=[0]), '--img-size'),
        (dict(img_sizes=[40]), '40'),
        (dict(model='vit_tinny_patch16_224'), 'vit_tiny_patch16_224'),
        (dict(model='runs/none'), 'runs/none: no such model folder'),
    ],
)
def test_mistakes_are_named_before_anything_is_run(prepared, runs, change, named):
    given = dict(model=str(prepared / 'model'), folders=[prepared / 'photos'], img_sizes=[64], attentions=['pool'])
    with pytest.raises(UserError, match=named):
        fidelity_table(**given | change)
    assert not runs


@pytest.mark.parametrize('text', ['[1', '[1]'])
def test_another_file_is_refused(prepared, runs, tmp_path, text):
    (tmp_path / 'measured.json').write_text(text)
    given = dict(model=str(prepared / 'model'), folders=[prepared / 'photos'], img_sizes=[64], attentions=['pool'])
    with pytest.raises(UserError, match='measured.json is not a file of measurements'):
        fidelity_table(**given, measured=tmp_path / 'measured.json')
    assert not runs


@pytest.mark.parametrize('cell', [3, {'patch': 1}, {'seconds': None}, {'centred': 'high'}, {'machine': None}])
def test_a_cell_that_is_no_measurement_is_named(prepared, runs, tmp_path, cell):
    path = tmp_path / 'measured.json'
    given = dict(model=str(prepared / 'model'), folders=[prepared / 'photos'], img_sizes=[64], attentions=['pool'])
    fidelity_table(**given, measured=path)
    entries = json.loads(path.read_text())
    of_size = next(value for key, value in entries.items() if key != 'about')['64']
    cells = of_size[next(key for key in of_size if 'pool' in key)]
    first = next(iter(cells))
    if not isinstance(cell, dict):
        cells[first] = cell
    elif cell.get('machine', 1) is None:
        del cells[first]['machine']
    else:
        cells[first] = cell if cell == {'patch': 1} else cells[first] | cell
    path.write_text(json.dumps(entries))
    with pytest.raises(UserError, match=rf'measured\.json: what it has at .* / 64 / .*pool.* / {first} is no measure'):
        fidelity_table(**given, measured=path)


def test_the_machines_that_have_measured_are_named(prepared, tmp_path, runs, monkeypatch):
    path = tmp_path / 'measured.json'
    given = dict(model=str(prepared / 'model'), folders=[prepared / 'photos'], img_sizes=[64], measured=path)
    text = fidelity_table(**given, attentions=['pool'])
    entries = path.read_text()
    machine = text.splitlines()[-1].removeprefix('Measured on ').removesuffix('.')
    path.write_text(entries.replace(json.dumps(machine, ensure_ascii=False), '"a calculating machine"'))
    text = fidelity_table(**given, attentions=['pool', 'subsample'])
    assert text.splitlines()[-1] == f'Measured on a calculating machine. Measured on {machine}.'


def test_out_is_tried_before_anything_is_measured(prepared, runs, tmp_path):
    (tmp_path / 'file').touch()
    given = dict(model=str(prepared / 'model'), folders=[prepared / 'photos'], img_sizes=[64], attentions=['pool'])
    with pytest.raises(UserError, match=r'file/fidelity\.md: cannot be written: (File exists|Not a directory)'):
        fidelity_table(**given, out=tmp_path / 'file')
    assert not runs


def test_folders_without_images_are_named(tmp_path, capsys):
    command = ['table', 'fidelity', 'test_vit', '--img-size', '64', '--attention', 'pool', '--images']
    assert main([*command, str(tmp_path)]) == 2
    assert f'{tmp_path}: no image in it' in capsys.readouterr().err
    assert main([*command, str(tmp_path / 'none')]) == 2
    assert 'no such folder of images' in capsys.readouterr().err
