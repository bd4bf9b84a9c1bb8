"""Recipes trained one after the other, in float64, by as many processes as torchrun starts: `double.py RECIPE …`.

Rounding in float32 would hide what else differs between ways to share the work.
"""

import sys

import torch
from torch.distributed.tensor import DTensor

from vit_efficient.train import load_recipe, loop, train
from vit_efficient.train.distributed import processes


def double(create_model):
    def create(*args):
        model = create_model(*args).double()
        model.register_forward_pre_hook(lambda _, images: (images[0].double(),))
        return model

    return create


def check_weights(update):
    """Asserts that exactly the models that are to share out their weights do."""

    def checking(run, chunk):
        models = [run.model, *([run.ema.module] if run.ema else [])]
        for parameter in (parameter for model in models for parameter in model.parameters()):
            assert parameter.dtype == torch.float64
            assert isinstance(parameter, DTensor) == (run.config.parallel == 'fsdp' and run.team.world_size > 1)
        return update(run, chunk)

    return checking


loop.create_model = double(loop.create_model)
loop._Run._update = check_weights(loop._Run._update)

if __name__ == '__main__':
    with processes('cpu'):  # a second group cannot meet where the first one did
        for recipe in sys.argv[1:]:
            train(load_recipe(recipe))
