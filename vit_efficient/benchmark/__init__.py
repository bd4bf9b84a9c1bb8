"""Layers and models timed against what a user would pick instead, in one run, with their memory and their limits."""

from vit_efficient.benchmark.layers import EXACT, PASSES, Candidate, LayerSetting, benchmark_layer, squarest_grid
from vit_efficient.benchmark.models import WORKS, ModelCandidate, ModelSetting, benchmark_models
from vit_efficient.benchmark.products import products_of
from vit_efficient.benchmark.tables import plot_times
from vit_efficient.benchmark.timing import Shared, compare, matmul_rate, slope, take_turns

__all__ = [
    'EXACT',
    'PASSES',
    'WORKS',
    'Candidate',
    'LayerSetting',
    'ModelCandidate',
    'ModelSetting',
    'Shared',
    'benchmark_layer',
    'benchmark_models',
    'compare',
    'matmul_rate',
    'plot_times',
    'products_of',
    'slope',
    'squarest_grid',
    'take_turns',
]
