"""Gated short convolutions: against the published module, and the mixer protocol."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnzoo.layers import BaseConv, BaseConvConfig, ProjectedConv
from attnzoo.layers.base_conv import short_convolution
from attnzoo_testing import mixers
from attnzoo_testing.goldens import golden
from attnzoo_testing.mixers import close

PRECISIONS = [("float32", "", 2e-5, 1e-4), ("float64", "64", 1e-13, 1e-13)]


def from_golden(g, prefix="param/"):
  """Our parameters from the published names."""
  w, bias = g[f"{prefix}in_proj.weight"], g[f"{prefix}in_proj.bias"]
  width = len(bias) // 2
  return dict(
    conv_in__kernel=w[:width].T,
    conv_in__bias=bias[:width],
    gate_in__kernel=w[width:].T,
    gate_in__bias=bias[width:],
    taps=g[f"{prefix}conv.conv.weight"][:, 0].T,
    out__kernel=g[f"{prefix}out_proj.weight"].T,
    out__bias=g[f"{prefix}out_proj.bias"],
  )


def published(g, dtype):
  mixer = BaseConv(BaseConvConfig(32), dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
  mixers.set_params(mixer, **from_golden(g))
  return mixer


@pytest.mark.parametrize(("dtype", "suffix", "forward", "backward"), PRECISIONS)
def test_published_module(dtype, suffix, forward, backward):
  g = golden("based_baseconv")
  with jax.enable_x64(dtype == "float64"):
    x, dy = (jnp.asarray(g[f"in/{name}"], dtype) for name in ("x", "cotangent"))
    mixer = published(g, dtype)
    y, dx, grads = mixers.value_and_grads(mixer, x, dy)
    close(y, g[f"out{suffix}/y"], forward)
    close(dx, g[f"grad{suffix}_in/x"], backward)
    for name, expected in from_golden(g, f"grad{suffix}/").items():
      close(grads[name], expected, backward)
    if dtype == "float32":
      return  # float32 steps are compared with the whole by the protocol below
    prompt, state = mixers.run(mixer, x[:, :9])
    outputs, step = [prompt], jax.jit(mixer.step)
    # Theirs also keeps an input that no later token needs.
    close(state, np.moveaxis(g["out/state_after_prefill/0/conv"], 1, 2)[:, 1:])
    for t in range(9, x.shape[1]):
      y, state = step(x[:, t], state)
      outputs.append(y[:, None])
    close(jnp.concatenate(outputs, 1), g[f"out{suffix}/y_recurrent"], forward)
    close(state, np.moveaxis(g["out/state_final/0/conv"], 1, 2)[:, 1:])


def random_mixers(taps=3):
  config = BaseConvConfig(8, kernel_size=taps, init_stddev=0.5)
  conv = BaseConv(config, rngs=nnx.Rngs(0))
  plain = ProjectedConv(8, kernel_size=taps, init_stddev=0.5, rngs=nnx.Rngs(1))
  return dict(base=conv, projected=plain)


def inputs(rows=2, length=7, seed=1):
  return jax.random.normal(jax.random.key(seed), (rows, length, 8))


@pytest.mark.parametrize(("name", "taps"), [("base", 4), ("projected", 3), ("projected", 1)])
def test_mixer_protocol(name, taps):
  mixers.check_protocol(random_mixers(taps)[name], inputs(rows=3), [1, 3, 4])


@pytest.mark.parametrize("name", ["base", "projected"])
def test_over_devices(name):
  mixers.check_sharded(random_mixers()[name], inputs(rows=4, length=12), 2, 2, 2)


def test_bfloat16_adds_up_in_float32():
  x = jnp.full((1, 2, 1), 1.0, jnp.bfloat16)
  taps = jnp.asarray([[256.0], [1.0], [1.0]])
  state = jnp.ones((1, 2, 1), jnp.bfloat16)
  y, _ = short_convolution(x, taps, state=state)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_array_equal(np.asarray(y, np.float32), 258)  # 256 + 1 is 256 in bfloat16


def test_initial_taps_are_uniform():
  taps = np.asarray(BaseConv(BaseConvConfig(512), rngs=nnx.Rngs(0)).taps[...])
  assert np.abs(taps).max() < 3**-0.5
  np.testing.assert_allclose(taps.std(), 1 / 3, rtol=0.03)


def test_bad_configurations_are_refused():
  with pytest.raises(ValueError, match="kernel_size must be at least 1; got 0"):
    BaseConvConfig(8, kernel_size=0)
  with pytest.raises(ValueError, match="expand must make an even width; got 1 with 7"):
    BaseConvConfig(7, expand=1)
