import csv
import json

import pytest
import timm
import torch

from vit_efficient.flops import count_flops
from vit_efficient.utils.options import parse_spec
from vit_efficient_cli import main


def test_flops_prints_what_count_flops_counts(capsys):
    models = ['vit_full_tiny', 'vit_dct_tiny', 'resnet18']
    options = ['--attention-kwargs', 'keep_ratio=1/16', 'domain=frequency']
    command = ['table', 'flops', '--models', *models, '--img-sizes', '64', '128', *options, '--format', 'json']
    assert main(command) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row['img_size'], row['model']) for row in rows] == [(size, m) for size in (64, 128) for m in models]
    model = timm.create_model(
        'vit_dct_tiny', img_size=128, attention_kwargs={'keep_ratio': 1 / 16, 'domain': 'frequency'}
    )
    count = count_flops(model, (3, 128, 128))
    row = rows[4]
    assert row['gmacs'] == count.total / 1e9
    assert row['ratio'] == pytest.approx(row['gmacs'] / rows[3]['gmacs'])
    roles = ('attention_products', 'attention_projections', 'transform')
    assert row['attention_gmacs'] == pytest.approx(sum(row[f'{role}_gmacs'] for role in roles))
    assert row['tokens'] == 65 and rows[5]['tokens'] is None
    assert row['parameters_m'] == sum(p.numel() for p in model.parameters()) / 1e6


def test_flops_says_what_is_an_expectation(capsys):
    models = ['vit_treeformer_tc_tiny', 'vit_treeformer_tf_tiny']
    assert main(['table', 'flops', '--models', *models, '--img-sizes', '64', '128']) == 0
    assert 'In expectation, as if all leaves held as many patches: vit_treeformer_tf_tiny.\n' in capsys.readouterr().out


def test_flops_writes_what_it_prints(tmp_path, capsys):
    out = tmp_path / 'new' / 'table.csv'
    assert main(['table', 'flops', '--models', 'vit_full_tiny', '--format', 'csv', '--out', str(out)]) == 0
    assert out.read_text() == capsys.readouterr().out
    assert [row['img_size'] for row in csv.DictReader(out.open())] == ['224']


@pytest.mark.parametrize(
    ('options', 'named'),
    [
        (['--models', 'vit_dct_tinny'], 'vit_dct_tiny'),
        (['--models', 'vit_dct_tiny', '--img-sizes', '225'], '225'),
        (['--models', 'vit_tiny_patch16_224', '--img-sizes', '225'], '225'),
        (['--models', 'vit_dct_tiny', '--img-sizes', '0'], '--img-sizes'),
        (['--models', 'vit_dct_tiny', '--attention-kwargs', 'keep_ratio'], 'keep_ratio'),
        (['--models', 'vit_dct_tiny', '--attention-kwargs', 'keep_ratio=2'], 'keep_ratio'),
    ],
)
def test_flops_names_bad_arguments_in_one_line(options, named, capsys):
    assert main(['table', 'flops', *options]) == 2
    out, err = capsys.readouterr()
    assert not out and named in err and err.count('\n') == 1


def test_flops_of_models_with_arguments(capsys):
    specs = [
        'vit_full_tiny',
        'vit_full_tiny:patch_embed=dct,patch_color=ycbcr,patch_keep=[16,8,8]',
        'vit_full_tiny:depth=3',
    ]
    assert main(['table', 'flops', '--format', 'json', '--models', *specs]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row['model'] for row in rows] == specs
    plain, cut, shallow = rows
    assert cut['patch_embedding_gmacs'] == pytest.approx(plain['patch_embedding_gmacs'] * (256 + 64 + 64) / 768)
    assert cut['patch_transform_gmacs'] > 0 == plain['patch_transform_gmacs']
    assert cut['attention_gmacs'] == plain['attention_gmacs'] == pytest.approx(4 * shallow['attention_gmacs'])


