"""What a run ran on: recorded beside its results, so that it can be repeated, and what differs can be explained."""

import os
import platform
import re
import shlex
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from vit_efficient.utils.compat import sdpa_order
from vit_efficient.version import __version__

_PACKAGES = ('torch', 'torchvision', 'timm', 'albumentations', 'numpy', 'omegaconf', 'opencv-python-headless', 'pillow')

#: What changes times and memory from outside, if it is set: threads, allocators, compilers, and which kernels a GPU
#: runs, and when. (PyTorch sets the folder of the compiler's cache itself.)
_VARIABLES = re.compile(
    r'THP_MEM_ALLOC_ENABLE|LD_PRELOAD|OMP_(NUM_THREADS|WAIT_POLICY)|(MALLOC|MKL|KMP|GOMP)_.*|PYTORCH_.*ALLOC.*'
    r'|TORCHINDUCTOR_(?!CACHE_DIR).*|TORCH_(CUDNN|BLAS|ALLOW_TF32)_.*|NVIDIA_TF32_OVERRIDE|CUBLAS(LT)?_WORKSPACE.*'
    r'|CUDA_(LAUNCH_BLOCKING|MODULE_LOADING|DEVICE_MAX_CONNECTIONS)'
)


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Versions, processor, threads, GPU, and what it takes to repeat the run.

    `sdpa` are the backends of `F.scaled_dot_product_attention` in the order in which a GPU tries them. `git` is the
    state of this package's source tree, `working_git` that of the folder that the command was given in; either is None
    where there is no such repository. `command` is a line for a shell.
    """
    return {
        'vit_efficient': __version__,
        'python': platform.python_version(),
        'packages': _versions(),
        'platform': platform.platform(),
        'cpu': _cpu_model(),
        'cores': len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count(),
        'threads': torch.get_num_threads(),
        'device': str(device),
        'gpu': torch.cuda.get_device_name(device) if device.type == 'cuda' else None,
        'sdpa': sdpa_order(device) if device.type == 'cuda' else None,
        'cudnn': torch.backends.cudnn.version() if device.type == 'cuda' else None,
        'variables': {name: os.environ[name] for name in sorted(os.environ) if _VARIABLES.fullmatch(name)},
        'git': _git_state(Path(__file__).parent, Path(__file__).name),
        'working_git': _git_state(Path.cwd()),
        'command': _command(),
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _cpu_model() -> str:
    with suppress(OSError):
        for line in Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines():
            if line.startswith('model name'):
                return line.partition(':')[2].strip()
    return platform.processor() or platform.machine()


def _command() -> str:
    """The line that starts what runs here, from its own folder; of several processes, that of torchrun."""
    command = sys.orig_argv
    if 'LOCAL_WORLD_SIZE' in os.environ:
        nodes = ['--nnodes', os.environ.get('GROUP_WORLD_SIZE', '1')]
        processes = ['--nproc-per-node', os.environ['LOCAL_WORLD_SIZE']]
        script = [argument for argument in command[1:] if argument != '-u']  # torchrun's own
        command = ['torchrun', *nodes, *processes, *script]
    return f'cd {shlex.quote(str(Path.cwd()))} && {shlex.join(command)}'


def _git_state(folder: Path, file: str = '') -> dict[str, Any] | None:
    """Commit of a folder's repository and whether it has changes; None where it is not a git checkout.

    Nor is it where git does not know the `file` in it: a package that is installed inside of another repository.
    """

    def git(*arguments: str) -> str:
        command = ['git', '-C', str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if file:
            git('ls-files', '--error-unmatch', file)
        return {'commit': git('rev-parse', 'HEAD'), 'changed': bool(git('status', '--porcelain', '-uno'))}
    except (OSError, subprocess.SubprocessError):
        return None


def one_line(environment: dict[str, Any]) -> str:
    """What `describe_environment` says of machine, versions, commit, SDPA and variables, for below a table."""
    packages = environment['packages']
    machine = environment['gpu'] or f'{environment["cpu"]}, {environment["cores"]} cores'
    parts = [machine, f'torch {packages["torch"]}', f'timm {packages["timm"]}']
    if git := environment['git']:
        parts.append(f'commit {git["commit"][:10]}' + ' (changed)' * git['changed'])
    # Of what follows old runs say nothing.
    if environment.get('sdpa'):
        parts.append(f'cuDNN {environment["cudnn"]}, SDPA {" > ".join(environment["sdpa"])}')
    parts += [f'{name}={value}' for name, value in environment.get('variables', {}).items()]
    return ', '.join(parts)
