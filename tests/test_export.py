"""Exported graphs compute what the model computes, run by PyTorch and by onnxruntime."""

import contextlib
import json

import pytest
import timm
import torch
from torch import nn

import vit_efficient
from vit_efficient.export import export_model
from vit_efficient_cli import main

SMALL = dict(embed_dim=32, depth=1, num_heads=2, num_classes=5, img_size=(56, 104), patch_size=8)
VARIANTS = [
    ('full', {}),
    ('dct', {}),
    ('dct', dict(domain='frequency', place='kv', local=3)),
    ('dct', dict(place='block')),
    ('dct1d', {}),
    ('linformer', dict(num_tokens=9)),
    ('pool', {}),
    ('pool', dict(summary='local')),
    ('pool', dict(summary='medoid')),
    ('subsample', {}),
    ('combiner', dict(window_size=3, cell_size=2)),
    ('combiner', dict(window_size=2, cell_size=1, reach=1, summary='max')),
    ('combiner', dict(pattern='axial')),
    ('monarch', {}),
    ('monarch', dict(block_size=3, steps=2)),
    ('merge', {}),
    ('merge', dict(place='x', local_first=True)),
    ('nystrom', dict(num_landmarks=(3, 2))),
    ('performer', {}),
    ('window', dict(window_size=3)),
    ('treeformer_tc', dict(tree_height=3)),
]


class Listed(nn.Module):
    """As a model that returns the features of some of its layers."""

    def forward(self, x):
        return [x, x]


class PseudoInverse(nn.Module):
    def forward(self, x):
        return torch.linalg.pinv(x)


def build(name, options, **arguments):
    torch.manual_seed(0)
    return timm.create_model(f'vit_{name}_tiny', **{**SMALL, **arguments}, attention_kwargs=options).train()


def run_onnx(path, x):
    onnxruntime = pytest.importorskip('onnxruntime')
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.mark.parametrize(
    'name, options', VARIANTS, ids=lambda v: v if isinstance(v, str) else '-'.join(map(str, v.values()))
)
@pytest.mark.compiled
def test_to_onnx(name, options, tmp_path, capfd):
    pytest.importorskip('onnxscript')
    model = build(name, options)
    assert export_model(model, tmp_path / 'vit.onnx', (3, 56, 104)) <= 1e-5
    assert model.training
    x = torch.randn(5, 3, 56, 104)
    torch.testing.assert_close(run_onnx(tmp_path / 'vit.onnx', x), model.eval()(x), atol=1e-4, rtol=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ['vit.onnx']
    assert capfd.readouterr() == ('', '')


@pytest.mark.parametrize('arguments', [{}, dict(patch_embed='dct', patch_keep=[4, 2, 2], patch_color='ycbcr')])
@pytest.mark.compiled
def test_to_a_program_of_pytorch(arguments, tmp_path):
    model = build('dct', {}, **arguments)
    assert export_model(model, tmp_path / 'vit.pt2', (3, 56, 104)) <= 1e-6
    program = torch.export.load(tmp_path / 'vit.pt2').module()
    x = torch.randn(5, 3, 56, 104)
    torch.testing.assert_close(program(x), model.eval()(x))


ABOUT = {
    'input_size': [3, 56, 104],
    'mean': [0.25, 0.5, 0.75],
    'std': [0.5, 0.5, 0.5],
    'interpolation': 'bicubic',
    'crop_pct': 1.0,
    'crop_mode': 'squash',
    'labels': ['ant', 'bée', 'cat', 'dog', 'eel'],
}


def labelled():
    """A model that says of its input and outputs what `ABOUT` has, but for the way images are cut."""
    model = build('dct', {})
    own = {name: tuple(ABOUT[name]) for name in ('mean', 'std')} | {'interpolation': 'bicubic', 'crop_pct': 0.9}
    model.pretrained_cfg = model.pretrained_cfg | own | {'label_names': ABOUT['labels']}
    return model, {'crop_pct': 1.0, 'crop_mode': 'squash'}


@pytest.mark.compiled
@pytest.mark.parametrize('fixed_batch', [0, 2])
def test_names_and_metadata_of_onnx(fixed_batch, tmp_path):
    pytest.importorskip('onnxscript')
    onnxruntime = pytest.importorskip('onnxruntime')
    model, preprocessing = labelled()
    export_model(model, tmp_path / 'vit.onnx', (3, 56, 104), fixed_batch, preprocessing)
    session = onnxruntime.InferenceSession(str(tmp_path / 'vit.onnx'), providers=['CPUExecutionProvider'])
    (images,), (logits,), batch = session.get_inputs(), session.get_outputs(), fixed_batch or 'batch'
    assert (images.name, images.shape) == ('images', [batch, 3, 56, 104])
    assert (logits.name, logits.shape) == ('logits', [batch, 5])
    found = session.get_modelmeta().custom_metadata_map
    assert {name: json.loads(value) for name, value in found.items()} == ABOUT


@pytest.mark.compiled
def test_metadata_of_a_program_of_pytorch(tmp_path):
    model, preprocessing = labelled()
    export_model(model, tmp_path / 'vit.pt2', (3, 56, 104), preprocessing=preprocessing)
    torch.export.load(tmp_path / 'vit.pt2', extra_files=(files := {'metadata.json': ''}))
    assert json.loads(files['metadata.json']) == ABOUT
    export_model(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), tmp_path / 'linear.pt2', (3, 2, 2))
    torch.export.load(tmp_path / 'linear.pt2', extra_files=files)
    assert json.loads(files['metadata.json']) == {'input_size': [3, 2, 2]}


