"""The weight layout of the Routing Transformer's PyTorch port: its state_dict.

Kernels are [out, in]. What is fixed by the sizes (position tables, flags) is written, and passed
over when it is read.
"""

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping

import numpy as np
from flax import nnx

from ..layers import DecoderLM
from . import routing_port
from .routing_port import RoutingPortConfig
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

EMBEDDING, HEAD_COPY = "token_emb.weight", "out.tensor"
POSITIONS = "sinu_pos_emb.emb"
_FIXED = re.compile(r"sinu_pos_emb\.emb|.*\.inv_freq|.*\.initted")
_MIXER = re.compile(r"routing_transformer\.(?:fn\.)?layers\.layers\.(\d+)\.0\.(.*)")
# What the port can also be built with -> how its tensors' names give it away.
_UNKNOWN = {
  "reversible layers": r".*\.layers\.blocks\.\d+\.[fg]\..*",
  "token shift": r".*\.layers\.\d+\.(0\.fn\.fn\.to_|1\.fn\.fn\.fn\.).*",
  "product-key memories or experts": r".*\.layers\.\d+\.1\.fn\.(?!fn\.).*",
}


def import_weights(
  source: str | os.PathLike | Mapping[str, np.ndarray],
  config: RoutingPortConfig | str | None = None,
  **overrides,
) -> DecoderLM:
  """A model with the port's weights and centroids.

  Args:
    source: a file of `torch.save`, a .safetensors file, or a mapping of the names of the model's
      state_dict to arrays; wrappers may have put something in front of the names.
    config: a configuration or the name of a preset; None reads it off the tensors (`config_of`).
    **overrides: fields of the configuration to replace, such as dtype or membership.

  Raises:
    FileNotFoundError: no such file.
    ValueError: tensors that are missing, surplus or misshapen (all of them in one message), those
      of an option of the port that is not here, a tied head that is not the embedding, a corrupt
      file, or tensors that do not say enough.
  """
  if isinstance(config, str):
    config = find_preset(config, routing_port)
  tensors = plain_names(read_tensors(source))
  noise = sorted(name for name, x in tensors.items() if name.endswith(".initted") and not x)
  if noise:
    raise ValueError(
      f"import_weights: centroids must have seen data; got {noise[0]} = False (the port sets"
      " them in its first pass: run a batch through it)"
    )
  config = config_of(tensors) if config is None else config
  _check_known(tensors)
  config = dataclasses.replace(config, **overrides)
  weights = {
    name: tensor for name, tensor in tensors.items() if not _FIXED.fullmatch(name) and tensor.size
  }
  if config.tied_head:
    weights = without_head_copy(weights, EMBEDDING, HEAD_COPY)
  return load_slots(
    lambda: routing_port.build(config, nnx.Rngs(0)), _slots(config), weights,
    "a routing-transformer of PyTorch with this configuration",
  )  # fmt: skip


def export_weights(
  model: DecoderLM,
  config: RoutingPortConfig,
  path: str | os.PathLike | None = None,
  dtype: str | None = None,
) -> dict[str, np.ndarray]:
  """The state_dict, what is fixed included; also written to `path` (.safetensors) if given.

  PyTorch's strict `load_state_dict` takes it. Importing the result gives the same bits back.
  """
  tensors = dump_slots(model, _slots(config), dtype)
  like = tensors[EMBEDDING].dtype
  if config.tied_head:
    tensors[HEAD_COPY] = tensors[EMBEDDING]
  return write_exported(path, tensors | dict(_fixed(config, like)))


