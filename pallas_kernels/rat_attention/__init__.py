"""RAT attention: a gated recurrence in chunks, softmax attention across them."""

from .api import rat_attention
from .state import RatState, empty_state
from .step import rat_attention_step

__all__ = ["RatState", "empty_state", "rat_attention", "rat_attention_step"]
