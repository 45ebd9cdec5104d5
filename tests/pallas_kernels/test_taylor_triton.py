"""The Triton kernels of Taylor attention: numerics in the interpreter, choices, refusals.

What the compilers make of them is in test_taylor_triton_aot.py.
"""

import concurrent.futures
import dataclasses
import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo.pallas_kernels import compat, taylor_attention
from attnzoo.pallas_kernels.cases import Case, tagged
from attnzoo.pallas_kernels.segments import run_index
from attnzoo.pallas_kernels.taylor_attention import triton
from attnzoo.pallas_kernels.taylor_attention.cases import CASES, make_inputs, static_options
from attnzoo.pallas_kernels.taylor_attention.features import feature_count
from attnzoo_testing.cuda_aot import A100, H100, abstract_gpu
from attnzoo_testing.gradients import cotangents, results_and_gradients
from attnzoo_testing.numerics import assert_as_exact
from attnzoo_testing.triton_interpreter import interpret

NAMES = ("output", "final_state")
SOME = {
  case.name: case
  for case in (
    *tagged(CASES, "ci"),
    Case("many_features", (), dict(batch=1, length=40, heads=1, key_dim=24, value_dim=20), {}),
    Case(
      "far_from_zero",
      (),
      dict(batch=1, length=70, heads=1, key_dim=4, value_dim=8),
      dict(scale=20.0, state=True),
    ),
  )
}
CHUNK = 64  # the small cases have up to three of them

needs_triton = pytest.mark.skipif(not compat.has_jax_triton(), reason="no jax-triton here")
needs_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU here")

# (case, dtype, pieces). In "far_from_zero" weights and features are above float16's largest number.
RUNS = [
  *((name, "float32", 1) for name in ("one_token", "below_one_chunk", "odd_features")),
  *((name, "float32", 1) for name in ("large_inputs", "many_features", "padded")),
  *((name, "float32", 2) for name in ("packed", "single_token_documents")),
  *((name, "float32", 2) for name in ("decayed", "not_normalized")),
  *((name, "float32", 3) for name in ("chunks_plus_one", "packed_and_padded")),
  ("below_one_chunk", "float16", 1),
  ("decayed", "float16", 2),
  ("far_from_zero", "float16", 1),
]


def options(name):
  return static_options(SOME[name])


@functools.cache
def given(name, dtype):
  """(inputs, cotangents) of a case."""
  inputs = make_inputs(SOME[name], np.dtype(dtype))
  return inputs, cotangents(function("xla", name), inputs)


def function(implementation, name):
  more = dict(chunk_size=CHUNK) if implementation == "xla" else {}
  return functools.partial(taylor_attention, implementation=implementation, **options(name), **more)


@functools.cache
def expected(name, dtype):
  """(results of the portable path, truth in float64) of a case."""
  inputs, cotangent = given(name, dtype)
  portable = results_and_gradients(function("xla", name), inputs, cotangent, NAMES)
  with jax.enable_x64(True):
    wide = {n: x.astype(np.float64) if x.dtype.kind == "f" else x for n, x in inputs.items()}
    reference = function("reference", name)
    return portable, results_and_gradients(reference, wide, cotangent, NAMES)


@functools.cache
def widened(name):
  """Results of the portable path in float32 for float16 inputs."""
  inputs, cotangent = given(name, "float16")
  inputs = {n: x.astype(np.float32) if x.dtype == np.float16 else x for n, x in inputs.items()}
  return results_and_gradients(function("xla", name), inputs, cotangent, NAMES)


def program(name, dtype, pieces):
  """The launches of a forward and a backward pass of a case, and their arrays."""
  inputs, cotangent = given(name, dtype)
  batch, length, heads, key_dim = inputs["query"].shape
  value_dim = inputs["value"].shape[3]
  state = np.zeros((batch, heads, feature_count(key_dim), value_dim + 1), np.float32)
  arrays = dict(initial_state=state) | inputs
  if "segment_ids" in arrays:
    arrays["segments"] = np.asarray(run_index(jnp.asarray(arrays.pop("segment_ids"))))
  arrays |= dict(d_output=cotangent[0].astype(dtype))
  arrays |= dict(d_final_state=cotangent[1].astype(np.float32))
  has = (name in arrays for name in ("log_decay", "segments", "lengths"))
  sizes = (batch, length, heads, key_dim, value_dim)
  problem = triton.Problem(*sizes, dtype, options(name)["normalize"], *has)
  tile = triton.Tile(16, 4, 2)
  config = triton.Config(CHUNK, pieces, tile, tile)
  launches = triton.forward_launches(problem, config) + triton.backward_launches(problem, config)
  return launches, arrays


def with_constants(**changes):
  """A fault: every launch with other constants."""

  def spoil(launches, arrays):
    changed = [
      dataclasses.replace(
        launch,
        constants=launch.constants | {n: x for n, x in changes.items() if n in launch.constants},
      )
      for launch in launches
    ]
    return tuple(changed), arrays

  return spoil


