"""The Triton kernels of membership "causal_recent": numerics, faults, machine code, a GPU."""

import concurrent.futures
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo.pallas_kernels import Routing, routed_attention
from attnzoo.pallas_kernels.cases import Case
from attnzoo.pallas_kernels.routed_attention import cases, triton, triton_recent
from attnzoo.pallas_kernels.routed_attention.recent_band import find_band
from attnzoo.pallas_kernels.routed_attention.state import Tokens
from attnzoo_testing.cuda_aot import A100, H100, compile_for_h100
from attnzoo_testing.gradients import results_and_gradients
from attnzoo_testing.numerics import assert_as_exact
from attnzoo_testing.triton_interpreter import interpret
from attnzoo_testing.triton_launches import (
  assert_imports_no_triton,
  changed,
  check_other_machines_refused,
  compare_on_gpu,
  interpret_operator,
  needs_gpu,
  needs_plugin,
  needs_triton,
  operations,
  resources_of,
)

RESULTS = ("output", "d_query", "d_key", "d_value")


class Run(NamedTuple):
  """A problem. `own`: keys have scores of their own; `packed`: three documents to a row."""

  batch: int
  length: int
  heads: int
  dims: tuple[int, int]
  window: int
  own: bool = True
  packed: bool = False
  dtype: str = "float32"


RUNS = {
  "own": Run(2, 45, 2, (16, 20), 7),
  "packed": Run(1, 45, 1, (17, 16), 4, packed=True),
  "shared": Run(1, 45, 2, (16, 17), 9, own=False),
  "narrow": Run(1, 40, 1, (8, 16), 9, dtype="float16"),
}
CONFIG = triton_recent.Config(*[triton.Tile(16, 16, 4, 1)] * 3)


# --- Arrays, truth, programs ----------------------------------------------------------------------


@functools.cache
def given(name) -> dict[str, Any]:
  """Arguments of `routed_attention`, and d_output; scores are of few centroids, with ties."""
  run, rng = RUNS[name], np.random.default_rng(0)
  rows = run.batch, run.length, run.heads
  dims = dict(query=run.dims[0], key=run.dims[0], value=run.dims[1], d_output=run.dims[1])
  arrays = {n: rng.standard_normal((*rows, dim)).astype(run.dtype) for n, dim in dims.items()}
  for scores in ("scores", "key_scores")[: 1 + run.own]:
    arrays[scores] = np.round(rng.standard_normal((*rows, 3)), 1).astype(np.float32) + 0.0
  if run.packed:
    arrays["segment_ids"] = np.repeat([0, 1, 0], [12, 9, 24])[None]
  return arrays


def results(name, implementation, dtype):
  """RESULTS of `routed_attention`."""
  fixed = dict(given(name))
  learned = {n: fixed.pop(n).astype(dtype) for n in ("query", "key", "value")}
  cotangent = (fixed.pop("d_output").astype(np.float64),)

  def call(**learned):
    return routed_attention(
      **learned, **fixed, options=Routing(RUNS[name].window, scale=0.3),
      implementation=implementation,
    )[:1]  # fmt: skip

  return results_and_gradients(call, learned, cotangent, ("output",))


@functools.cache
def expected(name):
  """(by the portable path, the truth in float64)."""
  narrow = results(name, "xla", RUNS[name].dtype)
  with jax.enable_x64(True):
    return narrow, results(name, "reference", "float64")


@functools.cache
def program(name):
  """The launches of a forward and a backward pass, and their arrays."""
  run, x = RUNS[name], given(name)
  documents = jnp.cumsum(jnp.diff(x["segment_ids"], prepend=0) != 0, 1) if run.packed else None
  own = jnp.asarray(x["key_scores" if run.own else "scores"])
  tokens = Tokens(jnp.asarray(x["key"]), jnp.asarray(x["value"]), own, documents)
  scores = jnp.asarray(x["scores"]) if run.own else None
  band = find_band(scores, tokens, run.length, run.window)
  arrays = {n: x[n] for n in ("query", "key", "value", "d_output")} | band._asdict()
  arrays["seen_by"] = triton_recent.seen_by(band, CONFIG.by_key.rows)
  problem = triton_recent.problem_of(arrays, 0.3)
  launches = triton_recent.forward_launches(problem, CONFIG)
  launches += triton_recent.backward_launches(problem, CONFIG)
  return launches, {n: np.asarray(a) for n, a in triton_recent.prepared(arrays).items()}


