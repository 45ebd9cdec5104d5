"""Softmax attention in a causal window."""

from .api import sliding_window_attention
from .sharding import sharded_sliding_window_attention
from .step import sliding_window_attention_step
from .window import WindowState, empty_window, left_keys

__all__ = [
  "WindowState",
  "empty_window",
  "left_keys",
  "sharded_sliding_window_attention",
  "sliding_window_attention",
  "sliding_window_attention_step",
]
