"""Trains a recipe in the processes that torchrun starts; in the last of them alone the loss of update 3 is NaN.

poisoned.py RECIPE
"""

import logging
import sys

import torch

from vit_efficient.train import load_recipe, train
from vit_efficient.train.trainer import Trainer

if __name__ == '__main__':
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    update = Trainer.update

    def poisoned(trainer, chunk):
        if (
            trainer.state.progress.updates == 3
            and trainer.experiment.team.rank + 1 == trainer.experiment.team.world_size
        ):
            chunk[0][0] = torch.full_like(chunk[0][0], float('nan'), dtype=torch.float32)
        return update(trainer, chunk)

    Trainer.update = poisoned
    train(load_recipe(sys.argv[1]))
