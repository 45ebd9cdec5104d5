"""Softplus attention over 8 virtual devices against one device."""

import functools

import jax
import numpy as np
import pytest

from attnzoo.pallas_kernels.softmax_attention.cache import CacheState
from attnzoo.pallas_kernels.softplus_attention import (
  VARIANTS,
  cases,
  sharded_softplus_attention,
  softplus_attention,
)
from attnzoo_testing.gradients import cotangents, results_and_gradients
from attnzoo_testing.marks import slow_but
from attnzoo_testing.numerics import assert_as_exact
from attnzoo_testing.oracle import widen

MESHES = {
  "batch_and_heads": ((4, 2), ("data", "model"), {}),
  "sequence": ((8,), ("seq",), dict(batch_axes=(), head_axes=(), sequence_axis="seq")),
  "all_three": ((2, 2, 2), ("data", "seq", "model"), dict(sequence_axis="seq")),
}
RUNS = [
  ("sequence", "lssar_p15", "packed_and_padded"),
  ("all_three", "lssa", "packed_and_padded"),
  ("batch_and_heads", "lssar_p3", "packed_and_padded"),
  ("sequence", "softmax", "plain"),
  ("sequence", "sigmoid_bias", "packed"),
]
OPTIONS = {
  "plain": {},
  "packed": dict(segments="packed", lengths=True),
  "packed_and_padded": dict(segments="packed", lengths=True, state="few"),
}


def on_arrays(function, *, stored_key=None, stored_value=None, count=None, **arguments):
  state = None if count is None else CacheState(stored_key, stored_value, count)
  output, state = function(**arguments, initial_state=state)
  return output, state.key, state.value


@functools.cache
def expected(options, variant, length=48, rows=4):
  """(inputs, cotangents, unsharded results, float64 truth)."""
  case = cases._case("sharded", (), rows, length, 4, 8, kv_heads=2, **OPTIONS[options])
  inputs = cases.make_inputs(case, seed=3)
  if "segment_ids" in inputs:  # documents that end exactly at a shard's edge, and repeated ids
    inputs["segment_ids"][0] = np.arange(length) // (length // 8)
    inputs["segment_ids"][2] = (np.arange(length) // (length // 4)) % 2
  if "lengths" in inputs:  # ... and rows that end at one, in the middle of one, and at once
    inputs["lengths"][:] = length // 2, 0, length, length // 2 + 1
  operator = functools.partial(softplus_attention, variant=VARIANTS[variant])
  whole = functools.partial(on_arrays, functools.partial(operator, implementation="xla"))
  cotangent = cotangents(whole, inputs)
  results = results_and_gradients(whole, inputs, cotangent, cases.RESULTS)
  with jax.enable_x64(True):
    exact = functools.partial(on_arrays, functools.partial(operator, implementation="reference"))
    truth = results_and_gradients(exact, widen(inputs), cotangent, cases.RESULTS)
  return inputs, cotangent, results, truth


@pytest.mark.parametrize(("mesh_name", "variant", "options"), slow_but(RUNS, RUNS[0]))
def test_sharded_is_unsharded(mesh_name, variant, options):
  """It errs at most twice as much as the unsharded one (`assert_as_exact`)."""
  inputs, cotangent, whole, truth = expected(options, variant)
  shape, axes, split = MESHES[mesh_name]
  mesh = jax.make_mesh(shape, axes, axis_types=(jax.sharding.AxisType.Auto,) * len(axes))
  sharded = functools.partial(
    sharded_softplus_attention, mesh=mesh, variant=VARIANTS[variant], chunk_size=4, **split
  )
  function = functools.partial(on_arrays, sharded)
  got = results_and_gradients(function, inputs, cotangent, cases.RESULTS)
  assert_as_exact(got, whole, truth, np.float32)


def test_nothing_is_gathered():
  """Keys and values go around; the largest array in any collective is one shard's."""
  tokens = jax.ShapeDtypeStruct((2, 512, 2, 8), np.float32)
  shape, axes, split = MESHES["sequence"]
  mesh = jax.make_mesh(shape, axes, axis_types=(jax.sharding.AxisType.Auto,) * len(axes))

  def loss(*tokens):
    return jax.numpy.sum(sharded_softplus_attention(*tokens, mesh=mesh, **split)[0] ** 2)

  text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(tokens, tokens, tokens).compile().as_text()
  assert "collective-permute" in text
  assert "all-gather" not in text
  assert "all-reduce" not in text


def test_bad_mesh_axis_and_implementation():
  inputs, *_ = expected("plain", "softmax")
  mesh = jax.make_mesh((8,), ("seq",), axis_types=(jax.sharding.AxisType.Auto,))
  options = dict(mesh=mesh, batch_axes=(), head_axes=())
  with pytest.raises(ValueError, match="sharded_softplus_attention: sequence_axis must name axes"):
    sharded_softplus_attention(**inputs, sequence_axis="sep", **options)
  with pytest.raises(NotImplementedError, match="does not take a sequence_axis"):
    sharded_softplus_attention(**inputs, sequence_axis="seq", implementation="tpu", **options)
