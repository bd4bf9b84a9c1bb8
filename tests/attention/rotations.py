"""Rotary positions, written out slowly: angles of coordinates by the formulas of each family, and complex numbers.

Everything in float64. Frequencies are for heads of `DIM` channels.
"""

import math

import torch
from torch import Tensor

DIM = 8
HEADS = 3


def dinov3(height: int, width: int):
    """Coordinates from −1 to 1, divided by periods of 1 to 100 (here of few channels)."""
    periods = [100 ** (4 * k / DIM) for k in range(DIM // 4)]

    def angles(head: int, row: float, column: float) -> list[float]:
        centred = 2 * (row + 0.5) / height - 1, 2 * (column + 0.5) / width - 1
        return [2 * math.pi * c / period for c in centred for period in periods]

    return angles


def eva(height: int, width: int, reference: int = 16, offset: float = 0.3):
    """Coordinates of a grid of reference patches: EVA-02, Perception Encoder."""
    bands = [10000 ** (-4 * k / DIM) for k in range(DIM // 4)]

    def angles(head: int, row: float, column: float) -> list[float]:
        scaled = (row + offset) / height * reference, (column + offset) / width * reference
        return [c * band for c in scaled for band in bands]

    return angles


def mixed(height: int, width: int):
    """Each pair of channels of each head has a direction of its own (RoPE-ViT); up to one radian for each patch."""
    random = torch.Generator().manual_seed(5)
    directions = torch.randn(HEADS, DIM // 2, 2, generator=random, dtype=torch.float64)
    directions = (directions / directions.norm(dim=-1, keepdim=True)).tolist()

    def angles(head: int, row: float, column: float) -> list[float]:
        return [a * row + b * column for a, b in directions[head]]

    return angles


FAMILIES = {'dinov3': dinov3, 'eva': eva, 'mixed': mixed}


def rope_at(angles, places: list[tuple[float, float]], half: bool) -> Tensor:
    """Sines and cosines at places (row, column), as timm lays them out: (HEADS, places, 2 DIM)"""
    table = torch.tensor([[angles(head, *place) for place in places] for head in range(HEADS)], dtype=torch.float64)
    table = torch.cat([table, table], dim=-1) if half else table.repeat_interleave(2, dim=-1)
    return torch.cat([table.sin(), table.cos()], dim=-1)


def turn(t: Tensor, angles, head: int, places: list[tuple[float, float]], prefix: int, half: bool) -> Tensor:
    """Tokens (prefix + places, DIM) of one head, each pair of channels times e^(i angle)."""
    turned = t.clone()
    for n, place in enumerate(places):
        for pair, angle in enumerate(angles(head, *place)):
            a, b = (pair, pair + DIM // 2) if half else (2 * pair, 2 * pair + 1)
            number = torch.complex(t[prefix + n, a], t[prefix + n, b]) * complex(math.cos(angle), math.sin(angle))
            turned[prefix + n, a], turned[prefix + n, b] = number.real, number.imag
    return turned


def patches(height: int, width: int) -> list[tuple[int, int]]:
    return [(row, column) for row in range(height) for column in range(width)]


def means(height: int, width: int, kept: tuple[int, int]) -> list[tuple[float, float]]:
    """Mean coordinates of the cells."""
    rows, columns = (
        [(i * n // m + (i + 1) * n // m - 1) / 2 for i in range(m)] for n, m in ((height, kept[0]), (width, kept[1]))
    )
    return [(row, column) for row in rows for column in columns]


def middles(height: int, width: int, kept: tuple[int, int]) -> list[tuple[int, int]]:
    """The patches that subsampling keeps."""
    rows, columns = (
        [(i * n // m + (i + 1) * n // m) // 2 for i in range(m)] for n, m in ((height, kept[0]), (width, kept[1]))
    )
    return [(row, column) for row in rows for column in columns]


def samples(height: int, width: int, kept: tuple[int, int]) -> list[tuple[float, float]]:
    """Where a band-limited resize samples."""
    rows, columns = ([(i + 0.5) * n / m - 0.5 for i in range(m)] for n, m in ((height, kept[0]), (width, kept[1])))
    return [(row, column) for row in rows for column in columns]
