"""Training by recipes, on PyTorch's and timm's own parts."""

from vit_efficient.models import load_model
from vit_efficient.train.build import create_model
from vit_efficient.train.config import Config, load_recipe
from vit_efficient.train.evaluation import Evaluation, evaluate
from vit_efficient.train.interrupts import Interrupted
from vit_efficient.train.trainer import train

__all__ = ['Config', 'Evaluation', 'Interrupted', 'create_model', 'evaluate', 'load_model', 'load_recipe', 'train']
