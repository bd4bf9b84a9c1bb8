"""Trains a recipe in the processes that torchrun starts; in the last of them alone the loss of update 3 is NaN.

poisoned.py RECIPE
"""

import sys

from vit_efficient.train import load_recipe, train
from vit_efficient.train import trainer as loop

if __name__ == '__main__':
    update = loop._Run._update

    def poisoned(run, chunk):
        if run.progress.updates == 3 and run.team.rank + 1 == run.team.world_size:
            chunk[0][0][:] = float('nan')
        return update(run, chunk)

    loop._Run._update = poisoned
    train(load_recipe(sys.argv[1]))
