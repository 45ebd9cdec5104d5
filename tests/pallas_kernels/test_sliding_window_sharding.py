"""Sliding-window attention over 8 virtual devices against one device."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from attnzoo.pallas_kernels import (
  WindowState,
  sharded_sliding_window_attention,
  sliding_window_attention,
)
from attnzoo.pallas_kernels.sliding_window_attention import cases, sharding
from attnzoo_testing.gradients import cotangents, results_and_gradients
from attnzoo_testing.numerics import assert_as_exact

pytestmark = pytest.mark.slow

NAMES = ("output", "final_key", "final_value")
MESHES = {
  "batch_and_heads": ((4, 2), ("data", "model"), {}),
  "sequence": ((8,), ("seq",), dict(batch_axes=(), head_axes=(), sequence_axis="seq")),
  "all_three": ((2, 2, 2), ("data", "seq", "model"), dict(sequence_axis="seq")),
}
LENGTH = 40  # 5 tokens per shard of eight


def make_mesh(name):
  shape, axes, options = MESHES[name]
  return jax.make_mesh(shape, axes, axis_types=(jax.sharding.AxisType.Auto,) * len(axes)), options


@functools.cache
def make_inputs(left, packed):
  """Four rows of a state (rows 0 and 1 with a full window, unless it is wide) and 40 tokens."""
  options = dict(segments="packed", lengths=True) if packed else {}
  case = cases._case("sharded", (), 4, LENGTH, 4, 6, left, kv_heads=2, value_dim=10,
                     state="many", **options)  # fmt: skip
  inputs = cases.make_inputs(case, np.float32, seed=3)
  inputs["count"][:] = left + 3, left, left // 2, 0
  if packed:  # documents that end at a shard's edge, repeated ids, one long document
    ids = inputs["segment_ids"]
    ids[0] = np.arange(LENGTH) // 5
    ids[1] = (np.arange(LENGTH) // 10) % 2
    ids[2] = 5
    inputs["lengths"][:] = LENGTH, 20, 26, 0
  return inputs


@functools.cache
def expected(left, packed):
  """(inputs, cotangents, unsharded results, float64 truth)."""
  inputs = make_inputs(left, packed)
  xla = functools.partial(cases.operator, implementation="xla", chunk_size=4, left=left)
  cotangent = cotangents(xla, inputs)
  whole = results_and_gradients(xla, inputs, cotangent, NAMES)
  with jax.enable_x64(True):
    wide = {n: x.astype(np.float64) if x.dtype == np.float32 else x for n, x in inputs.items()}
    reference = functools.partial(cases.operator, implementation="reference", left=left)
    truth = results_and_gradients(reference, wide, cotangent, NAMES)
  return inputs, cotangent, whole, truth


def on_mesh(name, left, **options):
  mesh, axes = make_mesh(name)
  options = dict(implementation="xla", chunk_size=4) | options

  def run(*, stored_key, stored_value, count, **arrays):
    output, state = sharded_sliding_window_attention(
      **arrays, left=left, initial_state=WindowState(stored_key, stored_value, count), mesh=mesh,
      **axes, **options,
    )  # fmt: skip
    return output, state.key, state.value

  return run


def compare(mesh_name, left, packed, **options):
  """The sharded form errs at most twice as much as the unsharded one (`assert_as_exact`)."""
  inputs, cotangent, whole, truth = expected(left, packed)
  got = results_and_gradients(on_mesh(mesh_name, left, **options), inputs, cotangent, NAMES)
  assert_as_exact(got, whole, truth, np.float32)


# A window within the neighbouring shard, over two of them, over more than there are tokens.
@pytest.mark.parametrize(
  ("mesh_name", "left", "packed"),
  [
    ("batch_and_heads", 3, True),
    ("sequence", 3, True),
    ("sequence", 7, True),
    ("sequence", 7, False),
    ("sequence", 60, True),
    ("sequence", 0, True),
    ("all_three", 7, True),
    ("all_three", 60, False),
  ],
)
def test_sharded_is_unsharded(mesh_name, left, packed):
  compare(mesh_name, left, packed)


def test_counts_and_no_state():
  inputs = make_inputs(7, True)
  tokens = {n: inputs[n] for n in ("query", "key", "value", "segment_ids", "lengths")}
  mesh, axes = make_mesh("sequence")
  output, state = jax.jit(
    lambda x: sharded_sliding_window_attention(**x, left=7, mesh=mesh, **axes)
  )(tokens)
  whole, final = jax.jit(lambda x: sliding_window_attention(**x, left=7))(tokens)
  np.testing.assert_allclose(output, whole, rtol=0, atol=2e-6)
  jax.tree.map(np.testing.assert_array_equal, state, final)


@pytest.mark.slow
def test_kernel_is_unsharded():
  compare("sequence", 3, False, implementation="tpu", chunk_size=None, interpret=True)


def edge_of_the_halo_lost(patch):
  original = sharding._halo
  patch.setattr(sharding, "_halo", lambda *a: original(*a).at[:, 0].set(0))


def halo_from_the_right(patch):
  original = jax.lax.ppermute
  patch.setattr(jax.lax, "ppermute", lambda x, axis, pairs: original(
    x, axis, [(b, a) for a, b in pairs]))  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
  "fault", [edge_of_the_halo_lost, halo_from_the_right], ids=lambda f: f.__name__
)
def test_seeded_fault_is_seen(fault, monkeypatch):
  expected(7, True)
  fault(monkeypatch)
  with pytest.raises(AssertionError, match=r"error .* above"):
    compare("sequence", 7, True)


def shard(mesh, axes, inputs):
  batch, heads = axes.get("batch_axes", "data") or None, axes.get("head_axes", "model") or None
  spec = NamedSharding(mesh, PartitionSpec(batch, axes.get("sequence_axis"), heads))
  return {n: jax.device_put(inputs[n], spec) for n in ("query", "key", "value")}


def compiled_lines(mesh_name, left):
  mesh, axes = make_mesh(mesh_name)

  @jax.jit
  def run(inputs):
    function = functools.partial(sharded_sliding_window_attention, left=left, mesh=mesh, **axes)
    output, pull = jax.vjp(lambda x: function(**x)[0], inputs)
    return output, pull(output)

  text = run.lower(shard(mesh, axes, make_inputs(left, False))).compile().as_text()
  return text.splitlines()


def test_batch_and_heads_communicate_nothing():
  lines = compiled_lines("batch_and_heads", 3)
  words = ("all-gather", "all-reduce", "all-to-all", "permute")
  found = [line for line in lines if any(word + "(" in line for word in words)]
  assert not found, found


def test_sequence_moves_the_window_only():
  """Hops of at most `left` keys and values to the right, and of their gradients to the left."""
  lines = compiled_lines("sequence", 7)
  hops = [line.split(" = ")[1].split(" ")[0] for line in lines if "permute(" in line]
  assert {hop.split("{")[0] for hop in hops} <= {
    f"{kind}[4,{rows}{rest}]" for rows in (2, 5) for kind, rest in
    (("f32", ",2,6"), ("f32", ",2,10"), ("s32", ""))
  }, hops  # fmt: skip
  assert len(hops) >= 8
  assert not any("f32[4,40,4,6]" in line for line in lines)  # the whole query is on no device


@pytest.mark.parametrize(
  ("message", "options"),
  [
    (r"batch_axes must name axes .* \(did you mean 'data'\?\)", dict(batch_axes="dat")),
    (r"heads must be divisible by the 4 devices along \('data',\); got 2",
     dict(batch_axes=(), head_axes="data")),
    (r"left must be at least 0; got -1", dict(left=-1)),
    (r"length must be divisible by the 4 devices along \('data',\); got 39",
     dict(batch_axes=(), sequence_axis="data", cut=39)),
  ],
)  # fmt: skip
def test_errors(message, options):
  mesh, _ = make_mesh("batch_and_heads")
  inputs = make_inputs(3, False)
  cut = options.pop("cut", LENGTH)
  tokens = {n: inputs[n][:, :cut] for n in ("query", "key", "value")}
  with pytest.raises(ValueError, match="^sharded_sliding_window_attention: " + message):
    sharded_sliding_window_attention(**tokens, **(dict(left=3, mesh=mesh) | options))
