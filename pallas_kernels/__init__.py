"""Attention operators as pure functions on arrays. See WORKSPACE.md for the map."""

from .lightning_attention import (
  lightning_attention,
  lightning_attention_step,
  sharded_lightning_attention,
)
from .taylor_attention import (
  sharded_taylor_attention,
  taylor_attention,
  taylor_attention_step,
)

__all__ = [
  "lightning_attention",
  "lightning_attention_step",
  "sharded_lightning_attention",
  "sharded_taylor_attention",
  "taylor_attention",
  "taylor_attention_step",
]
