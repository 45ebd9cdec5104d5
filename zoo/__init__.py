"""The models: named configurations, building, and the published weight layouts."""

from .models import build, create, get_config, list_models
from .transnormer import TransNormerConfig

__all__ = ["TransNormerConfig", "build", "create", "get_config", "list_models"]
