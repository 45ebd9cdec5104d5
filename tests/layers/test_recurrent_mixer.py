"""The recurrent baseline of RAT, and its other layers, against the published modules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnzoo.layers import (
  AttentionMixer,
  AttentionMixerConfig,
  FeedForward,
  RatMixer,
  RatMixerConfig,
  RecurrentMixer,
  RecurrentMixerConfig,
)
from attnzoo_testing import mixers, rat_layers
from attnzoo_testing.goldens import golden
from attnzoo_testing.mixers import close

SMALL = RecurrentMixerConfig(12, heads=4, head_dim=3, train_length=5, init_stddev=0.5)
# Class, configuration, parameters and tokens of the prompt of the golden modules.
PUBLISHED = {
  "rnn": (RecurrentMixer, RecurrentMixerConfig(32, heads=4, head_dim=8), None),
  "local": (
    AttentionMixer,
    AttentionMixerConfig(32, heads=2, head_dim=16, window_size=6, window_convention="left"),
    11,
  ),
  "attn": (AttentionMixer, AttentionMixerConfig(32, heads=4, head_dim=8), None),
}


def load(name):
  module, config, prompt = PUBLISHED[name]
  params = rat_layers.gated_params if name == "rnn" else rat_layers.attention_params
  g = rat_layers.module_of(golden("rat_layer_b"), name)

  def make(dtype="float32"):
    return module(config, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))

  return make, g, functools.partial(params, heads=config.heads), prompt


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_module(name):
  make, g, params, _ = load(name)
  rat_layers.check_layer(make, g, params)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_steps(name):
  make, g, params, prompt = load(name)
  rat_layers.check_steps(make(), g, params, prompt)


class TwoMatrices(nnx.Module):
  """A feed-forward with the calls of a mixer, as far as `check_layer` needs them."""

  def __init__(self, dtype):
    init = nnx.initializers.normal(0.02)
    options = dict(init=init, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
    self.feed_forward = FeedForward(32, 128, **options)

  def __call__(self, x):
    return self.feed_forward(x), None


def test_published_feed_forward():
  """Its gelu is the exact one: the approximation by tanh would be off by 1e-4."""

  def params(g, prefix):
    return dict(
      norm__scale=g[f"{prefix}ln.weight"],
      mixer__feed_forward__fc1__kernel=g[f"{prefix}fc1.weight"].T,
      mixer__feed_forward__fc2__kernel=g[f"{prefix}fc2.weight"].T,
    )

  g = rat_layers.module_of(golden("rat_layer_b"), "ffn")
  rat_layers.check_layer(TwoMatrices, g, params)


def inputs(rows, length):
  return jax.random.normal(jax.random.key(1), (rows, length, 12))


def test_mixer_protocol():
  mixer = RecurrentMixer(SMALL, rngs=nnx.Rngs(0))
  mixers.check_protocol(mixer, inputs(rows=3, length=7), [1, 3, 4])


def test_over_devices():
  mixers.check_sharded(RecurrentMixer(SMALL, rngs=nnx.Rngs(0)), inputs(4, 12), 2, 2, 2)


def test_is_rat_with_one_chunk():
  """The softmax over nothing but the running chunk is 1, whatever queries and keys are."""
  rat = RatMixer(RatMixerConfig(12, heads=4, head_dim=6, chunk_size=9), rngs=nnx.Rngs(0))
  recurrent = RecurrentMixer(RecurrentMixerConfig(12, heads=4, head_dim=6), rngs=nnx.Rngs(1))
  mixers.set_params(
    recurrent,
    gated_heads_in__kernel=rat.gated_heads_in.kernel[...],
    gate_bias=rat.gate_bias[...],
    heads_out__kernel=rat.heads_out.kernel[...],
  )
  x = inputs(2, 9)
  close(mixers.run(recurrent, x)[0], mixers.run(rat, x)[0])


def test_state_is_float32_and_padding_gives_nothing():
  mixer = RecurrentMixer(SMALL, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
  y, state = mixers.run(mixer, jnp.ones((1, 3, 12)), lengths=jnp.asarray([2]))
  assert (y.dtype, state.running_value.dtype) == (jnp.bfloat16, jnp.float32)
  np.testing.assert_array_equal(y[0, 2], 0)
  assert jax.tree.map(jnp.shape, mixer.init_state(1)) == jax.tree.map(jnp.shape, state)


def test_initial_gates_reach_over_the_training_length():
  bias = np.exp(RecurrentMixer(RecurrentMixerConfig(256, 4, 64), rngs=nnx.Rngs(0)).gate_bias[...])
  assert bias.min() >= 1
  assert 3500 < bias.max() <= 4095
  with pytest.raises(ValueError, match="RecurrentMixerConfig: train_length must be at least 1"):
    RecurrentMixerConfig(12, 4, 3, train_length=0)