@pytest.mark.compiled
def test_what_only_a_program_of_pytorch_can_do(tmp_path):
    model = build('nystrom', dict(num_landmarks=(2, 3), pinv='exact'))
    assert export_model(model, tmp_path / 'vit.pt2', (3, 56, 104)) <= 1e-5


@pytest.mark.compiled
def test_an_error_of_the_exporter_to_onnx(tmp_path):
    """It has pages of text."""
    pytest.importorskip('onnxscript')
    with pytest.raises(ValueError, match='ONNX cannot have this model: .*pinv') as error:
        export_model(PseudoInverse(), tmp_path / 'model.onnx', (3, 8, 8))
    assert '\n' not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.compiled
def test_a_fixed_batch(tmp_path):
    model = build('dct', {})
    export_model(model, tmp_path / 'vit.pt2', (3, 56, 104), fixed_batch=1)
    program = torch.export.load(tmp_path / 'vit.pt2')
    assert program.example_inputs is None  # a batch of images, which the file would carry
    program = program.module()
    x = torch.randn(1, 3, 56, 104)
    torch.testing.assert_close(program(x), model.eval()(x))


@pytest.mark.parametrize(
    'name, options, file, message',
    [
        ('treeformer_tf', dict(tree_height=2), 'vit.pt2', 'reads the sizes of its leaves from the data'),
        ('dct', dict(learned=True), 'vit.pt2', 'freeze_truncation, .*at the end of a run'),
        ('dct', {}, 'vit.pt', 'must end in .onnx or .pt2'),
    ],
)
def test_what_cannot_be_exported(name, options, file, message, tmp_path):
    pytest.importorskip('onnxscript')
    with pytest.raises(ValueError, match=message) as error:
        export_model(build(name, options), tmp_path / file, (3, 56, 104))
    assert '\n' not in str(error.value) and not list(tmp_path.iterdir())


@pytest.fixture
def untraced(monkeypatch):
    monkeypatch.setattr('torch.export.export', lambda *args, **options: pytest.fail('it was traced'))


