"""Published checkpoints of any family: finds out whose layout one has, and reads it."""

import os
from collections.abc import Mapping
from types import ModuleType

import numpy as np

from ..layers import DecoderLM
from . import based_weights, models, transnormer_weights
from .weights import find_preset, read_config_json

# Family -> its weight layout, and a field of config.json that no other family has.
_LAYOUTS: dict[str, tuple[ModuleType, str]] = {
  "transnormer": (transnormer_weights, "decoder_embed_dim"),
  "based": (based_weights, "n_embd"),
}


def find_config(source: str | os.PathLike, preset: str | None = None):
  """The configuration of a checkpoint: that of a preset, or what its `config.json` says.

  Raises:
    FileNotFoundError: no such file or folder, or no config.json where no preset is given.
    ValueError: a preset that was not published, or a config.json of an unknown model.
  """
  if preset:
    family = models.family_of(models.get_config(preset))
    if family not in _LAYOUTS:
      raise ValueError(
        f"import_weights: {preset!r} cannot be imported: no checkpoint of family {family!r} was"
        " published"
      )
    return find_preset(preset, models.module_of(family))
  file, raw = read_config_json(source)
  for layout, field in _LAYOUTS.values():
    if field in raw:
      return layout.config_beside(source)
  fields = " or ".join(field for _, field in _LAYOUTS.values())
  raise ValueError(
    f"import_weights: {file} must be that of a model of the zoo, with a field {fields} (for other"
    " files name a preset)"
  )


def import_weights(source: str | os.PathLike | Mapping[str, np.ndarray], config) -> DecoderLM:
  """The model of a configuration of any family with the weights of `source`."""
  layout, _ = _LAYOUTS[models.family_of(config)]
  return layout.import_weights(source, config)
