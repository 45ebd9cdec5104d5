"""Which axis of a parameter or an activation goes where on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from attnzoo import zoo
from attnzoo.layers.partitioning import (
  active_axes,
  constrain,
  logical,
  parameter_shardings,
  parameter_spec,
)


def mesh(data=2, seq=1, model=4):
  devices = np.asarray(jax.devices()[: data * seq * model]).reshape(data, seq, model)
  return Mesh(devices, ("data", "seq", "model"), axis_types=(AxisType.Auto,) * 3)


@pytest.mark.parametrize(
  ("shape", "axes", "spec"),
  [
    ((8, 12), ("embed", "mlp"), P("data", "model")),
    ((3, 8, 12), ("embed", "mlp"), P(None, "data", "model")),  # stacked layers
    ((4, 8, 4, 6), (None, "embed", "heads", None), P(None, "data", "model", None)),
    ((7, 12), ("embed", "mlp"), P(None, "model")),  # 7 is no multiple of 2
    ((8, 6), ("embed", "mlp"), P("data", None)),  # 6 is no multiple of 4
    ((8, 8), ("heads", "mlp"), P("model", None)),  # an axis is used once
    ((257, 8), ("vocab", "embed"), P(None, "data")),
    ((8,), ("unknown",), P(None)),
    ((8, 8), (), P(None, None)),
  ],
  ids=str,
)
def test_parameter_spec(shape, axes, spec):
  assert parameter_spec(nnx.Param(jnp.zeros(shape), **logical(*axes)), mesh()) == spec


def test_a_mesh_without_our_axes_splits_nothing():
  other = Mesh(np.asarray(jax.devices()[:2]), ("x",))
  assert parameter_spec(nnx.Param(jnp.zeros((8, 8)), **logical("embed", "mlp")), other) == P(
    None, None
  )


def test_every_large_parameter_of_a_model_is_split_over_all_devices():
  config = zoo.get_config("transnormer-tiny", vocab_size=512)
  template = nnx.state(nnx.eval_shape(lambda: zoo.build(config, nnx.Rngs(0))), nnx.Param)
  shardings = parameter_shardings(template, mesh())
  for (path, variable), (_, sharding) in zip(
    nnx.to_flat_state(template), nnx.to_flat_state(shardings), strict=True
  ):
    shape = variable.get_value().shape
    part = sharding.get_value().shard_shape(shape)
    if np.prod(shape) > 10_000:
      assert np.prod(shape) == 8 * np.prod(part), path


def test_constrain_follows_the_mesh_in_force():
  x = jnp.zeros((4, 6, 8, 3))
  assert constrain(x, "batch", "length", "heads", None) is x
  assert active_axes() == {}
  with jax.set_mesh(mesh()):
    assert active_axes() == {"data": 2, "seq": 1, "model": 4}
    y = jax.jit(lambda x: constrain(x, "batch", "length", "heads", None))(x)
    odd = jax.jit(lambda x: constrain(x, "batch", "length", "heads", None))(x[:3])
  assert y.sharding.shard_shape(y.shape) == (2, 6, 2, 3)
  assert odd.sharding.shard_shape(odd.shape) == (3, 6, 2, 3)
