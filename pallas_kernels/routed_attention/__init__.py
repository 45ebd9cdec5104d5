"""Routed attention: tokens attend to those that are near the same centroid."""

from .api import routed_attention
from .options import Routing
from .sharding import sharded_routed_attention
from .state import RoutedState, empty_routed_state
from .step import routed_attention_step

__all__ = [
  "RoutedState",
  "Routing",
  "empty_routed_state",
  "routed_attention",
  "routed_attention_step",
  "sharded_routed_attention",
]
