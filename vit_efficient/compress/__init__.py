"""Tokens down to fewer tokens and up again: one file per way."""

from vit_efficient.compress import dct, learned, merge, pool  # these register themselves
from vit_efficient.compress.base import COMPRESSORS, Compressor, get_compressor, register_compressor

__all__ = ['COMPRESSORS', 'Compressor', 'dct', 'get_compressor', 'learned', 'merge', 'pool', 'register_compressor']
