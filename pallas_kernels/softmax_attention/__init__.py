"""Full softmax attention: causal, and of everything to everything."""

from .api import softmax_attention
from .bidirectional import bidirectional_attention, sharded_bidirectional_attention
from .cache import CacheState, empty_cache
from .sharding import sharded_softmax_attention
from .step import softmax_attention_step

__all__ = [
  "CacheState",
  "bidirectional_attention",
  "empty_cache",
  "sharded_bidirectional_attention",
  "sharded_softmax_attention",
  "softmax_attention",
  "softmax_attention_step",
]
