"""The published layout of TransICD: a PyTorch state dict, one small matrix per code."""

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping

import numpy as np
from absl import logging
from flax import nnx

from ..layers.label_classifier import LabelClassifier
from . import transicd
from .transicd import TransICDConfig
from .weights import (
  Slot,
  dump_slots,
  find_preset,
  from_heads,
  into_heads,
  load_slots,
  read_tensors,
  write_exported,
)

EMBEDDING, MARGIN, POSITION = "embedder.weight", "class_margin", "pos_encoder.pe"


def import_weights(
  source: str | os.PathLike | Mapping[str, np.ndarray],
  config: TransICDConfig | str | None = None,
  **overrides,
) -> LabelClassifier:
  """A model with weights in the published layout, TransICD's or its mean-pooling ablation's.

  Args:
    source: a .bin, .pth or .safetensors file, or a mapping of published names to arrays.
    config: a configuration or the name of a preset; None reads the sizes off the tensors. Without
      one, heads have 16 channels as published.
    **overrides: fields of the configuration to replace. Positions are those of the code that
      trained the weights, "batch_row", unless this or `config` says otherwise.

  Raises:
    FileNotFoundError: no such file.
    ValueError: tensors that are missing, surplus or misshapen (all of them in one message), or a
      corrupt file.
  """
  tensors = dict(read_tensors(source))
  if isinstance(config, str):
    config = find_preset(config, transicd)
  elif config is None:
    config = config_of(tensors)
    if "positions" not in overrides:
      logging.info("import_weights: positions='batch_row', as the code that trained them has it")
  config = dataclasses.replace(config, **overrides)
  _check(config)
  tensors.pop(POSITION, None)  # sinusoids, which are computed
  tensors.setdefault(MARGIN, np.zeros((config.labels,), np.float32))
  what = f"{'TransICD' if config.pool == 'labels' else 'the ablation'} in the published layout"
  return load_slots(lambda: transicd.build(config, nnx.Rngs(0)), _slots(config), tensors, what)


def is_transicd(tensors: Mapping[str, np.ndarray]) -> bool:
  return EMBEDDING in tensors and "fcs.0.weight" in tensors


def config_of(tensors: Mapping[str, np.ndarray]) -> TransICDConfig:
  """The configuration that the shapes of published tensors tell; heads have 16 channels."""
  names = (EMBEDDING, "encoder.layers.0.linear1.weight", "fcs.0.weight")
  if absent := [name for name in names if name not in tensors]:
    raise ValueError(
      f"import_weights: the tensors must be those of TransICD; got none called {absent[0]!r}"
      " (name a preset for another model)"
    )
  vocab_size, features = tensors[EMBEDDING].shape
  layers = {m[1] for n in tensors if (m := re.match(r"encoder\.layers\.(\d+)\.", n))}
  labels = sum(re.fullmatch(r"fcs\.\d+\.weight", n) is not None for n in tensors)
  attention = tensors.get("attn.l1.weight")
  positions = tensors.get(POSITION)
  return TransICDConfig(
    vocab_size=vocab_size,
    labels=labels,
    features=features,
    num_layers=len(layers),
    heads=max(1, features // 16),
    hidden=tensors["encoder.layers.0.linear1.weight"].shape[0],
    attention_features=None if attention is None else attention.shape[0],
    pool="mean_of_all" if attention is None else "labels",
    positions="batch_row",
    max_length=2500 if positions is None else len(positions),
    margin=3.0 if MARGIN in tensors else 0.0,
    freeze_embedding=True,
  )


def export_weights(
  model: LabelClassifier,
  config: TransICDConfig,
  path: str | os.PathLike | None = None,
  dtype: str | None = None,
) -> dict[str, np.ndarray]:
  """The model's weights in the published layout, and written to `path` (.safetensors) if given."""
  _check(config)
  tensors = dump_slots(model, _slots(config), dtype)
  if not config.margin:
    del tensors[MARGIN]
  if model.position_table is not None:
    tensors[POSITION] = np.asarray(model.position_table[...])[:, None]
  return write_exported(path, tensors)


def _check(config: TransICDConfig) -> None:
  if config.encoder != "transformer":
    raise ValueError(
      f"transicd: encoder must be 'transformer' for the published layout; got {config.encoder!r}"
      " (nothing else was published)"
    )


def _slots(config: TransICDConfig) -> Iterator[Slot]:
  c = config
  same, transposed = (lambda x: x), (lambda x: x.T)
  d, hidden, keys = c.features, c.feed_forward_dim, c.attention_dim

  def slot(name, shape, *path, index=(), convert=(same, same)):
    to_ours, to_theirs = convert
    return Slot(name, shape, path, index, to_ours, to_theirs)

  def linear(name, out, features_in, *path):
    yield slot(f"{name}.weight", (out, features_in), *path, "kernel",
               convert=(transposed, transposed))  # fmt: skip
    yield slot(f"{name}.bias", (out,), *path, "bias")

  yield slot(MARGIN, (c.labels,), "margins")
  yield slot(EMBEDDING, (c.vocab_size, d), "embedding")
  biases = (lambda b: b.reshape(3, c.heads, -1), lambda b: b.reshape(-1))
  for layer in range(c.num_layers):
    ours, theirs = ("encoder", layer), f"encoder.layers.{layer}"
    attention = f"{theirs}.self_attn"
    yield slot(f"{attention}.in_proj_weight", (3 * d, d), *ours, "mixer", "heads_in", "kernel",
               convert=into_heads(c.heads, 3))  # fmt: skip
    yield slot(f"{attention}.in_proj_bias", (3 * d,), *ours, "mixer", "heads_in", "bias",
               convert=biases)  # fmt: skip
    yield slot(f"{attention}.out_proj.weight", (d, d), *ours, "mixer", "heads_out", "kernel",
               convert=from_heads(c.heads))  # fmt: skip
    yield slot(f"{attention}.out_proj.bias", (d,), *ours, "mixer", "heads_out", "bias")
    yield from linear(f"{theirs}.linear1", hidden, d, *ours, "feed_forward", "fc1")
    yield from linear(f"{theirs}.linear2", d, hidden, *ours, "feed_forward", "fc2")
    for name, norm in (("norm1", "mixer_norm"), ("norm2", "feed_forward_norm")):
      yield slot(f"{theirs}.{name}.weight", (d,), *ours, norm, "scale")
      yield slot(f"{theirs}.{name}.bias", (d,), *ours, norm, "bias")
  if c.pool == "labels":
    yield from linear("attn.l1", keys, d, "attention", "key")
    yield slot("attn.l2.weight", (c.labels, keys), "attention", "query")
    yield slot("attn.l2.bias", (c.labels,), "attention", "label_bias")
  row = (lambda w: w[0], lambda w: w[None])
  for label in range(c.labels):
    yield slot(f"fcs.{label}.weight", (1, d), "head", index=(label,), convert=row)
    yield slot(f"fcs.{label}.bias", (1,), "head_bias", index=(label,),
               convert=(lambda b: b[0], lambda b: np.reshape(b, (1,))))  # fmt: skip
