"""Label-wise attention on NVIDIA GPUs: what the Triton kernels take, block sizes and launches.

Everything here is computed from sizes; triton itself is imported only when a launch is run.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from ..triton_call import Gpu, Launch, block_of, target_gpu, too_old

NAME = "code_attention"
KERNELS = f"{__package__}.triton_kernels"
GRADIENT_KERNELS = f"{__package__}.triton_gradient_kernels"
DTYPES = ("float32", "bfloat16", "float16")
MAX_DIM = 256  # the gradients of 64 keys and values fill the registers
SMALL_MEMORY = 128 << 10  # bytes; GPUs where a program may use less get smaller tiles
JOINED_ROWS = 16  # labels of a program that joins splits


@dataclasses.dataclass(frozen=True)
class Problem:
  """All that the launches depend on."""

  batch: int
  labels: int
  length: int
  key_dim: int
  value_dim: int
  dtype: str
  masked: bool
  scale: float


@dataclasses.dataclass(frozen=True)
class Tile:
  """What one program of a kernel has in hand: labels times tokens."""

  rows: int
  tokens: int
  num_warps: int
  num_stages: int


@dataclasses.dataclass(frozen=True)
class Config:
  """Block sizes of all kernels of one problem; the first three take equally many tokens."""

  forward: Tile
  drop: Tile
  query_gradient: Tile
  token_gradient: Tile
  splits: int  # programs that share the tokens of a document, forward
  drop_splits: int  # the same of the drop kernel
  parts: int  # of the batch, whose gradients of the queries are summed apart
  part_splits: int  # programs that share the tokens of such a part's documents


def fits(query: Any, key: Any, value: Any) -> str | None:
  """Why the kernels cannot take these arguments on the GPU that is compiled for; None: they can."""
  if query.dtype.name not in DTYPES:
    return f"query must be float32, bfloat16 or float16; got {query.dtype}"
  for name, array in (("key", key), ("value", value)):
    if array.shape[2] > MAX_DIM:
      return f"{name} must have at most {MAX_DIM} channels; got {array.shape[2]}"
  return too_old(target_gpu(NAME))


def tiles_of(problem: Problem, gpu: Gpu) -> tuple[Tile, Tile, Tile, Tile]:
  """Those of `Config`, by rule, from what the assembler says; nothing is timed.

  Tokens enter again for every block of labels, so that more labels at a time are fewer reads. In
  float32, whose products have three parts, a warp keeps both parts of its operands in registers:
  with over 128 channels 16 rows are what fits (two of the kernels then spill up to 100 numbers of
  each thread).
  """
  wide_key, wide_value = problem.key_dim > 128, problem.value_dim > 128
  if problem.dtype == "float32":
    if wide_key or wide_value:
      return Tile(16, 16, 4, 2), Tile(16, 16, 8, 2), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)
    return Tile(32, 32, 8, 2), Tile(16, 32, 4, 2), Tile(32, 32, 8, 1), Tile(16, 32, 8, 1)
  if gpu.shared_memory < SMALL_MEMORY:
    rows, stages = Tile(64, 32, 4, 2), 1 if wide_value else 2
    return rows, rows, Tile(64, 32, 8, stages), Tile(32, 32, 8, 2)
  rows, more = Tile(64, 64, 4, 2), Tile(128, 64, 8, 2)
  more = more if gpu.compute_capability >= 90 and problem.labels > 64 else rows
  by_token = Tile(16 if wide_key and wide_value else 32, 64, 8, 2)
  return more, rows if wide_value else more, Tile(64, 64, 8, 2), by_token


def choose_config(problem: Problem, gpu: Gpu) -> Config:
  """Block sizes, and as many programs as fill the GPU.

  With few labels several programs share the tokens of a document. With many the gradients of the
  queries are summed over as many documents as leave a few programs for each multiprocessor: what
  they write and another kernel adds up is then a fixed amount, whatever the batch.
  """
  tiles = forward, drop, query_gradient, _ = tiles_of(problem, gpu)
  splits, drop_splits, part_splits = (
    _splits(problem, tile, gpu) for tile in (forward, drop, query_gradient)
  )
  wanted = -(-4 * gpu.multiprocessors // -(-problem.labels // query_gradient.rows))
  parts = -(-problem.batch // max(1, problem.batch // wanted))
  return Config(*tiles, splits, drop_splits, parts, part_splits if parts == problem.batch else 1)


def _splits(problem, tile, gpu):
  """As many as make one program per multiprocessor, of at least two blocks of tokens."""
  programs = problem.batch * -(-problem.labels // tile.rows)
  blocks = -(-problem.length // tile.tokens)
  return max(1, min(gpu.multiprocessors // programs, blocks // 2))


def forward_launches(
  problem: Problem, config: Config, statistics: bool = True
) -> tuple[Launch, ...]:
  """Adds output, and with `statistics` top and inverse.

  Inputs: query, key, value, and where there is a mask real, blocks, filled.
  """
  tile, splits = config.forward, config.splits
  row = _of_labels(problem) if statistics else jax.ShapeDtypeStruct((1,), jnp.float32)
  results = dict(
    output=_of_labels(problem, problem.value_dim, dtype=problem.dtype), top=row, inverse=row
  )
  inputs = ("query", "key", "value", *_places(problem))
  constants = _constants(problem, tile) | dict(SPLITS=splits, STATISTICS=statistics)
  grid = (-(-problem.labels // tile.rows), problem.batch * splits)
  name = f"{KERNELS}:forward_kernel"
  if splits == 1:
    return (_launch(name, grid, inputs, results, constants, tile),)
  pieces = dict(
    parts=_of_labels(problem, problem.value_dim, splits=splits),
    part_top=_of_labels(problem, splits=splits),
    part_sum=_of_labels(problem, splits=splits),
  )
  first = _launch(name, grid, inputs, pieces, constants, tile)
  constants = {n: constants[n] for n in ("L", "V", "V_BLOCK", "SPLITS", "SCALE", "STATISTICS")}
  constants |= dict(ROWS=JOINED_ROWS)
  grid = (-(-problem.labels // JOINED_ROWS), problem.batch)
  name, tile = f"{KERNELS}:join_kernel", Tile(JOINED_ROWS, 1, 4, 1)
  return first, _launch(name, grid, tuple(pieces), results, constants, tile)


def backward_launches(problem: Problem, config: Config) -> tuple[Launch, ...]:
  """Adds part_drop, d_query_parts, whose sum is the gradient, d_key and d_value.

  Inputs: those of the forward pass, its top and inverse, d_output.
  """
  tile, splits = config.drop, config.drop_splits
  rows = ("top", "inverse", "d_output")
  inputs = ("query", "key", "value", *_places(problem), *rows)
  drop = _launch(
    f"{GRADIENT_KERNELS}:drop_kernel",
    (-(-problem.labels // tile.rows), problem.batch * splits),
    inputs,
    dict(part_drop=_of_labels(problem, splits=splits)),
    _constants(problem, tile) | dict(SPLITS=splits),
    tile,
  )
  shared = dict(DROPS=splits, FACTOR=problem.scale)
  tile, splits = config.query_gradient, config.part_splits
  pieces = config.parts * splits
  parts = jax.ShapeDtypeStruct((pieces, problem.labels, problem.key_dim), jnp.float32)
  of_query = _launch(
    f"{GRADIENT_KERNELS}:query_gradient_kernel",
    (-(-problem.labels // tile.rows), pieces),
    (*inputs, "part_drop"),
    dict(d_query_parts=parts),
    _constants(problem, tile) | shared | dict(B=problem.batch, SPLITS=splits, PARTS=config.parts),
    tile,
  )
  tile, tokens = config.token_gradient, (problem.batch, problem.length)
  dims, dtype = dict(d_key=problem.key_dim, d_value=problem.value_dim), jnp.dtype(problem.dtype)
  of_tokens = _launch(
    f"{GRADIENT_KERNELS}:token_gradient_kernel",
    (-(-problem.length // tile.tokens), problem.batch),
    ("query", "key", "value", _places(problem)[0], *rows, "part_drop"),
    {name: jax.ShapeDtypeStruct((*tokens, dim), dtype) for name, dim in dims.items()},
    _constants(problem, tile) | shared,
    tile,
  )
  return drop, of_query, of_tokens


def _constants(problem, tile):
  return dict(
    L=problem.labels,
    T=problem.length,
    K=problem.key_dim,
    V=problem.value_dim,
    ROWS=tile.rows,
    TILE=tile.tokens,
    K_BLOCK=block_of(problem.key_dim),
    V_BLOCK=block_of(problem.value_dim),
    SIGN=(problem.scale > 0) - (problem.scale < 0),
    SCALE=abs(problem.scale or 1.0) / math.log(2),  # products are 0 where the sign is
    MASKED=problem.masked,
    # float32 as three products of tf32 parts: close to float32 and still on the tensor cores.
    PRECISION="tf32x3" if problem.dtype == "float32" else "tf32",
  )


def _launch(kernel, grid, inputs, outputs, constants, tile):
  return Launch(kernel, grid, inputs, outputs, constants, tile.num_warps, tile.num_stages)


def _places(problem):
  """Inputs that say which tokens are real; absent ones are never read."""
  return ("real", "blocks", "filled") if problem.masked else ("query",) * 3


def _of_labels(problem, *dims, dtype="float32", splits=None):
  places = (problem.batch,) if splits is None else (problem.batch, splits)
  return jax.ShapeDtypeStruct((*places, problem.labels, *dims), jnp.dtype(dtype))
