"""TransNormerLLM's published weight layout (the hub checkpoints of 385M to 7B)."""

import dataclasses
import os
from collections.abc import Iterator, Mapping

import numpy as np
from flax import nnx

from ..layers import DecoderLM, activation
from . import transnormer
from .transnormer import TransNormerConfig
from .weights import (
  Slot,
  dump_slots,
  find_preset,
  from_heads,
  into_heads,
  layer_paths,
  load_slots,
  read_config_json,
  read_tensors,
  without_head_copy,
  write_exported,
)

# Names in the published config.json and ours. What is not listed there is not a choice we offer.
_CONFIG_NAMES = {
  "vocab_size": "vocab_size",
  "decoder_embed_dim": "features",
  "decoder_layers": "num_layers",
  "decoder_attention_heads": "heads",
  "glu_dim": "glu_dim",
  "bias": "use_bias",
  "pad_token_id": "pad_id",
  "bos_token_id": "bos_id",
  "eos_token_id": "eos_id",
}
_ACTIVATIONS = {"swish": "silu", "none": "identity"}


def import_weights(
  source: str | os.PathLike | Mapping[str, np.ndarray],
  config: TransNormerConfig | str | None = None,
  **overrides,
) -> DecoderLM:
  """A model with published weights.

  Args:
    source: a .bin or .safetensors file, a folder with shards and their index, or a mapping of
      published names to arrays.
    config: a configuration or the name of a preset; None reads `config.json` beside the weights.
    **overrides: fields of the configuration to replace, such as dtype or implementation.

  Files are mapped, not loaded: memory is needed for the parameters once (4 bytes each; 2 with
  param_dtype="bfloat16") and for the largest stack of matrices a second time.

  Raises:
    FileNotFoundError: no such file or folder, or a shard is missing.
    ValueError: tensors that are missing, surplus or misshapen (all of them in one message), a
      corrupt file, or a preset whose layout was never published.
  """
  if isinstance(config, str):
    config = find_preset(config, transnormer)
  elif config is None:
    config = config_beside(source)
  config = dataclasses.replace(config, **overrides)
  _check_layout(config)
  tensors = without_head_copy(read_tensors(source), "model.embed_tokens.weight")
  return load_slots(
    lambda: transnormer.build(config, nnx.Rngs(0)),
    _slots(config),
    tensors,
    "TransNormerLLM with this configuration",
  )


def export_weights(
  model: DecoderLM,
  config: TransNormerConfig,
  path: str | os.PathLike | None = None,
  dtype: str | None = None,
) -> dict[str, np.ndarray]:
  """The weights under their published names; also written to `path` (.safetensors) if given.

  The head is the embedding and is not listed twice. Importing the result gives the same bits back.
  """
  _check_layout(config)
  return write_exported(path, dump_slots(model, _slots(config), dtype))


def config_beside(source: str | os.PathLike | Mapping) -> TransNormerConfig:
  """The configuration that the `config.json` beside a checkpoint describes."""
  file, raw = read_config_json(source, required=list(_CONFIG_NAMES)[:5])
  if raw.get("gate_dim"):
    reason = transnormer.NO_IMPORT["transnormer3-15b"]
    raise ValueError(f"import_weights: {file} has gate_dim and cannot be imported: {reason}")
  fields = {ours: raw[theirs] for theirs, ours in _CONFIG_NAMES.items() if theirs in raw}
  if fields["glu_dim"] == -1:
    fields["glu_dim"] = fields["features"]
  lrpe = raw.get("linear_use_lrpe_list") or [1] + [0] * (fields["num_layers"] - 1)
  if len(lrpe) != fields["num_layers"]:
    raise ValueError(
      f"import_weights: linear_use_lrpe_list of {file} must have {fields['num_layers']} entries;"
      f" got {len(lrpe)} (one per layer)"
    )
  patterns = {_lrpe_pattern(name, len(lrpe)): name for name in transnormer.LRPE_LAYERS}
  if tuple(lrpe) not in patterns:
    raise ValueError(
      f"import_weights: linear_use_lrpe_list of {file} is not a known pattern: {lrpe}"
    )
  if raw.get("hidden_dim", fields["features"]) != fields["features"]:
    raise ValueError(f"import_weights: hidden_dim of {file} must equal decoder_embed_dim")
  act = raw.get("linear_act_fun", "swish")
  activation(_ACTIVATIONS.get(act, act))  # raises for an unknown one
  return TransNormerConfig(
    **fields,
    scale_embedding=not raw.get("no_scale_embedding", False),
    lrpe_layers=patterns[tuple(lrpe)],
    activation=_ACTIVATIONS.get(act, act),
    norm="srms" if raw.get("norm_type", "simplermsnorm") == "simplermsnorm" else "layer",
  )