def test_specs_with_brackets_in_brackets():
    text = "vit_full_tiny:attention=['full',('dct',{'keep_ratio':0.5,'num':[1,2]})],depth=2"
    expected = {'attention': ['full', ('dct', {'keep_ratio': 0.5, 'num': [1, 2]})], 'depth': 2}
    assert parse_spec(text) == ('vit_full_tiny', expected)
    assert parse_spec('vit_full_tiny') == ('vit_full_tiny', {})


def test_flops_of_a_model_without_the_argument(capsys):
    assert main(['table', 'flops', '--models', 'vit_full_tiny:patch_kept=3']) != 0
    error = capsys.readouterr().err
    assert "vit_full_tiny has no option 'patch_kept'; did you mean patch_keep?" in error and error.count('\n') == 1


def test_flops_of_a_model_of_coefficients(capsys):
    of_pixels = 'vit_full_tiny:patch_embed=dct,patch_keep=8'
    assert (
        main(['table', 'flops', '--format', 'json', '--models', of_pixels, f'{of_pixels},patch_input=coefficients'])
        == 0
    )
    pixels, coefficients = json.loads(capsys.readouterr().out)
    assert coefficients['patch_transform_gmacs'] == 0 < pixels['patch_transform_gmacs']
    assert coefficients['gmacs'] == pytest.approx(pixels['gmacs'] - pixels['patch_transform_gmacs'])
    assert coefficients['tokens'] == pixels['tokens'] == 197


def test_flops_of_a_convolutional_model_with_wrong_arguments(capsys):
    assert main(['table', 'flops', '--models', 'resnet18:patch_embed=dct']) != 0
    assert 'resnet18: ' in (error := capsys.readouterr().err) and "'patch_embed'" in error


def test_flops_of_converted_models_and_sizes_that_do_not_fit(capsys):
    base = 'vit_small_patch14_dinov2'
    specs = [base, f'convert:{base}:dct,keep_ratio=1/4', 'vit_full_small']
    command = ['table', 'flops', '--models', *specs, '--img-sizes', '224', '512', '518']
    assert main([*command, '--format', 'json']) == 0
    rows = {(row['model'], row['img_size']): row for row in json.loads(capsys.readouterr().out)}
    for size in (224, 518):
        with torch.device('meta'):
            model = timm.create_model(base, img_size=size)
        count = sum(parameter.numel() for parameter in model.parameters())
        assert [rows[spec, size]['parameters_m'] for spec in specs[:2]] == [count / 1e6] * 2
        assert rows[specs[1], size]['ratio'] == rows[specs[1], size]['gmacs'] / rows[base, size]['gmacs'] < 0.8
        assert rows[specs[1], size]['mlp_gmacs'] == rows[base, size]['mlp_gmacs']
    for spec in specs[:2]:
        row = rows[spec, 512]
        assert 'not a multiple of the patch size 14' in row['error'] and 'use 504 or 518' in row['error']
        assert {row[key] for key in row if key not in ('model', 'img_size', 'error')} == {None}
    # There is a third model at that size, and none that it could be compared with; at others there is one.
    assert rows['vit_full_small', 512]['gmacs'] > 0 and rows['vit_full_small', 512]['ratio'] is None
    assert 'not a multiple of the patch size 16' in rows['vit_full_small', 518]['error']

    assert main(command) == 0
    text = capsys.readouterr().out
    for spec in specs[:2]:  # a model is named once, with its options
        assert f'\n- {spec} at 512 px: img_size=512 is not a multiple of the patch size 14; use 504 or 518.\n' in text
    assert 'Parameters: with the position embeddings of each size.\n' in text and 'error' not in text
    cells = next(line for line in text.splitlines() if line.startswith(f'| {base}') and ' 512 ' in line).split('|')[3:]
    assert {cell.strip() for cell in cells if cell} == {'–'}

    assert main(['table', 'flops', '--models', 'vit_full_small', base, '--img-sizes', '512']) == 2
    assert f'{base} at 512 px: img_size=512 is not' in capsys.readouterr().err
