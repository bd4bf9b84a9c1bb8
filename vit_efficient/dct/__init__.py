"""Orthonormal discrete cosine transforms, inverted, used to resize, and truncated, of images and of their blocks."""

from vit_efficient.dct.transforms import dct, dct2, dct_matrix, idct, idct2, resample
from vit_efficient.dct.truncation import kept_coefficients, kept_energy, truncate, zigzag

__all__ = [
    'dct',
    'dct2',
    'dct_matrix',
    'idct',
    'idct2',
    'kept_coefficients',
    'kept_energy',
    'resample',
    'truncate',
    'zigzag',
]
