"""Processes that need not import everything again: forked from one that has imported the package, and nothing else.

What they run begins as it does in a new process, 5 s of imports sooner. The tests whose subject is the start of Python
or of torchrun itself start these.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch

from vit_efficient.utils.files import lock

ROOT = Path(__file__).parents[1]
TIMEOUT = 300  # seconds

SERVER = multiprocessing.get_context('forkserver')
SERVER.set_forkserver_preload(['albumentations', 'torch.distributed.tensor', 'vit_efficient.train'])


def _run(arguments: Sequence[str], folder: Path, environment: dict[str, str], said: Sequence[str]) -> None:
    """As `python *arguments` does, where arguments are a script's, or `-m` and a module's."""
    for number, path in enumerate(said, 1):
        with open(path, 'w') as file:
            os.dup2(file.fileno(), number)
    os.chdir(folder)
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.orig_argv = [sys.executable, *arguments]
    if arguments[0] == '-m':
        sys.path.insert(0, str(folder))
        sys.argv = list(arguments[1:])
        runpy.run_module(arguments[1], run_name='__main__', alter_sys=True)
    else:
        sys.path.insert(0, str((Path(folder) / arguments[0]).parent))
        sys.argv = list(arguments)
        runpy.run_path(arguments[0], run_name='__main__')


def run_python(*arguments: str | Path, folder: Path = ROOT, check: bool = True) -> SimpleNamespace:
    """`returncode`, `stdout` and `stderr` of `python *arguments`, run in a folder; if `check`, it must succeed."""
    (done,) = _run_all(arguments, folder, [{}], check)
    return done


def torchrun(*arguments: str | Path, processes: int = 2, check: bool = True) -> list[SimpleNamespace]:
    """The same of each of the processes that torchrun would start, by rank."""
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    shared = {'MASTER_ADDR': 'localhost', 'MASTER_PORT': port, 'GROUP_WORLD_SIZE': 1}
    shared |= {'WORLD_SIZE': processes, 'LOCAL_WORLD_SIZE': processes}
    ranks = [shared | {'RANK': rank, 'LOCAL_RANK': rank} for rank in range(processes)]
    environments = [{key: str(value) for key, value in rank.items()} for rank in ranks]
    return _run_all(arguments, ROOT, environments, check)


def _run_all(arguments, folder, environments, check):
    with tempfile.TemporaryDirectory() as scratch:
        started = []
        for number, environment in enumerate(environments):
            said = [f'{scratch}/{number}.{name}' for name in ('stdout', 'stderr')]
            process = SERVER.Process(target=_run, args=([*map(str, arguments)], folder, environment, said))
            process.start()
            started.append((process, said))
        try:
            for process, _ in started:
                process.join(TIMEOUT)
        finally:
            for process, _ in started:
                process.kill()
                process.join()
        done = []
        for process, said in started:
            stdout, stderr = (Path(path).read_text() for path in said)
            done.append(SimpleNamespace(returncode=process.exitcode, stdout=stdout, stderr=stderr))
        assert not check or all(each.returncode == 0 for each in done), '\n'.join(each.stderr for each in done)
        return done


def _take(path, told):
    file = lock(path)
    told.send(file is not None)
    told.recv()


@contextmanager
def taking(path: Path) -> Iterator[tuple[bool, multiprocessing.Process]]:
    """Another process that takes a file, and whether it was given it."""
    ours, theirs = SERVER.Pipe()
    process = SERVER.Process(target=_take, args=(path, theirs))
    process.start()
    try:
        yield ours.recv(), process
    finally:
        process.kill()
        process.join()
