"""Lightning attention on NVIDIA GPUs: block sizes and launches of the Triton kernels.

Everything here is computed from sizes; triton itself is imported only when a launch is run.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ..triton_call import Gpu, Launch, block_of

KERNELS = f"{__package__}.triton_kernels"
MAX_DIM = 512
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
  segments: bool
  lengths: bool


@dataclasses.dataclass(frozen=True)
class Tile:
  """How one program of a sweep holds its slice of the state, [width, contracted axis]."""

  width: int
  num_warps: int
  num_stages: int


@dataclasses.dataclass(frozen=True)
class Config:
  """Block sizes of all sweeps of one problem."""

  chunk: int  # rows of one step
  pieces: int  # parts of the sequence that are swept side by side
  output: Tile  # the forward sweep, which contracts K
  over_key: Tile  # the other sweeps that contract K: dv, sums
  over_value: Tile  # sweeps that contract V: dq, dk


def choose_config(problem: Problem, gpu: Gpu, chunk_size: int | None = None) -> Config:
  """Block sizes by rule; nothing is timed.

  A forward sweep moves 2 (2 K + 2 V) bytes and does about 100 kFLOP per token and head of 128, so
  memory bounds it as long as every multiprocessor has a program. Heads that fill the GPU alone get
  one program each, eight warps and two chunks in flight; fewer heads get narrower tiles, which read
  query and key once more (from L2); still fewer split the sequence, which reads key and value once
  more, unless pieces got shorter than 8 chunks.
  """
  float32 = jnp.dtype(problem.dtype) == jnp.float32
  blocks = block_of(problem.key_dim), block_of(problem.value_dim)
  chunk = chunk_size or _chunk(max(blocks), float32, gpu)
  tile = _tile(blocks[0], float32, gpu)
  heads = problem.batch * problem.heads
  programs = heads * -(-problem.value_dim // tile.width)
  pieces = 1
  if programs < 0.75 * gpu.multiprocessors:
    chunks = -(-problem.length // chunk)
    pieces = max(1, min(-(-2 * gpu.multiprocessors // programs), chunks // 8, MAX_PIECES))
  output = tile
  if tile == _MAIN:
    if heads >= 0.7 * gpu.multiprocessors and blocks[1] >= 128:
      output = Tile(128, 8, 3)
    elif programs * pieces <= gpu.multiprocessors:
      output = Tile(64, 4, 3)  # one program per multiprocessor: room for one more chunk in flight
  return Config(chunk, pieces, output, tile, _tile(blocks[1], float32, gpu))


# Compiled for sm_90 this uses every register, 80 KiB of shared memory and the warpgroup products,
# and two programs share a multiprocessor, one loading while the other multiplies.
_MAIN = Tile(64, 4, 2)


def _chunk(dim: int, float32: bool, gpu: Gpu) -> int:
  """Rows of a chunk: what one warpgroup multiplies where there are warpgroups, else registers."""
  if float32:
    return 32 if dim <= 64 else 16
  if dim > 256:
    return 16
  return 64 if gpu.compute_capability // 10 in (9, 10) else 32


def _tile(dim: int, float32: bool, gpu: Gpu) -> Tile:
  """The tile of a sweep with a contracted axis of `dim`: a state of [width, dim] in registers."""
  if float32:
    if dim > 256:
      return Tile(16, 8, 1)
    return Tile(32 if dim <= 128 else 16, 4, 2)
  if dim <= 128:
    return _MAIN
  return Tile(64, 8, 2) if dim <= 256 else Tile(32, 8, 1)


def forward_launches(problem: Problem, config: Config) -> tuple[Launch, ...]:
  """Adds `sums` (where there are pieces), `output` and `final_state` to the arrays.

  Inputs: query, key, value, log_decay, initial_state, and segments and lengths where there are any.
  """
  launches = []
  if config.pieces > 1:
    launches.append(_sums(problem, config, ("key", "value"), "sums", reverse=False))
  outputs = dict(output=_rows(problem, problem.value_dim), final_state=_state(problem))
  inputs = ("query", "key", "value", *_positions(problem), "initial_state", _sums_name(config))
  launches.append(_over_key(problem, config, "forward_kernel", inputs, outputs, config.output))
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
  tile = config.over_key
  if problem.key_dim == problem.value_dim and tile == config.over_value:
    kernel, outputs = "gradients_kernel", of_value | of_keys
    launches.append(_over_key(problem, config, kernel, arrays, outputs, tile, roles=3))
    return tuple(launches)
  few = ("query", "key", *_positions(problem), "d_output", "d_final_state", d_sums)
  launches.append(_over_key(problem, config, "value_gradient_kernel", few, of_value, tile))
  dims = (problem.value_dim, problem.key_dim)
  kernel, tile = "key_query_gradient_kernel", config.over_value
  launches.append(_sweep(problem, config, kernel, arrays, of_keys, tile, dims, roles=2))
  return tuple(launches)


def _over_key(problem, config, kernel, inputs, outputs, tile, **more):
  dims = (problem.key_dim, problem.value_dim)
  return _sweep(problem, config, kernel, inputs, outputs, tile, dims, **more)


def _sums(problem, config, pair, name, reverse):
  shape = (config.pieces - 1, *_state(problem).shape)
  outputs = {name: jax.ShapeDtypeStruct(shape, jnp.float32)}
  inputs, more = (*pair, *_positions(problem)), dict(skipped=1, REVERSE=reverse)
  return _over_key(problem, config, "sums_kernel", inputs, outputs, config.over_key, **more)


def _sweep(problem, config, kernel, inputs, outputs, tile, dims, roles=1, skipped=0, **more):
  """`dims` are the contracted axis and the columns; `roles` sweeps share a launch."""
  dim, width = dims
  heads = problem.batch * problem.heads
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
  grid = (roles * -(-width // tile.width) * heads * (config.pieces - skipped),)
  name = f"{KERNELS}:{kernel}"
  return Launch(name, grid, inputs, outputs, constants | more, tile.num_warps, tile.num_stages)


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
