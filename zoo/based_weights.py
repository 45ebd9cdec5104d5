"""BASED's published weight layout: the hub checkpoints of BASED and of its attention baselines."""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from flax import nnx

from ..layers import DecoderLM
from . import based
from .based import BasedConfig
from .weights import (
  Slot,
  activation_in,
  check_config_json,
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

EMBEDDING = "transformer.embeddings.word_embeddings.weight"
# In files, but no weights: an unused decay, and what positions are computed from.
_NO_WEIGHTS = ("transformer.decay.decay", ".rotary_emb.inv_freq")
_ACTIVATIONS = {"swiglu": "silu", "geglu": "gelu", "glu": "sigmoid"}
_CLASSES = dict(mixer="BaseConv", alt_mixer="LinearAttention", alt_mixer_2="Slid")
# Fields of config.json that say something else than the model here: what they must be, if there.
_ONLY: dict[str, tuple] = dict(
  rms_norm=(True,),
  qkv_proj_bias=(False,),
  out_proj_bias=(False,),
  mlp_fc1_bias=(False,),
  mlp_fc2_bias=(False,),
  mlp_type=(None, "base"),
  rotary_emb_interleaved=(False, None),
  rotary_emb_scale_base=(None, False),
  scale_attn_weights=(True,),
  scale_attn_by_inverse_layer_idx=(False,),
  tie_word_embeddings=(True,),
)


def import_weights(
  source: str | os.PathLike | Mapping[str, np.ndarray],
  config: BasedConfig | str | None = None,
  **overrides,
) -> DecoderLM:
  """A model with published weights.

  Args:
    source: a .bin or .safetensors file, a folder with shards and their index, or a mapping of
      published names to arrays.
    config: a configuration or the name of a preset; None reads `config.json` beside the weights,
      which is right about the window where copies of one model differ.
    **overrides: fields of the configuration to replace, such as dtype or implementation.

  Files are mapped, not loaded: memory is needed for the parameters once (4 bytes each; 2 with
  param_dtype="bfloat16") and for the largest stack of matrices a second time.

  Raises:
    FileNotFoundError: no such file or folder, or a shard is missing.
    ValueError: tensors that are missing, surplus or misshapen (all of them in one message), a
      corrupt file, or a preset that was never published.
  """
  if isinstance(config, str):
    config = find_preset(config, based)
  elif config is None:
    config = config_beside(source)
  config = dataclasses.replace(config, **overrides)
  _check_layout(config)
  tensors = _weights_alone(read_tensors(source))
  rows = tensors[EMBEDDING].shape[0] if EMBEDDING in tensors else config.vocab_size
  if rows != config.vocab_size:
    raise ValueError(
      f"import_weights: vocab_size must be the {rows} rows of {EMBEDDING}; got"
      f" {config.vocab_size} (vocabularies are padded: 50257 tokens of GPT-2 have 50264 rows)"
    )
  return load_slots(
    lambda: based.build(config, nnx.Rngs(0)),
    _slots(config),
    tensors,
    "BASED with this configuration",
  )


def export_weights(
  model: DecoderLM,
  config: BasedConfig,
  path: str | os.PathLike | None = None,
  dtype: str | None = None,
) -> dict[str, np.ndarray]:
  """The weights under their published names; also written to `path` (.safetensors) if given.

  The head is the embedding and is not listed twice. Importing the result gives the same bits back.
  """
  _check_layout(config)
  return write_exported(path, dump_slots(model, _slots(config), dtype))


def config_beside(source: str | os.PathLike | Mapping) -> BasedConfig:
  """The configuration that the `config.json` beside a checkpoint describes."""
  required = ("vocab_size", "n_embd", "n_layer", "n_head", "rotary_emb_fraction")
  file, raw = read_config_json(source, required)
  check_config_json(file, raw, _ONLY, "no released model has it")
  activation = activation_in(file, raw, _ACTIVATIONS, "swiglu", "released models have swiglu")
  features, multiple = raw["n_embd"], raw.get("pad_vocab_size_multiple") or 1
  hidden, hidden_multiple = raw.get("n_inner") or 8 * features // 3, raw.get("mlp_multiple_of")
  fields: dict[str, Any] = dict(
    vocab_size=_up(raw["vocab_size"], multiple),
    features=features,
    num_layers=raw["n_layer"],
    heads=raw["n_head"],
    glu_dim=_up(hidden, hidden_multiple or 256),
    glu_activation=activation,
    rotary_fraction=float(raw["rotary_emb_fraction"]),
    rotary_base=float(raw.get("rotary_emb_base") or 10000),
    norm_eps=raw.get("layer_norm_epsilon", 1e-5),
    init_stddev=raw.get("initializer_range", 0.02),
  )
  return BasedConfig(**fields | _mixers(file, raw))


def _mixers(file, raw: dict) -> dict[str, Any]:
  """Fields of the configuration that say what the layers mix tokens with."""
  mixer, linear, sliding = (raw.get(name) for name in _CLASSES)
  if mixer is None:
    return dict(other_layers="attention")
  for name, part in _CLASSES.items():
    if raw.get(name) is not None and part not in raw[name].get("_target_", part):
      raise ValueError(
        f"import_weights: {name} of {file} must be a {part}; got {raw[name]['_target_']!r} (other"
        " mixers are not part of BASED)"
      )
  fields: dict[str, Any] = dict(
    conv_expand=mixer.get("expand_proj", 4),
    # Not `kernel_sizes`: the released code reads only this name, and 3 where it is absent.
    conv_kernel_size=mixer.get("kernel_size", 3),
    conv_bias=mixer.get("use_bias", False),
    linear_layers=tuple(raw.get("alt_mixer_layers") or ()) if linear else (),
    sliding_layers=tuple(raw.get("alt_mixer_2_layers") or ()) if sliding else (),
  )
  if linear:
    rms = linear.get("parallel_implementation") == "tk"  # that kernel does not divide
    fields |= dict(
      feature_dim=linear.get("feature_dim", 16),
      linear_heads=linear.get("num_heads", 16),
      linear_head_dim=linear.get("head_dim"),
      output_norm="rms" if rms else "denominator",
    )
  if sliding:
    if "window_size" not in sliding:
      raise ValueError(f"import_weights: alt_mixer_2 of {file} must have the field window_size")
    fields |= dict(
      window_size=sliding["window_size"], heads=sliding.get("num_heads", raw["n_head"])
    )
  return fields


def _up(size: int, multiple: int) -> int:
  return size + -size % multiple


def _check_layout(config: BasedConfig) -> None:
  if config.decay_offset is not None:
    raise ValueError(
      f"import_weights: decay_offset must be None in the published layout; got"
      f" {config.decay_offset} (files have a decay, but the released code does not use it)"
    )
  if config.key_heads is not None:
    raise ValueError(
      f"import_weights: key_heads must be None in the published layout; got {config.key_heads} (no"
      " released model shares keys between heads)"
    )


def _weights_alone(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Without the prefix of the trainer, its metrics, what is computed, and the copy of the head."""
  plain = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
  kept = {
    name: tensor
    for name, tensor in plain.items()
    if "metrics" not in name and not name.endswith(_NO_WEIGHTS)
  }
  return without_head_copy(kept, EMBEDDING)


def _slots(config: BasedConfig) -> Iterator[Slot]:
  c, d = config, config.features
  yield Slot(EMBEDDING, (c.vocab_size, d), ("embedding",), (), _same, _same)
  kinds = [c.mixer_of(layer) for layer in range(c.num_layers)]
  makers = dict(conv=_conv_slots, linear=_linear_slots)
  for layer, (at, index) in enumerate(layer_paths(kinds)):
    name = f"transformer.layers.{layer}"

    def slot(
      published, shape, path, to_ours=_same, to_theirs=_same, part=(), rows=slice(None),
      name=name, at=at, index=(index,),
    ):  # fmt: skip
      path = (*at, *path)
      return Slot(f"{name}.{published}", shape, path, (*index, *part), to_ours, to_theirs, rows)

    for theirs, ours in (("norm1", "mixer_norm"), ("norm2", "feed_forward_norm")):
      yield slot(f"{theirs}.weight", (d,), (ours, "scale"))
    # The value half comes first, the gate half second.
    yield from _halves(slot, "mlp.fc1.weight", c.glu_dim, d, "feed_forward", "up", "gate")
    path = ("feed_forward", "down", "kernel")
    yield slot("mlp.fc2.weight", (d, c.glu_dim), path, np.transpose, np.transpose)
    yield from makers.get(kinds[layer], _attention_slots)(c, slot)
  yield Slot("transformer.ln_f.weight", (d,), ("final_norm", "scale"), (), _same, _same)


def _halves(slot, published, width, features, module, first, second) -> Iterator[Slot]:
  """Two matrices [width, features], one above the other in the published tensor."""
  for ours, rows in ((first, slice(width)), (second, slice(width, None))):
    yield slot(
      published,
      (2 * width, features),
      (module, ours, "kernel"),
      np.transpose,
      np.transpose,
      rows=rows,
    )


def _conv_slots(config: BasedConfig, slot) -> Iterator[Slot]:
  d, width, taps = config.features, config.conv().width, config.conv_kernel_size
  yield from _halves(slot, "mixer.in_proj.weight", width, d, "mixer", "conv_in", "gate_in")
  yield slot(
    "mixer.conv.conv.weight",
    (width, 1, taps),
    ("mixer", "taps"),
    lambda w: w[:, 0].T,
    lambda w: w.T[:, None],
  )
  path = ("mixer", "out", "kernel")
  yield slot("mixer.out_proj.weight", (d, width), path, np.transpose, np.transpose)
  if config.conv_bias:
    for ours, rows in (("conv_in", slice(width)), ("gate_in", slice(width, None))):
      yield slot("mixer.in_proj.bias", (2 * width,), ("mixer", ours, "bias"), rows=rows)
    yield slot("mixer.out_proj.bias", (d,), ("mixer", "out", "bias"))


def _heads_slot(slot, published, rows, features, heads, path, *, parts=1, part=(0,)):
  """[parts * heads * dim, features], head after head, into a kernel [parts, features, heads, dim].

  `part` () takes all parts, (i,) one.
  """
  conversions = into_heads(heads, parts if part == () else None)
  return slot(published, (rows, features), path, *conversions, part)


def _linear_slots(config: BasedConfig, slot) -> Iterator[Slot]:
  c = config.linear()
  d, keys, values = c.features, c.heads * c.feature_dim, c.heads * c.head_dim
  for part, name in enumerate(("proj_q", "proj_k")):
    path = ("mixer", "query_key_heads_in", "kernel")
    yield _heads_slot(slot, f"mixer.{name}.weight", keys, d, c.heads, path, part=(part,))
  path = ("mixer", "value_heads_in", "kernel")
  yield _heads_slot(slot, "mixer.proj_v.weight", values, d, c.heads, path)
  yield _out_slot(slot, d, c.heads, values)
  if c.output_norm == "rms":
    yield slot("mixer.g_norm.weight", (c.head_dim,), ("mixer", "norm", "scale"))


def _attention_slots(config: BasedConfig, slot) -> Iterator[Slot]:
  d, heads = config.features, config.heads
  path = ("mixer", "heads_in", "kernel")
  yield _heads_slot(slot, "mixer.Wqkv.weight", 3 * d, d, heads, path, parts=3, part=())
  yield _out_slot(slot, d, heads, d)


def _out_slot(slot, features, heads, width):
  path = ("mixer", "heads_out", "kernel")
  return slot("mixer.out_proj.weight", (features, width), path, *from_heads(heads))


def _same(x: np.ndarray) -> np.ndarray:
  return x