def plain_names(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Without what wrappers of the port's language model put in front."""
  inside = [name.removesuffix(EMBEDDING) for name in tensors if name.endswith(EMBEDDING)]
  return {name.removeprefix(min(inside, key=len, default="")): x for name, x in tensors.items()}


def is_port(tensors: Mapping[str, np.ndarray]) -> bool:
  """Whether these plain names are the port's."""
  return EMBEDDING in tensors and any(name.startswith("routing_transformer.") for name in tensors)


def config_of(tensors: Mapping[str, np.ndarray]) -> RoutingPortConfig:
  """What shapes say, with the port's membership.

  Windows are max_length / clusters, as the port wants it. Blocks of local heads cannot be seen and
  are taken for the port's default, as long as a window, looking back one block; pass `block_size`
  and `look_back` for others. Without routed heads there is one cluster and the window is the whole
  length.

  Raises:
    ValueError: tensors that do not say enough, or of an option that is not here.
  """
  _check_known(tensors)
  layers: dict[int, dict[str, np.ndarray]] = {}
  for name, tensor in tensors.items():
    if found := _MIXER.fullmatch(name):
      layers.setdefault(int(found[1]), {})[found[2].removeprefix("fn.")] = tensor
  first = layers.get(0, {})
  last = [
    x for name, x in tensors.items() if re.fullmatch(r".*layers\.0\.1\.fn\.fn\.w1\.weight", name)
  ]
  if POSITIONS not in tensors or "to_out.weight" not in first or not last:
    raise ValueError(
      f"import_weights: config must be given for tensors without {POSITIONS} and the first layer;"
      " got None (they say how long texts may be and how wide heads are)"
    )
  max_length, dim = tensors[POSITIONS].shape
  features, width = first["to_out.weight"].shape
  embedding = tensors[EMBEDDING].shape
  kinds = {"norm.g": "scale", "residual_weight": "rezero"}
  locals_ = [layers[n].get("local_to_qkv.weight") for n in sorted(layers)]
  routed = [x for x in layers.values() if "global_attn.kmeans.means" in x]
  clusters = routed[0]["global_attn.kmeans.means"].shape[1] if routed else 1
  memory = routed[0].get("global_attn.mem_key") if routed else None
  return RoutingPortConfig(
    vocab_size=embedding[0],
    features=features,
    num_layers=len(layers),
    heads=width // dim,
    local_heads=tuple(0 if w is None else w.shape[0] // (3 * dim) for w in locals_),
    window_size=max_length // clusters,
    max_length=max_length,
    head_dim=dim,
    embedding_features=None if embedding[1] == features else embedding[1],
    membership="official",
    shared=not any("to_k.weight" in x for x in layers.values()),
    memory_slots=0 if memory is None else memory.shape[2],
    feed_forward="geglu" if last[0].shape[0] == 8 * features else "gelu",
    norm=next((kind for name, kind in kinds.items() if name in first), "layer"),
    tied_head=HEAD_COPY in tensors,
  )


def _check_known(tensors: Mapping[str, np.ndarray]) -> None:
  for what, pattern in _UNKNOWN.items():
    names = sorted(name for name in tensors if re.fullmatch(pattern, name))
    if names:
      listed = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if names[4:] else "")
      raise ValueError(
        f"import_weights: the port's model must be built without {what}; got {listed} (this option"
        " is not here)"
      )


def _prefix(config: RoutingPortConfig, layer: int) -> str:
  inside = "fn." if config.width != config.features else ""
  return f"routing_transformer.{inside}layers.layers.{layer}."


def _fixed(config: RoutingPortConfig, dtype: np.dtype) -> Iterator[tuple[str, np.ndarray]]:
  """What a state_dict has beside weights: tables, flags, and weights without a single row."""
  c, dim = config, config.head_dim
  rates = 10000.0 ** (-np.arange(0, dim, 2) / dim)
  angles = np.arange(c.max_length)[:, None] * rates
  yield POSITIONS, np.concatenate([np.sin(angles), np.cos(angles)], 1).astype(np.float32)
  for layer, local in enumerate(c.local_heads):
    name = _prefix(c, layer) + "0.fn."
    routed = c.heads - local
    if local:
      yield name + "local_attn.rel_pos.inv_freq", rates.astype(np.float32)
    if routed:
      yield name + "global_attn.kmeans.initted", np.asarray(True)
    else:
      for letter in "qv" if c.shared else "qvk":
        yield f"{name}to_{letter}.weight", np.zeros((0, c.features), dtype)
    if routed and not c.memory_slots:
      for kind in ("key", "value"):
        yield f"{name}global_attn.mem_{kind}", np.zeros((routed, c.clusters, 0, dim), dtype)


def _slots(config: RoutingPortConfig) -> Iterator[Slot]:
  c, d, width = config, config.features, config.width

  def slot(name, shape, *path, conversion=_same):
    return Slot(name, shape, path, (), conversion, conversion)

  table = ("embedding",) if width == d else ("embedder", "table")
  yield slot(EMBEDDING, (c.vocab_size, width), *table)
  norm: tuple = ("final_norm",)
  if width != d:
    norm = ("final_norm", "layers", 1)
    for name, path, shape in (
      ("in", ("embedder", "dense"), (d, width)),
      ("out", ("final_norm", "layers", 0), (width, d)),
    ):
      name = f"routing_transformer.project_{name}."
      yield slot(name + "weight", shape, *path, "kernel", conversion=np.transpose)
      yield slot(name + "bias", shape[:1], *path, "bias")
  yield slot("norm.weight", (width,), *norm, "scale")
  yield slot("norm.bias", (width,), *norm, "bias")
  if not c.tied_head:
    yield slot("out.weight", (c.vocab_size, width), "head")
    yield slot("out.bias", (c.vocab_size,), "head_bias")
  # Layers of equal structure are stacked; what they differ in is their numbers of heads.
  for layer, (at, index) in enumerate(layer_paths(c.local_heads)):
    for name, shape, path, part, conversions, *rows in _layer(c, c.local_heads[layer]):
      to_ours, to_theirs = conversions
      rows = rows[0] if rows else slice(None)
      yield Slot(
        _prefix(c, layer) + name, shape, (*at, *path), (index, *part), to_ours, to_theirs, rows
      )


def _layer(config: RoutingPortConfig, local: int) -> Iterator[tuple]:
  """(name, shape, path in the block, place in the variable, conversions) of each tensor."""
  c, d, dim, heads = config, config.features, config.head_dim, config.heads
  routed = heads - local
  as_is = (_same, _same)
  for number, ours in enumerate(("mixer", "feed_forward")):
    if c.norm == "rezero":
      yield f"{number}.residual_weight", (1,), (ours, "gain"), (), as_is
    elif c.norm == "scale":
      yield f"{number}.norm.g", (1,), (f"{ours}_norm", "scale"), (), as_is
    else:
      yield f"{number}.norm.weight", (d,), (f"{ours}_norm", "scale"), (), as_is
      yield f"{number}.norm.bias", (d,), (f"{ours}_norm", "bias"), (), as_is
  if local:
    path, rows = ("mixer", "local_heads_in"), 3 * local * dim
    yield "0.fn.local_to_qkv.weight", (rows, d), (*path, "kernel"), (), into_heads(local, 3)
    split = (lambda b: b.reshape(3, local, dim), lambda b: b.reshape(-1))
    yield "0.fn.local_to_qkv.bias", (rows,), (*path, "bias"), (), split
  if routed:
    path = ("mixer", "routed_heads_in", "kernel")
    for part, letter in enumerate("qv" if c.shared else "qvk"):
      yield f"0.fn.to_{letter}.weight", (routed * dim, d), path, (part,), into_heads(routed)
    inner, shape = "0.fn.global_attn.", (routed, c.clusters, dim)
    yield inner + "kmeans.means", shape, ("mixer", "centroids", "means"), (), as_is
    if c.memory_slots:
      shape = (routed, c.clusters, c.memory_slots, dim)
      for part, kind in enumerate(("key", "value")):
        yield f"{inner}mem_{kind}", shape, ("mixer", "memory"), (part,), as_is
  yield (
    "0.fn.to_out.weight",
    (d, heads * dim),
    ("mixer", "heads_out", "kernel"),
    (),
    from_heads(heads),
  )
  yield from _feed_forward(c)


def _feed_forward(config: RoutingPortConfig) -> Iterator[tuple]:
  """The same of the feed-forward; the rows of the gate come first."""
  c, d = config, config.features
  hidden, gated = 4 * d, config.feed_forward == "geglu"
  path = ("feed_forward", "inner") if c.norm == "rezero" else ("feed_forward",)
  parts = ("gate", "up") if gated else ("fc1",)
  for kind, ours, conversion in (("weight", "kernel", np.transpose), ("bias", "bias", _same)):
    columns = (d,) if kind == "weight" else ()
    for number, part in enumerate(parts):
      rows = slice(number * hidden, (number + 1) * hidden)
      shape = (len(parts) * hidden, *columns)
      yield f"1.fn.fn.w1.{kind}", shape, (*path, part, ours), (), (conversion, conversion), rows
    shape = (d, hidden) if columns else (d,)
    last = (*path, "down" if gated else "fc2", ours)
    yield f"1.fn.fn.w2.{kind}", shape, last, (), (conversion, conversion)


def _same(x: np.ndarray) -> np.ndarray:
  return x
