"""The Taylor mixer: against the published module, its variants, and the mixer protocol."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnzoo.layers import TaylorMixer, TaylorMixerConfig, srms_norm
from attnzoo_testing import mixers
from attnzoo_testing.goldens import golden
from attnzoo_testing.mixers import close

# Theirs adds 1e-12 to the denominator, which in float64 shows at the first tokens.
PRECISIONS = [("float32", "", 2e-5, 1e-4), ("float64", "64", 4e-12, 4e-12)]
SMALL = TaylorMixerConfig(12, heads=2, head_dim=5, feature_dim=4, init_stddev=0.5, chunk_size=4)


def from_golden(g, prefix="param/", heads=4):
  """Our parameters from the published names."""
  w = {name: g[f"{prefix}{name}.weight"] for name in ("proj_q", "proj_k", "proj_v", "out_proj")}
  features = w["proj_q"].shape[1]
  query, key, value = (w[f"proj_{n}"].T.reshape(features, heads, -1) for n in "qkv")
  return dict(
    query_key_heads_in__kernel=np.stack([query, key]),
    value_heads_in__kernel=value[None],
    heads_out__kernel=w["out_proj"].T.reshape(heads, -1, features),
  )


def packed_state(g, when):
  """The published states, which have all F^2 products and their factors, as ours has them."""
  full = np.concatenate(
    [g[f"out/{when}/0/kv_state"][:, :, 0], g[f"out/{when}/0/k_state"][:, :, 0]], axis=2
  )  # [B, H, V + 1, 1 + F + F^2]
  dim = 16
  first, second = np.triu_indices(dim)
  parts = [
    full[..., :1],
    full[..., 1 : dim + 1] * dim**0.25,
    full[..., 1 + dim + dim * first + second] * (2 * dim) ** 0.5,
  ]
  return np.moveaxis(np.concatenate(parts, -1), -1, -2)


@pytest.mark.parametrize(("dtype", "suffix", "forward", "backward"), PRECISIONS)
def test_published_module(dtype, suffix, forward, backward):
  g = golden("based_linear_attention")
  with jax.enable_x64(dtype == "float64"):
    x, dy = (jnp.asarray(g[f"in/{name}"], dtype) for name in ("x", "cotangent"))
    config = TaylorMixerConfig(64, heads=4, head_dim=16, chunk_size=8)
    mixer = TaylorMixer(config, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
    mixers.set_params(mixer, **from_golden(g))
    y, dx, grads = mixers.value_and_grads(mixer, x, dy)
    close(y, g[f"out{suffix}/y"], forward)
    close(dx, g[f"grad{suffix}_in/x"], backward)
    for name, expected in from_golden(g, f"grad{suffix}/").items():
      close(grads[name], expected, backward)
    if dtype == "float32":
      return  # float32 steps are compared with the whole by the protocol below
    prompt, state = mixers.run(mixer, x[:, :20])
    close(state.memory, packed_state(g, "state_after_prefill"), 2e-5)
    outputs, step = [prompt], jax.jit(mixer.step)
    for t in range(20, x.shape[1]):
      y, state = step(x[:, t], state)
      outputs.append(y[:, None])
    close(jnp.concatenate(outputs, 1), g[f"out{suffix}/y_recurrent"], forward)
    close(state.memory, packed_state(g, "state_final"), 2e-5)


def test_rms_variant_normalises_the_published_numerator():
  g = golden("based_linear_attention")
  config = TaylorMixerConfig(64, heads=4, head_dim=16, output_norm="rms")
  mixer = TaylorMixer(config, rngs=nnx.Rngs(0))
  scale = np.linspace(0.5, 2, 16, dtype=np.float32)
  params = from_golden(g)
  mixers.set_params(mixer, norm__scale=scale, **params)
  numerator = jnp.moveaxis(g["out/tk_o"], 1, 2)  # of a kernel that does not divide, [B, T, H, V]
  normed = srms_norm(numerator, 1e-5) * scale
  expected = jnp.einsum("bthv,hvd->btd", normed, params["heads_out__kernel"])
  close(mixers.run(mixer, jnp.asarray(g["in/x"]))[0], expected, 2e-5)


def test_decay_is_in_the_numerator_alone():
  config = dataclasses.replace(SMALL, decay_offset=-3.0)
  mixer = TaylorMixer(config, rngs=nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(0), (1, 9, 12))
  query, key, value = (np.asarray(part, np.float64) for part in jax.jit(mixer._project)(x))
  scores = np.einsum("bihf,bjhf->bhij", query, key) / 2  # sqrt(F)
  weights = np.tril(1 + scores + scores**2 / 2)
  distance = np.arange(9)[:, None] - np.arange(9)
  rates = np.array([1 - 2.0**-3, 1 - 2.0**-4])[:, None, None]
  faded = weights * np.tril(rates ** np.maximum(distance, 0))
  output = (
    np.einsum("bhij,bjhv->bihv", faded, value) / weights.sum(-1).transpose(0, 2, 1)[..., None]
  )
  expected = np.einsum("bihv,hvd->bid", output, mixer.heads_out.kernel[...])
  close(mixers.run(mixer, x)[0], expected)


@pytest.mark.parametrize("variant", ["plain", "rms-decay"])
def test_mixer_protocol(variant):
  options = dict(output_norm="rms", decay_offset=-1.0) if variant == "rms-decay" else {}
  mixer = TaylorMixer(dataclasses.replace(SMALL, **options), rngs=nnx.Rngs(0))
  mixers.check_protocol(mixer, jax.random.normal(jax.random.key(1), (3, 7, 12)), [1, 3, 4])


def test_over_devices():
  mixer = TaylorMixer(dataclasses.replace(SMALL, decay_offset=-1.0), rngs=nnx.Rngs(0))
  mixers.check_sharded(mixer, jax.random.normal(jax.random.key(1), (4, 12, 12)), 2, 2, 2)


def test_state_is_float32_whatever_the_activations():
  mixer = TaylorMixer(SMALL, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
  y, state = mixer(jnp.ones((1, 3, 12)))
  assert (y.dtype, state.memory.dtype) == (jnp.bfloat16, jnp.float32)
  assert jax.tree.map(jnp.shape, mixer.init_state(1)) == jax.tree.map(jnp.shape, state)


def test_bad_configurations_are_refused():
  with pytest.raises(ValueError, match="output_norm must be one of.*got 'layer'"):
    dataclasses.replace(SMALL, output_norm="layer")
  with pytest.raises(ValueError, match="decay_offset must be negative; got 0"):
    dataclasses.replace(SMALL, decay_offset=0.0)
