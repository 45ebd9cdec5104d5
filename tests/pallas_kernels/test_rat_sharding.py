"""RAT attention over 8 virtual devices against one device, and under jax's transformations."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo.pallas_kernels import RatState, rat_attention, sharded_rat_attention
from attnzoo.pallas_kernels.rat_attention import cases, layout, sharding, tpu_vjp
from attnzoo_testing.gradients import cotangents, results_and_gradients
from attnzoo_testing.marks import slow_but, some_faults
from attnzoo_testing.numerics import assert_as_exact, relative_error
from attnzoo_testing.oracle import widen

MESHES = {
  "batch_and_heads": ((4, 2), ("data", "model"), {}),  # 3 heads of 2 groups on each device
  "heads": ((2, 3), ("x", "y"), dict(batch_axes=(), head_axes=("x", "y"))),  # one head
  "sequence": ((8,), ("seq",), dict(batch_axes=(), head_axes=(), sequence_axis="seq")),
  "all_three": ((2, 2, 2), ("data", "seq", "model"), dict(sequence_axis="seq")),
}
ROWS, LENGTH, HEADS, GROUPS, DIM = 4, 48, 6, 2, 4  # 6 tokens per shard of eight
OPTIONS = {
  "plain": {},
  "packed": dict(segments="packed", lengths=True, state=13),
}
NAMES = (*cases.RESULTS, "position")


def make_mesh(name):
  shape, axes, split = MESHES[name]
  return jax.make_mesh(shape, axes, axis_types=(jax.sharding.AxisType.Auto,) * len(axes)), split


def on_arrays(function, **options):
  """`function` with the state as plain arrays; returns what NAMES lists."""

  def run(*, stored_key=None, stored_value=None, running_key=None, running_value=None,
          position=None, **arrays):  # fmt: skip
    state = RatState(stored_key, stored_value, running_key, running_value, position)
    state = None if position is None else state
    output, state = function(**arrays, initial_state=state, **options)
    return output, *state[:4], state.position.astype(output.dtype)

  return run


def sharded(mesh_name, chunk_size, **options):
  mesh, split = make_mesh(mesh_name)
  options = dict(implementation="xla", chunk_size=chunk_size) | split | options
  return on_arrays(sharded_rat_attention, mesh=mesh, **options)


def unsharded(chunk_size):
  return on_arrays(rat_attention, implementation="xla", chunk_size=chunk_size)


@functools.cache
def make_inputs(options, chunk_size):
  case = cases._case("sharded", (), ROWS, LENGTH, HEADS, DIM, chunk_size, groups=GROUPS,
                     **OPTIONS[options])  # fmt: skip
  inputs = widen(cases.make_inputs(case, seed=3))
  if options == "packed":  # documents that end exactly at a shard's edge, and repeated ids
    inputs["segment_ids"][0] = np.arange(LENGTH) // (LENGTH // 8)
    inputs["segment_ids"][2] = (np.arange(LENGTH) // (LENGTH // 4)) % 2
    inputs["segment_ids"][3] = 7
    # Rows that end at an edge, in the middle of a shard, at once, and not before the end.
    inputs["lengths"][:] = LENGTH // 2, 0, LENGTH, LENGTH // 2 + 1
    inputs["position"][:] = 2 * chunk_size + 1, chunk_size, 0, chunk_size - 1
  return inputs


@functools.cache
def expected(chunk_size):
  """(cotangents, results and gradients) of "packed" on one device, in float64."""
  inputs, function = make_inputs("packed", chunk_size), unsharded(chunk_size)
  with jax.enable_x64(True):
    cotangent = cotangents(function, inputs)
    return cotangent, results_and_gradients(function, inputs, cotangent, NAMES)


def check(got, truth):
  """In float64 nothing but the order of sums is left, so no mistake can hide in a tolerance."""
  errors = {name: relative_error(got[name], truth[name])[0] for name in got}
  limit = LENGTH * np.finfo(np.float64).eps
  assert max(errors.values()) <= limit, f"error {errors} above {limit}"


@pytest.mark.slow
@pytest.mark.parametrize(
  ("mesh_name", "chunk_size"),
  # Chunks that begin in one shard of 24 or 6 and end in the next, and some longer than two shards.
  [("batch_and_heads", 4), ("all_three", 4), ("sequence", 13)],
)
def test_sharded_is_unsharded(mesh_name, chunk_size):
  inputs, (cotangent, truth) = make_inputs("packed", chunk_size), expected(chunk_size)
  with jax.enable_x64(True):
    got = results_and_gradients(sharded(mesh_name, chunk_size), inputs, cotangent, NAMES)
  check(got, truth)


def forward(function, chunk_size):
  inputs = make_inputs("packed", chunk_size)
  with jax.enable_x64(True):
    return dict(zip(NAMES, jax.jit(lambda x: function(**x))(inputs), strict=True))


@pytest.mark.parametrize("mesh_name", slow_but(["heads", "sequence"], "sequence"))
def test_forward_is_unsharded(mesh_name):
  """Heads over two axes; chunks of four over shards of six."""
  check(forward(sharded(mesh_name, 4), 4), expected(4)[1])


@pytest.mark.slow
def test_whole_chunks_and_no_state():
  inputs = {n: np.float32(x) for n, x in make_inputs("plain", 3).items()}
  inputs["lengths"] = np.array([6, 0, 48, 25], np.int32)
  output, final = jax.jit(lambda x: rat_attention(**x, chunk_size=3))(inputs)
  mesh, split = make_mesh("sequence")
  function = functools.partial(sharded_rat_attention, chunk_size=3, mesh=mesh, **split)
  got, state = jax.jit(lambda x: function(**x))(inputs)
  np.testing.assert_allclose(got, output, rtol=0, atol=2e-6)
  for a, b in zip(state, final, strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-6)
  assert state.position.tolist() == [6, 0, 48, 25]


@pytest.mark.slow
def test_kernel_is_unsharded():
  """The TPU kernels, interpreted, from the states that the shards make for them; in float32."""
  inputs = {n: np.float32(x) if x.dtype == np.float64 else x
            for n, x in make_inputs("packed", 4).items()}  # fmt: skip
  kernel = sharded("all_three", 4, implementation="tpu", interpret=True)
  got, whole = (dict(zip(NAMES, jax.jit(lambda x, f=f: f(**x))(inputs), strict=True))
                for f in (kernel, unsharded(4)))  # fmt: skip
  truth = expected(4)[1]
  assert_as_exact(got, whole, {name: truth[name] for name in NAMES}, np.float32)


@pytest.mark.slow
def test_fused_kernels_on_documents(monkeypatch):
  """Without a state, batch and heads split: each device lays out its own rows."""
  monkeypatch.setattr(layout, "either", lambda fits, kernel, general: kernel())
  monkeypatch.setattr(tpu_vjp, "rat_attention_xla", None)  # is not called
  stored = ("stored_key", "stored_value", "running_key", "running_value", "position")
  inputs = {n: x for n, x in make_inputs("packed", 4).items() if n not in stored}
  narrow = {n: np.float32(x) if x.dtype == np.float64 else x for n, x in inputs.items()}
  kernel = sharded("batch_and_heads", 4, implementation="tpu", interpret=True)
  whole = unsharded(4)
  got, portable = (dict(zip(NAMES, jax.jit(lambda x, f=f: f(**x))(narrow), strict=True))
                   for f in (kernel, whole))  # fmt: skip
  with jax.enable_x64(True):
    truth = dict(zip(NAMES, whole(**inputs), strict=True))
  assert_as_exact(got, portable, truth, np.float32)


# --- What is communicated -------------------------------------------------------------------------


def collectives(mesh_name, length, chunk_size):
  """Elements of every array that any collective of the forward pass makes."""
  shapes = dict(query=(ROWS, length, GROUPS, DIM), value=(ROWS, length, HEADS, DIM))
  shapes |= dict(key=shapes["query"], gate_logits=shapes["value"], gate_bias=(HEADS, DIM))
  inputs = {n: jax.ShapeDtypeStruct(shape, jnp.float32) for n, shape in shapes.items()}
  mesh, split = make_mesh(mesh_name)
  function = functools.partial(sharded_rat_attention, chunk_size=chunk_size, mesh=mesh, **split)
  text = jax.jit(lambda x: function(**x)).lower(inputs).compile().as_text()
  words = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
  results = re.findall(rf"= (.*) (?:{words})(?:-start)?\(", text)
  return [math.prod(int(n) for n in shape.split(",") if n) for result in results
          for shape in re.findall(r"\[([0-9,]*)\]", result)]  # fmt: skip


def test_batch_and_heads_communicate_nothing():
  assert collectives("batch_and_heads", 64, 4) == []


def test_only_summaries_travel_along_the_sequence():
  sizes = collectives("sequence", 512, 8)
  assert max(sizes) == ROWS * (512 // 8) * HEADS * DIM
  assert sizes.count(max(sizes)) == 2  # of keys and of values


# --- Transformations (rung 9) ---------------------------------------------------------------------


LAYER = dict(chunk_size=4, implementation="xla")


def loss_over_layers(function, scan):
  """The loss of `function` applied to `value` once per scale, as a loop or a scan with remat."""
  arrays = {n: np.float32(x) for n, x in make_inputs("plain", 4).items()}
  value, scales = arrays.pop("value"), np.float32([1.0, 0.5])

  def layer(x, scale):
    output = function(**arrays | dict(key=scale * arrays["key"]), value=x)[0]
    return x + output, None

  def loss(value, scales):
    if scan:
      return jnp.sum(jax.lax.scan(jax.checkpoint(layer), value, scales)[0] ** 2)
    for scale in scales:
      value, _ = layer(value, scale)
    return jnp.sum(value**2)

  return jax.jit(jax.value_and_grad(loss, (0, 1)))(value, scales)


@functools.cache
def loss_of_the_loop():
  return loss_over_layers(functools.partial(rat_attention, **LAYER), scan=False)


@pytest.mark.slow
@pytest.mark.parametrize("mesh_name", [None, "sequence"])
def test_remat_and_scan_over_layers_change_nothing(mesh_name):
  function = functools.partial(rat_attention, **LAYER)
  if mesh_name:
    mesh, split = make_mesh(mesh_name)
    function = functools.partial(sharded_rat_attention, mesh=mesh, **split, **LAYER)
  got = loss_over_layers(function, scan=True)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(loss_of_the_loop()), strict=True):
    assert relative_error(a, b)[0] <= LENGTH * np.finfo(np.float32).eps


@pytest.mark.slow
def test_vmap_is_a_loop():
  """Of the sharded form; the operator's own is in test_rat_attention."""
  arrays = {n: np.float32(x) for n, x in make_inputs("plain", 4).items()}
  scales = jnp.float32([1.0, -0.5])
  mesh, split = make_mesh("sequence")

  def output(scale, function):
    return function(**arrays | dict(query=scale * arrays["query"]), **LAYER)[0]

  whole = functools.partial(output, function=rat_attention)
  apart = functools.partial(
    output, function=functools.partial(sharded_rat_attention, mesh=mesh, **split)
  )
  got, truth = jax.jit(jax.vmap(apart))(scales), jax.jit(whole)
  for a, scale in zip(got, scales, strict=True):
    assert relative_error(a, truth(scale))[0] <= LENGTH * np.finfo(np.float32).eps


