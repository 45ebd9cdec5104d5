"""GPT-2's published weight layout, for GPT-2 itself and for models with its attention swapped.

Two layouts have the same names: OpenAI's, whose matrices are [in, out], and that of trainers in
PyTorch, whose matrices are [out, in]. The first projection, which is not square, tells them apart.
Models with rotary positions have no tensor `wpe.weight`.
"""

import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping

import numpy as np
from flax import nnx

from ..layers import DecoderLM
from . import softplus
from .softplus import SOFTMAX, SoftplusConfig
from .weights import (
  Conversion,
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

EMBEDDING = "wte.weight"
_FIRST = "h.0.attn.c_attn.weight"
# In files, but no weights: the causal mask and what stands for minus infinity in it.
_NO_WEIGHTS = (".attn.bias", ".attn.masked_bias")
_COMPILED = "_orig_mod."
_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
# Fields of config.json that say something else than the model here: what they must be, if there.
_ONLY: dict[str, tuple] = dict(
  model_type=("gpt2",),
  scale_attn_weights=(True,),
  scale_attn_by_inverse_layer_idx=(False,),
  add_cross_attention=(False,),
  tie_word_embeddings=(True,),
)


def import_weights(
  source: str | os.PathLike | Mapping[str, np.ndarray],
  config: SoftplusConfig | str | None = None,
  **overrides,
) -> DecoderLM:
  """A model with weights in GPT-2's layout.

  Args:
    source: a .bin, .pth or .safetensors file, a folder with shards and their index, or a mapping of
      published names to arrays.
    config: a configuration or the name of a preset; None reads `config.json` beside the weights.
    **overrides: fields of the configuration to replace: `variant="softmax_rw_p15"` runs a model
      that was trained with softmax with re-weighting.

  Files are mapped, not loaded: memory is needed for the parameters once (4 bytes each; 2 with
  param_dtype="bfloat16") and for the largest stack of matrices a second time.

  Raises:
    FileNotFoundError: no such file or folder, or a shard is missing.
    ValueError: tensors that are missing, surplus or misshapen (all of them in one message), a
      corrupt file, or a config.json of another model.
  """
  if isinstance(config, str):
    config = find_preset(config, softplus)
  elif config is None:
    config = config_beside(source)
  config = dataclasses.replace(config, **overrides)
  _check_layout(config)
  tensors = _weights_alone(read_tensors(source))
  width = config.features
  transposed = _FIRST in tensors and tensors[_FIRST].shape == (3 * width, width)
  return load_slots(
    lambda: softplus.build(config, nnx.Rngs(0)), _slots(config, transposed), tensors,
    "GPT-2 with this configuration",
  )  # fmt: skip


def export_weights(
  model: DecoderLM,
  config: SoftplusConfig,
  path: str | os.PathLike | None = None,
  dtype: str | None = None,
) -> dict[str, np.ndarray]:
  """The weights in OpenAI's layout; also written to `path` (.safetensors) if given.

  The head is the embedding and is not listed twice. Importing the result gives the same bits back.
  """
  _check_layout(config)
  return write_exported(path, dump_slots(model, _slots(config, transposed=False), dtype))


def config_beside(source: str | os.PathLike | Mapping) -> SoftplusConfig:
  """The configuration that the `config.json` beside a GPT-2 checkpoint describes: softmax."""
  file, raw = read_config_json(source, ("vocab_size", "n_embd", "n_layer", "n_head"))
  check_config_json(file, raw, _ONLY, "GPT-2 has it so")
  activation = activation_in(file, raw, _ACTIVATIONS, "gelu_new", "GPT-2 has gelu_new")
  return SoftplusConfig(
    vocab_size=raw["vocab_size"],
    features=raw["n_embd"],
    num_layers=raw["n_layer"],
    heads=raw["n_head"],
    variant=SOFTMAX,
    hidden=raw.get("n_inner"),
    activation=activation,
    norm_eps=raw.get("layer_norm_epsilon", 1e-5),
    learned_positions=raw.get("n_positions", 1024),
    init_stddev=raw.get("initializer_range", 0.02),
  )


def _check_layout(config: SoftplusConfig) -> None:
  for name, value in (("norm", "layer"), ("use_bias", True)):
    if getattr(config, name) != value:
      raise ValueError(
        f"import_weights: {name} must be {value!r} in GPT-2's layout; got {getattr(config, name)!r}"
        " (it has a scale and a bias for every norm, and a bias for every matrix)"
      )


def _weights_alone(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Without prefixes, masks and the copy of the head."""
  plain = {
    name.removeprefix(_COMPILED).removeprefix("transformer."): tensor
    for name, tensor in tensors.items()
    if not name.endswith(_NO_WEIGHTS)
  }
  return without_head_copy(plain, EMBEDDING)


def _slots(config: SoftplusConfig, transposed: bool) -> Iterator[Slot]:
  c, d, hidden = config, config.features, config.feed_forward_dim
  yield Slot(EMBEDDING, (c.vocab_size, d), ("embedding",), (), _same, _same)
  if c.learned_positions is not None:
    yield Slot("wpe.weight", (c.learned_positions, d), ("positions", "table"), (), _same, _same)
  matrices = (  # sizes [out, in], our variable, conversions of [out, in], shape of our bias
    ("attn.c_attn", (3 * d, d), ("mixer", "heads_in"), into_heads(c.heads, 3), (3, c.heads, -1)),
    ("attn.c_proj", (d, d), ("mixer", "heads_out"), from_heads(c.heads), (d,)),
    ("mlp.c_fc", (hidden, d), ("feed_forward", "fc1"), (np.transpose, np.transpose), (hidden,)),
    ("mlp.c_proj", (d, hidden), ("feed_forward", "fc2"), (np.transpose, np.transpose), (d,)),
  )
  for layer, (at, index) in enumerate(layer_paths([0] * c.num_layers)):

    def slot(published, shape, path, to_ours=_same, to_theirs=_same, layer=layer, at=at, i=index):
      return Slot(f"h.{layer}.{published}", shape, (*at, *path), (i,), to_ours, to_theirs)

    for theirs, ours in (("ln_1", "mixer_norm"), ("ln_2", "feed_forward_norm")):
      yield slot(f"{theirs}.weight", (d,), (ours, "scale"))
      yield slot(f"{theirs}.bias", (d,), (ours, "bias"))
    for name, shape, path, conversions, bias in matrices:
      outputs = shape[0]
      if not transposed:
        shape, conversions = shape[::-1], _of_transposed(*conversions)
      yield slot(f"{name}.weight", shape, (*path, "kernel"), *conversions)
      reshape = functools.partial(np.reshape, shape=bias)
      yield slot(f"{name}.bias", (outputs,), (*path, "bias"), reshape, np.ravel)
  yield Slot("ln_f.weight", (d,), ("final_norm", "scale"), (), _same, _same)
  yield Slot("ln_f.bias", (d,), ("final_norm", "bias"), (), _same, _same)


def _of_transposed(to_ours: Conversion, to_theirs: Conversion) -> tuple[Conversion, Conversion]:
  """Conversions of [in, out] from those of [out, in]."""
  return lambda w: to_ours(w.T), lambda w: to_theirs(w).T


def _same(x: np.ndarray) -> np.ndarray:
  return x
