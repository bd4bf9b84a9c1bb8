"""`benchmark model`: what is timed, what is counted, and what is refused before anything is timed."""

import json

import pytest
import torch

from vit_efficient import count_flops
from vit_efficient.benchmark import ModelCandidate, ModelSetting, benchmark_models, matmul_rate
from vit_efficient_cli import main

pytestmark = pytest.mark.usefixtures('short_clocks')
TINY = dict(patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=3)
MODELS = [
    ModelCandidate('vit_tiny_patch16_224', TINY),
    ModelCandidate('vit_dct_tiny', dict(TINY, attention_kwargs=dict(place='block'))),
]


def run(*args, **kwargs):
    return [row for block in benchmark_models(*args, rounds=1, memory=False, **kwargs) for row in block]


@pytest.mark.parametrize('setting', [ModelSetting(batch_size=2), ModelSetting(2, torch.bfloat16, amp=True)])
def test_rows(setting):
    rows = run(MODELS, [32, 48], ['inference', 'forward+backward', 'training step'], setting)
    assert [(row['img_size'], row['work']) for row in rows[::2]] == [
        (size, work) for size in (32, 48) for work in ('inference', 'forward+backward', 'training step')
    ]
    for row in rows:
        assert row['error'] is None and row['milliseconds'] > 0 and row['peak_share'] > 0
    assert all(row['ratio'] == 1 for row in rows[::2])
    model = MODELS[1].build(48)
    assert rows[-1]['gmacs'] == count_flops(model, (3, 48, 48), batch_size=2).total / 1e9
    assert rows[-1]['parameters_m'] == sum(p.numel() for p in model.parameters()) / 1e6


def test_a_step_of_the_optimiser_changes_weights(monkeypatch):
    from vit_efficient.benchmark import models as module

    built = []
    build = ModelCandidate.build
    monkeypatch.setattr(
        ModelCandidate, 'build', lambda *args, **kwargs: built.append(build(*args, **kwargs)) or built[-1]
    )
    for work, changes in (('forward+backward', False), ('training step', True)):
        call = module.model_call(MODELS[1], 32, ModelSetting(), work)
        assert all(p.grad is None for p in built[-1].parameters())
        before = [p.clone() for p in built[-1].parameters()]
        call()
        assert changes == any(not torch.equal(a, b) for a, b in zip(before, built[-1].parameters(), strict=True))
        assert all(p.grad is None for p in built[-1].parameters())


def test_what_fails_leaves_the_others():
    rows = run([*MODELS, ModelCandidate('vit_dct_tiny', dict(TINY, patch_size=32))], [32, 48])
    assert [row['error'] is None for row in rows] == [True, True, True, True, True, False]
    assert 'not a multiple of the patch size' in rows[-1]['error']


def test_a_model_of_coefficients():
    candidate = ModelCandidate('vit_full_tiny', dict(TINY, patch_embed='dct', patch_keep=4, patch_input='coefficients'))
    assert run([candidate], [32])[0]['error'] is None


@pytest.mark.parametrize(
    'models, options, message',
    [
        ([ModelCandidate('vit_nothing')], {}, "no model 'vit_nothing'"),
        ([ModelCandidate('vit_dct_tiny', dict(keep=3))], {}, "vit_dct_tiny keep=3: .*'keep'"),
        ([ModelCandidate('resnet18', dict(keep=3))], {}, "resnet18 keep=3: .*'keep'"),
        ([ModelCandidate('vit_dct_tiny', dict(img_size=64))], {}, 'vit_dct_tiny .*img_size=64 .*--img-sizes'),
        ([ModelCandidate('resnet18', dict(img_size=64), 'ours')], {}, 'ours: img_size=64 .*--img-sizes'),
        (MODELS, dict(works=['sleep']), "work must be one of .*, got work='sleep'"),
        (MODELS, dict(setting=ModelSetting(0)), 'batch_size=0'),
        ([*MODELS, MODELS[0]], {}, 'is given twice'),
        (MODELS, dict(max_seconds=0), 'max_seconds=0'),
    ],
)
def test_errors_come_first(models, options, message):
    with pytest.raises(ValueError, match=message):
        benchmark_models(models, [32], **options)


def test_matmul_rate_is_that_of_products():
    assert 1e8 < matmul_rate(torch.float32, torch.device('cpu'), side=256, seconds=0.05) < 1e14


def test_by_command(tmp_path, capsys):
    spec = ','.join(f'{key}={value}' for key, value in TINY.items())
    command = ['benchmark', 'model', '--models', f'vit_tiny_patch16_224:{spec}', f'vit_dct_tiny:{spec}']
    out = tmp_path / 'models.md'
    assert main([*command, '--img-sizes', '32', '--rounds', '1', '--no-memory', '--out', str(out)]) == 0
    text = capsys.readouterr().out
    assert text == out.read_text() and '× first' in text and 'peak MiB' not in text
    assert out.with_suffix('.csv').exists()
    assert main([*command, '--img-sizes', '32', '--rounds', '1', '--no-memory', '--format', 'json']) == 0
    assert [row['img_size'] for row in json.loads(capsys.readouterr().out)] == [32, 32]
    assert main([*command, '--img-sizes', '33']) == 2
    assert 'img' in capsys.readouterr().err
