import os

import pytest
import torch

from vit_efficient.utils import device


@pytest.mark.parametrize(
    ('most', 'cores', 'said', 'expected'),
    [
        (2, 8, None, 2),
        (2, 1, None, 1),
        (4, 8, '3', 3),
        (4, 8, '6', 4),
        (4, 8, '3,2', 3),
        (4, 8, 'many', 4),
        (None, 1, '1', 5),
    ],
)
def test_threads_are_no_more_than_cores_and_the_environment_allow(monkeypatch, most, cores, said, expected):
    taken = [5]
    monkeypatch.setattr(torch, 'set_num_threads', taken.append)
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: set(range(cores)), raising=False)
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    if said:
        monkeypatch.setenv('OMP_NUM_THREADS', said)
    device.limit_threads(most)
    assert taken[-1] == expected