# --- Seeded faults --------------------------------------------------------------------------------


def fault(kernel, constants=None, **inputs):
  return lambda launches: changed(launches, kernel, constants, **inputs)


# (fault, run): every one of them must fail the comparison.
FAULTS = {
  "window_not_closed": (fault("forward", stop="behind"), "packed"),
  "window_not_opened": (fault("forward", start="nothing"), "packed"),
  "window_not_closed_backwards": (fault("band_query", stop="behind"), "packed"),
  "keys_seen_by_others": (fault("band_key", start="nothing"), "packed"),
  "mean_not_subtracted": (fault("band_key", drop="zeros"), "packed"),
  "queries_unsorted": (fault("forward", query_order="key_order"), "packed"),
  "keys_unsorted_backwards": (fault("band_key", key_order="query_order"), "packed"),
  "another_scale": (fault("band_key", dict(SCALE=0.25)), "shared"),
}


def spoiled(name, arrays):
  """The program of a fault from the first launch that it changes; what is before stands."""
  change, run = FAULTS[name]
  launches, _ = program(run)
  wrong = change(launches)
  first = next(n for n, pair in enumerate(zip(launches, wrong, strict=True)) if pair[0] != pair[1])
  stop = arrays["stop"]
  behind = np.minimum(stop + 1, RUNS[run].length).astype(np.int32)
  more = dict(behind=behind, nothing=np.zeros_like(stop), zeros=np.zeros_like(arrays["drop"]))
  return wrong[first:], arrays | more


# --- Numerics -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interpreted():
  """Arrays by run and fault; children run while the truth is computed here."""
  pytest.importorskip("triton")
  programs = [program(name) for name in RUNS]
  with concurrent.futures.ThreadPoolExecutor(1) as executor:

    def work():
      clean = dict(zip(RUNS, interpret(programs), strict=True))
      wrong = [spoiled(name, clean[FAULTS[name][1]]) for name in FAULTS]
      return clean | dict(zip(FAULTS, interpret(wrong), strict=True))

    arrays = executor.submit(work)
    for run in RUNS:
      expected(run)
    return arrays.result()


def compare(arrays, run):
  dims = (RUNS[run].dims[1], RUNS[run].dims[0], RUNS[run].dims[0], RUNS[run].dims[1])
  got = {n: arrays[n][..., :dim] for n, dim in zip(RESULTS, dims, strict=True)}
  return assert_as_exact(got, *expected(run), np.dtype(RUNS[run].dtype))


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
def test_public_function(monkeypatch):
  """With the block sizes that a GPU would have, in two pieces; its launches are interpreted."""
  pytest.importorskip("triton")
  interpret_operator(monkeypatch, triton, triton_recent, H100)
  x, options = dict(given("own")), Routing(RUNS["own"].window, scale=0.3)
  x.pop("d_output")
  call = functools.partial(routed_attention, options=options, implementation="triton")
  start, state = call(**{n: a[:, :20] for n, a in x.items()})
  end, _ = call(**{n: a[:, 20:] for n, a in x.items()}, initial_state=state)
  got = dict(output=np.concatenate([start, end], axis=1))
  narrow, truth = ({"output": found["output"]} for found in expected("own"))
  assert_as_exact(got, narrow, truth, np.dtype("float32"))


# --- What the compilers make of it ----------------------------------------------------------------

