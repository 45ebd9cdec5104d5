"""The released Routing Transformer's weight layout, by the names of its TensorFlow variables.

Sources are mappings of names to arrays, .npz and .safetensors files with those names (slashes
included): what `tf.train.load_checkpoint` gives, stored. The optimiser's variables are passed over.
Kernels are [in, out]. Text models only.
"""

import dataclasses
import os
import pathlib
import zipfile
from collections.abc import Iterator, Mapping

import numpy as np
from flax import nnx

from ..layers import DecoderLM
from . import routing
from .routing import RoutingConfig
from .weights import (
  Slot,
  dump_slots,
  find_preset,
  layer_paths,
  load_slots,
  read_tensors,
  write_exported,
)

PREFIX = "sparse_transformer/body/"
_NO_WEIGHTS = ("Adafactor", "global_step", "/Adam")


def import_weights(
  source: str | os.PathLike | Mapping[str, np.ndarray], config: RoutingConfig | str, **overrides
) -> DecoderLM:
  """A text model with released weights, centroids and their running sums included.

  Args:
    source: a .npz or .safetensors file, or a mapping, of TensorFlow's variable names to arrays.
    config: a configuration or the name of a preset, such as "routing-pg19".
    **overrides: fields of the configuration to replace.

  Raises:
    FileNotFoundError: no such file.
    ValueError: tensors that are missing, surplus or misshapen (all of them in one message), a
      corrupt file, or the configuration of an image model.
  """
  if isinstance(config, str):
    config = find_preset(config, routing)
  config = dataclasses.replace(config, **overrides)
  _check_layout(config)
  tensors = _weights_alone(_read(source))
  return load_slots(
    lambda: routing.build(config, nnx.Rngs(0)), _slots(config), tensors,
    "a Routing Transformer with this configuration",
  )  # fmt: skip


def export_weights(
  model: DecoderLM,
  config: RoutingConfig,
  path: str | os.PathLike | None = None,
  dtype: str | None = None,
) -> dict[str, np.ndarray]:
  """The weights by the released names; also written to `path` (.safetensors) if given."""
  _check_layout(config)
  return write_exported(path, dump_slots(model, _slots(config), dtype))


def _check_layout(config: RoutingConfig) -> None:
  if config.is_image:
    raise ValueError(
      "import_weights: config must be that of a text model; got one of images (no checkpoint of"
      " those was released)"
    )


def _read(source) -> dict[str, np.ndarray]:
  if not isinstance(source, Mapping) and pathlib.Path(source).suffix == ".npz":
    try:
      with open(source, "rb") as file, np.load(file) as arrays:
        return {name: arrays[name] for name in arrays.files}
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
      raise ValueError(
        f"import_weights: {source} must be a .npz file of arrays; {error} (write it again)"
      ) from error
  return read_tensors(source)


def _weights_alone(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Without the optimiser's variables; every name with the usual prefix."""
  found = {}
  for name, tensor in tensors.items():
    if not any(part in name for part in _NO_WEIGHTS):
      before, body, rest = name.rpartition("body/")
      found[PREFIX + (rest if body else before + rest)] = tensor
  return found


def _slots(config: RoutingConfig) -> Iterator[Slot]:
  c, d = config, config.features
  width = d if c.embedding_features is None else c.embedding_features

  def slot(name, shape, *path, index=(), to_ours=_same, to_theirs=_same):
    return Slot(PREFIX + name, shape, path, index, to_ours, to_theirs)

  yield slot("embeddings/embedding", (c.vocab_size, width), "embedder", "table")
  yield slot("emb_dense/kernel", (width, d), "embedder", "dense", "kernel")
  yield slot("emb_dense/bias", (d,), "embedder", "dense", "bias")
  if width != d:
    yield slot("final_dense_1/kernel", (d, width), "final_norm", "kernel")
    yield slot("final_dense_1/bias", (width,), "final_norm", "bias")
  turned = dict(to_ours=np.transpose, to_theirs=np.transpose)
  yield slot("final_dense_2/kernel", (width, c.vocab_size), "head", **turned)
  yield slot("final_dense_2/bias", (c.vocab_size,), "head_bias")
  routed = [c.routed_heads > 0 and layer >= c.skip_first for layer in range(c.num_layers)]
  for layer, (at, index) in enumerate(layer_paths(routed)):
    name = f"decoder_layer_{layer}/self_attention/"
    for inner, shape, path, part, conversions in _layer(c, routed[layer]):
      more = dict(zip(("to_ours", "to_theirs"), conversions, strict=True))
      yield slot(name + inner, shape, *at, *path, index=(index, *part), **more)


def _layer(config: RoutingConfig, routed: bool) -> Iterator[tuple]:
  """(name, shape, path in the block, place in the variable, conversions) of each tensor."""
  c, d, heads, hidden = config, config.features, config.heads, config.hidden
  dim = d // heads
  as_is = (_same, _same)
  for part, letter in enumerate("qkv"):
    split = (lambda w: w.reshape(d, heads, dim), lambda w: w.reshape(d, d))
    yield f"self_attention/{letter}/kernel", (d, d), ("mixer", "heads_in", "kernel"), (part,), split
  join = (lambda w: w.reshape(heads, dim, d), lambda w: w.reshape(d, d))
  out = "self_attention/output_transform/kernel"
  yield out, (d, d), ("mixer", "heads_out", "kernel"), (), join
  inner = "self_attention/attention_nd/"
  if c.head_mix:
    yield inner + "dense/kernel", (dim, dim), ("mixer", "head_mix"), (), as_is
  cluster = inner + "cluster_attention/cluster_attention/"
  local = not routed or c.routed_heads < heads
  for name, ours, there in (
    (inner + "local_nd/", "local_tables", local),
    (cluster, "routed_tables", routed),
  ):
    for part, kind in enumerate(("keys", "values")):
      if there and c.positions == "shaw":
        shape = (2 * c.max_distance + 1, dim)
        table = f"{name}relative_positions_{kind}/embeddings"
        yield table, shape, ("mixer", ours), (part,), as_is
  if routed:
    shape = (c.routed_heads, c.clusters, dim)
    for name, size in (("means", shape), ("ema_means", shape), ("ema_count", shape[:2])):
      yield cluster + name, size, ("mixer", "centroids", name), (), as_is
  for behind, norm in (("", "mixer_norm"), ("_1", "feed_forward_norm")):
    for kind in ("scale", "bias"):
      name = f"layer_postprocess{behind}/layer_norm/layer_norm_{kind}"
      yield name, (d,), (norm, kind), (), as_is
  if c.feed_forward == "geglu":
    for number, ours in enumerate(("gate", "up", "down"), start=1):
      shape = (hidden, d) if ours == "down" else (d, hidden)
      yield f"ffn/weight{number}/kernel", shape, ("feed_forward", ours, "kernel"), (), as_is
    return
  for number, shape in ((1, (d, hidden)), (2, (hidden, d))):
    for kind, size in (("kernel", shape), ("bias", shape[1:])):
      yield f"ffn/conv{number}/{kind}", size, ("feed_forward", f"fc{number}", kind), (), as_is


def _same(x: np.ndarray) -> np.ndarray:
  return x
