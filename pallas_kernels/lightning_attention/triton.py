"""Lightning attention on NVIDIA GPUs: block sizes and launches of the Triton kernels.

Everything here is computed from sizes; triton itself is imported only when a launch is run.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ..triton_call import Gpu, Launch

KERNELS = f"{__package__}.triton_kernels"
MAX_DIM = 512


@dataclasses.dataclass(frozen=True)
class Problem:
  """All that the launches depend on."""

  batch: int
  length: int
  heads: int
  key_dim: int
  value_dim: int
  dtype: str
  segments: bool
  lengths: bool


@dataclasses.dataclass(frozen=True)
class Tile:
  """How one program of a sweep holds its slice of the state, [contracted axis, width]."""

  width: int
  num_warps: int
  num_stages: int


@dataclasses.dataclass(frozen=True)
class Config:
  """Block sizes of all sweeps of one problem."""

  chunk: int  # rows of one step
  pieces: int  # parts of the sequence that are swept side by side
  over_key: Tile  # sweeps that contract K: output, dv
  over_value: Tile  # sweeps that contract V: dq, dk


def choose_config(problem: Problem, gpu: Gpu, chunk_size: int | None = None) -> Config:
  """Block sizes by rule; nothing is timed.

  A sweep is bound by memory traffic as long as enough programs run, two per multiprocessor. Few
  heads therefore first split the sequence in pieces, which costs one more read of key and value,
  and only where that leaves pieces shorter than 8 chunks, take narrower tiles, which read query and
  key more often (from L2).
  """
  float32 = jnp.dtype(problem.dtype) == jnp.float32
  largest = max(block_of(problem.key_dim), block_of(problem.value_dim))
  chunk = chunk_size or _chunk(largest, float32)
  over_key = _tile(problem.key_dim, problem.value_dim, float32, gpu)
  over_value = _tile(problem.value_dim, problem.key_dim, float32, gpu)
  pieces = 1
  programs = problem.batch * problem.heads * -(-problem.value_dim // over_key.width)
  if programs < 0.75 * gpu.multiprocessors:
    chunks = -(-problem.length // chunk)
    wanted = -(-2 * gpu.multiprocessors // programs)
    pieces = max(1, min(wanted, chunks // 8, 16))
    if pieces < wanted // 2 and over_key.width > 32:
      over_key = dataclasses.replace(over_key, width=32)
  return Config(chunk, pieces, over_key, over_value)


def _chunk(dim: int, float32: bool) -> int:
  """64 rows are what one warpgroup multiplies; larger heads or elements must fit shared memory."""
  return 32 if float32 or dim > 256 else 64


def _tile(dim: int, width: int, float32: bool, gpu: Gpu) -> Tile:
  return Tile(64, 4, 2)


def block_of(dim: int) -> int:
  """Power of two that covers `dim`; matrix products need 16."""
  return max(16, 1 << (dim - 1).bit_length())


def forward_launches(problem: Problem, config: Config) -> tuple[Launch, ...]:
  """Adds `sums` (where there are pieces), `output` and `final_state` to the arrays.

  Inputs: query, key, value, log_decay, initial_state, and segments and lengths where there are any.
  """
  launches = []
  if config.pieces > 1:
    launches.append(_sums(problem, config, ("key", "value"), "sums", reverse=False))
  outputs = dict(output=_rows(problem, problem.value_dim), final_state=_state(problem))
  inputs = ("query", "key", "value", *_positions(problem), "initial_state", _sums_name(config))
  launches.append(_sweep(problem, config, "forward_kernel", inputs, outputs))
  return tuple(launches)


def backward_launches(problem: Problem, config: Config) -> tuple[Launch, ...]:
  """Adds d_query, d_key, d_value and d_initial_state.

  Inputs: those of the forward pass, its `sums`, d_output and d_final_state.
  """
  launches = []
  sums, d_sums = _sums_name(config), _sums_name(config, "d_sums")
  if config.pieces > 1:
    launches.append(_sums(problem, config, ("query", "d_output"), "d_sums", reverse=True))
  of_value = dict(d_value=_rows(problem, problem.value_dim), d_initial_state=_state(problem))
  of_keys = {name: _rows(problem, problem.key_dim) for name in ("d_key", "d_query")}
  arrays = ("query", "key", "value", *_positions(problem), "initial_state", sums)
  arrays += ("d_output", "d_final_state", d_sums)
  if problem.key_dim == problem.value_dim and config.over_key == config.over_value:
    kernel = "gradients_kernel"
    launches.append(_sweep(problem, config, kernel, arrays, of_value | of_keys, roles=3))
    return tuple(launches)
  few = ("query", "key", *_positions(problem), "d_output", "d_final_state", d_sums)
  launches.append(_sweep(problem, config, "value_gradient_kernel", few, of_value))
  kernel = "key_query_gradient_kernel"
  launches.append(_sweep(problem, config, kernel, arrays, of_keys, roles=2, over_value=True))
  return tuple(launches)


def _sweep(problem, config, kernel, inputs, outputs, roles=1, over_value=False, **more):
  dims = (problem.key_dim, problem.value_dim)
  dim, width = reversed(dims) if over_value else dims
  tile = config.over_value if over_value else config.over_key
  heads = problem.batch * problem.heads
  pieces = config.pieces - 1 if kernel == "sums_kernel" else config.pieces
  constants = dict(
    HEADS_ALL=heads,
    T=problem.length,
    H=problem.heads,
    DIM=dim,
    WIDTH=width,
    DIM_BLOCK=block_of(dim),
    WIDTH_BLOCK=tile.width,
    CHUNK=config.chunk,
    PIECE=piece_length(problem, config),
    PIECES=config.pieces,
    SEGMENTS=problem.segments,
    LENGTHS=problem.lengths,
    # float32 as three products of tf32 parts: close to float32 and still on the tensor cores.
    PRECISION="tf32x3",
  )
  grid = (roles * -(-width // tile.width) * heads * pieces,)
  name = f"{KERNELS}:{kernel}"
  return Launch(name, grid, inputs, outputs, constants | more, tile.num_warps, tile.num_stages)


def _sums(problem, config, pair, name, reverse):
  shape = (config.pieces - 1, *_state(problem).shape)
  outputs = {name: jax.ShapeDtypeStruct(shape, jnp.float32)}
  inputs = (*pair, *_positions(problem))
  return _sweep(problem, config, "sums_kernel", inputs, outputs, REVERSE=reverse)


def piece_length(problem: Problem, config: Config) -> int:
  """Tokens of a piece: whole chunks."""
  chunks = -(-problem.length // config.chunk)
  return -(-chunks // config.pieces) * config.chunk


def _positions(problem):
  """Names of the arrays in place of log_decay, segments and lengths; absent ones are never read."""
  segments = "segments" if problem.segments else "log_decay"
  return ("log_decay", segments, "lengths" if problem.lengths else "log_decay")


def _sums_name(config, name="sums"):
  return name if config.pieces > 1 else "log_decay"  # a placeholder that is never read


def _rows(problem, dim):
  shape = (problem.batch, problem.length, problem.heads, dim)
  return jax.ShapeDtypeStruct(shape, jnp.dtype(problem.dtype))


def _state(problem):
  shape = (problem.batch, problem.heads, problem.key_dim, problem.value_dim)
  return jax.ShapeDtypeStruct(shape, jnp.float32)
