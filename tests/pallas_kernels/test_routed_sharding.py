"""Routed attention over 8 virtual devices against one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo.pallas_kernels import RoutedState, Routing, routed_attention, sharded_routed_attention
from attnzoo.pallas_kernels.routed_attention import cases
from attnzoo_testing.gradients import cotangents, results_and_gradients
from attnzoo_testing.marks import slow_but
from attnzoo_testing.numerics import assert_as_exact
from attnzoo_testing.oracle import widen

MESHES = {
  "batch_and_heads": ((4, 2), ("data", "model"), {}),
  "sequence": ((8,), ("seq",), dict(batch_axes=(), head_axes=(), sequence_axis="seq")),
  "all_three": ((2, 2, 2), ("data", "seq", "model"), dict(sequence_axis="seq")),
}
# "sequence" has more devices than heads, "all_three" as many along the sequence as heads.
RUNS = [
  ("sequence", "official"),
  ("all_three", "recent"),
  ("sequence", "recent"),
  ("batch_and_heads", "official"),
]
OPTIONS = {
  "official": dict(unshared=True, relative=3, memory=2, lengths=True),
  "recent": dict(routing=cases.RECENT, segments="packed", lengths=True, state=True),
}
RESULTS = ("output", "score", "stored_key", "stored_value")


def on_arrays(function, *, query, key=None, old_score=None, old_key=None, old_value=None, **rest):
  state = None if old_score is None else RoutedState(old_score, old_key, old_value)
  key = query if key is None else key
  output, state = function(query, key, **rest, initial_state=state)
  return output, jnp.where(jnp.isfinite(state.score), state.score, -9), state.key, state.value


@functools.cache
def expected(name, length=48, rows=4):
  """(inputs, options, cotangents, unsharded results, float64 truth)."""
  case = cases._case("sharded", (), rows, length, 4, 8, 5, 6, value_dim=12, **OPTIONS[name])
  inputs, options = cases.make_inputs(case, seed=3), cases.static_options(case)["options"]
  if "segment_ids" in inputs:  # documents that end exactly at a shard's edge, and repeated ids
    inputs["segment_ids"][0] = np.arange(length) // (length // 8)
    inputs["segment_ids"][2] = (np.arange(length) // (length // 4)) % 2
  if "lengths" in inputs:  # ... and rows that end at one, in the middle of one, and at once
    inputs["lengths"][:] = length // 2, 0, length, length // 2 + 1
  if case.options.get("state"):
    earlier = {n: inputs[n][:, ::3] for n in ("query", "value", "scores")}
    state = routed_attention(key=earlier["query"], **earlier, options=options)[1]
    inputs |= dict(zip(("old_score", "old_key", "old_value"), map(np.asarray, state), strict=True))
  whole = functools.partial(
    on_arrays, functools.partial(routed_attention, options=options, implementation="xla")
  )
  cotangent = cotangents(whole, inputs)
  results = results_and_gradients(whole, inputs, cotangent, RESULTS)
  with jax.enable_x64(True):
    truth = results_and_gradients(whole, widen(inputs), cotangent, RESULTS)
  return inputs, options, cotangent, results, truth


@pytest.mark.parametrize(("mesh_name", "name"), slow_but(RUNS, *RUNS[:2]))
def test_sharded_is_unsharded(mesh_name, name):
  """It errs at most twice as much as the unsharded one (`assert_as_exact`)."""
  inputs, options, cotangent, whole, truth = expected(name)
  shape, axes, split = MESHES[mesh_name]
  mesh = jax.make_mesh(shape, axes, axis_types=(jax.sharding.AxisType.Auto,) * len(axes))
  sharded = functools.partial(sharded_routed_attention, mesh=mesh, options=options, **split)
  function = functools.partial(on_arrays, sharded)
  got = results_and_gradients(function, inputs, cotangent, RESULTS)
  assert_as_exact(got, whole, truth, np.float32)


def test_what_travels():
  """Queries that are the keys once, values, scores, output and numbers of clusters; no states."""
  tokens = jax.ShapeDtypeStruct((1, 64, 2, 8), np.float32)
  shape, axes, split = MESHES["sequence"]
  mesh = jax.make_mesh(shape, axes, axis_types=(jax.sharding.AxisType.Auto,) * len(axes))
  options = Routing(6, "official")

  def run(q, v, scores):
    return sharded_routed_attention(q, q, v, scores, options=options, mesh=mesh, **split)[0]

  text = jax.jit(run).lower(tokens, tokens, tokens).compile().as_text()
  assert text.count(" all-to-all(") == 5
  assert "all-gather" not in text
  assert "all-reduce" not in text


def test_bad_mesh_axis_and_arguments():
  inputs, options, *_ = expected("recent")
  mesh = jax.make_mesh((8,), ("seq",), axis_types=(jax.sharding.AxisType.Auto,))
  q, v, scores = (inputs[n] for n in ("query", "value", "scores"))
  run = functools.partial(
    sharded_routed_attention, q, q, options=options, mesh=mesh, batch_axes=(), head_axes=()
  )
  with pytest.raises(ValueError, match="sharded_routed_attention: sequence_axis must name axes"):
    run(v, scores, sequence_axis="sep")
  with pytest.raises(ValueError, match=r"scores must be \[4, 48, 4, C\]; got \(4, 48, 2, 5\)"):
    run(v, scores[:, :, :2], sequence_axis="seq")
