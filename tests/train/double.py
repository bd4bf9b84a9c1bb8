"""Trains recipes one after the other, in float64, in as many processes as torchrun starts.

    double.py RECIPE [RECIPE@UPDATE …]

After UPDATE the last process alone is told to stop. Rounding in float32 would hide what else differs between ways to
share the work.
"""

import os
import signal
import sys
from contextlib import suppress

import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from vit_efficient.train import Interrupted, load_recipe, train
from vit_efficient.train import trainer as loop
from vit_efficient.train.distributed import processes


def double(create_model):
    """The model in float64. It is made once in a run: what it was made from may be gone later."""

    def create(*args):
        create.calls += 1
        model = create_model(*args).double()
        model.register_forward_pre_hook(lambda _, images: (images[0].double(),))
        return model

    create.calls = 0
    return create


def counting(build_step_model):
    """Counts in `run.reductions` how often DDP averages gradients: small models have one bucket of them."""

    def build(run):
        build_step_model(run)
        if isinstance(run.step_model, DistributedDataParallel):
            run.reductions = []
            run.step_model.register_comm_hook(run.reductions, count_and_reduce)

    def count_and_reduce(reductions, bucket):
        reductions.append(bucket.index())
        return allreduce_hook(None, bucket)

    return build


def stop_after(last_update, update):
    """The update, which asserts that exactly the models that are to share out their weights do, and that processes talk
    once, however many micro-batches there are."""

    def updating(run, chunk):
        models = [run.model, *([run.ema.module] if run.ema else [])]
        for parameter in (parameter for model in models for parameter in model.parameters()):
            assert parameter.dtype == torch.float64
            assert isinstance(parameter, DTensor) == (run.config.parallel == 'fsdp' and run.team.world_size > 1)
        if run.progress.updates + 1 == last_update and run.team.rank + 1 == run.team.world_size:
            os.kill(os.getpid(), signal.SIGTERM)
        loss = update(run, chunk)
        if isinstance(run.step_model, DistributedDataParallel):
            assert run.reductions == [0]
            run.reductions.clear()
        return loss

    return updating


if __name__ == '__main__':
    loop.create_model = double(loop.create_model)
    loop._Run._build_step_model = counting(loop._Run._build_step_model)
    update = loop._Run._update
    with processes('cpu'):  # a second group cannot meet where the first one did
        for argument in sys.argv[1:]:
            recipe, _, last_update = argument.partition('@')
            loop._Run._update = stop_after(int(last_update or 0), update)
            with suppress(Interrupted):
                train(load_recipe(recipe))
            assert loop.create_model.calls == 1
            loop.create_model.calls = 0
