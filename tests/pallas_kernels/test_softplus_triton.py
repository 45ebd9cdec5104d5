"""The Triton kernels of softplus attention: numerics in the interpreter, seeded faults, refusals.

What the compilers make of the kernels is in test_softplus_triton_aot.py.
"""

import concurrent.futures
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo.pallas_kernels import compat
from attnzoo.pallas_kernels.sliding_window_attention.history import Tokens
from attnzoo.pallas_kernels.softplus_attention import (
  LSSA,
  LSSAR,
  VARIANTS,
  Variant,
  cases,
  softplus_attention,
  triton,
  triton_vjp,
)
from attnzoo.pallas_kernels.softplus_attention.api import unit
from attnzoo.pallas_kernels.softplus_attention.reference import attend_reference
from attnzoo.pallas_kernels.softplus_attention.xla import softplus_attention_xla
from attnzoo_testing.cuda_aot import A100, H100, abstract_gpu
from attnzoo_testing.numerics import assert_as_exact, relative_error
from attnzoo_testing.triton_interpreter import interpret
from attnzoo_testing.triton_launches import (
  assert_imports_no_triton,
  changed,
  check_other_machines_refused,
  interpret_operator,
)

RESULTS = ("output", "d_query", "d_key", "d_value")


class Shape(NamedTuple):
  """`before`: keys of a state in front, of which some slots are empty; comes with documents."""

  batch: int
  length: int
  heads: int
  groups: int
  key_dim: int
  value_dim: int
  before: int


SHAPES = dict(
  # Three blocks of 16 rows, the last one of 5; the second has a whole block of keys before it.
  whole=Shape(1, 37, 2, 2, 16, 16, 0),
  packed=Shape(2, 21, 2, 1, 8, 20, 9),
)
ADD = Variant(power=15.0, epsilon="add", eps_first=1e-2, eps_second=1e-2)
CLAMP = Variant(power=3.0, epsilon="clamp", eps_first=8.0, eps_second=0.5)
# name: (shape, variant, dtype)
RUNS = {
  "lssa": ("whole", LSSA, "float32"),
  "lssar": ("whole", LSSAR, "float32"),
  "packed": ("packed", VARIANTS["lssar_p3"], "float32"),
  "packed_lssa": ("packed", LSSA, "float32"),
  "real_power": ("packed", Variant(power=2.5, scale=4.0, offset=0.5), "float32"),
  "power_one": ("packed", Variant(power=1.0, skip_rows=5), "float32"),
  "add": ("whole", ADD, "float32"),
  "clamp": ("whole", CLAMP, "float32"),
  "clamp_lssa": ("packed", Variant(epsilon="clamp", eps_first=8.0), "float32"),
  "narrow_lssa": ("whole", LSSA, "float16"),
  "narrow_lssar": ("whole", LSSAR, "float16"),
}
# Documents are tried with every tile masked, the others with those that need it.
TILES = dict(whole=triton.Tile(16, 16, 4, 2), packed=triton.Tile(16, 16, 4, 2, always=True))


# --- Arrays, truth, programs ----------------------------------------------------------------------


@functools.cache
def given(name) -> dict[str, np.ndarray]:
  """query, key (unit vectors), value, count, d_output, and documents where there are any."""
  size, _, dtype = (SHAPES[RUNS[name][0]], *RUNS[name][1:])
  batch, length, heads, groups, key_dim, value_dim, before = size
  total, rng = before + length, np.random.default_rng(0)
  shapes = dict(query=(batch, length, heads, key_dim), key=(batch, total, groups, key_dim))
  shapes |= dict(
    value=(batch, total, groups, value_dim), d_output=(batch, length, heads, value_dim)
  )
  arrays = {n: rng.standard_normal(shape) for n, shape in shapes.items()}
  if not before:
    arrays["key"][:, 1:12] = arrays["key"][:, :1]  # rows 4 to 12 are flat: all keys are equal
  arrays = {n: jnp.asarray(x, dtype) for n, x in arrays.items()}
  arrays |= {n: unit(arrays[n], 1e-12) for n in ("query", "key")}
  arrays = {n: np.asarray(x) for n, x in arrays.items()}
  if before:
    stored = np.where(np.arange(before) < 3 + np.arange(batch)[:, None], 0, -1)
    starts = np.zeros((batch, length), np.int32)
    starts[0, [5, 17]] = starts[1, [0, 1, 12]] = 1  # the second row has nothing of its state's
    arrays["documents"] = np.concatenate([stored, np.cumsum(starts, 1)], 1).astype(np.int32)
  return arrays | dict(count=np.sum(seen_of(arrays), 2, dtype=np.float32))


