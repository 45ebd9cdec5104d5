"""Full causal softmax attention."""

from .api import softmax_attention
from .cache import CacheState, empty_cache
from .sharding import sharded_softmax_attention
from .step import softmax_attention_step

__all__ = [
  "CacheState",
  "empty_cache",
  "sharded_softmax_attention",
  "softmax_attention",
  "softmax_attention_step",
]