@pytest.mark.parametrize(
    'change, file, size, message',
    [
        (lambda model: model, 'vit.pt2', (3, 64, 64), r'input_size=\(3, 64, 64\): the height .* is 64'),
        (lambda model: model, 'vit.pt2', (1, 56, 104), r'input_size=\(1, 56, 104\): .*give the size'),
        (lambda model: model, 'vit.pt2', (3, 72), r'three positive integers, got input_size=\(3, 72\)'),
        (lambda model: model, 'vit.pt2', 72, 'three positive integers, got input_size=72'),
        (lambda model: model, 'vit.pt2', (3, 0, 104), r'three positive integers, got input_size=\(3, 0, 104\)'),
        (lambda model: model.to('meta'), 'vit.pt2', (3, 56, 104), "'meta' holds no weights"),
        (lambda model: model.double(), 'vit.onnx', (3, 56, 104), r'torch.float64; export model.float\(\)'),
        (lambda model: nn.Sequential(model, Listed()), 'vit.pt2', (3, 56, 104), 'Sequential returns a list; '),
    ],
)
def test_what_is_refused_before_it_is_traced(change, file, size, message, tmp_path, untraced):
    with pytest.raises(ValueError, match=message):
        export_model(change(build('dct', {})), tmp_path / file, size)
    assert not list(tmp_path.iterdir())


def test_an_exact_pseudo_inverse(tmp_path, untraced):
    model = build('nystrom', dict(num_landmarks=(2, 3), pinv='exact'))
    with pytest.raises(ValueError, match=r"pinv='exact'; export to .pt2, or use pinv='iterative'"):
        export_model(model, tmp_path / 'vit.onnx', (3, 56, 104))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.compiled
def test_a_model_of_another_dtype(dtype, tmp_path):
    model = build('dct', {}).to(dtype)
    assert export_model(model, tmp_path / 'vit.pt2', (3, 56, 104)) <= 1e-6
    program = torch.export.load(tmp_path / 'vit.pt2').module()
    x = torch.randn(4, 3, 56, 104).to(dtype)
    torch.testing.assert_close(program(x), model.eval()(x))


@pytest.mark.parametrize('size', [(3, 56, 104), (3, 64, 64)])
@pytest.mark.compiled
def test_each_module_stays_in_its_mode(size, tmp_path):
    model = build('dct', {})
    model.blocks[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    with contextlib.suppress(ValueError):
        export_model(model, tmp_path / 'vit.pt2', size)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert (tmp_path / 'vit.pt2').exists() == (size == (3, 56, 104))


@pytest.mark.compiled
def test_a_graph_that_differs_is_not_written(tmp_path, monkeypatch):
    model = build('dct', {})
    monkeypatch.setattr(
        'vit_efficient.export._write_program', lambda program, path, metadata: lambda x: x.mean() + model(x)
    )
    with pytest.raises(ValueError, match='computes something else'):
        export_model(model, tmp_path / 'vit.pt2', (3, 56, 104))
    assert not list(tmp_path.iterdir())


@pytest.mark.compiled
def test_by_command(tmp_path, capsys):
    model = build('dct', {})
    vit_efficient.save_model(model, tmp_path / 'model')
    out = tmp_path / 'vit.pt2'
    assert main(['export', str(tmp_path / 'model'), '--out', str(out), '--img-size', '64', '80']) == 0
    assert 'any number of images of 3×64×80' in capsys.readouterr().out
    program = torch.export.load(out).module()
    resized = timm.create_model(f'local-dir:{tmp_path / "model"}', pretrained=True, img_size=(64, 80)).eval()
    x = torch.randn(4, 3, 64, 80)
    torch.testing.assert_close(program(x), resized(x))
    torch.export.load(out, extra_files=(files := {'metadata.json': ''}))
    assert json.loads(files['metadata.json'])['input_size'] == [3, 64, 80]
    assert main(['export', str(tmp_path / 'model'), '--out', str(tmp_path / 'vit.tflite')]) == 2
    assert 'must end in .onnx or .pt2' in capsys.readouterr().err
