"""Softplus attention in the attention mixer: against the golden layer, and the protocol."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from attnzoo.layers import AttentionMixer, AttentionMixerConfig
from attnzoo.pallas_kernels import VARIANTS
from attnzoo_testing import mixers
from attnzoo_testing.goldens import golden
from attnzoo_testing.mixers import close

BASE = AttentionMixerConfig(32, heads=4, head_dim=8, qkv_bias=True, out_bias=True)


def from_golden(g, prefix="in/", suffix=""):
  qkv, bias, out = (g[f"{prefix}{name}{suffix}"] for name in ("wqkv", "bqkv", "wo"))
  return dict(
    heads_in__kernel=qkv.reshape(32, 3, 4, 8).transpose(1, 0, 2, 3),
    heads_in__bias=bias.reshape(3, 4, 8),
    heads_out__kernel=out.reshape(4, 8, 32),
    heads_out__bias=g[f"{prefix}bo{suffix}"],
  )


@pytest.mark.parametrize("name", ["lssa", "lssar_p3", "lssar_p15"])
def test_published_layer(name):
  """Rotary positions, biases, softplus attention; float64."""
  g = golden("softplus_block")
  with jax.enable_x64(True):
    # Rows in which no key stands out are recognised as in the golden file.
    variant = dataclasses.replace(VARIANTS[name], flat_tolerance=1e-12)
    config = dataclasses.replace(BASE, variant=variant)
    mixer = AttentionMixer(config, dtype="float64", param_dtype="float64", rngs=nnx.Rngs(0))
    mixers.set_params(mixer, **from_golden(g))
    x, dy = (jnp.asarray(g[f"in/{n}"], jnp.float64) for n in ("x", "do"))
    y, dx, grads = mixers.value_and_grads(mixer, x, dy)
    close(y, g[f"out/y.{name}"], 1e-11)
    close(dx, g[f"grad/x.{name}"], 1e-10)
    for parameter, expected in from_golden(g, "grad/", f".{name}").items():
      close(grads[parameter], expected, 1e-10)


@pytest.mark.slow
def test_protocol():
  config = dataclasses.replace(BASE, variant=VARIANTS["lssa"], key_heads=2, init_stddev=0.5)
  mixer = AttentionMixer(config, rngs=nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(0), (2, 9, 32))
  mixers.check_protocol(mixer, x, cuts=(4, 7))


def test_a_window_is_refused():
  with pytest.raises(ValueError, match="window_size must be None with a variant; got 4"):
    dataclasses.replace(BASE, variant=VARIANTS["lssa"], window_size=4)
