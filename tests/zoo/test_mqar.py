"""The recall models against the published one, and the bytes of their states."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnzoo import zoo
from attnzoo.zoo import mqar
from attnzoo.zoo.mqar import MQARConfig
from attnzoo_testing import mixers
from attnzoo_testing.goldens import golden
from attnzoo_testing.mixers import close

pytestmark = pytest.mark.slow

SMALL = MQARConfig(16, feature_dim=8, vocab_size=64)


def from_golden(g, prefix="param/backbone."):
  """Our parameters from the published names; one layer per group."""
  named = {k.removeprefix(prefix): v for k, v in g.items() if k.startswith(prefix)}
  conv, taylor = (f"layers.{layer}.sequence_mixer.mixer" for layer in (0, 1))
  query, key, value, out = (named[f"{taylor}.proj_{name}.weight"] for name in "qkvo")
  params = {
    "embedding": named["embeddings.word_embeddings.weight"],
    "groups__0__0__mixer__gate_in__kernel": named[f"{conv}.projection.weight"].T[None],
    "groups__0__0__mixer__gate_in__bias": named[f"{conv}.projection.bias"][None],
    "groups__0__0__mixer__taps": named[f"{conv}.conv.conv.weight"][:, 0].T[None],
    "groups__0__0__mixer__bias": named[f"{conv}.conv.conv.bias"][None],
    "groups__0__1__mixer__query_key_heads_in__kernel": np.stack([query.T, key.T])[None, :, :, None],
    "groups__0__1__mixer__value_heads_in__kernel": value.T[None, None, :, None],
    "groups__0__1__mixer__heads_out__kernel": out.T[None, None],
    "final_norm__scale": named["ln_f.weight"],
    "final_norm__bias": named["ln_f.bias"],
  }
  for layer in (0, 1):
    for theirs, ours in (("norm1", "mixer_norm"), ("norm2", "feed_forward_norm")):
      for kind, name in (("weight", "scale"), ("bias", "bias")):
        value = named[f"layers.{layer}.{theirs}.{kind}"]
        params[f"groups__0__{layer}__{ours}__{name}"] = value[None]
  return params


@pytest.mark.parametrize(
  ("dtype", "suffix", "tolerance"), [("float32", "", 2e-5), ("float64", "64", 1e-11)]
)
def test_published_model(dtype, suffix, tolerance):
  g = golden("based_zoology_mqar_model")
  with jax.enable_x64(dtype == "float64"):
    config = dataclasses.replace(SMALL, dtype=dtype, param_dtype=dtype)
    model = nnx.eval_shape(lambda: zoo.build(config, nnx.Rngs(0)))
    mixers.set_params(model, **from_golden(g))
    ids, labels = (jnp.asarray(g[f"in/{name}"]) for name in ("input_ids", "labels"))
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params):
      model = nnx.merge(graph, params, rest)
      sums = model.loss(ids, labels, (labels >= 0).astype(jnp.float32))
      return sums.loss / sums.weight, model(ids)[0]

    (value, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    close(logits, g[f"out{suffix}/logits"], tolerance)
    np.testing.assert_allclose(value, g[f"out{suffix}/loss"], rtol=2e-6)
    got = {"__".join(map(str, p)): v.get_value() for p, v in nnx.to_flat_state(grads)}
    for name, expected in from_golden(g, "grad/backbone.").items():
      close(got[name], expected, 1e-4 if dtype == "float32" else 2e-6)


@pytest.mark.parametrize("kinds", [("conv", "attention"), ("sliding", "taylor")], ids="-".join)
def test_steps_are_the_whole(kinds):
  config = dataclasses.replace(SMALL, mixers=kinds, window=3, init_stddev=0.5)
  model = zoo.build(config, nnx.Rngs(0))
  tokens = jax.random.randint(jax.random.key(0), (2, 8), 0, 64)
  whole, _ = model(tokens)
  state, step = model.init_state(2, 8), jax.jit(model.step)
  for t in range(8):
    logits, state = step(tokens[:, t], state)
    close(logits, whole[:, t], 2e-5)


def test_state_bytes_are_the_published_ones():
  published = {
    (32, 8): 5_940, (64, 8): 11_700, (128, 8): 23_220, (64, 16): 39_780, (256, 8): 46_260,
    (128, 16): 78_948, (64, 24): 84_500, (512, 8): 92_340, (256, 16): 157_284, (512, 16): 313_956,
    (512, 24): 666_900,
  }  # fmt: skip
  for (features, dim), count in published.items():
    config = zoo.get_config(f"mqar-based-{features}-{dim}")
    assert mqar.state_bytes(config, 512) == count
  assert mqar.state_bytes(SMALL, 32, with_conv=True) == 3252  # what the published code reports
  assert mqar.state_bytes(zoo.get_config("mqar-sliding-64"), 512) == 4 * 2 * 128 * 64
  # Full attention reaches the paper's 512 KiB and 2 MiB at lengths of 512 and 2048.
  attention = zoo.get_config("mqar-attention-128")
  assert [mqar.state_bytes(attention, n) >> 10 for n in (512, 2048)] == [512, 2048]


def test_state_bytes_are_those_of_the_state():
  for name in ("mqar-based-64-16", "mqar-sliding-16", "mqar-attention-64"):
    config = zoo.get_config(name)
    states = jax.eval_shape(lambda c=config: zoo.build(c, nnx.Rngs(0)).init_state(1, 32))
    mixer = states.groups[0][1]  # a convolution and a mixer take turns
    floats = [leaf for leaf in jax.tree.leaves(mixer) if leaf.dtype == jnp.float32]
    assert sum(4 * leaf.size for leaf in floats) == mqar.state_bytes(config, 32)


def test_bad_configurations_are_refused():
  with pytest.raises(ValueError, match="mixers must be one or more of.*got .'conv', 'mamba'."):
    dataclasses.replace(SMALL, mixers=("conv", "mamba"))
  with pytest.raises(ValueError, match=r"features must be a multiple of heads \(3\); got 16"):
    dataclasses.replace(SMALL, heads=3)
  with pytest.raises(ValueError, match="window must be at least 0; got -1"):
    dataclasses.replace(SMALL, window=-1)
