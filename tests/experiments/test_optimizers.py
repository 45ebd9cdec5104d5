"""What weight decay takes hold of, seen on a model's real parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnzoo import zoo
from attnzoo.experiments.training import state
from attnzoo.experiments.training.config import OptimizerConfig
from attnzoo.experiments.training.optimizers import make_optimizer


@pytest.fixture(scope="module")
def params():
  _, params = state.take_apart(zoo.create("based-tiny", rngs=nnx.Rngs(0)))
  return {name: jnp.ones_like(x) for name, x in params.items()}


@pytest.mark.parametrize("decayed", ["matrices", "weights", "everything"])
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
    "everything": set(params),
  }
  assert moved == expected[decayed]


def test_decay_groups_are_for_adamw():
  with pytest.raises(ValueError, match="decayed must be 'matrices' for muon"):
    OptimizerConfig(name="muon", decayed="weights")
  with pytest.raises(ValueError, match="decayed must be one of"):
    OptimizerConfig(decayed="norms")
