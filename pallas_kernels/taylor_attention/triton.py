"""Taylor attention on NVIDIA GPUs: block sizes and launches of the Triton kernels.

Everything here is computed from sizes; triton itself is imported only when a launch is run.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ..triton_call import Gpu, Launch, block_of, target_gpu
from .features import feature_count

KERNELS = f"{__package__}.triton_kernels"
GRADIENT_KERNELS = f"{__package__}.triton_gradient_kernels"
MAX_FEATURES = 32  # entries of a query: 16 columns of a state of 561 rows fit in registers
CHUNKS = (16, 32, 64)  # products need 16 rows; more than 64 do not fit in registers
MAX_PIECES = 16


@dataclasses.dataclass(frozen=True)
class Problem:
  """All that the launches depend on."""

  batch: int
  length: int
  heads: int
  key_dim: int
  value_dim: int
  dtype: str
  normalize: bool
  decay: bool
  segments: bool
  lengths: bool


@dataclasses.dataclass(frozen=True)
class Tile:
  """Columns of the value that one program holds, and how."""

  width: int
  num_warps: int
  num_stages: int


@dataclasses.dataclass(frozen=True)
class Config:
  """Block sizes of all sweeps of one problem."""

  chunk: int  # rows of one step
  pieces: int  # parts of the sequence that are swept side by side
  forward: Tile
  backward: Tile


def fits(key_dim: int, dtype: str, gpu: Gpu) -> bool:
  """Whether the kernels' 0/1 matrices, four of [F, P], and tiles fit in shared memory."""
  width = 2 if dtype == "bfloat16" else 4
  _, rows, tail = block_rows(key_dim)
  matrices = 4 * (2 * rows + tail) * block_of(key_dim) * width
  return key_dim <= MAX_FEATURES and matrices + width * 10240 <= gpu.shared_memory


def takes(function: str, key_dim: int, dtype: str, chunk_size: int | None) -> bool:
  """Whether the kernels can be used on the GPU that is compiled for."""
  return chunk_size in (None, *CHUNKS) and fits(key_dim, dtype, target_gpu(function))


