"""Streams of a GPU where there is none: batches are copied ahead, and what is asked of streams is written down."""

from contextlib import nullcontext

import torch

from vit_efficient.data import batches


class _Computing:
    def __init__(self, calls):
        self.calls = calls

    def wait_stream(self, stream):
        assert stream == 'side'
        self.calls.append('wait')


def stand_in_for_streams(monkeypatch) -> list[str]:
    """From here on batches are copied ahead on any device.

    Returns:
        What is done, in order: copies, waits for them, and tensors that another stream is said to use.
    """
    calls, to = [], batches._to
    computing = _Computing(calls)
    monkeypatch.setattr(batches, 'copies_ahead', lambda device: True)
    monkeypatch.setattr(batches, '_to', lambda *args: calls.append('copy') or to(*args))
    monkeypatch.setattr(torch.cuda, 'Stream', lambda device: 'side')
    monkeypatch.setattr(torch.cuda, 'stream', lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda device: computing)
    monkeypatch.setattr(torch.Tensor, 'record_stream', lambda tensor, stream: calls.append('use'))
    return calls
