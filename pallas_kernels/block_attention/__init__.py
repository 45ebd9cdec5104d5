"""Attention to the own block of tokens and the ones before it."""

from .api import block_attention, block_window
from .step import block_attention_step

__all__ = ["block_attention", "block_attention_step", "block_window"]
