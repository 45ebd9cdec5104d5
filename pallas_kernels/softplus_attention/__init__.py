"""Softplus attention: LSSA, its re-weighted form LSSAR, and what they are compared with."""

from .api import softplus_attention
from .sharding import sharded_softplus_attention
from .step import softplus_attention_step
from .variants import LSSA, LSSAR, VARIANTS, Variant

__all__ = [
  "LSSA",
  "LSSAR",
  "VARIANTS",
  "Variant",
  "sharded_softplus_attention",
  "softplus_attention",
  "softplus_attention_step",
]
