"""Softmax attention as a mixer: against the published module, its variants, and the protocol."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnzoo.layers import AttentionMixer, AttentionMixerConfig, rotary
from attnzoo_testing import mixers
from attnzoo_testing.goldens import golden
from attnzoo_testing.mixers import close

PRECISIONS = [("float32", "", 2e-5, 1e-4), ("float64", "64", 1e-13, 1e-13)]
SMALL = AttentionMixerConfig(12, heads=4, head_dim=6, window_size=3, window_convention="left",
                             init_stddev=0.5)  # fmt: skip
VARIANTS = {
  "window": SMALL,
  "full": dataclasses.replace(SMALL, window_size=None, rotary_fraction=0.5),
  "grouped": dataclasses.replace(SMALL, key_heads=2, qkv_bias=True, out_bias=True),
}


def from_golden(g, prefix="param/", heads=4):
  qkv, out = g[f"{prefix}Wqkv.weight"], g[f"{prefix}out_proj.weight"]
  features = qkv.shape[1]
  return dict(
    heads_in__kernel=qkv.reshape(3, heads, -1, features).transpose(0, 3, 1, 2),
    heads_out__kernel=out.T.reshape(heads, -1, features),
  )


@pytest.mark.parametrize(("dtype", "suffix", "forward", "backward"), PRECISIONS)
def test_published_sliding_module(dtype, suffix, forward, backward):
  g = golden("based_sliding_attention")
  with jax.enable_x64(dtype == "float64"):
    x, dy = (jnp.asarray(g[f"in/{name}"], dtype) for name in ("x", "cotangent"))
    config = AttentionMixerConfig(64, heads=4, head_dim=16, window_size=16)
    mixer = AttentionMixer(config, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
    mixers.set_params(mixer, **from_golden(g))
    y, dx, grads = mixers.value_and_grads(mixer, x, dy)
    close(y, g[f"out{suffix}/y"], forward)
    close(dx, g[f"grad{suffix}_in/x"], backward)
    for name, expected in from_golden(g, f"grad{suffix}/").items():
      close(grads[name], expected, backward)
    if dtype == "float32":
      return  # float32 steps are compared with the whole by the protocol below
    prompt, state = mixers.run(mixer, x[:, :25])
    outputs, step = [prompt], jax.jit(mixer.step)
    assert_window(state.memory, g["out/state_after_prefill/0"])
    for t in range(25, x.shape[1]):
      y, state = step(x[:, t], state)
      outputs.append(y[:, None])
    close(jnp.concatenate(outputs, 1), g[f"out{suffix}/y_recurrent"], forward)
    assert_window(state.memory, g["out/state_final/0"])


def assert_window(memory, cache):
  """The ring buffer holds the last keys and values of a published cache [B, T, 2, H, K]."""
  left, length = memory.key.shape[1], cache.shape[1]
  numbers = np.arange(length - left, length)
  close(memory.key[:, numbers % left], cache[:, numbers, 0])
  close(memory.value[:, numbers % left], cache[:, numbers, 1])
  np.testing.assert_array_equal(memory.count, length)


def test_rotary_angles_are_the_published_ones():
  g = golden("based_sliding_attention")
  length, pairs = g["out/rotary_cos"].shape
  x = jnp.ones((1, length, 1, 2 * pairs)).at[..., pairs:].set(0)
  turned = rotary(x, jnp.arange(length)[None])[0, :, 0]
  close(turned[:, :pairs], g["out64/rotary_cos"], 2e-6)
  close(turned[:, pairs:], g["out64/rotary_sin"], 2e-6)


def test_odd_rotary_width_turns_one_channel_more():
  """Half of 14 channels: 4 pairs, with exponents over 7; the last 6 channels stay."""
  x = np.random.default_rng(0).standard_normal((1, 5, 2, 14))
  angle = np.arange(5)[:, None, None] * 10000.0 ** (-2 * np.arange(4) / 7)
  first, second = x[..., :4], x[..., 4:8]
  expected = np.concatenate(
    [
      first * np.cos(angle) - second * np.sin(angle),
      second * np.cos(angle) + first * np.sin(angle),
      x[..., 8:],
    ],
    axis=-1,
  )
  close(rotary(jnp.asarray(x, jnp.float32), jnp.arange(5)[None], fraction=0.5), expected, 1e-6)


def test_rotary_angles_stay_exact_in_bfloat16():
  """The scores of far tokens depend on their distance alone, though 2047 is no bfloat16."""
  x = jnp.ones((1, 2, 1, 8), jnp.bfloat16)
  near, far = (rotary(x, jnp.asarray([p])).astype(jnp.float32) for p in ([0, 7], [2040, 2047]))
  scores = [jnp.sum(y[0, 0] * y[0, 1]) for y in (near, far)]
  assert abs(scores[0] - scores[1]) < 0.05


@pytest.mark.parametrize("name", VARIANTS)
def test_mixer_protocol(name):
  mixer = AttentionMixer(VARIANTS[name], rngs=nnx.Rngs(0))
  mixers.check_protocol(mixer, inputs(rows=3, length=7), [1, 3, 4])


@pytest.mark.parametrize("name", ["window", "full"])
def test_over_devices(name):
  mixer = AttentionMixer(VARIANTS[name], rngs=nnx.Rngs(0))
  mixers.check_sharded(mixer, inputs(rows=4, length=12), 2, 2, 2)


def inputs(rows, length):
  return jax.random.normal(jax.random.key(1), (rows, length, 12))


@pytest.mark.parametrize(
  ("size", "convention", "reach"), [(7, "half", 3), (3, "left", 3), (4, "total", 3)]
)
def test_what_the_window_counts(size, convention, reach):
  config = dataclasses.replace(SMALL, window_size=size, window_convention=convention)
  mixer = AttentionMixer(config, rngs=nnx.Rngs(0))
  x = inputs(1, 8)
  changed = x.at[:, 1].add(1)
  y, _ = mixers.run(mixer, jnp.concatenate([x, changed]))
  moved = np.abs(np.asarray(y[0] - y[1])).max(-1) > 1e-6
  np.testing.assert_array_equal(moved, (np.arange(8) >= 1) & (np.arange(8) <= 1 + reach))


def test_grouped_heads_share_keys_and_values():
  grouped = AttentionMixer(dataclasses.replace(SMALL, key_heads=2), rngs=nnx.Rngs(0))
  plain = AttentionMixer(SMALL, rngs=nnx.Rngs(1))
  shared = jnp.repeat(grouped.key_value_heads_in.kernel[...], 2, axis=2)
  mixers.set_params(
    plain,
    heads_in__kernel=jnp.concatenate([grouped.query_heads_in.kernel[...], shared]),
    heads_out__kernel=grouped.heads_out.kernel[...],
  )
  x = inputs(2, 9)
  close(mixers.run(grouped, x)[0], mixers.run(plain, x)[0])


def test_given_positions_are_used_and_counted_on():
  mixer = AttentionMixer(SMALL, rngs=nnx.Rngs(0))
  x = inputs(2, 6)
  whole, _ = mixers.run(mixer, x)
  there = jnp.broadcast_to(100 + jnp.arange(5), (2, 5))
  y, state = mixers.run(mixer, x[:, :5], positions=there)
  np.testing.assert_array_equal(state.position, 105)
  close(y, whole[:, :5], 1e-4)  # distances are what they were
  close(jax.jit(mixer.step)(x[:, 5], state)[0], whole[:, 5], 1e-4)
  apart, _ = mixers.run(mixer, x[:, :5], positions=3 * there)
  assert np.abs(np.asarray(apart - y)).max() > 1e-2


def test_bad_configurations_are_refused():
  with pytest.raises(ValueError, match="key_heads must divide the 4 heads; got 3"):
    dataclasses.replace(SMALL, key_heads=3)
  with pytest.raises(ValueError, match="convention must be one of"):
    dataclasses.replace(SMALL, window_convention="both")
  with pytest.raises(ValueError, match="rotary: fraction must lie in .*got 1.5 of 6"):
    dataclasses.replace(SMALL, rotary_fraction=1.5)
  with pytest.raises(ValueError, match="rotary: fraction must lie in .*got 1.0 of 7"):
    dataclasses.replace(SMALL, head_dim=7)
  with pytest.raises(ValueError, match="max_length must be given for attention without a window"):
    AttentionMixer(VARIANTS["full"], rngs=nnx.Rngs(0)).init_state(1)
