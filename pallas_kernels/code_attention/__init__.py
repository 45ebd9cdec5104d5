"""Label-wise attention: one query per label, shared by all documents of the batch."""

from .api import code_attention, code_attention_weights
from .sharding import sharded_code_attention

__all__ = ["code_attention", "code_attention_weights", "sharded_code_attention"]
