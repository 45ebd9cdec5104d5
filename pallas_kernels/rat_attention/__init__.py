"""RAT attention: a gated recurrence in chunks, softmax attention across them."""

from .api import rat_attention
from .sharding import sharded_rat_attention
from .state import RatState, empty_state
from .step import rat_attention_step

__all__ = [
  "RatState",
  "empty_state",
  "rat_attention",
  "rat_attention_step",
  "sharded_rat_attention",
]
