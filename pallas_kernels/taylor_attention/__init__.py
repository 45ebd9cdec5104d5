"""Taylor attention: causal linear attention with second-order Taylor features."""

from .api import taylor_attention
from .sharding import sharded_taylor_attention
from .step import taylor_attention_step

__all__ = ["sharded_taylor_attention", "taylor_attention", "taylor_attention_step"]
