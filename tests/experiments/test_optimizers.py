"""What weight decay takes hold of, on a model's real parameters; Adafactor against its golden."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from attnzoo import zoo
from attnzoo.experiments.training import state
from attnzoo.experiments.training.adafactor import adafactor
from attnzoo.experiments.training.config import OptimizerConfig
from attnzoo.experiments.training.optimizers import learning_rate, make_optimizer
from attnzoo_testing.goldens import golden, golden_config

ADAFACTOR = OptimizerConfig(
  name="adafactor", learning_rate=0.01, schedule="inverse_sqrt", warmup_steps=0, weight_decay=0,
  clip_norm=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def params():
  _, params = state.take_apart(zoo.create("based-tiny", rngs=nnx.Rngs(0)))
  return {name: jnp.ones_like(x) for name, x in params.items()}


@pytest.mark.parametrize("decayed", ["matrices", "weights", "all_but_biases", "everything"])
def test_what_is_decayed(params, decayed):
  """With no gradient only the decay moves a parameter."""
  optimizer = make_optimizer(OptimizerConfig(decayed=decayed, warmup_steps=0), 10)
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = optimizer.update(zeros, optimizer.init(params), params)
  moved = {name for name, update in updates.items() if np.any(update)}
  kinds = {
    "kernel": {name for name in params if name.endswith("kernel")},
    "bias": {name for name in params if name.endswith("bias")},
    "embedding": {"embedding"},
  }
  assert kinds["bias"]
  assert any(name.endswith("scale") for name in params)
  expected = {
    "matrices": kinds["kernel"] | kinds["embedding"],
    "weights": set(params) - kinds["bias"] - kinds["embedding"],
    "all_but_biases": set(params) - kinds["bias"],
    "everything": set(params),
  }
  assert moved == expected[decayed]


def test_decay_groups_are_for_adamw():
  with pytest.raises(ValueError, match="decayed must be 'matrices' for muon"):
    OptimizerConfig(name="muon", decayed="weights")
  with pytest.raises(ValueError, match="decayed must be one of"):
    OptimizerConfig(decayed="norms")


def run_adafactor(params, gradients):
  """(parameters after each step, last state) at the rate 0.01."""
  optimizer = adafactor(lambda step: 0.01)
  update = jax.jit(optimizer.update)
  state, after = optimizer.init(params), []
  for grads in gradients:
    updates, state = update(grads, state, params)
    params = optax.apply_updates(params, updates)
    after.append(params)
  return after, state


def test_adafactor_golden():
  g, steps = golden("routing_adafactor"), golden_config("routing_adafactor")["steps"]
  names = ("matrix", "bias", "table3d")
  with jax.enable_x64(True):
    arrays = lambda where: {n: jnp.asarray(g[f"{where}/{n}"], jnp.float64) for n in names}  # noqa: E731
    after, state = run_adafactor(arrays("param"), [arrays(f"in/grad_{i}") for i in range(steps)])
  for i, step in enumerate(after):
    for name, param in step.items():
      np.testing.assert_allclose(param, g[f"out/param_after_{i}/{name}"], rtol=1e-13, atol=1e-16)
  for name, parts in dict(matrix=("vr", "vc"), bias=("v",), table3d=("vr", "vc")).items():
    for part, found in zip(parts, state.moments[name], strict=True):
      np.testing.assert_allclose(found, g[f"out/state_end/{name}/{part}"], rtol=1e-13)
  rate = learning_rate(ADAFACTOR, 100)
  np.testing.assert_allclose([rate(i) for i in range(steps)], g["out/lr"], rtol=1e-6)


def test_stacked_layers_are_optimised_each_for_itself():
  """As are the projections of one input; heads and their channels are one axis of a matrix."""
  draw = np.random.default_rng(0)
  shapes = {"fc.kernel": (6, 10), "fc.bias": (7,), "q": (8, 6), "k": (8, 6), "out": (6, 8),
            "of_keys": (5, 4), "of_values": (5, 4)}  # fmt: skip
  # Parameters, then two gradients; [2, ...] layers of very different size.
  single = [
    {name: np.stack([draw.normal(size=shape), 1000 * draw.normal(size=shape)]).astype(np.float32)
     for name, shape in shapes.items()}
    for _ in range(3)
  ]  # fmt: skip
  stacked = [
    {
      "groups.0.0.fc.kernel": x["fc.kernel"],
      "groups.0.0.fc.bias": x["fc.bias"],
      "groups.0.0.heads_in.kernel": np.stack([x["q"], x["k"]], 1).reshape(2, 2, 8, 2, 3),
      "groups.0.0.heads_out.kernel": x["out"].reshape(2, 2, 3, 8),
      "groups.0.0.local_tables": np.stack([x["of_keys"], x["of_values"]], 1),
    }
    for x in single
  ]
  apart = [{f"{n}.{name}": x[n] for name, x in layers.items() for n in (0, 1)} for layers in single]
  expected = run_adafactor(apart[0], apart[1:])[0][-1]
  found = run_adafactor(stacked[0], stacked[1:])[0][-1]
  for n in range(2):
    rebuilt = {
      "fc.kernel": found["groups.0.0.fc.kernel"][n],
      "fc.bias": found["groups.0.0.fc.bias"][n],
      "q": found["groups.0.0.heads_in.kernel"][n, 0].reshape(8, 6),
      "k": found["groups.0.0.heads_in.kernel"][n, 1].reshape(8, 6),
      "out": found["groups.0.0.heads_out.kernel"][n].reshape(6, 8),
      "of_keys": found["groups.0.0.local_tables"][n, 0],
      "of_values": found["groups.0.0.local_tables"][n, 1],
    }
    for name, x in rebuilt.items():
      np.testing.assert_allclose(x, expected[f"{n}.{name}"], rtol=2e-6)
      assert np.abs(x / single[0][name][n] - 1).max() > 1e-3  # it has moved


def test_tables_of_images_are_those_of_the_published_model():
  """There they are [1, Y, 1, C D] and [1, 1, X, C D], and the last two axes are factored."""
  draw = np.random.default_rng(1)
  steps = [{name: draw.normal(size=(5, 3, 4)).astype(np.float32) for name in ("rows", "columns")}
           for _ in range(3)]  # fmt: skip
  ours = [{f"embedder.{name}": x for name, x in step.items()} for step in steps]
  shapes = dict(rows=(1, 5, 1, 12), columns=(1, 1, 5, 12))
  theirs = [{name: x.reshape(shapes[name]) for name, x in step.items()} for step in steps]
  found, expected = (run_adafactor(x[0], x[1:])[0][-1] for x in (ours, theirs))
  for name, x in expected.items():
    np.testing.assert_allclose(found[f"embedder.{name}"].reshape(x.shape), x, rtol=2e-6)


def test_inverse_square_root_of_the_step():
  rate = learning_rate(ADAFACTOR, 50_000)
  found = [float(rate(step)) for step in (0, 1, 9_999, 10_000, 40_000, 90_000)]
  np.testing.assert_allclose(found, [0.01, 0.01, 0.01, 0.01, 0.005, 0.01 / 3], rtol=1e-6)
  ramp = learning_rate(
    OptimizerConfig(schedule="inverse_sqrt", warmup_steps=100, hold_steps=400), 9
  )
  np.testing.assert_allclose(float(ramp(1600)) / 6e-4, 0.5, rtol=1e-6)


def test_weight_decay_of_adafactor_is_part_of_the_loss():
  """Where the gradient cancels the decay, nothing moves."""
  config = OptimizerConfig(
    name="adafactor", weight_decay=1e-3, decayed="all_but_biases", warmup_steps=0, clip_norm=0
  )
  optimizer = make_optimizer(config, 10)
  params = {"fc.kernel": jnp.ones((2, 3)), "fc.bias": jnp.ones(3)}
  against = {name: -1e-3 * x * (not name.endswith("bias")) for name, x in params.items()}
  updates, _ = optimizer.update(against, optimizer.init(params), params)
  assert not any(np.any(update) for update in updates.values())


def test_refusals_of_adafactor():
  with pytest.raises(
    ValueError, match=r"weight_decay must be at most 0.001 for adafactor; got 0.1"
  ):
    OptimizerConfig(name="adafactor")
  with pytest.raises(ValueError, match="hold_steps must be at least 1; got 0"):
    OptimizerConfig(hold_steps=0)
  optimizer = make_optimizer(ADAFACTOR, 10)
  weights = {"w": jnp.ones((2, 2))}
  with pytest.raises(ValueError, match="adafactor: params must be given"):
    optimizer.update(weights, optimizer.init(weights))
