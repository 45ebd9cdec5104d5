"""The Triton kernels of lightning attention: numerics in the interpreter, choices, refusals.

What the compilers make of them is in test_lightning_triton_aot.py.
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

from attnzoo.pallas_kernels import compat, lightning_attention
from attnzoo.pallas_kernels.cases import Case, tagged
from attnzoo.pallas_kernels.lightning_attention import triton
from attnzoo.pallas_kernels.lightning_attention.cases import CASES, make_inputs
from attnzoo.pallas_kernels.segments import run_index
from attnzoo_testing.cuda_aot import A100, H100, abstract_gpu
from attnzoo_testing.gradients import cotangents, results_and_gradients
from attnzoo_testing.numerics import assert_as_exact
from attnzoo_testing.triton_interpreter import interpret

NAMES = ("output", "final_state")
CI = {case.name: case for case in tagged(CASES, "ci")}
CHUNK = 32  # several chunks and pieces in the small cases
XLA = functools.partial(lightning_attention, implementation="xla", chunk_size=CHUNK)
REFERENCE = functools.partial(lightning_attention, implementation="reference")

needs_triton = pytest.mark.skipif(not compat.has_jax_triton(), reason="no jax-triton here")
needs_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU here")

# (case, dtype, pieces). "large_inputs" is not among the float16 ones: its scores overflow float16.
RUNS = [
  *((name, "float32", 1) for name in ("one_token", "below_one_chunk", "chunks_plus_one")),
  *((name, "float32", 1) for name in ("no_decay", "large_inputs", "packed_and_padded")),
  *((name, "float32", 2) for name in ("packed", "padded", "single_token_documents")),
  *((name, "float32", 3) for name in ("chunks_plus_one", "wide_key", "strong_decay")),
  ("packed_and_padded", "float32", 5),
  ("below_one_chunk", "float16", 1),
  ("no_decay", "float16", 1),
  ("packed", "float16", 2),
]


@functools.cache
def given(name, dtype):
  """(inputs, cotangents) of a case."""
  inputs = make_inputs(CI[name], np.dtype(dtype))
  return inputs, cotangents(XLA, inputs)


@functools.cache
def expected(name, dtype):
  """(results of the portable path, truth in float64) of a case."""
  inputs, cotangent = given(name, dtype)
  portable = results_and_gradients(XLA, inputs, cotangent, NAMES)
  with jax.enable_x64(True):
    wide = {n: x.astype(np.float64) if x.dtype.kind == "f" else x for n, x in inputs.items()}
    return portable, results_and_gradients(REFERENCE, wide, cotangent, NAMES)


def program(name, dtype, pieces):
  """The launches of a forward and a backward pass of a case, and their arrays."""
  inputs, cotangent = given(name, dtype)
  batch, length, heads, key_dim = inputs["query"].shape
  value_dim = inputs["value"].shape[3]
  state = np.zeros((batch, heads, key_dim, value_dim), np.float32)
  arrays = dict(log_decay=np.zeros(heads, np.float32), initial_state=state) | inputs
  if "segment_ids" in arrays:
    arrays["segments"] = np.asarray(run_index(jnp.asarray(arrays.pop("segment_ids"))))
  arrays |= dict(d_output=cotangent[0].astype(dtype))
  arrays |= dict(d_final_state=cotangent[1].astype(np.float32))
  sizes = (batch, length, heads, key_dim, value_dim)
  problem = triton.Problem(*sizes, dtype, "segments" in arrays, "lengths" in arrays)
  tile = triton.Tile(16, 4, 2)
  config = triton.Config(CHUNK, pieces, tile, tile, tile)
  launches = triton.forward_launches(problem, config) + triton.backward_launches(problem, config)
  return launches, arrays


def with_constants(**changes):
  """A fault: every launch with other constants."""

  def spoil(launches, arrays):
    changed = [
      dataclasses.replace(launch, constants=dict(launch.constants) | changes) for launch in launches
    ]
    return tuple(changed), arrays

  return spoil


def with_arrays(**changes):
  """A fault: arrays replaced by functions of all of them."""

  def spoil(launches, arrays):
    return launches, arrays | {name: change(arrays) for name, change in changes.items()}

  return spoil


def without_sums(launches, arrays):
  """A fault: pieces start from the initial state alone."""
  sums = {n: s for launch in launches for n, s in launch.outputs.items() if n.endswith("sums")}
  zeros = {name: np.zeros(shape.shape, np.float32) for name, shape in sums.items()}
  return tuple(launch for launch in launches if not sums.keys() & launch.outputs), arrays | zeros


def with_swapped_roles(launches, arrays):
  """A fault: query and key change places in the backward pass."""
  last = launches[-1]
  swap = {"query": "key", "key": "query"}
  inputs = tuple(swap.get(name, name) for name in last.inputs)
  return (*launches[:-1], dataclasses.replace(last, inputs=inputs)), arrays


SMALL = ("chunks_plus_one", "float32", 1)
# (fault, run): every one of them must fail the comparison.
FAULTS = {
  "decay_sign": (with_arrays(log_decay=lambda a: -a["log_decay"]), SMALL),
  "no_decay": (with_arrays(log_decay=lambda a: 0 * a["log_decay"]), SMALL),
  "documents_leak": (with_constants(SEGMENTS=False), ("single_token_documents", "float32", 2)),
  "padding_counted": (with_constants(LENGTHS=False), ("padded", "float32", 2)),
  "pieces_apart": (without_sums, ("chunks_plus_one", "float32", 3)),
  "piece_shortened": (with_constants(PIECE=CHUNK), ("chunks_plus_one", "float32", 3)),
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
  portable, truth = expected(*run[:2])
  # The gradient of the decay is the portable path's own.
  truth = {name: array for name, array in truth.items() if name != "d_log_decay"}
  return assert_as_exact(results, portable, truth, np.dtype(run[1]))


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS, ids=lambda run: "-".join(map(str, run)))
def test_interpreter(interpreted, run):
  compare(interpreted[run], run)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_seen(interpreted, fault):
  with pytest.raises(AssertionError, match="above"):
    compare(interpreted[fault], FAULTS[fault][1])


def test_interpreter_refuses_bfloat16():
  with pytest.raises(ValueError, match="query must be one of"):
    interpret([((), dict(query=np.zeros(1, jnp.bfloat16)))])


# --- Block sizes ----------------------------------------------------------------------------------


def choose(batch, length, heads, key_dim, value_dim=None, dtype="bfloat16", gpu=H100):
  sizes = (batch, length, heads, key_dim, value_dim or key_dim)
  problem = triton.Problem(*sizes, dtype, False, False)
  return problem, triton.choose_config(problem, gpu)


@pytest.mark.parametrize(
  ("sizes", "pieces"),
  [
    ((4, 4096, 64, 128), 1),  # 256 heads fill the GPU
    ((1, 8192, 96, 128), 1),
    ((4, 2048, 16, 128), 1),  # 128 programs of half a head
    ((2, 16384, 16, 128), 5),
    ((1, 65536, 1, 64), 16),  # no more than MAX_PIECES
    ((8, 1024, 8, 64), 2),  # no shorter than 8 chunks
    ((1, 512, 1, 64), 1),
    ((1, 1, 1, 64), 1),
  ],
)
def test_few_heads_split_the_sequence(sizes, pieces):
  problem, config = choose(*sizes)
  assert config.pieces == pieces
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
    roles = {"gradients_kernel": 3, "key_query_gradient_kernel": 2}.get(kernel, 1)
    pieces = constants["PIECES"] - (kernel == "sums_kernel")
    tiles = -(-constants["WIDTH"] // constants["WIDTH_BLOCK"])
    assert launch.grid == (roles * tiles * heads * pieces,)
    assert constants["DIM_BLOCK"] >= constants["DIM"]
    written |= launch.outputs
  wanted = {"output", "final_state", "d_query", "d_key", "d_value", "d_initial_state"}
  assert wanted == {name for name in written if not name.endswith("sums")}


# --- Refusals -------------------------------------------------------------------------------------


def shapes(dtype="bfloat16", dim=64):
  return (jax.ShapeDtypeStruct((1, 64, 2, dim), np.dtype(dtype)),) * 3


@needs_triton
@pytest.mark.parametrize(
  ("arrays", "options", "kind", "message"),
  [
    (shapes(dim=1024), {}, "NVIDIA H100", "head_dim must be at most"),
    (shapes(), dict(chunk_size=24), "NVIDIA H100", "chunk_size must be one of"),
    (shapes(), dict(chunk_size=128), "NVIDIA H100", "chunk_size must be one of"),
    (shapes("float64"), {}, "NVIDIA H100", "query must be float32, bfloat16 or float16"),
    (shapes(), {}, "Voodoo 5", "device kind must be one of"),
  ],
)
def test_refuses(arrays, options, kind, message):
  triton_attention = functools.partial(lightning_attention, implementation="triton", **options)
  raises = pytest.raises(NotImplementedError, match=message)
  with abstract_gpu(kind), jax.enable_x64(arrays[0].dtype == np.float64), raises:
    jax.eval_shape(triton_attention, *arrays)


def test_refuses_a_cpu():
  with pytest.raises(
    NotImplementedError, match="compiles only for an NVIDIA GPU|needs the packages"
  ):
    jax.eval_shape(functools.partial(lightning_attention, implementation="triton"), *shapes())


def test_triton_is_imported_only_to_launch():
  code = (
    "import sys, attnzoo.pallas_kernels.lightning_attention.triton_vjp\n"
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
  gpu_case("many_heads", 4, 1000, 40, 128, 128),
  gpu_case("few_heads", 1, 8192, 4, 64, 64),
  gpu_case("wide_key", 1, 4096, 4, 256, 128),
  gpu_case("wide", 2, 2048, 4, 256, 256),
  gpu_case("odd", 2, 777, 3, 40, 72),
  gpu_case("packed", 2, 4001, 2, 128, 128, segments="packed", lengths=True),
)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: case.name)
def test_gpu(case, dtype):
  inputs = make_inputs(case, jnp.dtype(dtype))
  xla = functools.partial(lightning_attention, implementation="xla")
  cotangent = cotangents(xla, inputs)
  portable = results_and_gradients(xla, inputs, cotangent, NAMES)
  kernel = functools.partial(lightning_attention, implementation="triton")
  got = results_and_gradients(kernel, inputs, cotangent, NAMES)
  with jax.enable_x64(True):
    wide = {
      n: x.astype(np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x
      for n, x in inputs.items()
    }
    truth = results_and_gradients(REFERENCE, wide, cotangent, NAMES)
  assert_as_exact(got, portable, truth, jnp.dtype(dtype))
