"""The peak memory of a call: what it adds to its inputs and weights.

On CUDA the allocator knows it. On the CPU it is the process's resident set, and the process is one of its own
(`python -m vit_efficient.benchmark.peak_memory`): in one that has run before, a call may use memory that was there
already.
"""

import os
import pickle
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

# glibc: blocks of 64 KiB and more go back to the system when they are freed; by default it keeps ever larger ones.
_MALLOC = {'MALLOC_MMAP_THRESHOLD_': '65536', 'MALLOC_TRIM_THRESHOLD_': '65536'}
# A call shorter than this, in seconds, is made twice, and the second one counts.
_SHORT = 1


class Killed(RuntimeError):
    """A child process was killed, by Linux for want of memory or by a crash: what it did is better not done here."""


def peak_on_cuda(call: Callable[[], object], device: torch.device) -> int:
    """Bytes that the second of two calls adds to what is allocated; the first one sets up the libraries."""
    torch.cuda.empty_cache()  # no room is lost in pieces that others have left
    call()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def peak_in_child(make: Callable[[], Callable[[], object]]) -> int:
    """Bytes that a call on the CPU adds to the resident set of a fresh process.

    A call that takes less than a second is made twice and the second one counts: the first one also loads code. Where
    the system cannot reset a peak (not Linux) there is one call, and the figure is what it adds to the peak before it.

    Args:
        make: Makes the inputs, weights and call, in the child. It is pickled, so of a module that can be imported.

    Raises:
        Killed: If the child was.
        RuntimeError: If the call fails, or there is no such measurement on this system. The message says why.
    """
    try:
        job = pickle.dumps((torch.get_num_threads(), make))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise RuntimeError(f'cannot be made in another process: {error}') from error
    command = [sys.executable, '-m', 'vit_efficient.benchmark.peak_memory']
    environment = {**os.environ, **_MALLOC, 'PYTHONPATH': os.pathsep.join(sys.path)}
    done = subprocess.run(command, input=job, capture_output=True, env=environment)
    if done.returncode < 0:
        cause = ', perhaps out of memory' if done.returncode == -9 else ''
        raise Killed(f'process ended by signal {-done.returncode}{cause}')
    if done.returncode:
        raise RuntimeError(done.stderr.decode(errors='replace').strip().rpartition('\n')[2])
    return int(done.stdout.split()[-1])


def _measure(make: Callable[[], Callable[[], object]]) -> int:
    call = make()
    resettable = _reset_peak()
    before, start = peak_resident(), time.perf_counter()
    call()
    if resettable and time.perf_counter() - start < _SHORT:
        _reset_peak()
        before = peak_resident()
        call()
    peak = peak_resident() - before
    if not peak and not resettable:  # there was a higher one before
        raise RuntimeError('the peak cannot be told from an earlier one on this system')
    return peak


def _reset_peak() -> bool:
    """Makes the present resident set the peak, where Linux allows it."""
    try:
        Path('/proc/self/clear_refs').write_text('5')
    except OSError:
        return False
    return True


def peak_resident() -> int:
    """The peak of this process's resident set, in bytes."""
    try:
        # Not `ru_maxrss`: on Linux a child's begins at that of its parent.
        return 1024 * int(re.search(r'VmHWM:\s*(\d+) kB', Path('/proc/self/status').read_text())[1])
    except (OSError, TypeError):
        import resource  # not on Windows

        return (1 if sys.platform == 'darwin' else 1024) * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def resident_of_its_own() -> int:
    """What this process has in memory that is no part of a file, in bytes: the code of libraries, which the system may
    drop, is not counted on Linux."""
    try:
        return 1024 * int(re.search(r'RssAnon:\s*(\d+) kB', Path('/proc/self/status').read_text())[1])
    except (OSError, TypeError):
        return peak_resident()


def one_line(error: Exception) -> str:
    """The kind of an error and the first line of what it says."""
    first = (str(error).splitlines() or [''])[0]
    if isinstance(error, torch.OutOfMemoryError):
        first = '. '.join(first.split('. ')[:2])  # how much it wanted, without the state of the GPU
    return f'{type(error).__name__}: {first}'


if __name__ == '__main__':
    try:
        threads, make = pickle.load(sys.stdin.buffer)
        torch.set_num_threads(threads)
        print(_measure(make))
    except Exception as error:
        sys.exit(one_line(error))
