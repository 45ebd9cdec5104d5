"""RAT attention on NVIDIA GPUs: block sizes and launches of the Triton kernels.

Forward: the recurrence writes own scores, own values (the running v~, in the dtype of the inputs)
and summaries; the softmax reads them. To write v~ and read it back moves as many bytes as to read
values and gate logits once more, needs no scan between threads, and leaves row blocks and chunks
independent of each other, so that any chunk size will do. Backward: rows, slots, recurrence; v~ is
not kept but made anew.

Everything here is computed from sizes; triton itself is imported only when a launch is run.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ..triton_call import Gpu, Launch, block_of, target_gpu, too_old

KERNELS = f"{__package__}.triton_kernels"
GRADIENT_KERNELS = f"{__package__}.triton_gradient_kernels"
MAX_DIM = 256  # two gradients of 16 slots fill the registers
MAX_SPLITS = 8


@dataclasses.dataclass(frozen=True)
class Problem:
  """All that the launches depend on."""

  batch: int
  length: int
  heads: int
  groups: int
  dim: int
  slots: int
  chunk_size: int  # 0: `first` and `last` say which slots a token sees, and there is no recurrence
  dtype: str
  rotary: bool
  gated: bool
  lengths: bool
  documents: bool = False  # each in slots of its own; which a token sees is said as well

  @property
  def chunks(self) -> int:
    return self.slots if self.documents else -(-self.length // self.chunk_size)

  @property
  def aligned(self) -> bool:
    """Whether a token's place says which slots it sees."""
    return self.chunk_size > 0 and not self.documents


@dataclasses.dataclass(frozen=True)
class Tile:
  """What one program of a softmax kernel holds: tokens times slots."""

  rows: int
  slots: int
  num_warps: int
  num_stages: int


@dataclasses.dataclass(frozen=True)
class Lanes:
  """Rows of the recurrence kernels' tiles: heads of each group, chunks, groups (powers of two)."""

  heads: int
  chunks: int
  groups: int
  half: int  # columns are two halves of the channels
  num_warps: int


@dataclasses.dataclass(frozen=True)
class Config:
  """Block sizes of all kernels of one problem."""

  lanes: Lanes
  forward: Tile
  row_gradient: Tile
  slot_gradient: Tile
  splits: int  # programs that share the rows of one tile of slots in the backward pass


def takes(function: str, dim: int) -> bool:
  """Whether the kernels can be used on the GPU that is compiled for."""
  return fits(dim, target_gpu(function))


def fits(dim: int, gpu: Gpu) -> bool:
  return dim <= MAX_DIM and not too_old(gpu)


