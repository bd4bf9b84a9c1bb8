"""recipes/conversion/prepare.py: weights out of an ONNX file, and photographs out of packages."""

import io
import runpy
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

pytestmark = pytest.mark.once

module = runpy.run_path(str(Path(__file__).parents[2] / 'recipes/conversion/prepare.py'))
prepare, globals_ = module['main'], module['main'].__globals__


def named(**modules: nn.Module) -> nn.Module:
    """A module of these parts, where 'a__b' is part b of part a."""
    root = nn.Module()
    for path, part in modules.items():
        *parents, name = path.split('__')
        parent = root
        for each in parents:
            if not hasattr(parent, each):
                parent.add_module(each, nn.Module())
            parent = getattr(parent, each)
        parent.add_module(name, part)
    return root


class Dinov2(nn.Module):
    """DINOv2 under the names that Hugging Face gives its parts, 28 px in patches of 14."""

    def __init__(self, dim: int = 12, heads: int = 2, depth: int = 2):
        super().__init__()
        self.heads = heads
        layers = [
            named(
                **{f'attention__attention__{name}': nn.Linear(dim, dim) for name in ('query', 'key', 'value')},
                attention__output__dense=nn.Linear(dim, dim),
                mlp__fc1=nn.Linear(dim, 4 * dim),
                mlp__fc2=nn.Linear(4 * dim, dim),
                norm1=nn.LayerNorm(dim, eps=1e-6),
                norm2=nn.LayerNorm(dim, eps=1e-6),
                layer_scale1=nn.Module(),
                layer_scale2=nn.Module(),
            )
            for _ in range(depth)
        ]
        for layer in layers:
            layer.layer_scale1.lambda1, layer.layer_scale2.lambda1 = (nn.Parameter(torch.randn(dim)) for _ in range(2))
        self.backbone = named(
            embeddings__patch_embeddings__projection=nn.Conv2d(3, dim, 14, 14),
            encoder__layer=nn.ModuleList(layers),
            layernorm=nn.LayerNorm(dim, eps=1e-6),
        )
        self.backbone.embeddings.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.backbone.embeddings.position_embeddings = nn.Parameter(torch.randn(1, 5, dim))
        for parameter in self.parameters():  # of those that are equal, one is exported
            nn.init.normal_(parameter, std=0.5)

    def forward(self, image):
        embeddings = self.backbone.embeddings
        patches = embeddings.patch_embeddings.projection(image).flatten(2).transpose(1, 2)
        x = torch.cat([embeddings.cls_token.expand(image.shape[0], -1, -1), patches], dim=1)
        positions = embeddings.position_embeddings  # its parts, exported, have no names
        x = x + torch.cat([positions[:, :1], positions[:, 1:].reshape(1, patches.shape[1], -1)], dim=1)
        for layer in self.backbone.encoder.layer:
            y, attention = layer.norm1(x), layer.attention.attention
            k, v, q = (
                getattr(attention, name)(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                for name in ('key', 'value', 'query')
            )
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + layer.attention.output.dense(y) * layer.layer_scale1.lambda1
            y = layer.mlp.fc2(F.gelu(layer.mlp.fc1(layer.norm2(x))))
            x = x + y * layer.layer_scale2.lambda1
        return self.backbone.layernorm(x)[:, 0].sigmoid()


@pytest.mark.compiled
@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_a_model_of_timm_has_the_weights_of_the_graph():
    onnx = pytest.importorskip('onnx')
    pytest.importorskip('onnxruntime')
    file = io.BytesIO()
    axes = {'input_image': {0: 'batch', 2: 'height', 3: 'width'}}
    options = dict(input_names=['input_image'], dynamic_axes=axes, dynamo=False, opset_version=17)
    torch.onnx.export(Dinov2().eval(), (torch.zeros(1, 3, 28, 28),), file, **options)
    graph = onnx.load_model(io.BytesIO(file.getvalue()))
    sizes = dict(embed_dim=12, num_heads=2, depth=2, img_size=28, num_classes=0)
    model = timm.create_model('vit_small_patch14_dinov2', **sizes).eval()
    model.load_state_dict(module['timm_weights'](graph))
    assert module['largest_error'](model, graph) < 1e-5
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight[-1] += 0.1
    assert module['largest_error'](model, onnx.load_model(io.BytesIO(file.getvalue()))) > 1e-3


def picture() -> bytes:
    file = io.BytesIO()
    Image.new('RGB', (8, 6)).save(file, 'png')
    return file.getvalue()


@pytest.fixture
def fetched(tmp_path) -> Path:
    """A folder with a package of PyPI as a file."""
    folder = tmp_path / 'fetched'
    folder.mkdir()
    with zipfile.ZipFile(folder / 'mvtb_data-9.0-py3-none-any.whl', 'w') as wheel:
        for name in ('church.jpg', 'seq/im.001.png', 'seq/im.002.png', 'wally.png', '__init__.py'):
            wheel.writestr(f'mvtbdata/images/{name}', picture())
        wheel.writestr('mvtbdata/data/parks.png', picture())
    return folder


def test_photographs_of_a_wheel_are_written_once(tmp_path, fetched, capsys):
    command = [str(tmp_path / 'data'), '--only', 'mvtb', '--from', str(fetched)]
    assert prepare(command) == 0
    target = tmp_path / 'data/mvtb'
    assert [path.name for path in sorted(target.iterdir())] == ['church.jpg', 'seq-im.001.png']
    assert (target / 'church.jpg').read_bytes() == picture()
    assert prepare(command) == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == [f'{target}: written', f'{target}: there']
    assert said.err == f'mvtb: 2 photographs, where the tables are of {len(globals_["MVTB"])}\n'
    assert [path.name for path in (tmp_path / 'data').iterdir()] == ['mvtb']


@pytest.mark.subprocess
@pytest.mark.skipif(not shutil.which('dpkg-deb'), reason='needs dpkg-deb')
def test_photographs_of_a_debian_package_and_every_tenth(tmp_path, capsys):
    tree = tmp_path / 'tree'
    land = tree / globals_['_SKY']
    land.mkdir(parents=True)
    for i in range(21):
        (land / f'sea{i:02d}.jpg').write_bytes(picture())
    (land / 'readme.txt').touch()
    (tree / 'DEBIAN').mkdir()
    control = 'Package: endless-sky-high-dpi\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: d\n'
    (tree / 'DEBIAN/control').write_text(control)
    package = tmp_path / 'endless-sky-high-dpi_1_all.deb'
    subprocess.run(['dpkg-deb', '--build', '-Znone', str(tree), str(package)], check=True, capture_output=True)
    names = ['endless-sky', 'choosing']
    assert prepare([str(tmp_path / 'data'), '--from', str(tmp_path), '--only', *names]) == 0
    found = [sorted(path.name for path in (tmp_path / 'data' / name).iterdir()) for name in names]
    assert found == [[f'sea{i:02d}.jpg' for i in range(21)], ['sea09.jpg', 'sea19.jpg']]


def test_what_is_missing_is_said_and_nothing_is_left_half_written(tmp_path, monkeypatch, capsys):
    root = tmp_path / 'data'
    monkeypatch.setenv('PATH', str(tmp_path))
    assert prepare([str(root), '--only', 'lomiri']) == 2
    said = capsys.readouterr().err
    assert f'{root / "lomiri"}: apt-get is not installed; fetch the package lomiri-wallpapers-16.04 elsewhere' in said
    with zipfile.ZipFile(tmp_path / 'mvtb_data-9.0-py3-none-any.whl', 'w') as wheel:
        wheel.writestr('mvtbdata/images/wally.png', picture())
    assert prepare([str(root), '--only', 'lomiri', 'mvtb', '--from', str(tmp_path)]) == 2
    assert 'mvtb-data has none of its photographs any more' in capsys.readouterr().err
    assert not list(root.iterdir())


def test_a_command_that_fails_says_why(tmp_path, monkeypatch, capsys):
    def fails(command, **options):
        raise subprocess.CalledProcessError(100, command, stderr='Reading\nE: Unable to locate package\n')

    monkeypatch.setattr(subprocess, 'run', fails)
    assert prepare([str(tmp_path), '--only', 'lomiri']) == 2
    assert ': E: Unable to locate package; fetch the package' in capsys.readouterr().err


def test_a_folder_of_packages_that_is_not_there(tmp_path, capsys):
    with pytest.raises(SystemExit):
        prepare([str(tmp_path), '--only', 'mvtb', '--from', str(tmp_path / 'slip')])
    assert f'--from {tmp_path / "slip"}: no such folder' in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, fetched, capsys):
    (tmp_path / 'file').touch()
    assert prepare([str(tmp_path / 'file'), '--only', 'mvtb', '--from', str(fetched)]) == 2
    assert capsys.readouterr().err == f'{tmp_path / "file" / "mvtb"}: cannot be written: File exists\n'
