"""One token mixer with its projections, made ready to be timed."""

import functools
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from attnzoo.layers import (
  AttentionMixer,
  AttentionMixerConfig,
  RatMixer,
  RatMixerConfig,
  RecurrentMixer,
  RecurrentMixerConfig,
)

PASSES = ("train", "prefill", "decode")
TORCH = "torch-attention"  # see `torch_layer`
KNOWN = "attention, rnn, rat-<tokens of a chunk>"


class Sizes(NamedTuple):
  """What all layers of a run share."""

  features: int
  heads: int
  groups: int  # of RAT's queries and keys
  dtype: str  # of activations; parameters are float32
  tokens: int  # of a call of train and prefill, whatever the length
  decode_batch: int  # sequences that are decoded at once


class OutOfMemory(Exception):
  """The device has not enough of it."""


@functools.cache
def make_mixer(name: str, sizes: Sizes) -> nnx.Module:
  """A mixer with random weights, the same one every time.

  Args:
    name: "attention" (softmax over everything, rotary), "rnn", or "rat-16" and the like.
  """
  if not is_layer(name):
    raise ValueError(f"make_mixer: name must be one of {KNOWN}; got {name!r} (--layers)")
  widths = dict(features=sizes.features, heads=sizes.heads, head_dim=sizes.features // sizes.heads)
  options = dict(dtype=jnp.dtype(sizes.dtype), rngs=nnx.Rngs(0))
  if name == "attention":
    return AttentionMixer(AttentionMixerConfig(**widths), **options)
  if name == "rnn":
    return RecurrentMixer(RecurrentMixerConfig(**widths), **options)
  chunk_size = int(name.removeprefix("rat-"))
  config = RatMixerConfig(**widths, groups=sizes.groups, chunk_size=chunk_size)
  return RatMixer(config, **options)


def is_layer(name: str) -> bool:
  return re.fullmatch(r"attention|rnn|rat-[1-9]\d*", name) is not None


def prepare(
  name: str, pass_name: str, length: int, sizes: Sizes, *, calls: int
) -> Callable[[], object]:
  """A function that runs the pass once and waits for it; it has been called once (compiled).

  "train" is forward and backward, with gradients of the input and of all parameters; "prefill" is
  forward, with the state; "decode" is one step of every sequence, the last of `calls` at position
  `length - 1`.

  Raises:
    OutOfMemory: on this device.
  """
  try:
    mixer = make_mixer(name, sizes)
    run = _decode(mixer, length, sizes, calls) if pass_name == "decode" else None
    run = run or _whole(mixer, pass_name, length, sizes)
    run()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower():
      raise OutOfMemory(f"{name}, {pass_name} at {length} tokens") from None
    raise
  return run


def _whole(mixer: nnx.Module, pass_name: str, length: int, sizes: Sizes):
  graph, variables = nnx.split(mixer)
  shape = (sizes.tokens // length, length, sizes.features)
  x = _noise(jax.random.key(1), shape, sizes.dtype)

  def mean(variables, x):
    return jnp.mean(nnx.merge(graph, variables)(x)[0].astype(jnp.float32))

  if pass_name == "train":
    function = jax.jit(jax.grad(mean, argnums=(0, 1)))
  else:
    function = jax.jit(lambda variables, x: nnx.merge(graph, variables)(x))
  return lambda: jax.block_until_ready(function(variables, x))


def _decode(mixer: nnx.Module, length: int, sizes: Sizes, calls: int):
  graph, variables = nnx.split(mixer)
  x = _noise(jax.random.key(1), (sizes.decode_batch, sizes.features), sizes.dtype)
  current = [state_after(mixer, sizes.decode_batch, length, length - calls)]

  @functools.partial(jax.jit, donate_argnums=2)  # the caches are written in place
  def step(variables, x, state):
    return nnx.merge(graph, variables).step(x, state)

  def run():
    y, current[0] = step(variables, x, current[0])
    return jax.block_until_ready(y)

  return run


def state_after(mixer: nnx.Module, batch: int, length: int, tokens: int):
  """A state with room for `length` tokens as it is after some: what is remembered is random.

  All integers in the mixers' states count tokens.
  """

  def filled(path, leaf):
    if jnp.issubdtype(leaf.dtype, jnp.integer):
      return jnp.full(leaf.shape, tokens, leaf.dtype)
    return _noise(jax.random.key(len(jax.tree_util.keystr(path))), leaf.shape, leaf.dtype)

  return jax.tree_util.tree_map_with_path(filled, mixer.init_state(batch, length))


def state_bytes(name: str, length: int, sizes: Sizes) -> int:
  """Of all sequences that are decoded at once."""
  mixer = make_mixer(name, sizes)
  state = jax.eval_shape(lambda: mixer.init_state(sizes.decode_batch, length))
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _noise(key, shape, dtype):
  return 0.02 * jax.random.normal(key, shape, dtype)
