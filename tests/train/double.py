"""Trains recipes one after the other, in float64, in as many processes as torchrun starts.

    double.py RECIPE [RECIPE@UPDATE …]

After UPDATE the last process alone is told to stop. Rounding in float32 would hide what else differs between ways to
share the work.
"""

import logging
import os
import signal
import sys
from contextlib import suppress
from functools import partial

import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from vit_efficient.data import Samples
from vit_efficient.models import compile_blocks
from vit_efficient.train import Interrupted, experiment, load_recipe, state, train
from vit_efficient.train.distributed import processes
from vit_efficient.train.state import TrainState
from vit_efficient.train.trainer import Trainer


def double(create_model):
    """The model in float64, and its teacher. It is made once in a run: what it was made from may be gone later."""

    def create(*args):
        create.calls += 1
        made = create_model(*args)
        model, *teacher = made if isinstance(made, tuple) else (made,)
        model.double().register_forward_pre_hook(lambda _, given: (given[0].double(), *given[1:]))
        for each in teacher:
            each.model.double()
            each.digest = each.current_digest()
        return made

    create.calls = 0
    return create


def counting(wrap):
    """Counts in `state.reductions` how often DDP averages gradients: small models have one bucket of them."""

    def wrapped(state):
        wrap(state)
        if isinstance(state.forward, DistributedDataParallel):
            state.reductions = []
            state.forward.register_comm_hook(state.reductions, count_and_reduce)

    def count_and_reduce(reductions, bucket):
        reductions.append(bucket.index())
        return allreduce_hook(None, bucket)

    return wrapped


def stop_after(last_update, update):
    """The update, which asserts that exactly the models that are to split their weights do, and that processes talk
    once, however many micro-batches there are."""

    def updating(trainer, chunk):
        experiment, state, team = trainer.experiment, trainer.state, trainer.experiment.team
        models = [state.model, *([state.average.module] if state.average else [])]
        for parameter in (parameter for model in models for parameter in model.parameters()):
            assert parameter.dtype == torch.float64
            assert isinstance(parameter, DTensor) == (experiment.config.parallel == 'fsdp' and team.world_size > 1)
        if state.progress.updates + 1 == last_update and team.rank + 1 == team.world_size:
            os.kill(os.getpid(), signal.SIGTERM)
        loss = update(trainer, chunk)
        if isinstance(state.forward, DistributedDataParallel):
            assert state.reductions == [0]
            state.reductions.clear()
        return loss

    return updating


if __name__ == '__main__':
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    experiment.create_model = double(experiment.create_model)
    experiment.create_student = double(experiment.create_student)
    normalize = Samples.normalize
    Samples.normalize = lambda self, images: normalize(self, images).double()
    state.compile_blocks = partial(compile_blocks, backend='aot_eager')
    TrainState.wrap = counting(TrainState.wrap)
    update = Trainer.update
    with processes('cpu'):  # a second group cannot meet where the first one did
        for argument in sys.argv[1:]:
            recipe, _, last_update = argument.partition('@')
            Trainer.update = stop_after(int(last_update or 0), update)
            with suppress(Interrupted):
                train(load_recipe(recipe))
            assert experiment.create_model.calls + experiment.create_student.calls == 1
            experiment.create_model.calls = experiment.create_student.calls = 0