def seen_of(arrays):
  """[B, T, S]: which keys a query sees."""
  (batch, length), total = arrays["query"].shape[:2], arrays["key"].shape[1]
  position = total - length + np.arange(length)
  seen = np.tile(np.arange(total) <= position[:, None], (batch, 1, 1))
  if "documents" in arrays:
    documents = arrays["documents"]
    seen &= documents[:, position][:, :, None] == documents[:, None]
  return seen


def with_gradients(function, arrays, dtype):
  """RESULTS of function(query, key, value)."""
  tokens = (jnp.asarray(arrays[n], dtype) for n in ("query", "key", "value"))
  output, pull = jax.vjp(function, *tokens)
  gradients = pull(jnp.asarray(arrays["d_output"], output.dtype))
  return {n: np.asarray(x) for n, x in zip(RESULTS, (output, *gradients), strict=True)}


@functools.cache
def expected(name):
  """(from the inputs' dtype, the truth in float64); narrow inputs: by the portable path."""
  arrays, (_, variant, dtype) = given(name), RUNS[name]
  seen = seen_of(arrays)

  def definition(q, k, v):
    return attend_reference(q, k, v, seen, jnp.asarray(arrays["count"], q.dtype), variant)

  def portable(q, k, v):
    tokens = Tokens(k, v, arrays.get("documents"), q.shape[1])
    return softplus_attention_xla(q, tokens, jnp.asarray(arrays["count"]), variant, 64)

  narrow = definition if dtype == "float32" else jax.jit(portable)
  narrow = with_gradients(narrow, arrays, dtype)
  with jax.enable_x64(True):
    return narrow, with_gradients(definition, arrays, "float64")


@functools.cache
def program(name):
  """The launches of a forward and a backward pass, and their arrays."""
  arrays, variant = given(name), RUNS[name][1]
  if "documents" not in arrays:  # the rows are alike
    arrays = arrays | dict(count=arrays["count"][:1])
  problem = triton_vjp.problem_of(arrays, variant)
  arrays = arrays | jax.device_get(triton_vjp.prepared(arrays, variant))
  config = triton.Config(*[TILES[RUNS[name][0]]] * 3)
  launches = (triton.forward_launch(problem, config), *triton.backward_launches(problem, config))
  return launches, arrays


# --- Seeded faults --------------------------------------------------------------------------------


def fault(kernel, constants=None, **inputs):
  """`changed` launches, with an array of zeros to read instead of the right one."""

  def spoil(launches, arrays):
    arrays = arrays | dict(nothing=np.zeros((2, 4, 64), np.float32))
    return changed(launches, kernel, constants, **inputs), arrays

  return spoil


# (fault, run): every one of them must fail the comparison.
FAULTS = {
  "other_documents_seen": (fault("forward", dict(DOCUMENTS=False)), "packed"),
  "other_documents_backwards": (fault("key_gradient", dict(DOCUMENTS=False)), "packed"),
  "later_queries_forgotten": (fault("key_gradient", stop="documents"), "packed"),
  "nothing_through_the_mean": (fault("key_gradient", lift="nothing"), "lssar"),
  "sum_not_subtracted": (fault("key_gradient", drop="nothing"), "lssa"),
  "first_rows_offset": (fault("forward", dict(SKIP=0.0)), "lssar"),
  "another_power": (fault("row_gradient", dict(WHOLE=14)), "lssar"),
  "coarse_logarithm": (fault("forward", dict(DEGREE=4)), "lssa"),
}


def with_degree(name, dtype):
  """The program of a run with the polynomial of another dtype."""
  degree = triton.DEGREES[dtype][RUNS[name][1].power is not None]
  launches, arrays = program(name)
  constants = [launch.constants | dict(DEGREE=degree) for launch in launches]
  pairs = zip(launches, constants, strict=True)
  return tuple(dataclasses.replace(launch, constants=c) for launch, c in pairs), arrays


# --- Numerics -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interpreted():
  """Results by run and fault; one child runs all while the truth is computed here."""
  pytest.importorskip("triton")
  programs = {name: program(name) for name in RUNS}
  programs |= {name: fault(*program(run)) for name, (fault, run) in FAULTS.items()}
  programs |= {(name, "bfloat16"): with_degree(name, "bfloat16") for name in ("lssa", "lssar")}
  with concurrent.futures.ThreadPoolExecutor(1) as executor:
    results = executor.submit(interpret, list(programs.values()))
    for run in RUNS:
      expected(run)
    return dict(zip(programs, results.result(), strict=True))


def compare(got, run):
  return assert_as_exact(got, *expected(run), np.dtype(RUNS[run][2]))


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_interpreter(interpreted, run):
  compare(interpreted[run], run)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_seen(interpreted, fault):
  with pytest.raises(AssertionError, match="above"):
    compare(interpreted[fault], FAULTS[fault][1])