# --- Seeded faults: the comparison above must see each --------------------------------------------


def chunk_under_way_forgotten(patch):
  original = sharding._ends
  patch.setattr(sharding, "_ends", lambda *a, **o: [0 * x for x in original(*a, **o)])


def documents_counted_per_shard(patch):
  original = sharding.locate

  def change(segments, *rest):
    shard, documents = original(segments, *rest)
    return shard._replace(first=shard.before), documents

  patch.setattr(sharding, "locate", change)


def groups_of_the_first_device(patch):
  patch.setattr(sharding, "_own_groups", lambda inputs, axes: {
    n: inputs[n][:, :, jnp.arange(inputs["value"].shape[2]) % GROUPS] for n in ("query", "key")
  })  # fmt: skip


FAULTS = {
  chunk_under_way_forgotten: ("sequence", 13),
  documents_counted_per_shard: ("sequence", 4),
  groups_of_the_first_device: ("batch_and_heads", 4),
}


@pytest.mark.parametrize("fault", some_faults(FAULTS), ids=lambda fault: fault.__name__)
def test_seeded_fault_is_seen(fault, monkeypatch):
  truth = expected(FAULTS[fault][1])[1]
  fault(monkeypatch)
  mesh_name, chunk_size = FAULTS[fault]
  got = forward(sharded(mesh_name, chunk_size), chunk_size)
  with pytest.raises(AssertionError, match=r"error .* above"):
    check(got, truth)


# --- Bad arguments --------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("message", "options"),
  [
    (r"batch_axes must name axes .* \(did you mean 'data'\?\)", dict(batch_axes="dat")),
    (r"heads must be divisible by the 4 devices along \('data',\); got 6",
     dict(batch_axes=(), head_axes="data")),
    (r"length must be divisible by the 4 devices along \('data',\); got 47",
     dict(batch_axes=(), sequence_axis="data", cut=47)),
    (r"chunk_size must be at least 1; got 0", dict(chunk_size=0)),
  ],
)  # fmt: skip
def test_errors(message, options):
  cut = options.pop("cut", LENGTH)
  inputs = make_inputs("plain", 4)
  tokens = {n: x if n == "gate_bias" else x[:, :cut] for n, x in inputs.items()}
  options = dict(chunk_size=4, mesh=make_mesh("batch_and_heads")[0]) | options
  with pytest.raises(ValueError, match="^sharded_rat_attention: .*" + message):
    sharded_rat_attention(**tokens, **options)