def with_arrays(**changes):
  """A fault: arrays replaced by functions of all of them."""

  def spoil(launches, arrays):
    return launches, arrays | {name: change(arrays) for name, change in changes.items()}

  return spoil


def without(name, fill=0.0):
  """A fault: what the launches write into an array with this ending is not seen."""

  def spoil(launches, arrays):
    found = {n: s for launch in launches for n, s in launch.outputs.items() if n.endswith(name)}
    filled = {n: np.full(s.shape, fill, s.dtype) for n, s in found.items()}
    return tuple(x for x in launches if not found.keys() & x.outputs), arrays | filled

  return spoil


def with_swapped_roles(launches, arrays):
  """A fault: query and key change places in the last launch."""
  last = launches[-1]
  swap = {"query": "key", "key": "query"}
  inputs = tuple(swap.get(name, name) for name in last.inputs)
  return (*launches[:-1], dataclasses.replace(last, inputs=inputs)), arrays


SMALL = ("below_one_chunk", "float32", 1)
SPLIT = ("chunks_plus_one", "float32", 3)
# (fault, run): every one of them must fail the comparison.
FAULTS = {
  "decay_sign": (with_arrays(log_decay=lambda a: -a["log_decay"]), ("decayed", "float32", 2)),
  "no_decay": (with_constants(DECAY=False), ("decayed", "float32", 2)),
  "documents_leak": (with_constants(SEGMENTS=False), ("single_token_documents", "float32", 2)),
  "padding_counted": (with_constants(LENGTHS=False), ("padded", "float32", 1)),
  "pieces_apart": (without("sums"), SPLIT),
  "piece_shortened": (with_constants(PIECE=CHUNK // 2), SPLIT),
  "not_divided": (with_constants(NORMALIZE=False), SMALL),
  "divided": (with_constants(NORMALIZE=True), ("not_normalized", "float32", 2)),
  "total_without_gradient": (without("d_total"), SMALL),
  "last_row_lost": (with_constants(P=44), SMALL),
  "roles_swapped": (with_swapped_roles, SMALL),
  "state_dropped": (with_arrays(initial_state=lambda a: 0 * a["initial_state"]), SMALL),
}


@pytest.fixture(scope="module")
def interpreted():
  """Results by run and by fault; one child runs them all while the truth is computed here."""
  pytest.importorskip("triton")
  programs = {run: program(*run) for run in RUNS}
  programs |= {name: fault(*program(*run)) for name, (fault, run) in FAULTS.items()}
  with concurrent.futures.ThreadPoolExecutor(1) as executor:
    results = executor.submit(interpret, list(programs.values()))
    for run in RUNS:
      expected(*run[:2])
    return dict(zip(programs, results.result(), strict=True))


def compare(results, run):
  name, dtype, _ = run
  portable, truth = expected(name, dtype)
  if name == "far_from_zero":  # where the portable path overflows: float16 inputs in float32
    portable = widened(name)
  results = dict(results)
  for part in ("d_query", "d_key"):
    results[part] = triton.sum_tiles(results[part], np.dtype(dtype))
  # The gradient of the decay is the portable path's own.
  truth = {name: array for name, array in truth.items() if name != "d_log_decay"}
  return assert_as_exact(results, portable, truth, np.dtype(dtype))


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS, ids=lambda run: "-".join(map(str, run)))
def test_interpreter(interpreted, run):
  compare(interpreted[run], run)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_seen(interpreted, fault):
  with pytest.raises(AssertionError, match="above"):
    compare(interpreted[fault], FAULTS[fault][1])


def test_portable_path_overflows_where_the_kernels_do_not():
  portable, _ = expected("far_from_zero", "float16")
  assert not np.isfinite(portable["output"]).all()


# --- Block sizes ----------------------------------------------------------------------------------


def choose(batch, length, heads, key_dim, value_dim, dtype="bfloat16", gpu=H100):
  sizes = (batch, length, heads, key_dim, value_dim)
  problem = triton.Problem(*sizes, dtype, True, False, False, False)
  return problem, triton.choose_config(problem, gpu)


@pytest.mark.parametrize("dim", range(1, triton.MAX_FEATURES + 1))
def test_blocks_hold_every_packed_row(dim):
  start, rows, tail = triton.block_rows(dim)
  assert start > dim  # the constant and the entries are in the tail
  assert start <= tail
  assert start < feature_count(dim) <= start + 2 * rows
  for size in (rows, tail):
    assert size >= 16
    assert size & (size - 1) == 0


@pytest.mark.parametrize(
  ("sizes", "pieces", "width"),
  [
    ((8, 2048, 16, 16, 64), 1, 64),  # 128 programs
    ((4, 2048, 16, 16, 64), 2, 64),
    ((4, 2048, 16, 16, 112), 1, 64),
    ((1, 65536, 1, 16, 64), 16, 16),  # no more than MAX_PIECES
    ((1, 1024, 16, 16, 64), 4, 32),  # no shorter than 8 chunks; columns are split then
    ((1, 1, 1, 16, 64), 1, 16),
  ],
)
def test_few_heads_split_the_sequence(sizes, pieces, width):
  problem, config = choose(*sizes)
  assert (config.pieces, config.forward.width) == (pieces, width)
  covered = triton.piece_length(problem, config) * pieces
  assert problem.length <= covered < problem.length + pieces * config.chunk
  assert triton.piece_length(problem, config) % config.chunk == 0


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("gpu", [A100, H100], ids=["a100", "h100"])
def test_launches_cover_everything(case, dtype, gpu):
  size = case.sizes
  dims = size["key_dim"], size["value_dim"]
  problem, config = choose(size["batch"], size["length"], size["heads"], *dims, dtype, gpu)
  heads = size["batch"] * size["heads"]
  written = {}
  launches = triton.forward_launches(problem, config)
  launches += triton.backward_launches(problem, config)
  for launch in launches:
    constants, kernel = launch.constants, launch.kernel.split(":")[1]
    written |= launch.outputs
    if kernel == "total_gradient_kernel":
      assert launch.grid[0] * constants["BLOCK"] >= heads * problem.length
      continue
    pieces = constants["PIECES"] - (kernel == "sums_kernel")
    tiles = -(-constants["V"] // constants["WIDTH"])
    assert launch.grid == (tiles * heads * pieces,)
    assert constants["F_BLOCK"] >= constants["F"]
  wanted = {"output", "total", "d_total", "final_state"}
  wanted |= {"d_query", "d_key", "d_value", "d_initial_state"}
  assert wanted == {name for name in written if not name.endswith("sums")}


# --- Refusals -------------------------------------------------------------------------------------


def shapes(dtype="bfloat16", dim=16):
  key = jax.ShapeDtypeStruct((1, 64, 2, dim), np.dtype(dtype))
  return key, key, jax.ShapeDtypeStruct((1, 64, 2, 24), np.dtype(dtype))


@needs_triton
@pytest.mark.parametrize(
  ("arrays", "options", "kind", "message"),
  [
    (shapes(dim=33), {}, "NVIDIA H100", "query must have fewer entries"),
    (shapes("float32", dim=32), {}, "NVIDIA A100", "query must have fewer entries"),
    (shapes(), dict(chunk_size=24), "NVIDIA H100", "chunk_size must be one of"),
    (shapes("float64"), {}, "NVIDIA H100", "query must be float32, bfloat16 or float16"),
    (shapes(), {}, "Voodoo 5", "device kind must be one of"),
  ],
)
def test_refuses(arrays, options, kind, message):
  attention = functools.partial(taylor_attention, implementation="triton", **options)
  raises = pytest.raises(NotImplementedError, match=message)
  with abstract_gpu(kind), jax.enable_x64(arrays[0].dtype == np.float64), raises:
    jax.eval_shape(attention, *arrays)


def test_refuses_a_cpu():
  with pytest.raises(
    NotImplementedError, match="compiles only for an NVIDIA GPU|needs the packages"
  ):
    jax.eval_shape(functools.partial(taylor_attention, implementation="triton"), *shapes())


def test_triton_is_imported_only_to_launch():
  code = (
    "import sys, attnzoo.pallas_kernels.taylor_attention.triton_vjp\n"
    "assert not {'triton', 'jax_triton'} & set(sys.modules)"
  )
  environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
  child = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
  assert child.returncode == 0


# --- On a GPU -------------------------------------------------------------------------------------


def gpu_case(name, batch, length, heads, key_dim, value_dim, **options):
  sizes = dict(batch=batch, length=length, heads=heads, key_dim=key_dim, value_dim=value_dim)
  return Case(name, (), sizes, options | dict(state=True))


GPU_CASES = (
  gpu_case("many_heads", 8, 1000, 20, 16, 64),
  gpu_case("two_tiles", 4, 1024, 16, 16, 112),
  gpu_case("few_heads", 1, 8192, 2, 16, 64),
  gpu_case("more_features", 1, 1024, 4, 24, 64),
  gpu_case("odd", 2, 777, 3, 5, 72, decay=True),
  gpu_case("packed", 2, 4001, 2, 16, 64, segments="packed", lengths=True, normalize=False),
)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: case.name)
def test_gpu(case, dtype):
  inputs = make_inputs(case, jnp.dtype(dtype))
  xla, kernel, reference = (
    functools.partial(taylor_attention, implementation=name, **static_options(case))
    for name in ("xla", "triton", "reference")
  )
  cotangent = cotangents(xla, inputs)
  portable = results_and_gradients(xla, inputs, cotangent, NAMES)
  got = results_and_gradients(kernel, inputs, cotangent, NAMES)
  with jax.enable_x64(True):
    wide = {
      n: x.astype(np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x
      for n, x in inputs.items()
    }
    truth = results_and_gradients(reference, wide, cotangent, NAMES)
  assert_as_exact(got, portable, truth, jnp.dtype(dtype))
