"""The backward kernel of Taylor attention: one reversed sweep over blocks of chunks.

The state before each block comes from the training forward, rounded to the input dtype as in every
product it enters; those before the chunks of the block are computed anew and stay in VMEM. So every
array of tokens is moved once: (4 F + 4 V) numbers, 4 bytes for the sum of weights and R W numbers
per block for the state, 694 bytes per token and head in bfloat16 at F = 16, V = 64 and blocks of
512 rows (the forward: 374). Two sweeps, one for dq and one for dk and dv, would move (7 F + 6 V)
numbers or 1000 bytes, and a stored state per chunk of 128 rows 150 bytes more in each direction.
Anew per chunk cost 160 of the 1180 rows that go through a 128 x 128 matrix unit.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..dots import NN, NT, TN, dot_f32
from .tpu import array, before_block, call, polynomial, state_block, totals_block
from .tpu_chunks import (
  LANES,
  Plan,
  clear_other_heads,
  do_share,
  fetches,
  fill_decay,
  for_chunks,
  head_rows,
  iota,
  make_chunk,
  put_back,
  split_scalars,
  state_factors,
  times,
  with_ones,
)
from .tpu_features import key_features, key_gradient, query_features, query_gradient


def _backward_kernel(*refs, plan: Plan):
  """Blocks: q, k [U C, G F], v, o, dO [U C, G V], totals [U, G, C], d_final [G, R, W], the state
  before the block, maybe starts [U, C]; out: dq, dk, dv, d_initial. Blocks run from the last one.

  With g the cotangents of the sums (`_sums_cotangent`), S the state before a chunk, D the cotangent
  of the state after it and J the transposed derivatives of the features:
  d_scores = (v . g) (1 + s), dq = d_scores k + J(q) (S g), dk = d_scores^T q + J(k) (D v),
  dv = a^T g + D^T psi(k), and psi(q) g^T is added to D.
  """
  scalars, refs = split_scalars(plan, refs)
  inputs, refs = refs[:8], refs[8:]
  starts_ref, refs = (refs[0], refs[1:]) if plan.packed else (None, refs)
  outputs, refs = refs[:4], refs[4:]
  scratch, decay_ref = Scratch(*refs[:9]), refs[9] if plan.decay else None
  d_state_ref, step = outputs[3], plan.steps - 1 - pl.program_id(2)

  @pl.when(pl.program_id(2) == 0)
  def _():
    if plan.decay:
      fill_decay(plan, scalars, decay_ref)
    d_state_ref[...] = inputs[6][...]

  def chunk_of(part):
    return make_chunk(plan, scalars, step, part, starts_ref)

  def fetch_all(part, slot):
    tiles = [ref.at[slot] for ref in (scratch.queries, scratch.outputs, scratch.d_outputs)]
    pairs = zip((inputs[0], *inputs[3:5]), tiles, strict=True)
    return [job for ref, tile_ref in pairs for job in fetches(ref, tile_ref, chunk_of(part))]

  def body(part, slot, following):
    jobs = [] if following is None else fetch_all(following, 1 - slot)
    refs = (inputs[1], inputs[5], *outputs)
    _chunk_gradients(plan, scalars, chunk_of(part), slot, jobs, refs, scratch, decay_ref)

  chunks = [chunk_of(part) for part in range(plan.unroll)]
  _recompute_states(plan, scalars, chunks, inputs, scratch, fetch_all(plan.unroll - 1, 0))
  for_chunks(plan, body, reverse=True)


class Scratch(NamedTuple):
  """Tiles with time on lanes. Two slots: of this chunk and of the next; U: of all chunks."""

  queries: jax.Array  # float32 [2, G F, C]
  outputs: jax.Array  # [2, G V, C]
  d_outputs: jax.Array  # [2, G V, C]
  keys: jax.Array  # float32 [U, G F, C]
  values: jax.Array  # [U, G V, C]
  states: jax.Array  # [U, G, R, W], before each chunk
  dq: jax.Array  # [G F, C]
  dk: jax.Array
  dv: jax.Array  # [G V, C]


def _recompute_states(plan, scalars, chunks, inputs, scratch, jobs):
  """Fills `keys`, `values` and `states` of a block, and does `jobs` meanwhile."""
  _, k_ref, v_ref = inputs[:3]
  numbered = list(enumerate(chunks))
  for part, chunk in numbered:
    do_share(fetches(k_ref, scratch.keys.at[part], chunk), 0, heads=1)
  parts = (fetches(v_ref, scratch.values.at[part], chunk) for part, chunk in numbered)
  lane_tiles = map(list, zip(*parts, strict=True))  # each of all chunks
  fetched = 0
  for head in range(plan.group):
    while fetched < (head + 1) * plan.value_dim:  # lanes of values
      do_share(next(lane_tiles), 0, heads=1)
      fetched += LANES
    do_share(jobs, head, plan.group)
    state = inputs[7][head].astype(jnp.float32)
    for part, chunk in numbered:
      _, down, carry = state_factors(plan, scalars, chunk, head)
      v = with_ones(plan, scratch.values[part, head_rows(head, plan.value_dim), :])
      k = scratch.keys[part, head_rows(head, plan.dim), :]
      scratch.states[part, head] = state.astype(plan.dtype)
      psi = key_features(k, plan.rows).astype(plan.dtype)
      state = times(carry, state) + dot_f32(psi, times(down, v), NT)


def _chunk_gradients(plan, scalars, chunk, slot, jobs, refs, scratch, decay_ref):
  """dq, dk and dv of one chunk, and the state cotangent before it."""
  k_ref, totals_ref, *out_refs, d_state_ref = refs
  gradient_refs = scratch.dq, scratch.dk, scratch.dv
  key_rows = clear_other_heads(plan, scalars, k_ref[chunk.here, :])  # [C, G F]

  def products(head):
    rows, value_rows = head_rows(head, plan.dim), head_rows(head, plan.value_dim)
    tiles = [ref[slot, value_rows, :] for ref in (scratch.outputs, scratch.d_outputs)]
    total = totals_ref[chunk.part, head : head + 1, :]
    g, d_total = _sums_cotangent(plan, total, *tiles)  # [W, C], [1, C]
    t, weights = polynomial(plan, chunk, head, key_rows, scratch.queries[slot, rows, :])
    values = scratch.values[chunk.part, value_rows, :]
    d_weights = dot_f32(values, g[: plan.value_dim], TN)  # [C, C]
    if plan.decay:
      d_weights, weights = decay_ref[head] * d_weights, decay_ref[head] * weights
    d_scores = jnp.where(chunk.mask, (d_weights + d_total) * t, 0.0)
    return g, weights.astype(plan.dtype), d_scores.astype(plan.dtype)

  now = products(0)
  for head in range(plan.group):
    later = products(head + 1) if head + 1 < plan.group else None  # the matrix unit never waits
    do_share(jobs, head, plan.group)
    rows, value_rows = head_rows(head, plan.dim), head_rows(head, plan.value_dim)
    tiles = scratch.queries[slot, rows, :], scratch.keys[chunk.part, rows, :]
    tiles = *tiles, scratch.values[chunk.part, value_rows, :], scratch.states[chunk.part, head]
    *gradients, d_state_ref[head] = _one_head(
      plan, scalars, chunk, head, tiles, *now, d_state_ref[head]
    )
    sizes = (plan.dim, plan.dim, plan.value_dim)
    for ref, tile_ref, dim, x in zip(out_refs, gradient_refs, sizes, gradients, strict=True):
      tile_ref[head_rows(head, dim), :] = x.astype(plan.dtype)
      put_back(ref, tile_ref, chunk, head, dim)
    now = later


def _one_head(plan, scalars, chunk, head, tiles, g, weights, d_scores, d_state):
  """(dq [F, C], dk [F, C], dv [V, C], the state cotangent before the chunk [R, W]) of one head."""
  q, k, values, state = tiles
  up, down, carry = state_factors(plan, scalars, chunk, head)
  down_v, up_g = times(down, with_ones(plan, values)), times(up, g)
  rounded = d_state.astype(plan.dtype)
  psi_q = query_features(q, plan.rows).astype(plan.dtype)
  psi_k = key_features(k, plan.rows).astype(plan.dtype)
  dq = plan.rows.scale * dot_f32(k.astype(plan.dtype), d_scores, NN)
  dk = plan.rows.scale * dot_f32(q.astype(plan.dtype), d_scores, NT)
  dq += query_gradient(q, dot_f32(state, up_g, NN), plan.rows)
  dk += key_gradient(k, dot_f32(rounded, down_v, NN), plan.rows)
  carried = times(down, dot_f32(rounded, psi_k, TN))[: plan.value_dim]
  dv = dot_f32(g[: plan.value_dim], weights, NT) + carried
  return dq, dk, dv, times(carry, d_state) + dot_f32(psi_q, up_g, NT)


def _sums_cotangent(plan, total, output, d_output):
  """Cotangents of weighted values and of the weights' sum, [W, C]; the latter's row in float32."""
  if plan.normalize:
    inverse = 1 / total
    wide = inverse * d_output.astype(jnp.float32)
    d_total = -jnp.sum(wide * output.astype(jnp.float32), 0, keepdims=True)
    d_output = wide.astype(plan.dtype)
  else:
    d_total = jnp.zeros_like(total)
  row = iota((plan.rows.multiple, plan.chunk), 0)
  below = jnp.where(row == 0, d_total, 0.0).astype(plan.dtype)
  return jnp.concatenate([d_output, below]), d_total


def backward(
  plan: Plan, scalars, starts, query, key, value, output, d_output, totals, d_final_state, before
):
  """(d_query, d_key, d_value, d_initial_state); arrays in the kernels' layout."""
  f, v = plan.dim, plan.value_dim
  inputs = [*(array(plan, dim) for dim in (f, f, v, v, v)), totals_block(plan)]
  inputs += [state_block(plan), before_block(plan)]
  outputs = [array(plan, f), array(plan, f), array(plan, v), state_block(plan)]
  keys, values = (plan.group * f, plan.chunk), (plan.group * v, plan.chunk)
  scratch = Scratch(
    queries=pltpu.VMEM((2, *keys), jnp.float32),
    outputs=pltpu.VMEM((2, *values), plan.dtype),
    d_outputs=pltpu.VMEM((2, *values), plan.dtype),
    keys=pltpu.VMEM((plan.unroll, *keys), jnp.float32),
    values=pltpu.VMEM((plan.unroll, *values), plan.dtype),
    states=pltpu.VMEM((plan.unroll, plan.group, plan.rows.total, plan.wide), plan.dtype),
    dq=pltpu.VMEM(keys, plan.dtype),
    dk=pltpu.VMEM(keys, plan.dtype),
    dv=pltpu.VMEM(values, plan.dtype),
  )
  work = plan.chunk * (3 * f + 2 * plan.wide) + 5 * plan.rows.total * plan.wide
  return call(
    functools.partial(_backward_kernel, plan=plan), "taylor_attention_backward", plan, scalars,
    (query, key, value, output, d_output, totals, d_final_state, before, *starts),
    inputs, outputs, scratch, work, reverse=True,
  )  # fmt: skip
