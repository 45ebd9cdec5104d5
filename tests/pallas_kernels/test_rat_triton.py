"""The Triton kernels of RAT attention: numerics in the interpreter, seeded faults.

Block sizes, refusals and a run on a GPU are in test_rat_triton_launches.py; what the compilers make
of the kernels is in test_rat_triton_aot.py.
"""

import concurrent.futures
import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo.pallas_kernels import compat
from attnzoo.pallas_kernels.cases import Case, tagged
from attnzoo.pallas_kernels.rat_attention import (
  cases,
  empty_state,
  layout,
  reference,
  triton,
  triton_vjp,
)
from attnzoo.pallas_kernels.segments import run_index, zero_padding
from attnzoo_testing.cuda_aot import H100
from attnzoo_testing.gradients import cotangents, results_and_gradients
from attnzoo_testing.numerics import assert_as_exact
from attnzoo_testing.triton_interpreter import interpret

SOME = {case.name: case for case in tagged(cases.CASES, "ci")}


def make_case(name, batch, length, heads, dim, chunk, groups, **options):
  sizes = dict(batch=batch, length=length, heads=heads, kv_heads=groups, key_dim=dim, value_dim=dim)
  return Case(name, (), sizes | dict(chunk=chunk), options)


SOME |= {
  case.name: case
  for case in (
    # Two tiles of slots, one of which a whole block of rows sees; three heads in two parts.
    make_case("two_tiles", 1, 50, 3, 8, 2, 1),
    make_case("padded", 3, 25, 4, 8, 4, 2, lengths=True),
    make_case("three_groups", 1, 33, 6, 6, 5, 3),
    make_case("documents", 3, 60, 2, 8, 3, 2, lengths=True),
  )
}

# Tokens of the documents of "documents".
DOCUMENTS = ((1, 30, 28, 1), (60,), (13, 1, 46))

needs_triton = pytest.mark.skipif(not compat.has_jax_triton(), reason="no jax-triton here")
needs_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU here")

SMALL = ("two_tiles", "float32")
# (case, dtype). Products of float32 and of narrower inputs are made in different orders.
RUNS = [
  SMALL,
  *((name, "float32") for name in ("odd_chunk_no_rotary", "large_inputs", "padded")),
  ("three_groups", "float32"),
  ("documents", "float32"),
  ("two_tiles", "float16"),
]
TOKENS = 13
EVERY = (1, 2, 3, 4, 6, 7, 12, 13, 14)  # chunk sizes of a row of so many tokens


@functools.cache
def given(name, dtype):
  """(inputs, cotangents) of a case."""
  inputs = cases.make_inputs(SOME[name], np.dtype(dtype))
  if name == "documents":
    ids = np.stack([np.repeat(np.arange(len(row)), row) for row in DOCUMENTS])
    inputs |= dict(segment_ids=ids.astype(np.int32), lengths=np.int32([60, 40, 0]))
  return inputs, cotangents(function("reference", name), inputs)


def function(implementation, name):
  options = cases.static_options(SOME[name])
  return functools.partial(cases.operator, implementation=implementation, **options)


@functools.cache
def expected(name, dtype):
  """Results of the definition: (from inputs of `dtype`, the truth in float64)."""
  inputs, cotangent = given(name, dtype)
  definition = function("reference", name)
  narrow = results_and_gradients(definition, inputs, cotangent, cases.RESULTS)
  with jax.enable_x64(True):
    wide = {n: x.astype(np.float64) if x.dtype.kind == "f" else x for n, x in inputs.items()}
    return narrow, results_and_gradients(definition, wide, cotangent, cases.RESULTS)


def small_tiles(problem, _=H100):
  """Block sizes that give small cases several of everything."""
  config, tile = triton.choose_config(problem, H100), triton.Tile(16, 16, 4, 2)
  lanes = dataclasses.replace(config.lanes, heads=min(2, config.lanes.heads))
  if problem.documents:
    lanes = dataclasses.replace(lanes, chunks=2)
  return triton.Config(lanes, tile, tile, tile, splits=2)


