"""Training by recipes, on PyTorch's and timm's own parts."""

from vit_efficient.models import load_model
from vit_efficient.train.build import create_model
from vit_efficient.train.config import Config
from vit_efficient.train.evaluation import Evaluation, evaluate
from vit_efficient.train.hooks import TrainingHook, register_hook
from vit_efficient.train.interrupts import Interrupted
from vit_efficient.train.recipe import load_recipe
from vit_efficient.train.run import train
from vit_efficient.train.run_folder import RunFolder

__all__ = [
    'Config',
    'Evaluation',
    'Interrupted',
    'RunFolder',
    'TrainingHook',
    'create_model',
    'evaluate',
    'load_model',
    'load_recipe',
    'register_hook',
    'train',
]
