"""The GPT-2 with softplus attention: golden logits and gradients, decoding, configurations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnzoo import zoo
from attnzoo.zoo import softplus
from attnzoo.zoo.softplus import SoftplusConfig
from attnzoo_testing import mixers
from attnzoo_testing.goldens import golden
from attnzoo_testing.mixers import close

GOLDEN = SoftplusConfig(37, 32, 2, 2, dtype="float64", param_dtype="float64")


def from_golden(g, prefix="in/", suffix=""):
  """Published arrays as our parameters: one stacked block of two layers."""

  def layers(name, shape=None):
    arrays = [g[f"{prefix}h{i}.{name}{suffix}"] for i in range(2)]
    return np.stack([x if shape is None else x.reshape(shape) for x in arrays])

  block = {
    "mixer__heads_in__kernel": layers("wqkv", (32, 3, 2, 16)).transpose(0, 2, 1, 3, 4),
    "mixer__heads_in__bias": layers("bqkv", (3, 2, 16)),
    "mixer__heads_out__kernel": layers("wo", (2, 16, 32)),
    "mixer__heads_out__bias": layers("bo"),
    "feed_forward__fc1__kernel": layers("wfc"),
    "feed_forward__fc1__bias": layers("bfc"),
    "feed_forward__fc2__kernel": layers("wpr"),
    "feed_forward__fc2__bias": layers("bpr"),
  }
  for theirs, ours in (("ln1", "mixer_norm"), ("ln2", "feed_forward_norm")):
    block[f"{ours}__scale"] = layers(f"{theirs}_g")
    block[f"{ours}__bias"] = layers(f"{theirs}_b")
  params = {f"groups__0__0__{name}": value for name, value in block.items()}
  named = (("embedding", "wte"), ("final_norm__scale", "lnf_g"), ("final_norm__bias", "lnf_b"))
  return params | {ours: g[f"{prefix}{theirs}{suffix}"] for ours, theirs in named}


@pytest.mark.parametrize(
  "variant", ["lssar_p15", pytest.param("lssa", marks=pytest.mark.slow),
              pytest.param("lssar_p3", marks=pytest.mark.slow)]
)  # fmt: skip
def test_golden_model(variant):
  g = golden("softplus_model")
  with jax.enable_x64(True):
    config = dataclasses.replace(GOLDEN, variant=variant)
    model = nnx.eval_shape(lambda: zoo.build(config, nnx.Rngs(0)))
    mixers.set_params(model, **from_golden(g))
    tokens = jnp.asarray(g["in/tokens"])
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params):
      model = nnx.merge(graph, params, rest)
      sums = model.loss(tokens[:, :-1], tokens[:, 1:])
      return sums.loss / sums.weight, model(tokens[:, :-1])[0]

    (value, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    close(logits, g[f"out/logits.{variant}"], 1e-9)
    np.testing.assert_allclose(value, g[f"out/loss.{variant}"], rtol=1e-6)  # summed in float32
    got = {"__".join(map(str, p)): v.get_value() for p, v in nnx.to_flat_state(grads)}
    for name, expected in from_golden(g, "grad/", f".{variant}").items():
      close(got[name], expected, 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["lssar_p15", "softmax"])
def test_steps_are_the_whole(variant):
  config = SoftplusConfig(37, 32, 2, 2, variant=variant, init_stddev=0.3)
  model = zoo.build(config, nnx.Rngs(0))
  tokens = jax.random.randint(jax.random.key(0), (2, 9), 0, 37)
  whole, _ = model(tokens)
  _, state = model(tokens[:, :4], state=model.init_state(2, 9))
  step = jax.jit(model.step)
  for t in range(4, 9):
    logits, state = step(tokens[:, t], state)
    close(logits, whole[:, t], 1e-4)


def test_all_variants_have_the_same_parameters():
  shapes = []
  for name in softplus.PRESETS:
    if not name.endswith("tiny"):
      continue
    config = zoo.get_config(name)
    state = nnx.state(nnx.eval_shape(lambda c=config: zoo.build(c, nnx.Rngs(0))), nnx.Param)
    shapes.append({path: v.get_value().shape for path, v in nnx.to_flat_state(state)})
    count = sum(int(np.prod(shape)) for shape in shapes[-1].values())
    assert count == softplus.parameter_count(config)
  assert all(shape == shapes[0] for shape in shapes)
  # GPT-2 small without its learned positions, and with a padded vocabulary.
  assert softplus.parameter_count(zoo.get_config("softplus-124m")) == 124_475_904 - 1024 * 768


def test_bad_configurations_are_refused():
  for change, message in (
    (dict(variant="lssar"), r"SoftplusConfig: variant must be one of .*; got 'lssar'"),
    (dict(variant="softmax", power=3.0), "power must be None for softmax; got 3.0"),
    (dict(heads=5), r"features must be a multiple of heads \(5\); got 32"),
    (dict(dtype="int8"), "dtype must be one of"),
    (dict(activation="gelu_tan"), "did you mean 'gelu_tanh'"),
  ):
    with pytest.raises(ValueError, match=message):
      dataclasses.replace(GOLDEN, **change)