def with_documents(inputs, chunk_size):
  """`inputs` as the differentiable function has them."""
  if "segment_ids" not in inputs:
    return inputs
  segments = run_index(inputs["segment_ids"])
  return inputs | dict(documents=triton_vjp.documents_of(segments, inputs["lengths"], chunk_size))


def finish(inputs, chunk_size):
  """A function from the kernels' results to those of `cases.RESULTS`."""
  lengths, length = inputs.get("lengths"), inputs["value"].shape[1]

  def results(*kernels):
    if documents := inputs.get("documents"):
      output = zero_padding(kernels[0], lengths)
      state = layout.final_state(documents.found, documents.fits, *kernels[1:], chunk_size)
    else:
      output, state = triton_vjp.with_state(kernels, lengths, length, chunk_size)
    return output, *state[:4]

  return results


def program(inputs, cotangent, options):
  """The launches of a forward and a backward pass, and their arrays."""
  arrays, inputs = dict(inputs), with_documents(inputs, options["chunk_size"])
  problem = triton_vjp.problem_of(inputs, **options)
  arrays |= jax.device_get(triton_vjp.prepared(inputs, **options))
  batch, _, heads, dim = inputs["value"].shape
  summaries = np.zeros((batch, problem.slots, heads, dim), problem.dtype)
  running = np.zeros((batch, heads, dim), np.float32)
  zeros = (np.zeros_like(inputs["value"]), summaries, summaries, running, running)
  last = finish(inputs, options["chunk_size"])
  results, pull = jax.vjp(last, *zeros)
  cotangent = tuple(jnp.asarray(c, r.dtype) for c, r in zip(cotangent, results, strict=True))
  names = ("d_output", "d_state_key", "d_state_value", "d_running_key", "d_running_value")
  arrays |= dict(zip(names, jax.device_get(pull(cotangent)), strict=True))
  config = small_tiles(problem)
  launches = triton.forward_launches(problem, config) + triton.backward_launches(problem, config)
  return launches, arrays


@functools.cache
def case_program(name, dtype):
  return program(*given(name, dtype), cases.static_options(SOME[name]))


def results_of(arrays, options):
  """Outputs and gradients by name, from the arrays after all launches."""
  arrays = triton_vjp.finished(with_documents(arrays, options["chunk_size"]), **options)
  kernels = (arrays[n] for n in ("output", "keys", "values", "running_key", "running_value"))
  last = finish(arrays, options["chunk_size"])
  return arrays | dict(zip(cases.RESULTS, last(*kernels), strict=True))


def compare(arrays, run):
  got = results_of(arrays, cases.static_options(SOME[run[0]]))
  return assert_as_exact(got, *expected(*run), np.dtype(run[1]))


# --- Seeded faults --------------------------------------------------------------------------------


def with_constants(kernel="", **changes):
  """A fault: launches of kernels with such a name have other constants."""

  def spoil(launches, arrays):
    changed = [
      dataclasses.replace(launch, constants=launch.constants | changes)
      if kernel in launch.kernel and changes.keys() <= launch.constants.keys()
      else launch
      for launch in launches
    ]
    return tuple(changed), arrays

  return spoil


def with_inputs(kernel="", **changes):
  """A fault: launches of kernels with such a name read other arrays."""

  def spoil(launches, arrays):
    changed = [
      dataclasses.replace(launch, inputs=tuple(changes.get(n, n) for n in launch.inputs))
      if kernel in launch.kernel
      else launch
      for launch in launches
    ]
    return tuple(changed), arrays

  return spoil


def without(*names):
  """A fault: these inputs are 0."""
  return lambda launches, arrays: (
    launches, arrays | {name: np.zeros_like(arrays[name]) for name in names}
  )  # fmt: skip


