import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r"__version__ = '(.+)'", (ROOT / 'vit_efficient/version.py').read_text()).group(1)

DEMO = ['mlxtend', 'scikit-image']
DOCS = ['furo', 'myst-parser>=4', 'sphinx>=8']
HF = ['datasets>=3']
JPEG = ['pyjpegio>=0.3', 'simplejpeg>=1.9']
ONNX = ['onnx', 'onnxscript', 'onnxruntime']
WEBDATASET = ['webdataset>=1.0']
# Public implementations that tests compare with.
PEERS = ['linformer', 'nystrom-attention', 'performer-pytorch']
TESTS = ['hypothesis', 'pytest', 'pytest-xdist', 'ruff>=0.17,<0.18', 'scipy']

setup(
    name='vit-efficient',
    version=VERSION,
    description='Efficient attention for timm vision transformers on long image-patch sequences',
    long_description=(ROOT / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    license_files=['LICENSE'],
    packages=find_packages(include=['vit_efficient', 'vit_efficient.*']),
    python_requires='>=3.10',
    install_requires=[
        'torch>=2.10',
        'torchvision>=0.25',
        'timm>=1.0.31',
        'albumentations>=2.0.8',
        'fvcore>=0.1.5.post20221221',
        'matplotlib',
        'numpy',
        'omegaconf>=2.3',
        'pyyaml',
        'safetensors',
        'tensorboard',
        'tifffile',
        'tqdm',
    ],
    extras_require={
        'demo': DEMO,
        'docs': DOCS,
        'hf': HF,
        'jpeg': JPEG,
        'onnx': ONNX,
        'peers': PEERS,
        'webdataset': WEBDATASET,
        'dev': [*DEMO, *DOCS, *HF, *JPEG, *ONNX, *PEERS, *WEBDATASET, *TESTS],
    },
    entry_points={'console_scripts': ['vit-efficient = vit_efficient.cli:main']},
    classifiers=[
        'Programming Language :: Python :: 3',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
)
