"""Tokens down to fewer tokens and up again: one file per way."""

from . import dct  # registers itself
from .base import COMPRESSORS, Compressor, register_compressor

__all__ = ['COMPRESSORS', 'Compressor', 'dct', 'register_compressor']