# (GPU, (B, T, S, H, K, V), dtype, most shared memory, most bytes spilled per thread).
COMPILED = {
  "h100": (H100, (1, 4096, 4096, 4, 64, 64), "bfloat16", 98304, 0),
  "h100-wide": (H100, (1, 8192, 8192, 4, 128, 128), "bfloat16", 131072, 0),
  "a100-float32": (A100, (1, 4096, 4096, 4, 64, 64), "float32", 65536, 64),
  "a100-widest": (A100, (1, 8192, 8192, 2, 129, 129), "bfloat16", 131072, 64),
}


@needs_triton
@pytest.mark.cuda_aot
@pytest.mark.parametrize("name", COMPILED)
def test_machine_code(name):
  gpu, sizes, dtype, shared_memory, spills = COMPILED[name]
  problem = triton_recent.Problem(*sizes, dtype, 0.125)
  config = triton_recent.choose_config(problem, gpu)
  launches = triton_recent.forward_launches(problem, config)
  launches += triton_recent.backward_launches(problem, config)
  dtypes = {n: "int32" for n in (*triton_recent.BAND, "seen_by")}
  dtypes |= dict.fromkeys(("query", "key", "value", "d_output"), dtype)
  found = resources_of(launches, dtypes, gpu)
  assert len(found) == 3
  for kernel, resources in found.items():
    print(name, kernel, resources)
    assert resources.spills <= spills, kernel
    assert resources.shared_memory <= shared_memory, kernel
    assert resources.tensor_cores > 0, kernel
    assert not resources.serialized, kernel


@needs_plugin
@pytest.mark.cuda_aot
@pytest.mark.parametrize("own", [True, False])
def test_whole_program(own):
  """On a GPU the kernels are the default: one launch forward, two backward, no larger arrays."""
  tokens = jax.ShapeDtypeStruct((1, 1024, 2, 32), jnp.bfloat16)
  scores = jax.ShapeDtypeStruct((1, 1024, 2, 4), jnp.float32)

  def run(query, key, value, scores, others):
    options = Routing(64)
    key_scores = others if own else None
    return routed_attention(query, key, value, scores, options=options, key_scores=key_scores)[0]

  def pull(cotangent, *arrays):
    return jax.vjp(lambda *x: run(*x, *arrays[3:]), *arrays[:3])[1](cotangent)

  arrays = (tokens, tokens, tokens, scores, scores)
  calls, _, largest = operations(compile_for_h100(run, *arrays))
  assert (calls, largest) == (1, 1024 * 2 * 32)
  calls, _, largest = operations(compile_for_h100(pull, tokens, *arrays))
  assert (calls, largest) == (3, 1024 * 2 * 32)


def refused(message, dtype="bfloat16", dim=16):
  tokens = jax.ShapeDtypeStruct((1, 8, 2, dim), np.dtype(dtype))
  scores = jax.ShapeDtypeStruct((1, 8, 2, 3), np.dtype(np.float32))
  call = functools.partial(routed_attention, options=Routing(4), implementation="triton")
  with pytest.raises(NotImplementedError, match=message):
    jax.eval_shape(call, tokens, tokens, tokens, scores)


def test_refuses_other_machines(monkeypatch):
  check_other_machines_refused(monkeypatch, refused, triton)


def test_triton_is_imported_only_to_launch():
  assert_imports_no_triton("attnzoo.pallas_kernels.routed_attention.triton_recent")


# --- On a GPU -------------------------------------------------------------------------------------


def make_case(name, batch, length, heads, dim, clusters, window, **options):
  sizes = dict(batch=batch, length=length, heads=heads, kv_heads=heads, key_dim=dim)
  options["routing"] = cases.RECENT
  return Case(name, (), sizes | dict(value_dim=dim, clusters=clusters, window=window), options)


GPU_CASES = (
  make_case("layer", 1, 4096, 4, 64, 8, 512),
  make_case("own", 1, 2048, 2, 64, 16, 64, unshared=True),
  make_case("odd", 2, 777, 3, 40, 5, 111, unshared=True, lengths=True, segments="packed"),
  make_case("widest", 1, 900, 2, 129, 4, 150, unshared=True),
)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: case.name)
def test_gpu(case, dtype):
  compare_on_gpu(cases, case, dtype, fixed=("scores", "key_scores"))
