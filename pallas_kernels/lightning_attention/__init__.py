"""Lightning attention: causal linear attention with a constant decay per head."""

from .api import lightning_attention
from .sharding import sharded_lightning_attention
from .step import lightning_attention_step

__all__ = ["lightning_attention", "lightning_attention_step", "sharded_lightning_attention"]
