"""Times what the training loop adds to a model's own work: everything that is neither its forward pass, nor the
backward pass, nor the optimiser's step. Prints a table.

    python recipes/benchmarks/loop.py

Both are measured in the same updates: the whole from the end of one update to the end of the next, loading and metrics
included; the model's work by hooks on the model, the loss and the optimiser. The images are made up, of 256 pixels, and
stay in memory; they are cropped, resized and jittered anew each time, as ImageNet's are.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from vit_efficient.report.table import Column, Table
from vit_efficient.train import Config, experiment, state, train
from vit_efficient.train.config import ModelConfig, SchedConfig
from vit_efficient.train.trainer import Trainer
from vit_efficient.utils.environment import describe_environment, one_line

WARM_UP = 3  # updates that are not counted


class Stopwatch:
    """Seconds between `start` and `stop`, all in all."""

    def __init__(self):
        self.seconds, self.started = 0.0, 0.0

    def start(self, *_) -> None:
        self.started = time.perf_counter()

    def stop(self, *_) -> None:
        self.seconds += time.perf_counter() - self.started


class MadeUp(torch.utils.data.Dataset):
    """(image (256, 256, 3), label) by index; the same few images again and again."""

    classes = ('even', 'odd')

    def __init__(self, size: int):
        self.size = size
        self.images = np.random.default_rng(0).integers(0, 256, (16, 256, 256, 3), np.uint8)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int):
        return self.images[index % 16], index % 2


def measure(config: Config, updates: int) -> dict:
    """Medians over the updates, in seconds."""
    watch, inside = Stopwatch(), []
    create_model, create_optimizer, update = experiment.create_model, state.create_optimizer, Trainer.update
    backward = torch.Tensor.backward

    def watched_model(*args):
        model = create_model(*args)
        model.register_forward_pre_hook(watch.start)
        model.register_forward_hook(watch.stop)
        return model

    def watched_optimizer(*args):
        optimizer = create_optimizer(*args)
        optimizer.register_step_pre_hook(watch.start)
        optimizer.register_step_post_hook(watch.stop)
        return optimizer

    def watched_backward(*args):
        watch.start()
        backward(*args)
        watch.stop()

    def watched_update(*args):
        watch.seconds = 0.0
        loss = update(*args)
        inside.append(watch.seconds)
        return loss

    with (
        mock.patch.object(experiment, 'create_model', watched_model),
        mock.patch.object(state, 'create_optimizer', watched_optimizer),
        mock.patch.object(Trainer, 'update', watched_update),
        mock.patch.object(torch.Tensor, 'backward', watched_backward),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        size = config.data.batch_size * (updates + WARM_UP)
        train(config, MadeUp(size), MadeUp(config.data.batch_size))
    lines = [json.loads(line) for line in (Path(config.output) / 'metrics.jsonl').open()]
    whole = [config.data.batch_size / line['images_per_second'] for line in lines if line['kind'] == 'train']
    whole, inside = whole[WARM_UP:], inside[WARM_UP:]
    return {
        'workers': config.data.workers,
        'updates': len(whole),
        'step': statistics.median(whole),
        'inside': statistics.median(inside),
        'outside': 100 * (1 - sum(inside) / sum(whole)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--model', default='vit_dct_small')
    parser.add_argument('--size', type=int, default=224)
    parser.add_argument('--batch', type=int, default=16)
    parser.add_argument('--updates', type=int, default=30)
    parser.add_argument('--workers', type=int, nargs='*', default=[0, 2])
    parser.add_argument('--threads', type=int, default=os.cpu_count())
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for workers in args.workers:
            config = Config(
                model=ModelConfig(args.model, {'img_size': args.size}),
                sched=SchedConfig(epochs=1, warmup_epochs=0),
                output=f'{folder}/{workers}',
                device='cpu',
                clip_grad=1.0,
                threads=args.threads,
                log_every=1,
            )
            config.data.batch_size, config.data.workers, config.data.cache = args.batch, workers, True
            rows.append(measure(config, args.updates))
    columns = [
        Column('workers', 'loader workers'),
        Column('updates', 'updates'),
        Column('step', 's per update', 3),
        Column('inside', 's in forward, backward, optimiser', 3),
        Column('outside', '% outside of them', 2),
    ]
    print(Table(columns, rows).render())
    environment = one_line(describe_environment(torch.device('cpu')))
    what = f'{args.model}, {args.size} px, batches of {args.batch}, {args.threads} threads'
    print(f'{what}; seconds are medians, the share is of all updates together. {environment}.')


if __name__ == '__main__':
    main()
