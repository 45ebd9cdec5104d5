"""Attention operators as pure functions on arrays. See WORKSPACE.md for the map."""

from .block_attention import block_attention, block_attention_step, block_window
from .code_attention import (
  code_attention,
  code_attention_weights,
  sharded_code_attention,
)
from .lightning_attention import (
  lightning_attention,
  lightning_attention_step,
  sharded_lightning_attention,
)
from .rat_attention import RatState, rat_attention, rat_attention_step, sharded_rat_attention
from .rat_attention import empty_state as empty_rat_state
from .rat_attention.recurrence import linear_recurrence
from .routed_attention import (
  RoutedState,
  Routing,
  empty_routed_state,
  routed_attention,
  routed_attention_step,
  sharded_routed_attention,
)
from .sliding_window_attention import (
  WindowState,
  empty_window,
  left_keys,
  sharded_sliding_window_attention,
  sliding_window_attention,
  sliding_window_attention_step,
)
from .softmax_attention import (
  CacheState,
  bidirectional_attention,
  empty_cache,
  sharded_bidirectional_attention,
  sharded_softmax_attention,
  softmax_attention,
  softmax_attention_step,
)
from .softplus_attention import (
  VARIANTS,
  Variant,
  sharded_softplus_attention,
  softplus_attention,
  softplus_attention_step,
)
from .taylor_attention import (
  sharded_taylor_attention,
  taylor_attention,
  taylor_attention_step,
)

__all__ = [
  "VARIANTS",
  "CacheState",
  "RatState",
  "RoutedState",
  "Routing",
  "Variant",
  "WindowState",
  "bidirectional_attention",
  "block_attention",
  "block_attention_step",
  "block_window",
  "code_attention",
  "code_attention_weights",
  "empty_cache",
  "empty_rat_state",
  "empty_routed_state",
  "empty_window",
  "left_keys",
  "lightning_attention",
  "lightning_attention_step",
  "linear_recurrence",
  "rat_attention",
  "rat_attention_step",
  "routed_attention",
  "routed_attention_step",
  "sharded_bidirectional_attention",
  "sharded_code_attention",
  "sharded_lightning_attention",
  "sharded_rat_attention",
  "sharded_sliding_window_attention",
  "sharded_routed_attention",
  "sharded_softmax_attention",
  "sharded_softplus_attention",
  "sharded_taylor_attention",
  "sliding_window_attention",
  "sliding_window_attention_step",
  "softmax_attention",
  "softmax_attention_step",
  "softplus_attention",
  "softplus_attention_step",
  "taylor_attention",
  "taylor_attention_step",
]
