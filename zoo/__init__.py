"""The models: named configurations, building, and the published weight layouts."""

from .based import BasedConfig
from .models import build, create, get_config, list_models
from .mqar import MQARConfig
from .rat import RatConfig
from .softplus import SoftplusConfig
from .transnormer import TransNormerConfig

__all__ = [
  "BasedConfig",
  "MQARConfig",
  "RatConfig",
  "SoftplusConfig",
  "TransNormerConfig",
  "build",
  "create",
  "get_config",
  "list_models",
]
