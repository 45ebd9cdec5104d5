"""Softplus attention on NVIDIA GPUs: what the Triton kernels take, block sizes and launches.

Everything here is computed from sizes; triton itself is imported only when a launch is run.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from ..triton_call import Gpu, Launch, block_of, target_gpu, too_old
from .variants import Variant

KERNELS = f"{__package__}.triton_kernels"
GRADIENT_KERNELS = f"{__package__}.triton_gradient_kernels"
MAX_DIM = 128  # two gradients of 64 keys and two tiles of pairs fill the registers
MAX_WHOLE = 1000  # larger powers are exp2(p log2 t) like those that are not whole
# Degree of the logarithm's polynomial (without a power, with one), its error well below a rounding
# of the weights: a power of 15 enlarges it, and the mean that is taken off even more.
DEGREES = {"float32": (8, 8), "bfloat16": (3, 4), "float16": (4, 6)}


@dataclasses.dataclass(frozen=True)
class Problem:
  """All that the launches depend on."""

  batch: int
  length: int
  total: int  # keys: those of a state in front
  heads: int
  groups: int
  key_dim: int
  value_dim: int
  dtype: str
  shared_count: bool  # one row of N for the whole batch
  documents: bool
  variant: Variant


@dataclasses.dataclass(frozen=True)
class Tile:
  """What one program of a kernel has in hand: queries times keys."""

  rows: int
  keys: int
  num_warps: int
  num_stages: int
  max_registers: int | None = None
  always: bool = False  # every tile is masked, also those without need: there is no branch


@dataclasses.dataclass(frozen=True)
class Config:
  """Block sizes of all kernels of one problem."""

  forward: Tile
  row_gradient: Tile
  key_gradient: Tile


def refusal(query: Any, value: Any, variant: Variant) -> str | None:
  """Why the kernels cannot take these arguments on whatever GPU; None if they can."""
  c = variant
  wanted = dict(score="softplus", score_bias=False, unit=True, normalization="l1")
  for name, choice in wanted.items():
    if getattr(c, name) != choice:
      return f"variant.{name} must be {choice!r}; got {getattr(c, name)!r}"
  if c.power is not None and c.offset < 0:
    return f"variant.offset must be at least 0; got {c.offset}"
  if query.dtype.name not in DEGREES:
    return f"query must be float32, bfloat16 or float16; got {query.dtype}"
  for name, array in (("query", query), ("value", value)):
    if array.shape[3] > MAX_DIM:
      return f"{name} must have at most {MAX_DIM} channels per head; got {array.shape[3]}"
  return None


def fits(function: str, query: Any, value: Any, variant: Variant) -> str | None:
  """`refusal`, or what is wrong with the GPU that is compiled for."""
  if reason := refusal(query, value, variant):
    return reason
  return too_old(target_gpu(function))


def choose_config(problem: Problem, gpu: Gpu) -> Config:
  """Block sizes by rule, from what the assembler says; nothing is timed.

  The forward pass has 128 rows on eight warps, 64 on each of Hopper's warpgroups; with up to 64
  channels, 128 registers let two such programs share a multiprocessor, one at its products while
  the other is at its softplus. The backward kernels hold two tiles of pairs, and that of the keys
  two gradients: no more rows at a time than leave it without spills. Only Hopper's products keep a
  warp's rows to itself when a branch is between them; on others every tile is masked, which is work
  for units that are not the busiest.
  """
  wide = max(problem.key_dim, problem.value_dim) > 64
  if problem.dtype == "float32":  # products of three parts need twice the registers
    if wide:
      return Config(Tile(32, 16, 4, 2), Tile(16, 32, 4, 2), Tile(16, 32, 8, 1))
    return Config(Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(16, 32, 4, 2))
  hopper = gpu.compute_capability >= 90
  keys, warps = 64 if hopper else 32, 8 if wide and (problem.documents or not hopper) else 4
  tiles = [Tile(64, keys, 4, 2), Tile(32, 64, warps, 2)]
  tiles.insert(0, Tile(128, 64, 8, 3) if wide else Tile(128, keys, 8, 3, max_registers=128))
  return Config(*(dataclasses.replace(tile, always=not hopper) for tile in tiles))


def forward_launch(problem: Problem, config: Config, statistics: bool = True) -> Launch:
  """Adds output, and with `statistics` total and rise.

  Inputs: query, key, value, scale, count, and documents, first where there are documents.
  """
  single = jax.ShapeDtypeStruct((1,), jnp.float32)
  rows = _per_row(problem)
  inputs = ("query", "key", "value", "scale", "count", *_places(problem, "first"))
  outputs = dict(
    output=_like(problem, problem.length, problem.heads, problem.value_dim),
    total=rows if statistics else single,
    rise=rows if statistics and problem.variant.power else single,
  )
  flat = problem.variant.flat_tolerance if problem.variant.epsilon == "none" else 0.0
  more = dict(FLAT=flat, STATISTICS=statistics)
  name = f"{KERNELS}:forward_kernel"
  return _rows_launch(problem, config.forward, name, inputs, outputs, more)


def backward_launches(problem: Problem, config: Config) -> tuple[Launch, ...]:
  """Adds d_query, and taken, share, drop, lift, the row statistics behind d_key and d_value.

  Inputs: those of the forward pass, stop where there are documents, its total and rise, d_output.
  """
  single, rows = jax.ShapeDtypeStruct((1,), jnp.float32), _per_row(problem)
  second = problem.variant.power is not None
  size = problem
  inputs = ("query", "key", "value", "scale", "count", *_places(problem, "first"))
  inputs += ("total", "rise", "d_output")
  outputs = dict(
    d_query=_like(problem, size.length, size.heads, size.key_dim),
    taken=rows if second else single,
    share=rows,
    drop=rows,
    lift=rows if second else single,
  )
  name = f"{GRADIENT_KERNELS}:row_gradient_kernel"
  first = _rows_launch(problem, config.row_gradient, name, inputs, outputs, {})
  inputs = ("query", "key", "value", "scale", *_places(problem, "stop"))
  inputs += ("rise", "d_output", "taken", "share", "drop", "lift")
  outputs = dict(
    d_key=_like(problem, size.total, size.groups, size.key_dim),
    d_value=_like(problem, size.total, size.groups, size.value_dim),
  )
  name = f"{GRADIENT_KERNELS}:key_gradient_kernel"
  tile = config.key_gradient
  grid = (-(-size.total // tile.keys) * size.groups, size.batch)
  return first, _launch(problem, tile, name, grid, inputs, outputs, {})


def _rows_launch(problem, tile, kernel, inputs, outputs, more):
  c = problem.variant
  log2e = 1 / math.log(2)
  constants = dict(
    OFFSET=float(c.offset),
    SKIP=float(c.skip_rows),
    EPSILON=c.epsilon,
    EPS_FIRST=c.eps_first * log2e,
    EPS_SECOND=math.log2(c.eps_second) if c.eps_second else -1e30,
  )
  grid = (-(-problem.length // tile.rows) * problem.heads, problem.batch)
  return _launch(problem, tile, kernel, grid, inputs, outputs, constants | more)


def _launch(problem, tile, kernel, grid, inputs, outputs, more):
  c = problem.variant
  power = float(c.power or 0)
  whole = int(power) if power == int(power) and power <= MAX_WHOLE else 0
  exact = problem.dtype == "float32"
  constants = dict(
    T=problem.length,
    S=problem.total,
    H=problem.heads,
    G=problem.groups,
    K=problem.key_dim,
    V=problem.value_dim,
    ROWS=tile.rows,
    TILE=tile.keys,
    K_BLOCK=block_of(problem.key_dim),
    V_BLOCK=block_of(problem.value_dim),
    WHOLE=whole,
    POWER=power,
    DEGREE=DEGREES[problem.dtype][power > 0],
    ALWAYS=tile.always,
    SHARED_COUNT=problem.shared_count,
    DOCUMENTS=problem.documents,
    # float32 as three products of tf32 parts: close to float32 and still on the tensor cores.
    PRECISION="tf32x3" if exact else "tf32",
  )
  return Launch(
    kernel, grid, inputs, outputs, constants | more, tile.num_warps, tile.num_stages,
    tile.max_registers,
  )  # fmt: skip


def _places(problem, name):
  """Inputs that say who sees what; absent ones are never read."""
  return ("documents", name) if problem.documents else ("query", "query")


def _like(problem, *shape):
  return jax.ShapeDtypeStruct((problem.batch, *shape), jnp.dtype(problem.dtype))


def _per_row(problem):
  return jax.ShapeDtypeStruct((problem.batch, problem.heads, problem.length), jnp.float32)