@pytest.mark.slow
@pytest.mark.parametrize("run", ["lssa", "lssar"])
def test_polynomial_of_bfloat16(interpreted, run):
  """The interpreter has no bfloat16; in float32, what is left of its error is the polynomial's."""
  truth, eps = expected(run)[1], float(jnp.finfo(jnp.bfloat16).eps)
  for name in RESULTS:
    error, _ = relative_error(interpreted[run, "bfloat16"][name], truth[name])
    finer, _ = relative_error(interpreted[run][name], truth[name])
    assert finer < error < eps / 16, name


@pytest.mark.slow
def test_flat_rows_have_neither_output_nor_gradient(interpreted):
  got = interpreted["lssar"]
  assert not np.any(got["output"][:, 3:12])
  assert not np.any(got["d_query"][:, 3:12])
  assert np.all(np.any(got["output"][:, 12:], -1))


@pytest.mark.slow
def test_differentiable_function(monkeypatch):
  """With the block sizes that a GPU would have; its launches are interpreted."""
  pytest.importorskip("triton")

  interpret_operator(monkeypatch, triton, triton_vjp, H100)
  arrays, (_, variant, dtype) = given("packed"), RUNS["packed"]

  def attend(q, k, v):
    tokens = Tokens(k, v, jnp.asarray(arrays["documents"]), q.shape[1])
    return triton_vjp.softplus_attention_triton(q, tokens, jnp.asarray(arrays["count"]), variant)

  compare(with_gradients(attend, arrays, dtype), "packed")


# --- Block sizes, refusals ------------------------------------------------------------------------


def problem_of(case, dtype):
  size = case.sizes
  before = 109 if case.options.get("state") else 0
  shape = (size["batch"], size["length"], size["length"] + before, size["heads"], size["kv_heads"])
  documents = bool(before or case.options.get("segments"))
  variant = cases.static_options(case)["variant"]
  dims = (size["key_dim"], size["value_dim"])
  return triton.Problem(*shape, *dims, dtype, not documents, documents, variant)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("gpu", [A100, H100], ids=["a100", "h100"])
def test_launches_cover_everything(dtype, gpu):
  for case in cases.CASES:
    problem = problem_of(case, dtype)
    config = triton.choose_config(problem, gpu)
    launches = (triton.forward_launch(problem, config), *triton.backward_launches(problem, config))
    written, read = {}, set()
    for launch in launches:
      constants = launch.constants
      by_key = "key_gradient" in launch.kernel
      block, length, heads = (
        (constants["TILE"], problem.total, problem.groups)
        if by_key
        else (constants["ROWS"], problem.length, problem.heads)
      )
      assert launch.grid == (-(-length // block) * heads, problem.batch)
      assert constants["K_BLOCK"] >= problem.key_dim
      assert constants["V_BLOCK"] >= problem.value_dim
      written, read = written | launch.outputs, read | set(launch.inputs)
    tokens = {"query", "key", "value", "scale", "count", "d_output"}
    assert read <= tokens | written.keys() | {"documents", "first", "stop"}
    assert {"output", "d_query", "d_key", "d_value"} <= written.keys()


def shapes(dtype="bfloat16", key_dim=16, value_dim=16):
  query, value = (jax.ShapeDtypeStruct((1, 8, 2, d), np.dtype(dtype)) for d in (key_dim, value_dim))
  return query, query, value


def refused(message, tokens=None, **options):
  attention = functools.partial(softplus_attention, implementation="triton", **options)
  with pytest.raises(NotImplementedError, match=message):
    jax.eval_shape(attention, *(tokens or shapes()))


@pytest.mark.skipif(not compat.has_jax_triton(), reason="no jax-triton here")
def test_refuses():
  with abstract_gpu():
    refused("query must have at most 128 channels per head; got 144", shapes(key_dim=144))
    refused("value must have at most 128 channels per head; got 256", shapes(value_dim=256))
    refused("variant.score must be 'softplus'; got 'exp'", variant=VARIANTS["softmax"])
    refused("variant.unit must be True; got False", variant=Variant(unit=False))
    refused("variant.offset must be at least 0; got -1", variant=Variant(power=3.0, offset=-1.0))
    refused("variant.normalization must be 'l1'; got 'mean'", variant=Variant(normalization="mean"))
    with jax.enable_x64(True):
      refused("query must be float32, bfloat16 or float16; got float64", shapes("float64"))
  with abstract_gpu("Voodoo 5"):
    refused("device kind must be one of")


def test_refuses_other_machines(monkeypatch):
  check_other_machines_refused(monkeypatch, refused, triton)


def test_triton_is_imported_only_to_launch():
  assert_imports_no_triton("attnzoo.pallas_kernels.softplus_attention.triton_vjp")