def choose_config(problem: Problem, gpu: Gpu, chunk_size: int | None = None) -> Config:
  """Block sizes by rule; nothing is timed.

  A program of eight warps holds 64 columns of the state of F = 16 in registers, all that a
  multiprocessor has; wider states and wider numbers leave room for fewer. Chunks of 64, the least
  that Hopper's warpgroup products take, spilled 80 to 900 bytes per thread: with those the compiler
  keeps the 0/1 matrices in registers and writes them to shared memory in each step, with the older
  products they stay there. Where there are at most half as many programs as multiprocessors the
  sequence is split, into pieces of 8 chunks or more; where that is not enough the columns of the
  forward pass are split further, which makes the features once more per tile.
  """
  tile = _tile(block_rows(problem.key_dim)[1], problem.dtype)
  chunk = chunk_size or (32 if problem.dtype == "bfloat16" else 16)
  heads = problem.batch * problem.heads
  programs = heads * tiles_of(problem, tile)
  chunks = -(-problem.length // chunk)
  pieces = max(1, min(gpu.multiprocessors // programs, chunks // 8, MAX_PIECES))
  forward = tile
  while 2 * programs * pieces <= gpu.multiprocessors and forward.width > 16:
    forward = dataclasses.replace(forward, width=forward.width // 2)
    programs = heads * tiles_of(problem, forward)
  return Config(chunk, pieces, forward, tile)


def _tile(rows: int, dtype: str) -> Tile:
  """The tile for blocks of `rows`, 64 for F = 16."""
  if dtype == "bfloat16":
    width = 64 if rows <= 64 else 32 if rows <= 128 else 16
  else:
    width = 32 if rows <= 64 and dtype == "float16" else 16
  return Tile(width, 8, 2)


def block_rows(key_dim: int) -> tuple[int, int, int]:
  """(start, rows, tail): packed rows start.. are two blocks of `rows`, those before one of `tail`.

  Sizes are powers of two, as few as possible unused: 25, 64, 32 for the 153 rows of F = 16. The
  tail has the constant and the entries; the others are pairs only.
  """
  count = feature_count(key_dim)
  rows = max(16, 1 << (count // 2).bit_length() - 1)
  start = max(1 + key_dim, count - 2 * rows)
  return start, rows, block_of(start)


def tiles_of(problem: Problem, tile: Tile) -> int:
  return -(-problem.value_dim // tile.width)


def forward_launches(problem: Problem, config: Config) -> tuple[Launch, ...]:
  """Adds `sums` (where there are pieces), `output`, `total` and `final_state` to the arrays.

  Inputs: query, key, value, initial_state, and log_decay, segments, lengths where there are any.
  """
  launches = []
  if config.pieces > 1:
    inputs = ("key", "value", "key", "key")
    launches.append(_sums(problem, config, inputs, "sums", config.forward, reverse=False))
  outputs = dict(output=_rows(problem, problem.value_dim), total=_totals(problem))
  outputs["final_state"] = _state(problem)
  inputs = ("query", "key", "value", *_positions(problem), "initial_state", _sums_name(config))
  launches.append(
    _sweep(problem, config, f"{KERNELS}:forward_kernel", inputs, outputs, config.forward)
  )
  return tuple(launches)


def backward_launches(problem: Problem, config: Config) -> tuple[Launch, ...]:
  """Adds d_query, d_key, d_value and d_initial_state.

  Inputs: those of the forward pass, its `sums`, `output` and `total`, d_output and d_final_state.
  d_query and d_key have an axis of value tiles in front where there are several: `sum_tiles`.
  """
  launches, tile = [], config.backward
  totals = ("d_output", "query", "query")  # placeholders that are never read
  if problem.normalize:
    launches.append(_total_gradient(problem))
    totals = ("d_output", "total", "d_total")
  d_sums = _sums_name(config, "d_sums")
  if config.pieces > 1:
    inputs = ("query", *totals)
    launches.append(_sums(problem, config, inputs, "d_sums", tile, reverse=True))
  tokens = ("query", "key", "value", *_positions(problem))
  inputs = (*tokens, "initial_state", _sums_name(config), *totals)
  outputs = dict(d_query=_parts(problem, tile))
  name = f"{GRADIENT_KERNELS}:query_gradient_kernel"
  launches.append(_sweep(problem, config, name, inputs, outputs, tile))
  inputs = (*tokens, "d_final_state", d_sums, *totals)
  outputs = dict(d_key=_parts(problem, tile), d_value=_rows(problem, problem.value_dim))
  outputs["d_initial_state"] = _state(problem)
  name = f"{GRADIENT_KERNELS}:key_value_gradient_kernel"
  launches.append(_sweep(problem, config, name, inputs, outputs, tile))
  return tuple(launches)


def sum_tiles(part, dtype):
  """d_query or d_key of `backward_launches` as [B, T, H, F]."""
  return part if part.ndim == 4 else part.sum(0).astype(dtype)


def _sums(problem, config, inputs, name, tile, reverse):
  shape = (config.pieces - 1, *_state(problem).shape)
  outputs = {name: jax.ShapeDtypeStruct(shape, jnp.float32)}
  inputs, kernel = (*inputs, *_positions(problem)), f"{KERNELS}:sums_kernel"
  return _sweep(
    problem, config, kernel, inputs, outputs, tile, pieces=config.pieces - 1, REVERSE=reverse
  )


def _total_gradient(problem):
  count = problem.batch * problem.length * problem.heads
  width = block_of(problem.value_dim)
  block = max(1, 4096 // width)
  constants = dict(COUNT=count, V=problem.value_dim, V_BLOCK=width, BLOCK=block)
  inputs, outputs = ("output", "d_output", "total"), dict(d_total=_totals(problem))
  name = f"{GRADIENT_KERNELS}:total_gradient_kernel"
  return Launch(name, (-(-count // block),), inputs, outputs, constants, 4, 1)


def _sweep(problem, config, kernel, inputs, outputs, tile, pieces=None, **more):
  heads = problem.batch * problem.heads
  start, rows, tail = block_rows(problem.key_dim)
  constants = dict(
    HEADS_ALL=heads,
    T=problem.length,
    H=problem.heads,
    F=problem.key_dim,
    V=problem.value_dim,
    P=feature_count(problem.key_dim),
    F_BLOCK=block_of(problem.key_dim),
    ROWS=rows,
    TAIL=tail,
    START=start,
    WIDTH=tile.width,
    CHUNK=config.chunk,
    PIECE=piece_length(problem, config),
    PIECES=config.pieces,
    NORMALIZE=problem.normalize,
    DECAY=problem.decay,
    SEGMENTS=problem.segments,
    LENGTHS=problem.lengths,
    # float16 is multiplied as tf32, which has as many digits and does not overflow at 65504;
    # float32 as three products of tf32 parts, close to float32 and still on the tensor cores.
    WIDE=problem.dtype == "float16",
    PRECISION="tf32x3" if problem.dtype == "float32" else "tf32",
  )
  grid = (tiles_of(problem, tile) * heads * (pieces or config.pieces),)
  return Launch(kernel, grid, inputs, outputs, constants | more, tile.num_warps, tile.num_stages)


def piece_length(problem: Problem, config: Config) -> int:
  """Tokens of a piece: whole chunks."""
  chunks = -(-problem.length // config.chunk)
  return -(-chunks // config.pieces) * config.chunk


def _positions(problem):
  """Names of log_decay, segments and lengths, or of a placeholder that is never read."""
  present = (problem.decay, problem.segments, problem.lengths)
  names = zip(("log_decay", "segments", "lengths"), present, strict=True)
  return tuple(name if there else "query" for name, there in names)


def _sums_name(config, name="sums"):
  return name if config.pieces > 1 else "query"  # a placeholder that is never read


def _rows(problem, dim):
  shape = (problem.batch, problem.length, problem.heads, dim)
  return jax.ShapeDtypeStruct(shape, jnp.dtype(problem.dtype))


def _parts(problem, tile):
  """A gradient of query or key: one array, or one float32 array per value tile."""
  whole, tiles = _rows(problem, problem.key_dim), tiles_of(problem, tile)
  return whole if tiles == 1 else jax.ShapeDtypeStruct((tiles, *whole.shape), jnp.float32)


def _totals(problem):
  return jax.ShapeDtypeStruct((problem.batch, problem.length, problem.heads), jnp.float32)


def _state(problem):
  rows, columns = feature_count(problem.key_dim), problem.value_dim + 1
  return jax.ShapeDtypeStruct((problem.batch, problem.heads, rows, columns), jnp.float32)
