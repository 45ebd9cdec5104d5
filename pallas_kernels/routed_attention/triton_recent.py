"""Membership "causal_recent" on NVIDIA GPUs: launches, and the differentiable function.

The band is found by XLA's sorts; attention over it is one launch, its gradients are two. Triton
itself is imported only when a launch is run.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..triton_call import Gpu, Launch, run_launches, target_gpu
from .attend import Extras
from .options import Routing
from .recent_band import Band, by_rows, find_band
from .state import Tokens
from .triton import NAME, Tile, channel_constants, fits, padded
from .triton_vjp import prepared

KERNELS = f"{__package__}.triton_recent_kernels"
BAND = ("query_order", "key_order", "start", "stop")


class Problem(NamedTuple):
  """All that the launches depend on."""

  batch: int
  length: int
  keys: int  # tokens with a key: the queries' and those before
  heads: int
  key_dim: int
  value_dim: int
  dtype: str
  scale: float


class Config(NamedTuple):
  """Block sizes: what a program has in hand, and what it meets at a time."""

  forward: Tile
  by_query: Tile
  by_key: Tile


def choose_config(problem: Problem, gpu: Gpu) -> Config:
  """By rule, from what the assembler says; nothing is timed."""
  wide = max(problem.key_dim, problem.value_dim) > 64
  if problem.dtype == "float32":  # products of three parts need twice the registers
    most, small = Tile(32, 16, 4, 1), Tile(16, 16, 4, 1)
    return Config(most, most, small if wide else most)
  warps = 8 if wide else 4
  forward = Tile(64, 64, warps, 2)
  by_query = Tile(64, 32, warps, 2) if wide and gpu.compute_capability < 90 else forward
  return Config(forward, by_query, Tile(64, 32, warps, 2))


def forward_launches(problem: Problem, config: Config, statistics=True) -> tuple[Launch, ...]:
  """Adds `output`, with as many channels as are `padded`; with `statistics` top and inverse."""
  row = jax.ShapeDtypeStruct((problem.batch, problem.heads, problem.length), jnp.float32)
  single = jax.ShapeDtypeStruct((1,), jnp.float32)
  kept = row if statistics else single
  outputs = dict(output=_tokens(problem, "value_dim"), top=kept, inverse=kept)
  more = dict(STATISTICS=statistics)
  inputs = ("query", "key", "value", *BAND)
  return (_launch(problem, "band_forward_kernel", config.forward, inputs, outputs, more),)


def backward_launches(problem: Problem, config: Config) -> tuple[Launch, ...]:
  """Adds d_query, d_key and d_value; reads `seen_by` for blocks of `config.by_key.rows` keys."""
  row = jax.ShapeDtypeStruct((problem.batch, problem.heads, problem.length), jnp.float32)
  inputs = ("query", "key", "value", "d_output", *BAND, "top", "inverse")
  of_query = dict(d_query=_tokens(problem, "key_dim"), drop=row)
  of_key = dict(
    d_key=_tokens(problem, "key_dim", True), d_value=_tokens(problem, "value_dim", True)
  )
  return (
    _launch(problem, "band_query_kernel", config.by_query, inputs, of_query),
    _launch(
      problem, "band_key_kernel", config.by_key, (*inputs, "drop", "seen_by"), of_key, keys=True
    ),
  )


def _tokens(problem, dim, keys=False):
  length = problem.keys if keys else problem.length
  shape = problem.batch, length, problem.heads, padded(getattr(problem, dim))
  return jax.ShapeDtypeStruct(shape, jnp.dtype(problem.dtype))


def _launch(problem, kernel, tile, inputs, outputs, more=None, keys=False):
  constants = channel_constants(problem) | dict(
    T=problem.length,
    S=problem.keys,
    H=problem.heads,
    ROWS=tile.rows,
    TILE=tile.keys,
    SCALE=float(problem.scale),
  )
  rows = problem.keys if keys else problem.length
  grid = -(-rows // tile.rows), problem.batch * problem.heads
  name = f"{KERNELS}:{kernel}"
  constants |= more or {}
  return Launch(name, grid, inputs, outputs, constants, tile.num_warps, tile.num_stages)


def seen_by(band: Band, rows: int) -> Int[Array, "B H N 2"]:
  """From which sorted query to which one each block of `rows` sorted keys is seen."""

  def one(start, stop, key_order):
    begin = jnp.arange(0, key_order.shape[0], rows)
    first = jnp.searchsorted(stop, begin, side="right")
    last = jnp.searchsorted(start, begin + rows - 1, side="right")
    return jnp.stack([first, last], axis=-1).astype(jnp.int32)

  return by_rows(one, band.start, band.stop, band.key_order)


def attend_band_triton(
  query: Float[Array, "B T H K"],
  tokens: Tokens,
  scores: Float[Array, "B T H C"] | None,
  options: Routing,
) -> Float[Array, "B T H V"]:
  """Output; the arguments are those of `recent.attend_recent`. Compiles for NVIDIA GPUs only.

  float32 inputs are multiplied as three tf32 products.
  """
  ranking = tokens.scores if scores is None else scores
  if reason := fits(query, tokens, ranking, options, Extras(None, None)):
    raise NotImplementedError(f'{NAME}: {reason} for the Triton kernels (use "xla")')
  band = find_band(scores, tokens, query.shape[1], options.window_size)
  return _attend(query, tokens.key, tokens.value, band, options.scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(query, key, value, band, scale):
  return _run_forward(query, key, value, band, scale, False)["output"][..., : value.shape[3]]


def _run_forward(query, key, value, band, scale, statistics):
  arrays = dict(query=query, key=key, value=value) | band._asdict()
  problem, gpu = problem_of(arrays, scale), target_gpu(NAME)
  launches = forward_launches(problem, choose_config(problem, gpu), statistics)
  return run_launches(launches, prepared(arrays), gpu)


def _forward(query, key, value, band, scale):
  arrays = _run_forward(query, key, value, band, scale, True)
  residuals = dict(query=query, key=key, value=value) | band._asdict()
  residuals |= dict(top=arrays["top"], inverse=arrays["inverse"])
  return arrays["output"][..., : value.shape[3]], residuals


def _backward(scale, residuals, d_output):
  problem, gpu = problem_of(residuals, scale), target_gpu(NAME)
  config = choose_config(problem, gpu)
  band = Band(*(residuals[name] for name in BAND))
  arrays = residuals | dict(d_output=d_output, seen_by=seen_by(band, config.by_key.rows))
  arrays = run_launches(backward_launches(problem, config), prepared(arrays), gpu)
  learned = ("query", "key", "value")
  return (*(arrays[f"d_{n}"][..., : residuals[n].shape[3]] for n in learned), None)


_attend.defvjp(_forward, _backward)


def problem_of(arrays: dict, scale: float) -> Problem:
  """The problem of arrays by name."""
  query, value = arrays["query"], arrays["value"]
  batch, length, heads, dim = query.shape
  return Problem(batch, length, value.shape[1], heads, dim, value.shape[3], query.dtype.name, scale)
