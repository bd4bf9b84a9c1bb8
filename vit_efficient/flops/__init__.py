"""Counting what a model computes, in multiply-accumulates: `count_flops(model, (3, 1024, 1024))`."""

from vit_efficient.flops.engine import ROLES, FlopCount, count_flops
from vit_efficient.flops.formulas import register_flops

__all__ = ['ROLES', 'FlopCount', 'count_flops', 'register_flops']