def choose_config(problem: Problem, gpu: Gpu) -> Config:
  """Block sizes by rule; nothing is timed."""
  forward, row_gradient, slot_gradient = _tiles(problem)
  programs = problem.batch * problem.heads * -(-problem.slots // slot_gradient.slots)
  blocks = -(-problem.length // slot_gradient.rows)
  splits = max(1, min(2 * gpu.multiprocessors // programs, blocks // 4, MAX_SPLITS))
  return Config(_lanes(problem, gpu), forward, row_gradient, slot_gradient, splits)


def _lanes(problem: Problem, gpu: Gpu) -> Lanes:
  """Tiles of about 2048 numbers, 16 for each of 128 threads; all heads of a group where they fit.

  With as many heads as fit, gradients of query and key are summed over them where they are made.
  Several chunks are taken together where heads are few, but only while programs are many.
  """
  half = block_of((problem.dim + 1) // 2, 4)
  groups = block_of(problem.groups, 1)
  width = 2 * half * groups
  heads = block_of(problem.heads // problem.groups, 1)
  while heads > 1 and heads * width > 4096:
    heads //= 2
  chunks, parts = 1, problem.batch * -(-problem.heads // (problem.groups * heads))
  available = problem.chunks if problem.chunk_size else 1
  while heads * chunks * width < 2048 and 2 * chunks <= available:
    busy = parts * available // (2 * chunks) >= 2 * gpu.multiprocessors
    if not busy and heads * chunks * width >= 512:
      break
    chunks *= 2
  num_warps = max(1, min(16, heads * chunks * width // 512))
  return Lanes(heads, chunks, groups, half, num_warps)


def _tiles(problem: Problem) -> tuple[Tile, Tile, Tile]:
  """Tiles of forward, row gradient and slot gradient.

  64 rows and four warps leave room for two programs per multiprocessor, one of which loads while
  the other computes: a few tokens' summaries are less work than reading the tokens. With many
  summaries 128 rows read them half as often.
  """
  width = block_of(problem.dim)
  if problem.dtype == "float32":
    small = Tile(32, 32, 8, 2) if width <= 128 else Tile(16, 16, 8, 2)
    return small, small, small
  if width > 128:
    wide = Tile(32, 16, 4, 2)
    return wide, wide, wide
  forward = Tile(64, 64, 4, 2) if problem.slots <= 1024 else Tile(128, 64, 8, 2)
  return forward, Tile(64, 64, 4, 2), Tile(64, 64, 8, 2)


def forward_launches(
  problem: Problem, config: Config, statistics: bool = True
) -> tuple[Launch, ...]:
  """Adds own_score, own_value, keys, values, running_key, running_value, output, top and total.

  Inputs: query, key, value, gate_logits, gate_bias, rotated (the query, turned and scaled), and
  cos, sin, lengths, output_logits where there are any. With documents also begins [B, S + 1], the
  first token of each slot's chunk, numbers [B, S] of those chunks, and first and last.
  `attend_launch` alone where there is no chunk_size: then own_score, own_value, keys, values, first
  and last are inputs too.
  """
  launches = (recurrence_launch(problem, config),) if problem.chunk_size else ()
  return (*launches, attend_launch(problem, config, statistics))


def recurrence_launch(problem: Problem, config: Config) -> Launch:
  inputs = _tokens(problem)
  outputs = dict(
    own_score=_per_head(problem),
    own_value=_rows(problem),
    keys=_summaries(problem),
    values=_summaries(problem),
    running_key=_running(problem),
    running_value=_running(problem),
  )
  return _recurrence(problem, config, f"{KERNELS}:recurrence_kernel", inputs, outputs)


def attend_launch(problem: Problem, config: Config, statistics: bool) -> Launch:
  single = jax.ShapeDtypeStruct((1,), jnp.float32)
  rows = _per_head(problem) if statistics else single
  inputs = ("rotated", "keys", "values", "own_score", "own_value", *_seen(problem), _gate(problem))
  outputs = dict(output=_output(problem), top=rows, total=rows)
  constants = dict(GATED=problem.gated, STATISTICS=statistics)
  tile, kernel = config.forward, f"{KERNELS}:attend_kernel"
  blocks = -(-problem.length // tile.rows)
  return _softmax(problem, tile, kernel, inputs, outputs, (blocks,), constants)


def backward_launches(problem: Problem, config: Config) -> tuple[Launch, ...]:
  """Adds the gradients; `triton_vjp.finished` makes the last sums.

  Inputs: those of the forward pass, its results but `own_value`, d_output, and the cotangents of
  the final state d_state_key, d_state_value, d_running_key, d_running_value.
  """
  launches = attend_gradient_launches(problem, config)
  if not problem.chunk_size:
    return launches
  inputs = (*_tokens(problem), _cotangent(problem), "own", "rest", "d_keys", "d_values")
  inputs += ("d_state_key", "d_state_value", "d_running_key", "d_running_value")
  parts, tiles = _parts(problem, config.lanes), -(-problem.chunks // config.lanes.chunks)
  shape = (parts, problem.batch, problem.length, problem.groups, problem.dim)
  dtype = jnp.dtype(problem.dtype) if parts == 1 else jnp.float32
  outputs = dict(
    d_query_own=jax.ShapeDtypeStruct(shape, jnp.float32),
    d_key=jax.ShapeDtypeStruct(shape, dtype),
    d_value=_rows(problem),
    d_gate_logits=_rows(problem),
    d_gate_bias=_float32(problem.batch * tiles, problem.heads, problem.dim),
  )
  name = f"{GRADIENT_KERNELS}:recurrence_gradient_kernel"
  last = _recurrence(problem, config, name, inputs, outputs, SPLITS=config.splits)
  return (*launches, last)


def attend_gradient_launches(problem: Problem, config: Config) -> tuple[Launch, ...]:
  """Adds d_rotated per head, own, rest, delta, d_output_logits and d_ungated, d_keys, d_values."""
  inputs = ("rotated", "keys", "values", "own_score", *_seen(problem), _gate(problem))
  inputs += ("output", "top", "total", "d_output")
  gated = _rows(problem) if problem.gated else jax.ShapeDtypeStruct((1,), jnp.float32)
  outputs = dict(d_rotated=_rows(problem), d_output_logits=gated, d_ungated=gated)
  outputs |= dict.fromkeys(("own", "rest", "delta"), _per_head(problem))
  tile, name = config.row_gradient, f"{GRADIENT_KERNELS}:row_gradient_kernel"
  blocks = (-(-problem.length // tile.rows),)
  rows = _softmax(problem, tile, name, inputs, outputs, blocks, dict(GATED=problem.gated))
  inputs = ("rotated", "keys", "values", *_seen(problem), _cotangent(problem))
  inputs += ("top", "total", "delta")
  shape = (config.splits, problem.batch, problem.slots, problem.heads, problem.dim)
  outputs = dict.fromkeys(("d_keys", "d_values"), _float32(*shape))
  tile, name = config.slot_gradient, f"{GRADIENT_KERNELS}:slot_gradient_kernel"
  grid = (-(-problem.slots // tile.slots), config.splits)
  slots = _softmax(problem, tile, name, inputs, outputs, grid, dict(SPLITS=config.splits))
  return rows, slots


def _recurrence(problem, config, kernel, inputs, outputs, **more):
  lanes = config.lanes
  tiles = -(-problem.chunks // lanes.chunks)
  full = problem.aligned and problem.length == tiles * lanes.chunks * problem.chunk_size
  full &= problem.groups == lanes.groups and problem.dim == 2 * lanes.half
  full &= problem.heads == _parts(problem, lanes) * lanes.heads * lanes.groups
  constants = dict(
    T=problem.length,
    H=problem.heads,
    G=problem.groups,
    K=problem.dim,
    L=problem.chunk_size,
    S=problem.slots,
    HEADS=lanes.heads,
    CHUNKS=lanes.chunks,
    GROUPS=lanes.groups,
    HALF=lanes.half,
    ROTARY=problem.rotary,
    LENGTHS=problem.lengths,
    DOCUMENTS=problem.documents,
    FULL=full,
  )
  grid = (tiles, _parts(problem, lanes), problem.batch)
  return Launch(kernel, grid, inputs, outputs, constants | more, lanes.num_warps, 1)


def _softmax(problem, tile, kernel, inputs, outputs, blocks, more):
  constants = dict(
    T=problem.length,
    H=problem.heads,
    G=problem.groups,
    K=problem.dim,
    L=problem.chunk_size if problem.aligned else 0,
    S=problem.slots,
    K_BLOCK=block_of(problem.dim),
    ROWS=tile.rows,
    TILE=tile.slots,
    # float32 as three products of tf32 parts: close to float32 and still on the tensor cores.
    PRECISION="tf32x3" if problem.dtype == "float32" else "tf32",
  )
  first, *rest = blocks
  grid = (first * problem.heads, problem.batch, *rest)
  return Launch(kernel, grid, inputs, outputs, constants | more, tile.num_warps, tile.num_stages)


def _parts(problem, lanes):
  """Programs that each have some of the heads of a group."""
  return -(-problem.heads // (problem.groups * lanes.heads))


def _tokens(problem):
  """Inputs of the recurrence; absent tables are never read."""
  tables = ("cos", "sin") if problem.rotary else ("query", "query")
  chunks = ("begins", "numbers") if problem.documents else ("query", "query")
  lengths = "lengths" if problem.lengths else "query"
  return ("query", "key", "value", "gate_logits", "gate_bias", *tables, *chunks, lengths)


def _seen(problem):
  return ("rotated", "rotated") if problem.aligned else ("first", "last")


def _gate(problem):
  return "output_logits" if problem.gated else "rotated"


def _cotangent(problem):
  """Name of the cotangent of the ungated output."""
  return "d_ungated" if problem.gated else "d_output"


def _rows(problem):
  shape = (problem.batch, problem.length, problem.heads, problem.dim)
  return jax.ShapeDtypeStruct(shape, jnp.dtype(problem.dtype))


def _output(problem):
  """In the dtype of the inputs, but float32 where it is not the end of the operator."""
  rows = _rows(problem)
  return rows if problem.chunk_size else _float32(*rows.shape)


def _summaries(problem):
  shape = (problem.batch, problem.slots, problem.heads, problem.dim)
  return jax.ShapeDtypeStruct(shape, jnp.dtype(problem.dtype))


def _running(problem):
  return _float32(problem.batch, problem.heads, problem.dim)


def _per_head(problem):
  return _float32(problem.batch, problem.length, problem.heads)


def _float32(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)
