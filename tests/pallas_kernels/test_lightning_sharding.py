"""Lightning attention over 8 virtual devices against one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from attnzoo.pallas_kernels import lightning_attention, sharded_lightning_attention, state_passing
from attnzoo.pallas_kernels.lightning_attention import cases
from attnzoo_testing.gradients import cotangents, results_and_gradients
from attnzoo_testing.numerics import assert_as_exact

NAMES = ("output", "final_state")
MESHES = {
  "batch": ((8,), ("data",), dict(batch_axes="data", head_axes=())),
  "batch_and_heads": ((2, 4), ("data", "model"), {}),
  "sequence": ((8,), ("seq",), dict(batch_axes=(), head_axes=(), sequence_axis="seq")),
  "all_three": ((2, 2, 2), ("data", "seq", "model"), dict(sequence_axis="seq")),
  "folded_batch": ((2, 2, 2), ("pod", "data", "seq"),
                   dict(batch_axes=("pod", "data"), head_axes=(), sequence_axis="seq")),
}  # fmt: skip
OPTIONS = {
  "plain": {},
  "packed": dict(segments="packed", state=True),
  "padded": dict(lengths=True, state=True),
  "packed_and_padded": dict(segments="packed", lengths=True, state=True, decay="none"),
}


def make_mesh(name):
  shape, axes, options = MESHES[name]
  return jax.make_mesh(shape, axes, axis_types=(jax.sharding.AxisType.Auto,) * len(axes)), options


def make_inputs(length=48, **options):
  case = cases._case("sharded", (), 8, length, 4, 6, 10, **options)
  inputs = cases.make_inputs(case, np.float32, seed=3)
  if "segment_ids" in inputs:  # documents that end exactly at a shard's edge, and repeated ids
    ids = inputs["segment_ids"]
    ids[0] = np.arange(length) // (length // 8)
    ids[1] = (np.arange(length) // (length // 4)) % 2
    ids[2] = np.arange(length)
    ids[3] = 5
  if "lengths" in inputs:  # ... and rows that end at, before and after one
    inputs["lengths"][:6] = length, 0, length // 2, length // 2 - 1, length // 2 + 1, 1
  return inputs


@functools.cache
def expected(options, length=48, rows=8):
  """(inputs, cotangents, unsharded results, float64 truth) of one entry of `OPTIONS`."""
  inputs = {name: x[:rows] if x.ndim != 1 or len(x) == 8 else x
            for name, x in make_inputs(length, **OPTIONS[options]).items()}  # fmt: skip
  xla = functools.partial(lightning_attention, implementation="xla", chunk_size=4)
  cotangent = cotangents(xla, inputs)
  whole = results_and_gradients(xla, inputs, cotangent, NAMES)
  with jax.enable_x64(True):
    wide = {n: x.astype(np.float64) if x.dtype == np.float32 else x for n, x in inputs.items()}
    reference = functools.partial(lightning_attention, implementation="reference")
    truth = results_and_gradients(reference, wide, cotangent, NAMES)
  return inputs, cotangent, whole, truth


def compare(sharded, *options, **sizes):
  """The sharded form errs at most twice as much as the unsharded one (`assert_as_exact`)."""
  inputs, cotangent, whole, truth = expected(*options, **sizes)
  got = results_and_gradients(sharded, inputs, cotangent, NAMES)
  assert_as_exact(got, whole, truth, np.float32)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("mesh_name", MESHES)
def test_sharded_is_unsharded(mesh_name, options):
  mesh, axes = make_mesh(mesh_name)
  sharded = functools.partial(
    sharded_lightning_attention, mesh=mesh, implementation="xla", chunk_size=4, **axes
  )
  compare(sharded, options)


@pytest.mark.parametrize("options", ["plain", "packed_and_padded"])
def test_doubling_is_unsharded(options, monkeypatch):
  monkeypatch.setattr(state_passing, "GATHER_LIMIT", 1)
  mesh, axes = make_mesh("sequence")
  sharded = functools.partial(
    sharded_lightning_attention, mesh=mesh, implementation="xla", chunk_size=4, **axes
  )
  compare(sharded, options)
  text = jax.jit(sharded).lower(**make_inputs()).as_text()
  assert "collective_permute" in text


def test_kernel_is_unsharded():
  pytest.importorskip("attnzoo.pallas_kernels.lightning_attention.tpu_vjp")
  mesh, axes = make_mesh("all_three")
  sharded = functools.partial(
    sharded_lightning_attention, mesh=mesh, implementation="tpu", interpret=True, **axes
  )
  compare(sharded, "packed", length=16, rows=2)


def shard(mesh, axes, inputs):
  batch, heads = axes.get("batch_axes", "data") or None, axes.get("head_axes", "model") or None
  spec = NamedSharding(mesh, PartitionSpec(batch, axes.get("sequence_axis"), heads))
  return {name: jax.device_put(x, spec) for name, x in inputs.items() if x.ndim == 4}


@pytest.mark.parametrize("mesh_name", ["batch", "batch_and_heads"])
def test_batch_and_heads_communicate_nothing(mesh_name):
  mesh, axes = make_mesh(mesh_name)
  inputs = shard(mesh, axes, make_inputs())

  @jax.jit
  def run(inputs):
    function = functools.partial(sharded_lightning_attention, mesh=mesh, **axes)
    (output, state), pull = jax.vjp(lambda x: function(**x), inputs)
    return output, pull((output, state))

  text = run.lower(inputs).compile().as_text()
  found = [c for c in ("all-gather", "all-reduce", "all-to-all", "permute") if c in text]
  assert not found, found
  assert "f32[8,48,4,6]" not in text  # the whole query exists on no device


def test_sequence_moves_states_only():
  mesh, axes = make_mesh("sequence")
  inputs = shard(mesh, axes, make_inputs())
  run = jax.jit(lambda x: sharded_lightning_attention(**x, mesh=mesh, **axes))
  lines = run.lower(inputs).compile().as_text().splitlines()
  gathered = [line for line in lines if " all-gather(" in line]
  states, edges = "f32[8,8,4,6,10]", "s32["
  assert any(states in line for line in gathered)
  assert all(states in line.split(" = ")[1] or edges in line for line in gathered), gathered
  assert not any("f32[8,48,4,6]" in line for line in lines)


def test_mesh_in_force_is_used():
  mesh, _ = make_mesh("batch_and_heads")
  inputs = make_inputs()
  with jax.set_mesh(mesh):
    output, _ = jax.jit(lambda x: sharded_lightning_attention(**x))(inputs)
  assert output.sharding.spec == PartitionSpec(("data",), None, ("model",))
  np.testing.assert_array_equal(output, jax.jit(lambda x: lightning_attention(**x))(inputs)[0])


def errors():
  def bad(message, mesh="batch_and_heads", shape=(8, 16, 4, 4), **axes):
    return pytest.param(mesh, shape, axes, message, id=message[:30])

  return [
    bad(r"batch_axes must name axes of the mesh \('data', 'model'\); got 'dat' "
        r"\(did you mean 'data'\?\)", batch_axes="dat"),
    bad(r"sequence_axis must name axes .* got 'zzz' \(\(\) leaves that axis whole\)",
        sequence_axis="zzz"),
    bad(r"batch_axes must use each mesh axis once; got 'data'", head_axes="data"),
    bad(r"batch must be divisible by the 2 devices along \('data',\); got 3", shape=(3, 16, 4, 4)),
    bad(r"heads must be divisible by the 4 devices along \('model',\); got 6", shape=(8, 16, 6, 4)),
    bad(r"length must be divisible by the 8 devices along \('seq',\); got 20", "sequence",
        (8, 20, 4, 4), batch_axes=(), head_axes=(), sequence_axis="seq"),
    bad(r"mesh must be given or be in force; got None", mesh=None),
    bad(r"query must have no empty axis", shape=(8, 0, 4, 4)),
  ]  # fmt: skip


@pytest.mark.parametrize(("mesh", "shape", "axes", "message"), errors())
def test_errors(mesh, shape, axes, message):
  mesh = mesh and make_mesh(mesh)[0]
  x = jnp.zeros(shape)
  with pytest.raises(ValueError, match="^sharded_lightning_attention: " + message):
    sharded_lightning_attention(x, x, x, mesh=mesh, **axes)
