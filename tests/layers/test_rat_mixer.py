"""The RAT mixer: against the published module, its variants, and the mixer protocol."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnzoo.layers import RatMixer, RatMixerConfig
from attnzoo.layers.partitioning import parameter_spec
from attnzoo.layers.rat_mixer import initial_gate_bias
from attnzoo_testing import mixers, rat_layers
from attnzoo_testing.goldens import golden
from attnzoo_testing.mixers import close

SMALL = RatMixerConfig(12, heads=4, head_dim=6, chunk_size=3, init_stddev=0.5)
# Configurations of the golden modules, and tokens of their prompts.
PUBLISHED = {
  "a": (RatMixerConfig(64, heads=4, head_dim=16, chunk_size=4), 14),
  "b": (RatMixerConfig(64, heads=8, head_dim=8), 41),
}


def load(name):
  g = golden(f"rat_layer_{name}")
  g = g if name == "a" else rat_layers.module_of(g, "rat")
  config, prompt = PUBLISHED[name]
  params = functools.partial(rat_layers.gated_params, heads=config.heads, groups=config.groups)
  return config, prompt, g, params


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_module(name):
  config, _, g, params = load(name)

  def make(dtype):
    return RatMixer(config, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))

  rat_layers.check_layer(make, g, params)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_steps(name):
  """From the empty state, whose first chunk theirs cannot decode, and after part of a chunk."""
  config, prompt, g, params = load(name)
  states = rat_layers.check_steps(RatMixer(config, rngs=nnx.Rngs(0)), g, params, prompt)
  for state, when in zip(states, ("step", "prefill"), strict=True):
    cache = {part: g[f"out/{when}_cache_{part}"] for part in ("k", "v", "last_k", "last_v")}
    chunks = cache["k"].shape[2]
    for ours, theirs in ((state.key, "k"), (state.value, "v")):
      close(ours[:, :chunks], np.moveaxis(cache[theirs], 1, 2), 3e-6)
    for ours, theirs in ((state.running_key, "last_k"), (state.running_value, "last_v")):
      close(ours, cache[theirs].reshape(ours.shape), 3e-6)
    np.testing.assert_array_equal(state.key[:, chunks:], 0)


def test_mixer_protocol():
  mixer = RatMixer(SMALL, rngs=nnx.Rngs(0))
  mixers.check_protocol(mixer, inputs(rows=3, length=7), [1, 3, 4])


def test_over_devices():
  """A device has one head, and needs but one of the two groups that it holds."""
  mixer = RatMixer(SMALL, rngs=nnx.Rngs(0))
  # The loss is a sum that is small beside its terms.
  mixers.check_sharded(mixer, inputs(rows=4, length=12), 1, 2, 4, relative=2e-5)


def inputs(rows, length):
  return jax.random.normal(jax.random.key(1), (rows, length, 12))


def test_groups_are_on_every_device_and_heads_are_split():
  mixer, mesh = RatMixer(SMALL, rngs=nnx.Rngs(0)), mixers.mesh_of(2, 1, 2)
  specs = {
    path: tuple(parameter_spec(variable, mesh))
    for path, variable in nnx.to_flat_state(nnx.state(mixer, nnx.Param))
  }
  assert specs == {
    ("gated_heads_in", "kernel"): (None, "data", "model", None),
    ("query_key_heads_in", "kernel"): (None, "data", None, None),
    ("gate_bias",): ("model", None),
    ("heads_out", "kernel"): ("model", None, "data"),
  }


def test_without_rotation_the_order_of_far_chunks_does_not_matter():
  config = dataclasses.replace(SMALL, rotary_base=None)
  x = inputs(rows=1, length=9)
  swapped = jnp.concatenate([x[:, 3:6], x[:, :3], x[:, 6:]], 1)
  y, _ = mixers.run(RatMixer(config, rngs=nnx.Rngs(0)), jnp.concatenate([x, swapped]))
  close(y[1, 6:], y[0, 6:])


def test_initial_gates():
  """log(u) with u uniform in [1, L - 1]; the two cases without such an interval."""
  draw = np.exp(initial_gate_bias(jax.random.key(0), (64, 64), 16))
  assert draw.min() >= 1
  assert draw.max() <= 15
  np.testing.assert_allclose([draw.mean(), draw.std()], [8, 14 / 12**0.5], rtol=0.03)
  np.testing.assert_array_equal(initial_gate_bias(jax.random.key(0), (3,), 2), 0)
  np.testing.assert_array_equal(initial_gate_bias(jax.random.key(0), (3,), 1), -8)


def test_state_has_a_slot_for_every_chunk():
  mixer = RatMixer(SMALL, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
  assert [mixer.init_state(2, length).key.shape[1] for length in (1, 3, 4, 12)] == [1, 1, 2, 4]
  x, empty = jnp.ones((1, 3, 12)), mixer.init_state(1, 6)
  y, state = jax.eval_shape(lambda: mixer(x, state=empty))
  assert (y.dtype, state.key.dtype, state.running_key.dtype) == (
    jnp.bfloat16, jnp.bfloat16, jnp.float32,
  )  # fmt: skip
  with pytest.raises(ValueError, match="RatMixer: max_length must be given; got None"):
    mixer.init_state(1)


def test_bad_configurations_are_refused():
  for change, message in (
    (dict(groups=3), "groups must divide the 4 heads; got 3"),
    (dict(groups=0), "groups must divide the 4 heads; got 0"),
    (dict(chunk_size=0), "chunk_size must be at least 1; got 0"),
    (dict(head_dim=5), "head_dim must be even for rotary positions; got 5"),
  ):
    with pytest.raises(ValueError, match=f"RatMixerConfig: {message}"):
      dataclasses.replace(SMALL, **change)
