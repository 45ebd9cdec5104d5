"""Rows of several documents for the fused TPU kernels: where tokens go, and what does not fit.

Tokens are moved to the chunks of their documents (`layout`) and results back by `tpu_move`, in the
dtype of the inputs. Where rows do not fit tokens stay in order, and the kernels run once for each
window of whole documents, on all rows of the batch at once.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from . import layout, tpu_arrays, tpu_move
from .layout import Layout
from .tpu_move import Moves
from .tpu_rows import Plan

GATES = 3  # the gates' place among the kernels' tokens


class Documents(NamedTuple):
  """What the kernels need to know of a window's documents."""

  oldest: Int[Array, " N"]  # for each step of each row: the first tile of summaries that it sees
  first: Int[Array, "B 1 P"]  # slot of the document's first chunk, tokens in the kernels' order
  number: Int[Array, "B C"]  # of each chunk in its document


class Packed(NamedTuple):
  """A batch of documents: all of them, whether they fit, and the first window."""

  found: Layout
  fits: Bool[Array, ""] | None
  window: Documents


class Ways(NamedTuple):
  """The tokens' to their places and back."""

  there: Moves
  back: Moves


def arrange(
  plan: Plan, segments: Int[Array, "B T"], lengths: Int[Array, " B"] | None, chunk_size: int
) -> tuple[Packed, Ways]:
  """Everything about a batch's documents; tokens stay in order where not all fit."""
  batch, length = segments.shape
  found = layout.lay_out(segments, lengths, chunk_size)
  first = layout.window(found, jnp.zeros((batch,), jnp.int32), plan.filled)
  fits = layout.fits(found, plan.filled)
  source, place = _maps(plan, found, first)
  if fits is not None:
    token = jnp.arange(plan.length)
    place = jnp.where(fits, place, token[:length])
    source = jnp.where(fits, source, jnp.where(token < length, token, -1))
  return Packed(found, fits, _documents(plan, first)), _ways(plan, source, place)


def _maps(plan, found, window):
  """(token of each row of the kernels [B, T'], row of each token [B, T]), -1 for none."""
  places, begin = found.places, window.begin
  place = (places.own - window.start[:, None]) * plan.chunk + places.row
  source = begin[:, :-1, None] + jnp.arange(plan.chunk)  # [B, C, L]
  source = jnp.where(source < begin[:, 1:, None], source, -1)
  return source.reshape(plan.batch, plan.length), jnp.where(window.inside, place, -1)


def _ways(plan, source, place):
  moves = tpu_move.plan_moves(source, place.shape[1]), tpu_move.plan_moves(place, plan.length)
  return Ways(*moves)


def _documents(plan, window):
  first = jnp.arange(plan.filled) - window.number
  first = first.reshape(plan.batch, plan.steps, 1, plan.chunks)
  oldest = (jnp.min(first, -1) // plan.tile).reshape(-1)
  by_row = jnp.broadcast_to(first, (plan.batch, plan.steps, plan.chunk, plan.chunks))
  return Documents(oldest, by_row.reshape(plan.batch, 1, plan.length), window.number)


def fill(plan: Plan, chunk_size: int, index: int) -> float:
  """What tokens number `index` have in rows that only lengthen a chunk."""
  return tpu_arrays.CLOSED if index == GATES and plan.chunk != chunk_size else 0.0


# --- Rows that do not fit -------------------------------------------------------------------------


def general(plan: Plan, chunk_size: int, packed: Packed, tokens: tuple, run: Callable) -> tuple:
  """What the forward kernel makes of tokens that are in order, window by window.

  run(documents, tokens): the kernel on one. The summaries are those of the rows' last documents,
  from slot 0 on.
  """

  def body(window, ways, results):
    laid = _laid(plan, chunk_size, ways, tokens)
    output, *summaries = run(_documents(plan, window), laid)
    total, *old = results
    last = _ends_here(packed.found, window)
    shift = packed.found.first - window.start
    new = [jnp.where(last, _shifted(x, shift), y) for x, y in zip(summaries, old, strict=True)]
    return total + _in_order(plan, ways, output), *new

  shape = (plan.batch, plan.outer, plan.inner, plan.filled, plan.lanes)
  nothing = jnp.zeros(shape, plan.dtype)
  return _windows(plan, packed.found, body, (jnp.zeros_like(tokens[2]), nothing, nothing))


def general_gradients(
  plan: Plan, chunk_size: int, packed: Packed, tokens: tuple, cotangents: tuple, bias: jax.Array,
  run: Callable,
) -> tuple:  # fmt: skip
  """Gradients of tokens and bias from the cotangents of what `general` returns.

  run(documents, tokens, cotangents): forward and backward kernel on one window.
  """
  d_output, *d_summaries = cotangents

  def body(window, ways, results):
    laid = _laid(plan, chunk_size, ways, tokens)
    last = _ends_here(packed.found, window)
    shift = window.start - packed.found.first
    given = [jnp.where(last, _shifted(x, shift), 0) for x in d_summaries]
    grads, d_bias = run(_documents(plan, window), laid, (_moved(plan, ways, d_output), *given))
    sums, total = results
    sums = (x + _in_order(plan, ways, y) for x, y in zip(sums, grads, strict=True))
    return tuple(sums), total + d_bias

  zeros = tuple(jnp.zeros_like(x) for x in tokens), jnp.zeros_like(bias)
  return _windows(plan, packed.found, body, zeros)


def _windows(plan, found, body, results):
  """results = body(window, ways, results) for all windows; documents are in one each."""

  def step(carry):
    start, results = carry
    window = layout.window(found, start, plan.filled)
    source, place = _maps(plan, found, window)
    room = ((0, 0), (0, plan.length - place.shape[1]))
    ways = _ways(plan, source, jnp.pad(place, room, constant_values=-1))
    return window.stop, body(window, ways, results)

  start = jnp.zeros((plan.batch,), jnp.int32)
  unfinished = lambda carry: jnp.any(carry[0] < found.total)  # noqa: E731
  return jax.lax.while_loop(unfinished, step, (start, results))[1]


def _laid(plan, chunk_size, ways, tokens):
  return tuple(_moved(plan, ways, x, fill(plan, chunk_size, i)) for i, x in enumerate(tokens))


def _moved(plan, ways, x, filling=0.0):
  return _shuffled(plan, ways.there, x, filling)


def _in_order(plan, ways, x):
  """The way back; 0 for tokens that are not in the window."""
  return _shuffled(plan, ways.back, x, 0.0)


def _shuffled(plan, moves, x, filling):
  """[B * T', N] -> [B * T', N]."""
  rows = x.reshape(plan.batch, plan.length, -1)
  rows = tpu_move.moved(rows, moves, plan.length, filling, plan.interpret)
  return rows.reshape(x.shape)


def _ends_here(found, window):
  """[B, 1, 1, 1, 1]: whether a row's last document is in the window."""
  here = (window.start <= found.first) & (window.stop >= found.total)
  return here[:, None, None, None, None]


def _shifted(x, shift):
  """result[..., s, :] = x[..., s + shift, :] of summaries [B, outer, inner, S, lanes], else 0."""
  slot = (jnp.arange(x.shape[3]) + shift[:, None])[:, None, None, :, None]
  found = jnp.take_along_axis(x, jnp.clip(slot, 0, x.shape[3] - 1), axis=3)
  return jnp.where((slot >= 0) & (slot < x.shape[3]), found, jnp.zeros((), x.dtype))
