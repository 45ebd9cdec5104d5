"""The differentiable TPU operator: layouts, padding, what is known of the blocks, the kernels."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from ..segments import pad_length
from ..sliding_window_attention.history import Tokens
from ..tpu_sizes import round_up
from . import tpu, tpu_backward, tpu_tuning
from . import tpu_tiles as tiles_of
from .reference import factor
from .tpu_tiles import Plan, Tables
from .variants import Variant

EMPTY = -1  # document of keys that nobody sees
MOST_TOKENS = 2.0**24  # counts are float32


def softplus_attention_tpu(
  query: Float[Array, "B T H K"],
  tokens: Tokens,
  count: Float[Array, "P T"],
  variant: Variant,
  interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, "B T H V"]:
  """Output, as `softplus_attention_xla`; gradients for query and the keys and values of `tokens`.

  `interpret` runs the kernels on the CPU: True, or a `pltpu.InterpretParams`.

  Raises:
    NotImplementedError: what `fits` has a reason against.
  """
  if reason := fits(query, tokens, variant):
    raise NotImplementedError(f"softplus_attention: {reason}")
  plan, front = make_plan(query, tokens, variant, interpret)
  length, heads = query.shape[1:3]
  groups, dim = tokens.key.shape[2:]
  q = _tokens(plan, query, plan.key_lanes, 0, plan.length)
  k, v = tokens.key, tokens.value
  if plan.fold > 1 and heads > groups:  # both heads of a unit have the same key
    k, v = (jnp.repeat(x, plan.fold, 2) for x in (k, v))
  k, v = (
    _tokens(plan, x, lanes, front, plan.total)
    for x, lanes in ((k, plan.key_lanes), (v, plan.value_lanes))
  )
  count = pad_length(count, plan.rows, value=1).astype(jnp.float32)
  scale = tiles_of.LOG2_E * factor(variant, count, dim)
  documents, tables = _documents(plan, tokens, length, front)
  rows = jax.lax.stop_gradient(jnp.stack([scale, count], 1))
  output = _attend((q, k, v), rows, documents, tables, plan)
  output = output.reshape(plan.batch, plan.length, heads, -1)
  return output[:, :length, :, : tokens.value.shape[3]]


def fits(query: Any, tokens: Tokens, variant: Variant) -> str | None:
  """Why the kernels do not take a problem; None if they do."""
  c = variant
  if tokens.value.dtype not in (jnp.float32, jnp.bfloat16):
    return (
      "value must be float32 or bfloat16 for the TPU kernels; got "
      f'{tokens.value.dtype} (cast it, or use implementation="xla")'
    )
  if c.score != "softplus" or not c.unit or c.normalization != "l1" or c.score_bias or c.offset < 0:
    return (
      "variant must be LSSA or LSSAR (softplus of unit vectors, l1, an offset of at least 0) for "
      f'the TPU kernels; got {c} (use implementation="xla")'
    )
  return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(arrays, rows, documents, tables, plan):
  """Output [B T', U * value lanes]."""
  return _run(arrays, rows, documents, tables, plan, save=False)[0]


def _run(arrays, rows, documents, tables, plan, save):
  return tpu.forward(plan, tables, (*arrays, rows, *documents), save)


def _forward(arrays, rows, documents, tables, plan):
  output, statistics = _run(arrays, rows, documents, tables, plan, save=True)
  return output, (arrays, rows, documents, tables, statistics)


def _backward(plan, residuals, d_output):
  arrays, rows, documents, tables, statistics = residuals
  operands = (*arrays, rows, *documents)
  grads = tpu_backward.backward(plan, tables, operands, statistics, d_output)
  return grads, None, None, None


_attend.defvjp(_forward, _backward)


def make_plan(query, tokens: Tokens, variant: Variant, interpret) -> tuple[Plan, int]:
  """How the kernels do it, and by how many keys the front is padded.

  So that the first query's own key begins a tile.
  """
  batch, length, heads, dim = query.shape
  total, groups, value_dim = tokens.value.shape[1:]
  width, fold = tpu_tuning.head_width(heads, heads // groups, dim, value_dim)
  lanes = [round_up(fold * width if fold > 1 else x, width * fold)
           for x in (dim, value_dim)]  # fmt: skip
  rows = tpu_tuning.block_rows(length)
  padded = round_up(length, rows)
  front = -(total - length) % rows
  keys = front + total - length + padded
  span = tpu_tuning.span_of(keys, rows, sum(lanes), query.dtype)
  # No named scale is above that of LSSA, or 1.
  named = max(1.0, math.log(dim)) * math.log(MOST_TOKENS)
  scale = named if isinstance(variant.scale, str) else abs(variant.scale)
  plan = Plan(
    batch=batch, length=padded, total=round_up(keys, span), units=heads // fold,
    groups=groups if fold == 1 or heads > groups else groups // fold, fold=fold, width=width,
    key_lanes=lanes[0], value_lanes=lanes[1], rows=rows,
    panel=min(tpu_tuning.PANEL, rows), span=span, documents=tokens.documents is not None,
    bounded=1.02 * tiles_of.LOG2_E * scale < 120, dtype=query.dtype, variant=variant,
    interpret=interpret,
  )  # fmt: skip
  return plan, front


def _tokens(plan, x, lanes, front, length):
  """[B, T, N, K] -> [B * length, N * width]."""
  width = plan.width if plan.fold > 1 else lanes
  behind = length - front - x.shape[1]
  x = jnp.pad(x, ((0, 0), (front, behind), (0, 0), (0, width - x.shape[3])))
  return x.reshape(plan.batch * length, -1)


def _documents(plan, tokens, length, front):
  """(documents of queries [B, 1, T'] and keys [B, 1, S'], or nothing; `Tables`)."""
  offset = front + tokens.key.shape[1] - length
  block = jnp.arange(plan.steps, dtype=jnp.int32)
  last = jnp.broadcast_to(offset // plan.rows + block, (plan.batch, plan.steps))
  if not plan.documents:
    first = jnp.zeros_like(last)
    blocks = jnp.stack([first, last, first, first])
    tiles = jnp.zeros((2, plan.batch, plan.tiles), jnp.int32)
    documents = ()
  else:
    behind = plan.total - front - tokens.documents.shape[1]
    keys = jnp.pad(tokens.documents, ((0, 0), (front, 0)), constant_values=EMPTY)
    # Behind, only queries that are cut off see it; an id of its own would widen the last range.
    keys = jnp.pad(keys, ((0, 0), (0, behind)), mode="edge").astype(jnp.int32)
    queries = jax.lax.slice_in_dim(keys, offset, offset + plan.length, axis=1)
    tiled = keys.reshape(plan.batch, plan.tiles, plan.rows)
    tiles = jnp.stack([jnp.min(tiled, 2), jnp.max(tiled, 2)])
    cut = queries.reshape(plan.batch, plan.steps, plan.rows)
    low, high = jnp.min(cut, 2), jnp.max(cut, 2)
    # [B, steps, tiles]: whether any document may be in both.
    shared = (tiles[0][:, None] <= high[..., None]) & (tiles[1][:, None] >= low[..., None])
    first = jnp.argmax(shared, 2).astype(jnp.int32)
    blocks = jnp.stack([first, last, low, high])
    documents = queries[:, None], keys[:, None]
  return documents, Tables(blocks.reshape(4, -1).astype(jnp.int32), tiles.reshape(2, -1))
