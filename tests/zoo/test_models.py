"""What holds for every preset of the zoo, whatever its family."""

import jax
import pytest
from flax import nnx

from attnzoo import zoo
from attnzoo.zoo import models


@pytest.mark.parametrize("name", zoo.list_models())
def test_every_preset_has_the_parameters_it_says(name):
  config = zoo.get_config(name)
  params = nnx.state(nnx.eval_shape(lambda: zoo.build(config, nnx.Rngs(0))), nnx.Param)
  total = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert total == models.parameter_count(config)
