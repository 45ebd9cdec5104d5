"""The TPU kernels of RAT attention, interpreted on the CPU against the definition in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from attnzoo.pallas_kernels.rat_attention import (
  cases,
  rat_attention,
  tpu_arrays,
  tpu_attend,
  tpu_backward,
  tpu_rows,
  tpu_softmax,
  tpu_tuning,
  tpu_vjp,
)
from attnzoo_testing.gradients import cotangents, results_and_gradients
from attnzoo_testing.marks import slow_but, some_faults, thinned
from attnzoo_testing.numerics import assert_as_exact
from attnzoo_testing.oracle import Oracle, widen

ORACLE = Oracle(cases.operator, cases, cases.RESULTS)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  """Several blocks of rows, tiles of summaries and turns of every loop in short sequences."""
  monkeypatch.setattr(tpu_rows, "LANES", 16)
  monkeypatch.setattr(tpu_rows, "PANEL", 32)
  monkeypatch.setattr(tpu_rows, "UNROLL", 1)
  monkeypatch.setattr(tpu_rows, "GROUP", 2)
  monkeypatch.setattr(tpu_tuning, "TILE", 8)
  monkeypatch.setattr(tpu_tuning, "WIDE_TILE", 8)
  monkeypatch.setattr(tpu_tuning, "MAX_ROWS", 32)
  monkeypatch.setattr(tpu_tuning, "ATTEND_ROWS", 32)


# Those of the cases that differ for the kernels; "packed", "whole_chunks" and "one_chunk" have
# tests of their own below.
CI = (
  "below_one_chunk", "chunks_of_one", "partial_chunk", "odd_chunk_no_rotary", "large_inputs",
  "packed_and_padded",
)  # fmt: skip


@pytest.mark.parametrize("name", slow_but(CI, "partial_chunk", "packed_and_padded"))
def test_float32_against_float64(name):
  ORACLE.compare(name, implementation="tpu", interpret=True)


@pytest.mark.slow
def test_chunks_longer_than_the_fused_kernel_takes(monkeypatch):
  monkeypatch.setattr(tpu_tuning, "LONGEST_CHUNK", 16)
  monkeypatch.setattr(tpu_vjp, "_rat", None)  # is not called
  ORACLE.compare("one_chunk", implementation="tpu", interpret=True)


@pytest.mark.slow
def test_heads_walk_alone_where_memory_is_short(monkeypatch):
  """Then query and key gradients of the heads are summed outside."""
  monkeypatch.setattr(tpu_tuning, "heads_inside", lambda *_: 1)
  ORACLE.compare("whole_chunks", implementation="tpu", interpret=True)


def test_padding_of_rows_is_as_if_not_there():
  """`lengths` without documents: the fused kernel and the last chunk once more."""
  inputs = cases.make_inputs(ORACLE.ci["whole_chunks"]) | dict(lengths=np.int32([0, 37]))
  options = dict(chunk_size=4, interpret=True)
  results = {}
  for implementation in ("tpu", "xla", "reference"):
    function = functools.partial(cases.operator, implementation=implementation, **options)
    cotangent = cotangents(function, inputs)
    arrays = inputs
    with jax.enable_x64(implementation == "reference"):
      if implementation == "reference":
        arrays = widen(inputs)
      results[implementation] = results_and_gradients(function, arrays, cotangent, cases.RESULTS)
  assert_as_exact(results["tpu"], results["xla"], results["reference"], np.float32)


@pytest.mark.parametrize(
  "name", thinned(["partial_chunk", "chunks_of_one", "packed"], slow=["partial_chunk", "packed"])
)
def test_bfloat16_against_float64(name):
  """To twice the error of the portable path in bfloat16."""
  inputs = cases.make_inputs(ORACLE.ci[name], jnp.bfloat16)
  wide = {n: x.astype(np.float64) if x.dtype.kind not in "iu" else x for n, x in inputs.items()}
  options = ORACLE.options(name)
  call = functools.partial(cases.operator, **options)
  cotangent = cotangents(functools.partial(call, implementation="xla"), inputs)
  cotangent = tuple(np.asarray(c, jnp.bfloat16).astype(np.float64) for c in cotangent)

  def run(arrays, **rest):
    return results_and_gradients(functools.partial(call, **rest), arrays, cotangent, cases.RESULTS)

  with jax.enable_x64(True):
    truth = run(wide, implementation="reference")
  got = run(inputs, implementation="tpu", interpret=True)
  assert_as_exact(got, run(inputs, implementation="xla"), truth, jnp.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("races", [False, True])
def test_tpu_memory_model(races):
  """The interpreter that knows TPU memories: unset scratch is NaN, parallel axes are shuffled."""
  name = "packed" if races else "partial_chunk"
  ORACLE.compare(name, implementation="tpu", interpret=pltpu.InterpretParams(detect_races=races))


def test_every_chunk_size_has_a_plan():
  """Whole tiles, even rows, chunks in a power of two; and no more padding than stated."""
  for dtype in (jnp.float32, jnp.bfloat16):
    for chunk_size in range(1, tpu_tuning.LONGEST_CHUNK + 1):
      query = jax.ShapeDtypeStruct((1, 700, 2, 16), dtype)
      value = jax.ShapeDtypeStruct((1, 700, 4, 16), dtype)
      plan = tpu_vjp.make_plan(query, value, None, chunk_size, 1e4, True)
      assert plan.chunk >= chunk_size
      assert plan.chunk <= chunk_size + 15
      assert plan.rows % tpu_rows.LANES == 0
      assert plan.chunks & (plan.chunks - 1) == 0
      assert plan.length >= 700
      assert plan.length % plan.rows == 0
      assert plan.rows % plan.panel == 0


def test_float16_is_refused():
  x = jnp.zeros((1, 4, 1, 8), jnp.float16)
  with pytest.raises(NotImplementedError, match="value must be float32 or bfloat16"):
    rat_attention(x, x, x, x, jnp.zeros((1, 8)), chunk_size=2, implementation="tpu", interpret=True)


# --- Faults that kernels of this kind are likely to have: the comparison must see each ------------


def own_summary_seen(patch):
  right = tpu_rows.visible
  patch.setattr(tpu_rows, "visible", lambda plan, step, *rest: right(plan, step + 1, *rest))


def scale_missing(patch):
  patch.setattr(tpu_rows.Plan, "scale", property(lambda plan: 1.0))


def rotated_by_the_next_chunk(patch):
  right = tpu_arrays.rotary_tables

  def wrong(positions, *rest):
    return right(positions + positions // 8, *rest)

  patch.setattr(tpu_arrays, "rotary_tables", wrong)


def weights_of_older_tiles_not_rescaled(patch):
  right = jnp.maximum

  def wrong(a, b):
    return b if getattr(b, "shape", ()) == (1, 32) else right(a, b)

  patch.setattr(tpu_softmax.jnp, "maximum", wrong)


def older_tiles_dropped(patch):
  patch.setattr(tpu_softmax, "add_tiles", lambda *_: None)


def bias_left_out(patch):
  right = tpu_arrays.to_lanes
  patch.setattr(tpu_arrays, "to_lanes", lambda plan, x: right(plan, 0 * x if x.ndim == 2 else x))


def query_and_key_gradients_swapped(patch):
  right = tpu_backward.backward

  def wrong(*args):
    dq, dk, *rest = right(*args)
    return dk, dq, *rest

  patch.setattr(tpu_backward, "backward", wrong)


def summaries_gradients_not_turned_back(patch):
  right = tpu_rows.turn

  def wrong(plan, x, tables, back=False):
    return right(plan, x, tables)

  patch.setattr(tpu_rows, "turn", wrong)


def reverse_recurrence_forgets_the_chunk_end(patch):
  right = tpu_rows.for_steps

  def wrong(plan, body, carry, reverse=False):
    carry = jax.tree.map(jnp.zeros_like, carry) if reverse else carry
    return right(plan, body, carry, reverse)

  patch.setattr(tpu_rows, "for_steps", wrong)


def documents_see_each_other(patch):
  right = tpu_attend._limits
  patch.setattr(tpu_attend, "_limits", lambda plan, first, last: right(plan, 0 * first, last))


FAULTS = {
  own_summary_seen: "output",
  scale_missing: "output",
  rotated_by_the_next_chunk: "output",
  weights_of_older_tiles_not_rescaled: "output",
  older_tiles_dropped: "output",
  bias_left_out: "output",
  query_and_key_gradients_swapped: "d_query",
  summaries_gradients_not_turned_back: "d_key",
  reverse_recurrence_forgets_the_chunk_end: "d_value",
}


@functools.cache
def small():
  """A problem in 3 blocks of 8 chunks of 4: inputs, and what the definition makes of it."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
  inputs = dict(query=2 * normal(1, 80, 1, 8), key=2 * normal(1, 80, 1, 8))
  inputs |= dict(value=normal(1, 80, 1, 8), gate_logits=normal(1, 80, 1, 8))
  inputs |= dict(gate_bias=1 + normal(1, 8))
  reference = functools.partial(only_output, implementation="reference")
  cotangent = cotangents(reference, inputs)
  narrow = results_and_gradients(reference, inputs, cotangent, ("output",))
  with jax.enable_x64(True):
    truth = results_and_gradients(reference, widen(inputs), cotangent, ("output",))
  return inputs, cotangent, narrow, truth


def only_output(**arguments):
  return rat_attention(**arguments, chunk_size=4)[:1]


def attempt(which):
  inputs, cotangent, narrow, truth = small()
  kernel = functools.partial(only_output, implementation="tpu", interpret=True)
  if which == "output":
    got = {"output": jax.jit(kernel)(**inputs)[0]}
  else:
    got = results_and_gradients(kernel, inputs, cotangent, ("output",))
  assert_as_exact(got, narrow, {name: truth[name] for name in got}, np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["output", "gradients"])
def test_no_fault(which):
  attempt(which)


@pytest.mark.parametrize("fault", some_faults(FAULTS), ids=lambda fault: fault.__name__)
def test_fault_is_found(fault, monkeypatch):
  small()  # before the fault is planted
  fault(monkeypatch)
  with pytest.raises(AssertionError, match=rf"{FAULTS[fault]}: error"):
    attempt(FAULTS[fault])


@pytest.mark.slow
def test_documents_that_see_each_other_are_found(monkeypatch):
  ORACLE.expected("packed")
  documents_see_each_other(monkeypatch)
  with pytest.raises(AssertionError, match="output: error"):
    ORACLE.compare("packed", implementation="tpu", interpret=True)
