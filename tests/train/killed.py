"""Kills a run at random moments and goes on with it each time; prints what it has seen, as JSON.

    killed.py RECIPE KILLS

The recipe's run has a process of its own, forked where everything is imported already, that is sent SIGKILL. Its
checkpoints are written slowly, so that about half of the moments lie within one.
"""

import gc
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from vit_efficient.train import load_recipe, train
from vit_efficient.train.checkpoint import list_checkpoints, load_newest
from vit_efficient.train.trainer import Trainer

LONGEST = 0.3  # seconds that a run has before it is killed, once it trains


class SlowFile:
    """Pauses now and then between what is written."""

    def __init__(self, file):
        self.file, self.writes = file, 0

    def write(self, content):
        self.writes += 1
        if self.writes % 50 == 0:
            self.file.flush()
            time.sleep(0.001)
        return self.file.write(content)

    def flush(self):
        self.file.flush()


def begin(config, ready):
    """The run; it tells when it begins to train."""
    save, epochs = torch.save, Trainer.epochs
    torch.save = lambda state, file: save(state, SlowFile(file))

    def told(trainer):
        os.write(ready, b'.')
        return epochs(trainer)

    Trainer.epochs = told
    train(config)


def killed(config, moment):
    """Whether the run was still going on when it was killed."""
    wait, ready = os.pipe()
    child = os.fork()
    if not child:
        with open(os.devnull, 'w') as nothing:
            os.dup2(nothing.fileno(), 2)
        try:
            begin(config, ready)
        finally:
            os._exit(0)
    os.close(ready)
    os.read(wait, 1)
    os.close(wait)
    time.sleep(moment)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def main(recipe, kills):
    torch.set_num_threads(1)
    gc.freeze()  # what is imported is not garbage, in no process forked from here
    draw = random.Random(0)
    config = load_recipe(recipe)
    folder = Path(config.output)
    seen = {'kills': 0, 'while writing': 0, 'updates': []}
    for number in range(int(kills)):
        before = len(list(folder.glob('.*.tmp')))
        config.checkpoint_keep = 1 + number % 3
        had_one = bool(list_checkpoints(folder))
        seen['kills'] += killed(config, draw.uniform(0, LONGEST))
        seen['while writing'] += len(list(folder.glob('.*.tmp'))) > 0
        assert before <= 1, 'what an earlier run had not finished was left there'
        assert list_checkpoints(folder) or not had_one
        if list_checkpoints(folder):
            path, state, unreadable = load_newest(folder)
            assert path.name == 'checkpoint.pt' and not unreadable
            seen['updates'].append(state['progress']['updates'])
    train(config)
    print(json.dumps(seen))


if __name__ == '__main__':
    main(*sys.argv[1:])