def without_launch(kernel):
  """A fault: a launch is forgotten; its results are 0."""

  def spoil(launches, arrays):
    gone = [launch for launch in launches if kernel in launch.kernel]
    zeros = {n: np.zeros(s.shape, s.dtype) for x in gone for n, s in x.outputs.items()}
    return tuple(launch for launch in launches if launch not in gone), arrays | zeros

  return spoil


def with_arrays(**changes):
  """A fault: these inputs are functions of what they should be."""
  return lambda launches, arrays: (
    launches, arrays | {name: np.asarray(f(arrays[name])) for name, f in changes.items()}
  )  # fmt: skip


LAST = "recurrence_gradient_kernel"
PACKED = ("documents", "float32")
# (fault, run): every one of them must fail the comparison.
FAULTS = {
  "future_seen": (with_constants("attend_kernel", L=1), SMALL),
  "own_chunk_unseen_backwards": (with_constants("row_gradient_kernel", L=3), SMALL),
  "rows_counted_twice": (with_constants("slot_gradient_kernel", SPLITS=1), SMALL),
  "half_of_the_rows": (with_constants(LAST, SPLITS=1), SMALL),
  "no_output_gate": (with_constants("attend_kernel", GATED=False), SMALL),
  "summaries_not_turned": (with_constants("recurrence_kernel", ROTARY=False), SMALL),
  "gradient_not_turned": (with_constants(LAST, ROTARY=False), SMALL),
  "query_not_turned": (with_inputs("attend_kernel", rotated="query"), SMALL),
  "padding_counted": (with_constants("recurrence_kernel", LENGTHS=False), ("padded", "float32")),
  "padding_counted_backwards": (with_constants(LAST, LENGTHS=False), ("padded", "float32")),
  "own_and_other_mixed": (with_inputs(LAST, rest="delta"), SMALL),
  "keys_and_values_mixed": (with_inputs(LAST, d_keys="d_values", d_values="d_keys"), SMALL),
  "summaries_without_gradient": (without_launch("slot_gradient_kernel"), SMALL),
  "state_without_gradient": (without("d_state_value"), SMALL),
  "running_sum_without_gradient": (without("d_running_key"), SMALL),
  "other_documents_seen": (with_arrays(first=lambda x: 0 * x), PACKED),
  "first_chunk_unseen": (with_arrays(first=lambda x: x + 1), PACKED),
  "first_chunk_unseen_backwards": (with_inputs("slot_gradient_kernel", first="last"), PACKED),
  "chunks_numbered_by_slot": (
    with_arrays(numbers=lambda x: 0 * x + np.arange(x.shape[1], dtype=np.int32) // 2),
    PACKED,
  ),
  "documents_not_restarted_backwards": (with_constants(LAST, DOCUMENTS=False), PACKED),
  "gate_without_gradient": (with_inputs("row_gradient_kernel", output_logits="value"), SMALL),
}


# --- Numerics -------------------------------------------------------------------------------------


def every_inputs():
  return cases.make_inputs(make_case("every", 1, TOKENS, 2, 4, 1, 1))


def every_options(chunk_size):
  return dict(chunk_size=chunk_size, rotary_base=10000.0)


@functools.cache
def every_function():
  """(inputs, cotangent, chunk size) -> output and gradients, compiled once for all chunk sizes."""

  names = tuple(every_inputs())
  definition = inspect.unwrap(reference.rat_attention_reference)  # its chunk_size may be traced

  @jax.jit
  def run(inputs, cotangent, chunk_size):
    def output(inputs):
      state = empty_state(1, TOKENS, 2, 4, inputs["value"].dtype)
      segments = jnp.zeros((1, TOKENS), jnp.int32)
      lengths = jnp.full((1,), TOKENS, jnp.int32)
      rest = (state, segments, lengths, chunk_size, 10000.0)
      return definition(*(inputs[n] for n in names), *rest)[0]

    result, pull = jax.vjp(output, inputs)
    (gradients,) = pull(cotangent.astype(result.dtype))
    return dict(output=result) | {f"d_{n}": x for n, x in gradients.items()}

  return run


def every_cotangent():
  return np.random.default_rng(2).standard_normal(every_inputs()["value"].shape)


def every_program(chunk_size):
  inputs = every_inputs()
  summaries = np.zeros((1, max(TOKENS // chunk_size, 1), 2, 4), np.float32)
  running = np.zeros((1, 2, 4), np.float32)
  cotangent = (every_cotangent(), summaries, summaries, running, running)
  return program(inputs, cotangent, every_options(chunk_size))


@pytest.fixture(scope="module")
def interpreted():
  """Results by run, fault and chunk size; one child runs all while the truth is computed here."""
  pytest.importorskip("triton")
  programs = {run: case_program(*run) for run in RUNS}
  programs |= {name: fault(*case_program(*run)) for name, (fault, run) in FAULTS.items()}
  programs |= {chunk_size: every_program(chunk_size) for chunk_size in EVERY}
  with concurrent.futures.ThreadPoolExecutor(1) as executor:
    results = executor.submit(interpret, list(programs.values()))
    for run in RUNS:
      expected(*run)
    return dict(zip(programs, results.result(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS, ids="-".join)
def test_interpreter(interpreted, run):
  compare(interpreted[run], run)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_seen(interpreted, fault):
  with pytest.raises(AssertionError, match="above"):
    compare(interpreted[fault], FAULTS[fault][1])


@pytest.mark.slow
def test_every_chunk_size(interpreted):
  """From softmax attention over gated keys (1) to a recurrent network (T), with gradients."""
  inputs, cotangent = every_inputs(), every_cotangent()
  for chunk_size in EVERY:
    narrow = every_function()(inputs, cotangent, chunk_size)
    with jax.enable_x64(True):
      wide = {name: np.float64(x) for name, x in inputs.items()}
      truth = every_function()(wide, cotangent, np.int32(chunk_size))
    if chunk_size >= TOKENS:  # rounding errors of 0 are no scale
      np.testing.assert_array_less(np.abs(truth.pop("d_query")), 1e-14)
    got = results_of(interpreted[chunk_size], every_options(chunk_size))
    assert_as_exact(got, narrow, truth, np.float32)


@pytest.mark.slow
def test_query_of_a_single_chunk_has_no_gradient(interpreted):
  """Its softmax has one entry; the rounding of values and output must not show."""
  for chunk_size in (TOKENS, TOKENS + 1):
    assert not np.any(interpreted[chunk_size]["d_query_own"])
    assert not np.any(interpreted[chunk_size]["d_rotated"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["padded", "single_token_documents", "packed_and_padded"])
def test_whole_operator(name, monkeypatch):
  """The differentiable function, its launches interpreted; also what is left to the softmax's."""
  pytest.importorskip("triton")

  def run_launches(launches, arrays, gpu):
    given = {n: x for n, x in arrays.items() if x is not None}
    shapes = {n: s for launch in launches for n, s in launch.outputs.items()}

    def run(given):
      after = interpret([(launches, {n: np.asarray(x) for n, x in given.items()})])[0]
      return {n: after[n] for n in shapes}

    return arrays | jax.pure_callback(run, shapes, given)

  monkeypatch.setattr(triton_vjp, "run_launches", run_launches)
  monkeypatch.setattr(triton_vjp, "target_gpu", lambda _: H100)
  monkeypatch.setattr(triton_vjp, "choose_config", small_tiles)
  monkeypatch.setattr(compat, "require_triton", lambda _: None)
  inputs, cotangent = given(name, "float32")
  got = results_and_gradients(function("triton", name), inputs, cotangent, cases.RESULTS)
  assert_as_exact(got, *expected(name, "float32"), np.float32)
