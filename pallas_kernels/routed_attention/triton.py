"""Routed attention on NVIDIA GPUs: what the Triton kernels take, block sizes and launches.

Forward: members, attention (one row per slot), combination of a token's slots. Backward: D of each
slot, gradients per slot, their combination, and with relative tables the tables' gradients. Nothing
is added up by atomics, so that results are the same in every run.

Everything here is computed from sizes; triton itself is imported only when a launch is run.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ..triton_call import Gpu, Launch, block_of, target_gpu, too_old
from .attend import Extras
from .options import Routing
from .state import Tokens

NAME = "routed_attention"
MEMBERS = f"{__package__}.triton_members"
KERNELS = f"{__package__}.triton_kernels"
GRADIENT_KERNELS = f"{__package__}.triton_gradient_kernels"
MAX_DIM = 129  # published; gradients of keys and values fill the registers
MAX_EXACT_RELATIVE_DIM = 64  # products of three parts beside tiles of tables: more are all spills
MAX_LENGTH = 16384  # a program has the scores of a whole row in its registers
MAX_ROWS = 65535  # of a grid's second axis
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Problem:
  """All that the launches depend on."""

  batch: int
  length: int
  heads: int
  clusters: int
  key_dim: int
  value_dim: int
  dtype: str
  shared_members: bool  # of queries and keys
  shared_key: bool  # query and key are one array
  relative: int  # rows of the relative tables; 0: none
  options: Routing

  @property
  def window(self) -> int:
    return min(self.options.window_size, self.length)


@dataclasses.dataclass(frozen=True)
class Tile:
  """What one program of a kernel has in hand: slots, and slots of the other side."""

  rows: int
  keys: int
  num_warps: int
  num_stages: int


@dataclasses.dataclass(frozen=True)
class Config:
  """Block sizes of all kernels of one problem. `table`: rows and keys are equal."""

  forward: Tile
  drop: Tile
  gradient: Tile
  table: Tile
  splits: int  # programs that share the pairs of one distance in the tables' gradients


def fits(query: Any, tokens: Tokens, scores: Any, options: Routing, extras: Extras) -> str | None:
  """Why the kernels cannot take these arguments on the GPU that is compiled for, or None."""
  if extras.memory is not None:
    return "memory_key must be None; got an array"
  if query.dtype.name not in DTYPES:
    return f"query must be float32, bfloat16 or float16; got {query.dtype}"
  if scores.dtype != jnp.float32:
    return f"scores must be float32; got {scores.dtype}"
  for name, array in (("query", query), ("value", tokens.value)):
    if array.shape[3] > MAX_DIM:
      return f"{name} must have at most {MAX_DIM} channels per head; got {array.shape[3]}"
  if extras.relative is not None and query.dtype.name == "float32":
    widest = max(query.shape[3], tokens.value.shape[3])
    if widest > MAX_EXACT_RELATIVE_DIM:
      return (
        f"query and value must have at most {MAX_EXACT_RELATIVE_DIM} channels per head in float32 "
        f"with relative_keys; got {widest}"
      )
  if options.membership == "official" and query.shape[1] > MAX_LENGTH:
    return f"query must have at most {MAX_LENGTH} tokens per row; got {query.shape[1]}"
  if query.shape[0] * query.shape[2] > MAX_ROWS:
    return f"query must have at most {MAX_ROWS} heads in all rows; got {query.shape}"
  return too_old(target_gpu(NAME))


def parts_of(dim: int) -> tuple[int, bool]:
  """(columns of the main part, whether one more comes last): 128 and True for 129."""
  last = dim - 1 >= 16 and block_of(dim - 1) == dim - 1
  return (dim - 1 if last else block_of(dim)), last


def padded(dim: int) -> int:
  """Channels of the kernels' rows: all rows begin at multiples of 16 bytes, or loads are scalar."""
  return -(-dim // 8) * 8


def choose_config(problem: Problem, gpu: Gpu) -> Config:
  """Block sizes by rule, from what the assembler says; nothing is timed.

  The backward kernel holds two gradients and two tiles of pairs. With relative tables, a tile of
  pairs is turned between slots and distances, which wants squares, and as many registers again.
  """
  wide = max(problem.key_dim, problem.value_dim) > 64
  tiles = -(-problem.window // 32)
  splits = max(1, min(2 * gpu.multiprocessors // tiles, problem.heads * problem.batch * 4))
  square, small = Tile(32, 32, 4, 2), Tile(16, 16, 4, 1)
  if problem.dtype == "float32":  # products of three parts need twice the registers
    if problem.relative:
      return Config(small, small, small, small, splits)
    most = Tile(32, 16, 4, 1)
    return Config(most, most, small if wide else most, small, splits)
  if problem.relative:
    more = Tile(32, 32, 8, 2) if max(problem.key_dim, problem.value_dim) > 128 else square
    gradient = Tile(32, 32, 8, 1) if wide else square
    return Config(more, more, gradient, dataclasses.replace(gradient, num_stages=1), splits)
  forward = Tile(64, 64, 8 if wide else 4, 2)
  drop = Tile(64, 32, 4, 2) if wide and gpu.compute_capability < 90 else forward
  return Config(forward, drop, Tile(64, 32, 8 if wide else 4, 2), square, splits)


def members_launch(problem: Problem, keys: bool = False) -> Launch:
  """Adds members and slot_of from scores; `keys`: key_members and key_slot_of from key_scores."""
  size = problem
  block = block_of(size.length, 32)
  shape = (size.batch, size.heads, size.clusters)
  before = "key_" if keys else ""
  outputs = {
    f"{before}members": jax.ShapeDtypeStruct((*shape, size.window), jnp.int32),
    f"{before}slot_of": jax.ShapeDtypeStruct((*shape, size.length), jnp.int16),
  }
  constants = dict(T=size.length, H=size.heads, C=size.clusters, W=size.window, T_BLOCK=block)
  grid = (size.clusters, size.batch * size.heads)
  warps = max(4, block // 1024)
  name = f"{MEMBERS}:members_kernel"
  return Launch(name, grid, (f"{before}scores",), outputs, constants, warps, 1)


def combine_launch(
  problem: Problem, source: str, result: str, slot_of: str, mean: bool = False
) -> Launch:
  """Adds `result` [B, T, H, D], sums over the slots of each token; `mean`: times share, added."""
  size = problem
  dim = size.key_dim if result in ("d_query", "d_key") else size.value_dim
  rows = 32
  outputs = {result: _tokens(size, dim)}
  single = jax.ShapeDtypeStruct((1,), jnp.float32)
  share = jax.ShapeDtypeStruct((size.batch, size.heads, size.length), jnp.float32)
  outputs["share" if mean else f"{result}_share"] = share if mean else single
  constants = dict(
    T=size.length,
    H=size.heads,
    C=size.clusters,
    W=size.window,
    D=dim,
    WIDTH=padded(dim),
    ROWS=rows,
    C_BLOCK=block_of(size.clusters, 1),
    D_BLOCK=block_of(dim),
    EPSILON=float(size.options.combine_eps),
    MEAN=mean,
  )
  grid = (-(-size.length // rows), size.batch * size.heads)
  return Launch(f"{MEMBERS}:combine_kernel", grid, (source, slot_of), outputs, constants, 4, 1)


def forward_launches(
  problem: Problem, config: Config, statistics: bool = True
) -> tuple[Launch, ...]:
  """Adds output, share, and what `members_launch` and `statistics` (top, inverse) add.

  Inputs, with the channels of `padded`: query, value, scores; key where it is not the query,
  key_scores where members are not shared, relative_keys and relative_values where there are any.
  """
  members = (members_launch(problem),)
  if not problem.shared_members:
    members += (members_launch(problem, keys=True),)
  single = jax.ShapeDtypeStruct((1,), jnp.float32)
  rows = _per_slot(problem) if statistics else single
  inputs = ("query", _key(problem), "value", *_members(problem), *_tables(problem))
  outputs = dict(slots=_slots(problem, problem.value_dim), top=rows, inverse=rows)
  name = f"{KERNELS}:forward_kernel"
  attend = _launch(
    problem, config.forward, name, inputs, outputs, _blocks(problem, config.forward),
    dict(STATISTICS=statistics),
  )  # fmt: skip
  return *members, attend, combine_launch(problem, "slots", "output", "slot_of", mean=True)


def backward_launches(problem: Problem, config: Config) -> tuple[Launch, ...]:
  """Adds d_query, d_value, d_key where it is not the query, and the partial sums of the tables.

  Inputs: those of the forward pass, what it added, d_output.
  """
  inputs = ("query", _key(problem), "value", "d_output", *_members(problem), *_tables(problem))
  inputs += ("top", "inverse")
  grid = _blocks(problem, config.drop)
  outputs = dict(drop=_per_slot(problem))
  name = f"{GRADIENT_KERNELS}:drop_kernel"
  drop = _launch(problem, config.drop, name, inputs, outputs, grid, {})

  inputs += ("share", "drop")
  keys = _slots(problem, problem.key_dim)
  single = jax.ShapeDtypeStruct((1,), jnp.dtype(problem.dtype))
  outputs = dict(
    d_query_slots=keys,
    d_key_slots=single if problem.shared_key else keys,
    d_value_slots=_slots(problem, problem.value_dim),
  )
  grid = _blocks(problem, config.gradient)
  name = f"{GRADIENT_KERNELS}:gradient_kernel"
  more = dict(SHARED_KEY=problem.shared_key)
  gradient = _launch(problem, config.gradient, name, inputs, outputs, grid, more)

  of_keys = "slot_of" if problem.shared_members else "key_slot_of"
  launches = (drop, gradient, combine_launch(problem, "d_query_slots", "d_query", "slot_of"))
  if not problem.shared_key:
    launches += (combine_launch(problem, "d_key_slots", "d_key", of_keys),)
  launches += (combine_launch(problem, "d_value_slots", "d_value", of_keys),)
  return (*launches, _table_launch(problem, config, inputs)) if problem.relative else launches


def _table_launch(problem, config, inputs):
  """The partial sums of the gradients of the relative tables, `triton_vjp.table_gradient`'s."""
  first, distances = distances_of(problem, config)
  shape = (distances, config.splits, 2 * config.table.rows)
  outputs = dict(
    d_relative_keys=jax.ShapeDtypeStruct((*shape, padded(problem.key_dim)), jnp.float32),
    d_relative_values=jax.ShapeDtypeStruct((*shape, padded(problem.value_dim)), jnp.float32),
  )
  name = f"{GRADIENT_KERNELS}:table_gradient_kernel"
  more = dict(BATCH=problem.batch, FIRST=first)
  return _launch(problem, config.table, name, inputs, outputs, (config.splits, distances), more)


def distances_of(problem: Problem, config: Config) -> tuple[int, int]:
  """(least, how many): by how many tiles keys lie behind queries that may see them."""
  tiles = -(-problem.window // config.table.rows)
  return (0, tiles) if _causal(problem) == "slot" else (1 - tiles, 2 * tiles - 1)


def _launch(problem, tile, kernel, inputs, outputs, grid, more):
  o = problem.options
  constants = channel_constants(problem) | dict(
    T=problem.length,
    H=problem.heads,
    C=problem.clusters,
    W=problem.window,
    ROWS=tile.rows,
    TILE=tile.keys,
    LIMIT=problem.relative // 2 if problem.relative else -1,
    SCALE=float(o.scale),
    CAUSAL=_causal(problem),
    SHARED=problem.shared_members,
    LAST_RESORT=o.own_pair == "last_resort",
    ZEROS_SEEN=o.zero_values_seen,
  )
  return Launch(kernel, grid, inputs, outputs, constants | more, tile.num_warps, tile.num_stages)


def channel_constants(problem: Any) -> dict[str, object]:
  """Of kernels with products, whatever the membership; needs key_dim, value_dim and dtype."""
  (key_block, key_last), (value_block, value_last) = map(
    parts_of, (problem.key_dim, problem.value_dim)
  )
  return dict(
    K=padded(problem.key_dim),
    V=padded(problem.value_dim),
    K_BLOCK=key_block,
    K_LAST=key_last,
    V_BLOCK=value_block,
    V_LAST=value_last,
    # float32 as three products of tf32 parts: close to float32 and still on the tensor cores.
    PRECISION="tf32x3" if problem.dtype == "float32" else "tf32",
  )


def _causal(problem):
  """Shared members stand in the order of their positions."""
  if not problem.options.causal:
    return "none"
  return "slot" if problem.shared_members or problem.options.mask == "rank" else "position"


def _blocks(problem, tile):
  return -(-problem.window // tile.rows) * problem.clusters, problem.batch * problem.heads


def _key(problem):
  return "query" if problem.shared_key else "key"


def _members(problem):
  return "members", "members" if problem.shared_members else "key_members"


def _tables(problem):
  """Inputs; absent ones are never read."""
  return ("relative_keys", "relative_values") if problem.relative else ("query", "query")


def _tokens(problem, dim):
  shape = (problem.batch, problem.length, problem.heads, dim)
  return jax.ShapeDtypeStruct(shape, jnp.dtype(problem.dtype))


def _slots(problem, dim):
  shape = (problem.batch, problem.heads, problem.clusters, problem.window, padded(dim))
  return jax.ShapeDtypeStruct(shape, jnp.dtype(problem.dtype))


def _per_slot(problem):
  shape = (problem.batch, problem.heads, problem.clusters, problem.window)
  return jax.ShapeDtypeStruct(shape, jnp.float32)
