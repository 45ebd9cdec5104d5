"""RAT's published weight layout: checkpoints of the authors' trainer."""

import dataclasses
import os
from collections.abc import Iterator, Mapping

import numpy as np
from flax import nnx

from ..layers import DecoderLM
from . import rat
from .rat import RatConfig
from .weights import (
  Slot,
  dump_slots,
  find_preset,
  from_heads,
  into_heads,
  layer_paths,
  load_slots,
  read_tensors,
  without_head_copy,
  write_exported,
)

EMBEDDING = "embedding.wte.weight"
_HEAD = "head.lm_head.weight"
_COMPILED = "_orig_mod."  # in names of models that were saved while they were compiled
# Rows of softmax attention's published matrix are values, queries, keys; ours are q, k, v.
_TO_QKV, _TO_VQK = [1, 2, 0], [2, 0, 1]


def import_weights(
  source: str | os.PathLike | Mapping[str, np.ndarray],
  config: RatConfig | str | None = None,
  **overrides,
) -> DecoderLM:
  """A model with published weights.

  Args:
    source: a checkpoint of the authors' trainer (its state dict is under "task"; what else is in it
      is left alone), a .bin or .safetensors file, or a mapping of published names to arrays.
    config: a configuration or the name of a preset; None finds the preset by the tensors' shapes.
    **overrides: fields of the configuration to replace, such as dtype or implementation.

  Files are mapped, not loaded: memory is needed for the parameters once (4 bytes each; 2 with
  param_dtype="bfloat16") and for the largest stack of matrices a second time.

  Raises:
    FileNotFoundError: no such file or folder, or a shard is missing.
    ValueError: tensors that are missing, surplus or misshapen (all of them in one message), a head
      that is not the embedding, a corrupt file, or shapes of no preset, or of several.
  """
  if isinstance(config, str):
    config = find_preset(config, rat)
  tensors = weights_alone(read_tensors(source))
  if config is None:
    config = config_of(tensors)
  config = dataclasses.replace(config, **overrides)
  return load_slots(
    lambda: rat.build(config, nnx.Rngs(0)), _slots(config), tensors, "RAT with this configuration"
  )


def export_weights(
  model: DecoderLM,
  config: RatConfig,
  path: str | os.PathLike | None = None,
  dtype: str | None = None,
) -> dict[str, np.ndarray]:
  """The weights under their published names; also written to `path` (.safetensors) if given.

  The head is the embedding and is not listed twice. Importing the result gives the same bits back.
  """
  return write_exported(path, dump_slots(model, _slots(config), dtype))


def config_of(tensors: Mapping[str, np.ndarray]) -> RatConfig:
  """The preset with exactly these published names and shapes.

  Shapes do not say everything: neither a chunk's size nor whether attention has a window is in
  them, and checkpoints have no config.json (their pickled configuration is not read).

  Raises:
    ValueError: no preset, or several, have these tensors.
  """
  shapes = {name: tensor.shape for name, tensor in tensors.items()}
  found = [
    name
    for name, config in rat.PRESETS.items()
    if shapes == {slot.name: slot.shape for slot in _slots(config)}
  ]
  if len(found) == 1:
    return rat.PRESETS[found[0]]
  if found:
    raise ValueError(
      f"import_weights: config must be given, one of {', '.join(found)}; got None (they differ in"
      " what weights do not show)"
    )
  raise ValueError(
    "import_weights: config must be given for tensors that are not those of a preset; got None"
    f" (the presets are {', '.join(rat.PRESETS)})"
  )


def weights_alone(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Without the compiler's prefix, and without the copy of the head."""
  plain = {name.replace(_COMPILED, ""): tensor for name, tensor in tensors.items()}
  return without_head_copy(plain, EMBEDDING, _HEAD)


def _slots(config: RatConfig) -> Iterator[Slot]:
  c, d, f = config, config.features, config.feed_forward_dim
  yield Slot(EMBEDDING, (c.vocab_size, d), ("embedding",), (), _same, _same)
  kinds = [c.mixer_of(layer) for layer in range(c.num_layers)]
  for layer, (at, index) in enumerate(layer_paths(kinds)):
    name = f"backbone.layers.{layer}"

    def slot(
      published, shape, path, to_ours=_same, to_theirs=_same, rows=slice(None),
      name=name, at=at, index=index,
    ):  # fmt: skip
      return Slot(f"{name}.{published}", shape, (*at, *path), (index,), to_ours, to_theirs, rows)

    yield slot("seq_layer.input_norm.weight", (d,), ("mixer_norm", "scale"))
    if kinds[layer] in ("rat", "rnn"):
      yield from _gated_slots(c, slot, c.groups if kinds[layer] == "rat" else 0)
    else:
      yield from _attention_slots(c, slot)
    path = ("mixer", "heads_out", "kernel")
    yield slot("seq_layer.out_proj.weight", (d, d), path, *from_heads(c.heads))
    yield slot("hidden_layer.ln.weight", (d,), ("feed_forward_norm", "scale"))
    for matrix, shape in (("fc1", (f, d)), ("fc2", (d, f))):
      path = ("feed_forward", matrix, "kernel")
      yield slot(f"hidden_layer.{matrix}.weight", shape, path, np.transpose, np.transpose)
  yield Slot("backbone.ln.weight", (d,), ("final_norm", "scale"), (), _same, _same)


def _gated_slots(config: RatConfig, slot, groups: int) -> Iterator[Slot]:
  """Rows z, v, g of all heads, then q, k of the groups."""
  d, heads = config.features, config.heads
  dim = d // heads
  shape = (3 * d + 2 * groups * dim, d)
  for count, ours, parts, rows in (
    (heads, "gated_heads_in", 3, slice(3 * d)),
    (groups, "query_key_heads_in", 2, slice(3 * d, None)),
  ):
    if count:
      path = ("mixer", ours, "kernel")
      conversions = into_heads(count, parts)
      yield slot("seq_layer.in_proj.weight", shape, path, *conversions, rows=rows)
  path = ("mixer", "gate_bias")
  yield slot(
    "seq_layer.gate_bias", (d,), path, lambda b: b.reshape(heads, dim), lambda b: b.reshape(-1)
  )


def _attention_slots(config: RatConfig, slot) -> Iterator[Slot]:
  d = config.features
  to_ours, to_theirs = into_heads(config.heads, 3)
  yield slot(
    "seq_layer.in_proj.weight",
    (3 * d, d),
    ("mixer", "heads_in", "kernel"),
    lambda w: to_ours(w)[_TO_QKV],
    lambda w: to_theirs(w[_TO_VQK]),
  )


def _same(x: np.ndarray) -> np.ndarray:
  return x
