"""Label-wise attention on NVIDIA GPUs: what the Triton kernels take, block sizes and launches.

Everything here is computed from sizes; triton itself is imported only when a launch is run.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from ..triton_call import Gpu, Launch, target_gpu

NAME = "code_attention"
KERNELS = f"{__package__}.triton_kernels"
GRADIENT_KERNELS = f"{__package__}.triton_gradient_kernels"
DTYPES = ("float32", "bfloat16", "float16")
MAX_DIM = 256  # two gradients of 64 tokens fill the registers
MIN_CAPABILITY = 80  # older ones have less than half of the shared memory, and no bfloat16
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
  """Block sizes of all kernels of one problem; forward and query_gradient take equal tokens."""

  forward: Tile
  query_gradient: Tile
  token_gradient: Tile
  splits: int  # programs that share the tokens of a document, forward
  parts: int  # of the batch, whose gradients of the queries are summed apart
  part_splits: int  # programs that share the tokens of such a part's documents


def fits(query: Any, key: Any, value: Any) -> str | None:
  """Why the kernels cannot take these arguments on the GPU that is compiled for; None: they can."""
  if query.dtype.name not in DTYPES:
    return f"query must be float32, bfloat16 or float16; got {query.dtype}"
  for name, array in (("key", key), ("value", value)):
    if array.shape[2] > MAX_DIM:
      return f"{name} must have at most {MAX_DIM} channels; got {array.shape[2]}"
  capability = target_gpu(NAME).compute_capability
  if capability < MIN_CAPABILITY:
    return f"the compute capability must be at least {MIN_CAPABILITY / 10}; got {capability / 10}"
  return None


def block_of(dim: int) -> int:
  """Power of two that covers `dim`; matrix products need 16."""
  return max(16, 1 << (dim - 1).bit_length())


def tiles_of(problem: Problem, gpu: Gpu) -> tuple[Tile, Tile, Tile]:
  """Those of `Config`, by rule, from what the assembler says; nothing is timed."""
  if problem.dtype == "float32":  # products of three parts need twice the registers
    return Tile(32, 32, 4, 2), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)
  return Tile(64, 64, 4, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)


def choose_config(problem: Problem, gpu: Gpu) -> Config:
  """Block sizes, and as many programs as fill the GPU.

  With few labels the programs of a document share its tokens. With many the gradients of the
  queries are summed over as many documents as leave a few programs for each multiprocessor: what
  they write and another kernel adds up is then a fixed amount, whatever the batch.
  """
  forward, query_gradient, token_gradient = tiles_of(problem, gpu)
  splits = _splits(problem, forward, gpu)
  wanted = -(-4 * gpu.multiprocessors // -(-problem.labels // query_gradient.rows))
  turns = max(1, problem.batch // wanted)  # documents of a part
  parts = -(-problem.batch // turns)
  part_splits = _splits(problem, query_gradient, gpu) if parts == problem.batch else 1
  return Config(forward, query_gradient, token_gradient, splits, parts, part_splits)


def _splits(problem, tile, gpu):
  """As many as make one program per multiprocessor, of at least two blocks of tokens."""
  programs = problem.batch * -(-problem.labels // tile.rows)
  blocks = -(-problem.length // tile.tokens)
  return max(1, min(gpu.multiprocessors // programs, blocks // 2))


def forward_launches(
  problem: Problem, config: Config, statistics: bool = True
) -> tuple[Launch, ...]:
  """Adds output, and with `statistics` lse and, where output is rounded, wide.

  Inputs: query, key, value, and where there is a mask real, blocks, filled.
  """
  keep = statistics and problem.dtype != "float32"
  results = dict(
    output=_of_labels(problem, problem.dtype, problem.value_dim),
    wide=_of_labels(problem, "float32", problem.value_dim) if keep else _nothing(),
    lse=_of_labels(problem, "float32") if statistics else _nothing(),
  )
  flags = dict(STATISTICS=statistics, WIDE=keep)
  inputs, splits = ("query", "key", "value", *_places(problem)), config.splits
  constants = _constants(problem, config.forward) | dict(SPLITS=splits)
  grid = (-(-problem.labels // config.forward.rows), problem.batch * splits)
  name = f"{KERNELS}:forward_kernel"
  if splits == 1:
    return (_launch(name, grid, inputs, results, constants | flags, config.forward),)
  pieces = dict(
    parts=_of_labels(problem, "float32", problem.value_dim, splits),
    no_wide=_nothing(),
    part_lse=_of_labels(problem, "float32", splits=splits),
  )
  apart = dict(STATISTICS=True, WIDE=False)
  first = _launch(name, grid, inputs, pieces, constants | apart, config.forward)
  joined = Tile(JOINED_ROWS, 1, 4, 1)
  constants = {n: constants[n] for n in ("L", "V", "V_BLOCK", "SPLITS")} | dict(ROWS=JOINED_ROWS)
  grid = (-(-problem.labels // JOINED_ROWS), problem.batch)
  inputs = ("parts", "part_lse")
  second = _launch(f"{KERNELS}:join_kernel", grid, inputs, results, constants | flags, joined)
  return first, second


def backward_launches(problem: Problem, config: Config) -> tuple[Launch, ...]:
  """Adds d_query_parts, whose sum is the gradient, drop, d_key and d_value.

  Inputs: those of the forward pass, its lse and wide (or output), d_output.
  """
  wide = "output" if problem.dtype == "float32" else "wide"
  tile, pieces = config.query_gradient, config.parts * config.part_splits
  outputs = dict(
    d_query_parts=jax.ShapeDtypeStruct((pieces, problem.labels, problem.key_dim), jnp.float32),
    drop=_of_labels(problem, "float32"),
  )
  inputs = ("query", "key", "value", *_places(problem), wide, "lse", "d_output")
  constants = _constants(problem, tile) | dict(
    B=problem.batch, SPLITS=config.part_splits, PARTS=config.parts, FACTOR=problem.scale
  )
  grid = (-(-problem.labels // tile.rows), pieces)
  name = f"{GRADIENT_KERNELS}:query_gradient_kernel"
  first = _launch(name, grid, inputs, outputs, constants, tile)
  tile, tokens = config.token_gradient, (problem.batch, problem.length)
  outputs = dict(
    d_key=jax.ShapeDtypeStruct((*tokens, problem.key_dim), jnp.dtype(problem.dtype)),
    d_value=jax.ShapeDtypeStruct((*tokens, problem.value_dim), jnp.dtype(problem.dtype)),
  )
  inputs = ("query", "key", "value", _places(problem)[0], "lse", "d_output", "drop")
  constants = _constants(problem, tile) | dict(FACTOR=problem.scale)
  grid = (-(-problem.length // tile.tokens), problem.batch)
  name = f"{GRADIENT_KERNELS}:token_gradient_kernel"
  return first, _launch(name, grid, inputs, outputs, constants, tile)


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
    SCALE=problem.scale / math.log(2),
    MASKED=problem.masked,
    # float32 as three products of tf32 parts: close to float32 and still on the tensor cores.
    PRECISION="tf32x3" if problem.dtype == "float32" else "tf32",
  )


def _launch(kernel, grid, inputs, outputs, constants, tile):
  return Launch(kernel, grid, inputs, outputs, constants, tile.num_warps, tile.num_stages)


def _places(problem):
  """Inputs that say which tokens are real; absent ones are never read."""
  return ("real", "blocks", "filled") if problem.masked else ("query",) * 3


def _of_labels(problem, dtype, *dims, splits=None):
  shape = (
    (problem.batch, problem.labels) if splits is None else (problem.batch, splits, problem.labels)
  )
  return jax.ShapeDtypeStruct((*shape, *dims), jnp.dtype(dtype))


def _nothing():
  return jax.ShapeDtypeStruct((1,), jnp.float32)
