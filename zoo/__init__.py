"""The models: named configurations, building, and the published weight layouts."""

from .based import BasedConfig
from .models import build, create, get_config, list_models
from .mqar import MQARConfig
from .transnormer import TransNormerConfig

__all__ = [
  "BasedConfig",
  "MQARConfig",
  "TransNormerConfig",
  "build",
  "create",
  "get_config",
  "list_models",
]
