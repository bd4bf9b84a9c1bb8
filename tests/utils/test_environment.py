import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from vit_efficient.utils import environment as environment_module
from vit_efficient.utils.compat import sdpa_order
from vit_efficient.utils.environment import describe_environment, one_line


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('PYTHONPATH', str(Path(__file__).parents[2]))
    for name in ('LOCAL_WORLD_SIZE', 'GROUP_WORLD_SIZE'):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_the_state_of_the_working_folder_is_told(folder):
    def git(*arguments):
        identity = ['-c', 'user.name=a', '-c', 'user.email=a@b']
        subprocess.run(['git', *identity, *arguments], check=True, capture_output=True)

    assert describe_environment(torch.device('cpu'))['working_git'] is None
    (folder / 'recipe.yaml').write_text('seed: 1')
    git('init')
    git('add', 'recipe.yaml')
    git('commit', '-m', 'one')
    state = describe_environment(torch.device('cpu'))['working_git']
    assert len(state['commit']) == 40 and state['changed'] is False
    (folder / 'recipe.yaml').write_text('seed: 2')
    assert describe_environment(torch.device('cpu'))['working_git'] == {**state, 'changed': True}


def test_a_package_installed_inside_a_repository_is_not_of_its_commit(folder, monkeypatch):
    """Its file is ignored there; where git knows it, as in a clone, the commit is its own."""

    def git(*arguments):
        identity = ['-c', 'user.name=a', '-c', 'user.email=a@b']
        subprocess.run(['git', *identity, *arguments], check=True, capture_output=True)

    installed = folder / 'env' / 'vit_efficient' / 'utils' / 'environment.py'
    installed.parent.mkdir(parents=True)
    installed.touch()
    (folder / '.gitignore').write_text('env\n')
    git('init')
    git('add', '.gitignore')
    git('commit', '-m', 'one')
    monkeypatch.setattr(environment_module, '__file__', str(installed))
    found = describe_environment(torch.device('cpu'))
    assert found['git'] is None and len(found['working_git']['commit']) == 40
    git('add', '--force', str(installed))
    git('commit', '-m', 'two')
    found = describe_environment(torch.device('cpu'))
    assert found['git'] == found['working_git'] and found['git']['changed'] is False


@pytest.mark.subprocess
def test_the_command_repeats_what_runs(folder):
    """Run by a shell, it gives itself again."""
    script = folder / 'a script.py'
    script.write_text(
        'import torch; from vit_efficient.utils.environment import describe_environment as describe\n'
        'print(describe(torch.device("cpu"))["command"])'
    )
    said = subprocess.run([sys.executable, script, 'a b'], capture_output=True, text=True, check=True).stdout
    assert said.endswith("a script.py' 'a b'\n") and said.startswith(f'cd {folder} && ')
    assert subprocess.run(said, shell=True, cwd='/', capture_output=True, text=True, check=True).stdout == said


def test_the_command_of_several_processes_is_that_of_torchrun(folder, monkeypatch):
    monkeypatch.setattr(sys, 'orig_argv', ['/usr/bin/python', '-u', 'tools/train.py', 'a.yaml', 'seed=1'])
    monkeypatch.setitem(os.environ, 'LOCAL_WORLD_SIZE', '8')
    monkeypatch.setitem(os.environ, 'GROUP_WORLD_SIZE', '2')
    command = describe_environment(torch.device('cpu'))['command']
    assert command == f'cd {folder} && torchrun --nnodes 2 --nproc-per-node 8 tools/train.py a.yaml seed=1'


def test_one_line_names_what_changes_times(monkeypatch):
    changing = [
        'THP_MEM_ALLOC_ENABLE',
        'MALLOC_ARENA_MAX',
        'OMP_NUM_THREADS',
        'OMP_WAIT_POLICY',
        'GOMP_SPINCOUNT',
        'MKL_DYNAMIC',
        'KMP_AFFINITY',
    ]
    changing += ['TORCH_CUDNN_SDPA_DEPRIORITIZED', 'CUDA_LAUNCH_BLOCKING', 'CUBLAS_WORKSPACE_CONFIG']
    changing += ['PYTORCH_CUDA_ALLOC_CONF', 'PYTORCH_ALLOC_CONF', 'TORCHINDUCTOR_FREEZING']
    others = ['PYTORCH_JIT', 'NO_MALLOC_HERE', 'CUDA_VERSION', 'CUDNN_VERSION', 'TORCHINDUCTOR_CACHE_DIR']
    for name in (*changing, *others):
        monkeypatch.setenv(name, '1')
    monkeypatch.setenv('LD_PRELOAD', '')
    environment = describe_environment(torch.device('cpu'))
    environment['git'] = dict(commit='0123456789abcdef', changed=False)
    line = one_line(environment)
    assert {'LD_PRELOAD', *changing} <= {part.partition('=')[0] for part in line.split(', ')}
    assert not any(name in line for name in others)
    assert ', commit 0123456789, ' in line
    environment['git']['changed'] = True
    assert ', commit 0123456789 (changed), ' in one_line(environment)
    del environment['variables']
    plain = one_line(environment | dict(git=None))
    assert plain.endswith(f', timm {timm.__version__}') and 'commit' not in plain


def test_the_order_of_attentions_on_a_gpu(monkeypatch):
    assert describe_environment(torch.device('cpu'))['sdpa'] is None
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'a GPU')
    monkeypatch.setattr(environment_module, 'sdpa_order', lambda device: ['cudnn', 'flash'])
    monkeypatch.setattr(torch.backends.cudnn, 'version', lambda: 91900)
    environment = describe_environment(torch.device('cuda', 0))
    assert ', cuDNN 91900, SDPA cudnn > flash' in one_line(environment)
    del environment['sdpa'], environment['cudnn']
    assert 'SDPA' not in one_line(environment)  # of an old run


def test_backends_by_name():
    assert sorted(sdpa_order(torch.device('cpu'))) == ['cudnn', 'efficient', 'flash', 'math']
