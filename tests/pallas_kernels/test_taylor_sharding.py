"""Taylor attention over 8 virtual devices against one device."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo.pallas_kernels import sharded_taylor_attention, state_passing, taylor_attention
from attnzoo.pallas_kernels.taylor_attention import cases
from attnzoo.pallas_kernels.taylor_attention.features import feature_count
from attnzoo_testing.gradients import cotangents, results_and_gradients
from attnzoo_testing.marks import slow_but
from attnzoo_testing.numerics import assert_as_exact
from attnzoo_testing.oracle import widen

pytestmark = pytest.mark.slow

NAMES = ("output", "final_state")
MESHES = {
  "batch_and_heads": ((4, 2), ("data", "model"), {}),
  "sequence": ((8,), ("seq",), dict(batch_axes=(), head_axes=(), sequence_axis="seq")),
  "all_three": ((2, 2, 2), ("data", "seq", "model"), dict(sequence_axis="seq")),
}
OPTIONS = {
  "plain": {},
  "packed_and_padded": dict(segments="packed", lengths=True, state=True, decay=True),
}


def sharded(mesh_name, **options):
  shape, axes, split = MESHES[mesh_name]
  mesh = jax.make_mesh(shape, axes, axis_types=(jax.sharding.AxisType.Auto,) * len(axes))
  options = dict(implementation="xla", chunk_size=4) | options
  return functools.partial(sharded_taylor_attention, mesh=mesh, **split, **options)


@functools.cache
def expected(options, length=48, rows=4):
  """(inputs, cotangents, unsharded results, float64 truth) of one entry of `OPTIONS`."""
  case = cases._case("sharded", (), rows, length, 2, 4, 6, **OPTIONS[options])
  inputs = cases.make_inputs(case, seed=3)
  if "segment_ids" in inputs:  # documents that end exactly at a shard's edge, and repeated ids
    inputs["segment_ids"][0] = np.arange(length) // (length // 8)
    inputs["segment_ids"][2] = (np.arange(length) // (length // 4)) % 2
  if "lengths" in inputs:  # ... and rows that end at one, in the middle of one, and at once
    inputs["lengths"][:] = length // 2, 0, length, length // 2 + 1
  xla = functools.partial(taylor_attention, implementation="xla", chunk_size=4)
  cotangent = cotangents(xla, inputs)
  whole = results_and_gradients(xla, inputs, cotangent, NAMES)
  with jax.enable_x64(True):
    reference = functools.partial(taylor_attention, implementation="reference")
    truth = results_and_gradients(reference, widen(inputs), cotangent, NAMES)
  return inputs, cotangent, whole, truth


def compare(function, *options, **sizes):
  """The sharded form errs at most twice as much as the unsharded one (`assert_as_exact`)."""
  inputs, cotangent, whole, truth = expected(*options, **sizes)
  got = results_and_gradients(function, inputs, cotangent, NAMES)
  assert_as_exact(got, whole, truth, np.float32)


@pytest.mark.parametrize("options", slow_but(OPTIONS, "packed_and_padded"))
@pytest.mark.parametrize("mesh_name", slow_but(MESHES, "all_three"))
def test_sharded_is_unsharded(mesh_name, options):
  compare(sharded(mesh_name), options)


@pytest.mark.slow
def test_doubling_is_unsharded(monkeypatch):
  monkeypatch.setattr(state_passing, "GATHER_LIMIT", 1)
  compare(sharded("sequence"), "packed_and_padded")


@pytest.mark.slow
def test_normaliser_that_decays_between_shards_is_seen(monkeypatch):
  """The comparison above can tell the columns of the state apart."""
  where = jnp.where

  def values_only(condition, x, y):
    return x if getattr(condition, "shape", None) == (7,) else where(condition, x, y)

  monkeypatch.setattr(jnp, "where", values_only)
  function = sharded("sequence")
  jax.clear_caches()
  with pytest.raises(AssertionError, match=r"error .* above"):
    compare(function, "packed_and_padded")


def test_only_states_travel():
  """The largest array in any collective is that of the gathered states."""
  tokens = jax.ShapeDtypeStruct((4, 4096, 2, 4), jnp.float32)
  text = jax.jit(sharded("sequence", chunk_size=64)).lower(tokens, tokens, tokens).compile()
  collectives = re.findall(r"= (.*) (?:all-gather|all-reduce|all-to-all)\(", text.as_text())
  sizes = [math.prod(int(n) for n in shape.split(",")) for result in collectives
           for shape in re.findall(r"\[([0-9,]+)\]", result)]  # fmt: skip
  states = 8 * 4 * 2 * feature_count(4) * 5  # [W, B, H, P, V + 1]
  assert max(sizes) == states < math.prod(tokens.shape)


def test_bad_mesh_axis():
  arrays = expected("plain")[0]
  mesh = sharded("sequence").keywords["mesh"]
  with pytest.raises(ValueError, match="sharded_taylor_attention: batch_axes must name axes"):
    sharded_taylor_attention(**arrays, mesh=mesh, batch_axes="dat")
