"""Attention operators as pure functions on arrays. See WORKSPACE.md for the map."""

from .lightning_attention import (
  lightning_attention,
  lightning_attention_step,
  sharded_lightning_attention,
)

__all__ = ["lightning_attention", "lightning_attention_step", "sharded_lightning_attention"]
