import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
VERSION = re.search(r"__version__ = '(.+)'", (ROOT / 'vit_efficient/version.py').read_text(encoding='utf-8')).group(1)

DEMO = ['mlxtend', 'scikit-image']
DOCS = ['furo', 'myst-parser>=4', 'sphinx>=8']
HF = ['datasets>=3']
JPEG = ['pyjpegio>=0.3', 'simplejpeg>=1.9']
TRAIN = ['albumentations>=2.0.8', 'matplotlib', 'omegaconf>=2.3', 'tensorboard', 'tifffile', 'tqdm']
TIFF = ['imagecodecs']  # the compressions that tifffile leaves to it: LZW, ZSTD, JPEG 2000, …
LARGE = ['pyvips[binary]>=3']  # parts of JPEGs and PNGs that are larger than memory
ONNX = ['onnx', 'onnxscript', 'onnxruntime']
WEBDATASET = ['webdataset>=1.0']
# Public implementations that tests compare with.
PEERS = ['linformer', 'nystrom-attention', 'performer-pytorch']
TESTS = ['hypothesis', 'pytest', 'pytest-xdist', 'ruff>=0.17,<0.18', 'scipy']


class BuildWithRecipes(build_py):
    """A wheel has the recipes in the command line's package; a checkout has them beside it."""

    def run(self):
        super().run()
        if not self.editable_mode:
            # as vit_efficient_cli.shipped lists them
            for pattern in ('**/*.yaml', '*.sh', '**/prepare.py', 'cutouts/*.py'):
                for path in (ROOT / 'recipes').glob(pattern):
                    copy = Path(self.build_lib, 'vit_efficient_cli', path.relative_to(ROOT))
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    self.copy_file(str(path), str(copy))


setup(
    name='vit-efficient',
    version=VERSION,
    description='Efficient attention for timm vision transformers on long image-patch sequences',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    license_files=['LICENSE'],
    packages=find_packages(include=['vit_efficient', 'vit_efficient.*', 'vit_efficient_cli']),
    cmdclass={'build_py': BuildWithRecipes},
    python_requires='>=3.10',
    install_requires=[
        'torch>=2.10',
        'torchvision>=0.25',
        'timm>=1.0.31',
        'fvcore>=0.1.5.post20221221',
        'numpy',
        'pillow',
        'pyyaml',
        'safetensors',
    ],
    extras_require={
        'demo': DEMO,
        'docs': DOCS,
        'hf': HF,
        'jpeg': JPEG,
        'large': LARGE,
        'onnx': ONNX,
        'peers': PEERS,
        'tiff': TIFF,
        'train': TRAIN,
        'webdataset': WEBDATASET,
        'dev': [*DEMO, *DOCS, *HF, *JPEG, *LARGE, *ONNX, *PEERS, *TIFF, *TRAIN, *WEBDATASET, *TESTS],
    },
    entry_points={'console_scripts': ['vit-efficient = vit_efficient_cli:main']},
    classifiers=[
        'Programming Language :: Python :: 3',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
)
