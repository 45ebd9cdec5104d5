"""Routed attention on NVIDIA GPUs: the differentiable function."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..triton_call import run_launches, target_gpu
from .attend import Extras
from .options import Routing
from .state import Tokens
from .triton import (
  NAME,
  Config,
  Problem,
  backward_launches,
  choose_config,
  distances_of,
  fits,
  forward_launches,
  padded,
)


class Residuals(NamedTuple):
  """What the backward pass needs: inputs, members, and 8 bytes per slot and 4 per token and head.

  `key` is None where it is the query, what belongs to it where members are shared. The outputs of
  the slots are not kept.
  """

  query: Float[Array, "B T H K"]
  key: Float[Array, "B T H K"] | None
  value: Float[Array, "B T H V"]
  scores: None
  key_scores: None
  relative_keys: Float[Array, "R K"] | None
  relative_values: Float[Array, "R V"] | None
  members: Int[Array, "B H C W"]
  slot_of: Int[Array, "B H C T"]
  key_members: Int[Array, "B H C W"] | None
  key_slot_of: Int[Array, "B H C T"] | None
  top: Float[Array, "B H C W"]
  inverse: Float[Array, "B H C W"]
  share: Float[Array, "B H T"]


INPUTS = Residuals._fields[:7]


def attend_clusters_triton(
  query: Float[Array, "B T H K"],
  tokens: Tokens,
  scores: Float[Array, "B T H C"],
  options: Routing,
  extras: Extras,
) -> Float[Array, "B T H V"]:
  """Output; the arguments are those of `xla.attend_clusters`.

  Compiles for NVIDIA GPUs only. Where `tokens.scores` is `scores`, queries and keys have the
  same members; where `tokens.key` is `query` as well, one sum is their gradient. float32 inputs are
  multiplied as three tf32 products. Gradients for query, key, value and the relative tables, which
  enter products in the dtype of the query.
  """
  if reason := fits(query, tokens, scores, options, extras):
    raise NotImplementedError(f'{NAME}: {reason} for the Triton kernels (use "xla")')
  shared = tokens.scores is scores
  key = None if shared and tokens.key is query else tokens.key
  key_scores = None if shared else tokens.scores
  tables = (None, None) if extras.relative is None else extras.relative
  tables = tuple(None if x is None else jnp.asarray(x, query.dtype) for x in tables)
  return _attend(query, key, tokens.value, scores, key_scores, *tables, options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _attend(query, key, value, scores, key_scores, relative_keys, relative_values, options):
  inputs = (query, key, value, scores, key_scores, relative_keys, relative_values)
  return _run_forward(inputs, options, statistics=False)["output"]


def _forward(*args):
  *inputs, options = args
  arrays = _run_forward(inputs, options, statistics=True)
  kept: dict[str, Any] = {name: arrays.get(name) for name in Residuals._fields}
  kept |= dict(zip(INPUTS, inputs, strict=True)) | dict(scores=None, key_scores=None)
  return arrays["output"], Residuals(**kept)


def _run_forward(inputs, options, statistics):
  arrays = dict(zip(INPUTS, inputs, strict=True))
  problem, gpu = problem_of(arrays, options), target_gpu(NAME)
  launches = forward_launches(problem, choose_config(problem, gpu), statistics)
  return run_launches(launches, prepared(arrays), gpu)


def _backward(options, residuals, d_output):
  arrays = residuals._asdict() | dict(d_output=d_output)
  problem, gpu = problem_of(arrays, options), target_gpu(NAME)
  config = choose_config(problem, gpu)
  arrays = run_launches(backward_launches(problem, config), prepared(arrays), gpu)
  tables = (None, None)
  if problem.relative:
    dims = dict(relative_keys=problem.key_dim, relative_values=problem.value_dim)
    tables = (table_gradient(arrays[f"d_{n}"][..., :d], problem, config) for n, d in dims.items())
    tables = tuple(x.astype(problem.dtype) for x in tables)
  return arrays["d_query"], arrays.get("d_key"), arrays["d_value"], None, None, *tables


_attend.defvjp(_forward, _backward)


def problem_of(arrays: dict[str, Any], options: Routing) -> Problem:
  """The problem of arrays under the names of `Residuals`; absent ones are None or not there."""
  query, value, members = arrays["query"], arrays["value"], arrays.get("members")
  clusters = arrays["scores"].shape[3] if members is None else members.shape[2]
  table, other = arrays.get("relative_keys"), ("key_scores", "key_members")
  batch, length, heads, dim = query.shape
  return Problem(
    batch, length, heads, clusters, dim, value.shape[3], query.dtype.name,
    shared_members=all(arrays.get(name) is None for name in other),
    shared_key=arrays.get("key") is None,
    relative=0 if table is None else table.shape[0],
    options=options,
  )  # fmt: skip


def prepared(arrays: dict[str, Any]) -> dict[str, Any]:
  """The arrays with as many channels as the kernels' rows have: the last are 0."""

  def wide(x):
    more = padded(x.shape[-1]) - x.shape[-1]
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, more),)) if more else x

  rows = ("query", "key", "value", "d_output", "relative_keys", "relative_values")
  return arrays | {n: wide(arrays[n]) for n in rows if arrays.get(n) is not None}


def table_gradient(
  parts: Float[Array, "D splits span K"], problem: Problem, config: Config
) -> Float[Array, "R K"]:
  """Of a relative table, from the partial sums of tiles of pairs that lie equally far apart.

  A tile's rows are those of its own distance and of the next: [D + 1, span / 2] in the end.
  """
  sums = jnp.sum(parts, axis=1)
  tile, (first, count) = config.table.rows, distances_of(problem, config)
  far = jnp.pad(sums[:, :tile], ((1, 0), (0, 0), (0, 0)))
  near = jnp.pad(sums[:, tile:], ((0, 1), (0, 0), (0, 0)))
  rows = (far + near)[::-1].reshape(-1, parts.shape[-1])
  lowest = 1 - (first + count) * tile  # distance of the first row, by how much keys come later
  highest = lowest + rows.shape[0] - 1
  limit = problem.relative // 2
  low, high = max(-limit - lowest, 0), max(highest - limit, 0)
  stop = rows.shape[0] - high
  inner = rows[low:stop]
  before, after = max(lowest + limit, 0), max(limit - highest, 0)
  inner = jnp.pad(inner, ((before, after), (0, 0)))
  return inner.at[0].add(jnp.sum(rows[:low], 0)).at[-1].add(jnp.sum(rows[stop:], 0))
