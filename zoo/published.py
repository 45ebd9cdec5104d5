"""Published checkpoints of any family: finds out whose layout one has, and reads it."""

import os
import pathlib
from collections.abc import Mapping
from types import ModuleType

import numpy as np

from ..layers import DecoderLM, LabelClassifier
from . import (
  based_weights,
  models,
  rat_weights,
  routing_port_weights,
  routing_weights,
  softplus_weights,
  transicd_weights,
  transnormer_weights,
)
from .weights import find_preset, read_config_json, read_tensors

# Family -> its weight layout.
_LAYOUTS: dict[str, ModuleType] = {
  "transnormer": transnormer_weights,
  "based": based_weights,
  "rat": rat_weights,
  "softplus": softplus_weights,
  "routing": routing_weights,
  "routing_port": routing_port_weights,
  "transicd": transicd_weights,
}
# A field of config.json that those before it have not -> the layout. The others have no such file.
_FIELDS = {
  "decoder_embed_dim": transnormer_weights,
  "rotary_emb_fraction": based_weights,
  "n_embd": softplus_weights,
}


def find_config(source: str | os.PathLike, preset: str | None = None):
  """The configuration of a checkpoint: that of a preset, or what its `config.json` says.

  Checkpoints of RAT, TransICD and the Routing Transformer's port have no such file, and are known
  by the names of their tensors. Those of the Routing Transformer itself need a preset.

  Raises:
    FileNotFoundError: no such file or folder, or no config.json where it is needed.
    ValueError: a preset that was not published, a config.json of an unknown model, or a checkpoint
      that does not say enough.
  """
  if preset:
    family = models.family_of(models.get_config(preset))
    if family not in _LAYOUTS:
      raise ValueError(
        f"import_weights: {preset!r} cannot be imported: no checkpoint of family {family!r} was"
        " published"
      )
    return find_preset(preset, models.module_of(family))
  try:
    file, raw = read_config_json(source)
  except FileNotFoundError:
    if pathlib.Path(source).suffix != ".npz":
      tensors = read_tensors(source)
      if transicd_weights.is_transicd(tensors):
        return transicd_weights.config_of(tensors)
      plain = rat_weights.weights_alone(tensors)
      if rat_weights.EMBEDDING in plain:
        return rat_weights.config_of(plain)
      plain = routing_port_weights.plain_names(tensors)
      if routing_port_weights.is_port(plain):
        return routing_port_weights.config_of(plain)
    raise
  for field, layout in _FIELDS.items():
    if field in raw:
      return layout.config_beside(source)
  fields = " or ".join(_FIELDS)
  raise ValueError(
    f"import_weights: {file} must be that of a model of the zoo, with a field {fields} (for other"
    " files name a preset)"
  )


def import_weights(
  source: str | os.PathLike | Mapping[str, np.ndarray], config
) -> DecoderLM | LabelClassifier:
  """The model of a configuration of any family with the weights of `source`."""
  return _LAYOUTS[models.family_of(config)].import_weights(source, config)