def _lrpe_pattern(name: str, layers: int) -> tuple[int, ...]:
  first, rest = {"first": (1, 0), "all": (1, 1), "all_but_first": (0, 1), "none": (0, 0)}[name]
  return (first,) + (rest,) * (layers - 1)


def _check_layout(config: TransNormerConfig) -> None:
  if config.gate != "full":
    raise ValueError(
      f"import_weights: gate must be 'full' in the published layout; got {config.gate!r} (the code"
      " of models with another gate was not published)"
    )
  if config.norm != "srms":
    raise ValueError(
      f"import_weights: norm must be 'srms' in the published layout; got {config.norm!r} (no norm"
      " has weights there)"
    )


def _slots(config: TransNormerConfig) -> Iterator[Slot]:
  c, heads, dim = config, config.heads, config.head_dim
  yield Slot(
    "model.embed_tokens.weight", (c.vocab_size, c.features), ("embedding",), (), _same, _same
  )
  places = layer_paths([c.has_lrpe(layer) for layer in range(c.num_layers)])
  for layer, (at, index) in enumerate(places):
    name = f"model.layers.{layer}"

    def slot(published, shape, path, to_ours=_same, to_theirs=_same, name=name, at=at, index=index):
      return Slot(f"{name}.{published}", shape, (*at, *path), (index,), to_ours, to_theirs)

    yield slot(
      "token_mixer.qkvu_proj.weight",
      (4 * c.features, c.features),
      ("mixer", "heads_in", "kernel"),
      *into_heads(heads, 4),
    )
    yield slot(
      "token_mixer.out_proj.weight",
      (c.features, c.features),
      ("mixer", "heads_out", "kernel"),
      *from_heads(heads),
    )
    if c.has_lrpe(layer):
      yield slot(
        "token_mixer.lrpe.theta",
        (heads, 1, dim),
        ("mixer", "lrpe", "theta"),
        lambda w: w[:, 0],
        lambda w: w[:, None],
      )
    for theirs, ours in (("l1", "gate"), ("l2", "up"), ("l3", "down")):
      shape = (c.glu_dim, c.features) if theirs != "l3" else (c.features, c.glu_dim)
      path = ("feed_forward", ours, "kernel")
      yield slot(f"channel_mixer.{theirs}.weight", shape, path, np.transpose, np.transpose)
    if c.use_bias:
      yield slot(
        "token_mixer.qkvu_proj.bias",
        (4 * c.features,),
        ("mixer", "heads_in", "bias"),
        lambda b: b.reshape(4, heads, dim),
        lambda b: b.reshape(-1),
      )
      yield slot("token_mixer.out_proj.bias", (c.features,), ("mixer", "heads_out", "bias"))
      for theirs, ours in (("l1", "gate"), ("l2", "up"), ("l3", "down")):
        size = c.features if theirs == "l3" else c.glu_dim
        yield slot(f"channel_mixer.{theirs}.bias", (size,), ("feed_forward", ours, "bias"))


def _same(x: np.ndarray) -> np.ndarray:
  return x
