"""Lightning attention as Pallas-Mosaic TPU kernels: one forward and one backward sweep over chunks.

The grid is (batch, heads, steps); the steps of one head run in order on one core, each taking
`unroll` chunks of `chunk` rows, and hand the [K, V] state on through VMEM. Symbols: C rows per
chunk, n of them real, i a row; `up` and `down` are decay^(i+1) and decay^(n-1-i), as in `xla.py`.

The backward is one reversed sweep. It reads the state before each chunk, which the training forward
stored in the dtype of the inputs: the state only ever enters a product rounded to that dtype, so
nothing is lost. Against two sweeps that recompute the states this moves 2 (4 K + 3 V) + 4 K V / C
bytes per token and head instead of 2 (5 K + 5 V) (bfloat16; 2048 against 2560 at K = V = 128 and
C = 256, the forward's write of the states included), and does 18 % fewer FLOPs.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from ..dots import NN, NT, TN, dot_f32

_LANES = 128


class Plan(NamedTuple):
  """What a kernel is specialised for."""

  batch: int
  length: int
  heads: int
  key_dim: int
  value_dim: int
  dtype: jnp.dtype
  chunk: int  # C
  panel: int  # rows of scores made at once, divides C; columns past a panel's end are skipped
  unroll: int  # chunks per grid step
  padded: bool  # some row of some chunk may lie past the end of its sequence
  packed: bool  # documents
  interpret: bool | pltpu.InterpretParams

  @property
  def rows(self) -> int:
    return self.chunk * self.unroll

  @property
  def steps(self) -> int:
    return pl.cdiv(self.length, self.rows)


class Scalars(NamedTuple):
  """Scalar-prefetched refs; the last two are [B * N] for N chunks, and only there if packed.

  Documents are runs, so in a chunk the rows that continue the document before it come first, and
  the rows of the document that goes on after it come last: two numbers per chunk say which.
  """

  log_decay: jax.Array  # float32 [H]
  lengths: jax.Array  # int32 [B]
  head_end: jax.Array | None  # rows below it see the state before the chunk
  tail_start: jax.Array | None  # rows from it on enter the state after the chunk


class Weights(NamedTuple):
  """Decay factors of one chunk."""

  mask: jax.Array  # [C, C] decay^(i-j) for i >= j in the same document, else 0
  up: jax.Array  # [C, 1]
  down: jax.Array  # [C, 1]
  carry: jax.Array  # [1, 1]
  real: jax.Array | None  # [C, 1] bool, None where all rows are


def _iota(shape, axis):
  return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _power(log_decay, exponent):
  """decay^exponent; exponents below 0 (masked by the caller) count as 0, so nothing overflows."""
  return jnp.exp(log_decay * jnp.maximum(exponent, 0).astype(jnp.float32))


def _fill_decay(plan, log_decay, decay):
  """Computes the decay factors of a head, once; all of its chunks use them."""
  mask_ref, up_ref, down_ref = decay
  distance = _iota(mask_ref.shape, 0) - _iota(mask_ref.shape, 1)
  mask_ref[...] = jnp.where(distance >= 0, _power(log_decay, distance), 0)
  up_ref[...] = _power(log_decay, _iota(up_ref.shape, 0) + 1)
  exponent = plan.chunk - 1 - _iota(down_ref.shape, 0)
  down_ref[...] = jnp.where(exponent >= 0, _power(log_decay, exponent), 0)


def _weights(plan, scalars, index, decay, document_end):
  """`index` counts the chunks of the sequence; `document_end` is int32 [1, C] or None.

  document_end holds, for every row of the chunk, the row after the last one of its document. Rows
  i >= j are in one document if i < document_end[j], which needs numbers in one orientation only.
  """
  mask_ref, up_ref, down_ref = decay
  count, real, first = plan.chunk, None, 0
  if plan.padded:
    length = scalars.lengths[pl.program_id(0)]
    count = jnp.clip(length - index * plan.chunk, 0, plan.chunk)
    real = _iota((plan.chunk, 1), 0) < count
    first = plan.chunk - count  # decay^(n-1-i) is row i + C - n of down_ref, and 0 from i = n on
  mask, up, down = mask_ref[...], up_ref[...], down_ref[pl.ds(first, plan.chunk), :]
  carry = _power(scalars.log_decay[pl.program_id(1)], jnp.full((1, 1), count, jnp.int32))
  if plan.packed:
    chunk_id = pl.program_id(0) * plan.steps * plan.unroll + index
    head_end, tail_start = scalars.head_end[chunk_id], scalars.tail_start[chunk_id]
    row = _iota(up.shape, 0)
    mask = jnp.where(_iota(mask.shape, 0) < document_end, mask, 0)
    up = jnp.where(row < head_end, up, 0)
    down = jnp.where(row >= tail_start, down, 0)
    carry = jnp.where(head_end >= count, carry, 0)
  return Weights(mask, up, down, carry, real)


def _block_weights(plan, scalars, step, decay, ends_ref):
  """`Weights` of each chunk of a block."""
  ends = [None if ends_ref is None else ends_ref[pl.ds(u, 1), :] for u in range(plan.unroll)]
  return [
    _weights(plan, scalars, step * plan.unroll + u, decay, ends[u]) for u in range(plan.unroll)
  ]


def _rows(ref, part, weights):
  """Chunk `part` of a block, [C, D]. Rows past the end hold anything, even NaN: they become 0."""
  chunk = weights.up.shape[0]
  tile = ref[pl.ds(part * chunk, chunk), :]
  return tile if weights.real is None else jnp.where(weights.real, tile, jnp.zeros_like(tile))


def _split_refs(plan, refs, tensors):
  """(Scalars, the `tensors` block refs after them, document ends or None, the remaining refs)."""
  prefetched = 4 if plan.packed else 2
  scalars = Scalars(*refs[:prefetched], *(None,) * (4 - prefetched))
  blocks, rest = refs[prefetched : prefetched + tensors], refs[prefetched + tensors :]
  return (scalars, blocks, rest[0], rest[1:]) if plan.packed else (scalars, blocks, None, rest)


def _forward_kernel(*refs, plan: Plan, save_states: bool):
  """Blocks: q, k [R, K], v [R, V], state [K, V]; out: o [R, V], state, maybe states [U, K, V].

  The states of all chunks of the block come first. They are one short dependent chain; with them in
  VMEM the outputs of the chunks are independent and their products overlap.
  """
  scalars, (q_ref, k_ref, v_ref, initial_ref), ends_ref, rest = _split_refs(plan, refs, 4)
  # The last scratch is there only if the states before the chunks are not an output anyway.
  o_ref, state_ref, *rest = rest
  *decay, states_ref = (*rest[1:], rest[0]) if save_states else rest
  step, log_decay = pl.program_id(2), scalars.log_decay[pl.program_id(1)]

  @pl.when(step == 0)
  def _():
    _fill_decay(plan, log_decay, decay)
    state_ref[...] = initial_ref[...]  # the output block stays in VMEM until the head is done

  weights = _block_weights(plan, scalars, step, decay, ends_ref)
  for part, w in enumerate(weights):
    k, v = (_rows(ref, part, w) for ref in (k_ref, v_ref))
    states_ref[part] = state_ref[...].astype(plan.dtype)
    added = dot_f32((w.down[:, : plan.key_dim] * k).astype(k.dtype), v, TN)
    state_ref[...] = w.carry * state_ref[...] + added
  for part, w in enumerate(weights):
    q, k, v = (_rows(ref, part, w) for ref in (q_ref, k_ref, v_ref))
    for start in range(0, plan.chunk, plan.panel):  # rows of a panel see the columns up to its end
      stop = start + plan.panel
      scores = (dot_f32(q[start:stop], k[:stop], NT) * w.mask[start:stop, :stop]).astype(v.dtype)
      carried = w.up[start:stop, : plan.value_dim] * dot_f32(q[start:stop], states_ref[part], NN)
      output = dot_f32(scores, v[:stop], NN) + carried
      o_ref[pl.ds(part * plan.chunk + start, plan.panel), :] = output.astype(o_ref.dtype)


def _backward_kernel(*refs, plan: Plan):
  """Blocks: q, k, v, dO, d_final, states; out: dq, dk, dv, d_initial. Steps run from the last one.

  As in the forward, first the chain of state cotangents, then what the chunks do alone.
  """
  scalars, blocks, ends_ref, rest = _split_refs(plan, refs, 6)
  *rows_refs, d_final_ref, states_ref = blocks
  q_ref, do_ref = rows_refs[0], rows_refs[3]
  dq_ref, dk_ref, dv_ref, d_state_ref, *decay, d_states_ref, scores_ref = rest
  turn, log_decay = pl.program_id(2), scalars.log_decay[pl.program_id(1)]
  step = plan.steps - 1 - turn

  @pl.when(turn == 0)
  def _():
    _fill_decay(plan, log_decay, decay)
    d_state_ref[...] = d_final_ref[...]

  weights = _block_weights(plan, scalars, step, decay, ends_ref)
  for part, w in reversed(list(enumerate(weights))):
    q, do = (_rows(ref, part, w) for ref in (q_ref, do_ref))
    d_states_ref[part] = d_state_ref[...].astype(plan.dtype)  # of the state after the chunk
    added = dot_f32((w.up[:, : plan.key_dim] * q).astype(q.dtype), do, TN)
    d_state_ref[...] = w.carry * d_state_ref[...] + added
  for part, w in enumerate(weights):
    tiles = [_rows(ref, part, w) for ref in rows_refs]
    states = (states_ref[part], d_states_ref[part])
    _backward_chunk(plan, part, w, tiles, states, (dq_ref, dk_ref, dv_ref), scores_ref.at[part % 2])


def _backward_chunk(plan, part, w, tiles, states, out_refs, scores_ref):
  """dq, dk and dv of one chunk. scores_ref [2, C, C] holds P and A between two uses.

  (P, A: the masked dO V^T and Q K^T.) Without it the compiler keeps them in registers and spills.
  """
  q, k, v, do = tiles
  state, d_state = states
  dq_ref, dk_ref, dv_ref = out_refs
  key_dim, value_dim, panel = plan.key_dim, plan.value_dim, plan.panel
  for start in range(0, plan.chunk, panel):
    rows, stop = slice(start, start + panel), start + panel
    mask = w.mask[rows, :stop]
    d_scores = (dot_f32(do[rows], v[:stop], NT) * mask).astype(q.dtype)
    scores = (dot_f32(q[rows], k[:stop], NT) * mask).astype(q.dtype)
    dq = dot_f32(d_scores, k[:stop], NN) + w.up[rows, :key_dim] * dot_f32(do[rows], state, NT)
    dq_ref[pl.ds(part * plan.chunk + start, panel), :] = dq.astype(dq_ref.dtype)
    scores_ref[0, rows, :stop] = d_scores
    scores_ref[1, rows, :stop] = scores
  for start in range(0, plan.chunk, panel):  # rows of dk and dv: columns of the scores
    rows, here = slice(start, start + panel), pl.ds(part * plan.chunk + start, panel)
    d_scores, scores = scores_ref[0, start:, rows], scores_ref[1, start:, rows]
    dk = dot_f32(d_scores, q[start:], TN) + w.down[rows, :key_dim] * dot_f32(v[rows], d_state, NT)
    dv = dot_f32(scores, do[start:], TN) + w.down[rows, :value_dim] * dot_f32(k[rows], d_state, NN)
    dk_ref[here, :] = dk.astype(dk_ref.dtype)
    dv_ref[here, :] = dv.astype(dv_ref.dtype)


def forward(plan: Plan, scalars, documents, query, key, value, initial_state, save_states: bool):
  """(output, final state[, states before each chunk, [B, H, N, K, V]]).

  query, key, value and output are in the kernels' layout (`to_kernel_layout`).
  """
  k, v = plan.key_dim, plan.value_dim
  out, scratch = [_array(plan, v, plan.dtype), _state(plan)], [_states_scratch(plan)]
  if save_states:
    out, scratch = [*out, _states(plan)], []
  flops = plan.batch * plan.heads * plan.length * (2 * plan.chunk * (k + v) + 4 * k * v)
  operands = (query, key, value, initial_state, *documents)
  return _call(
    functools.partial(_forward_kernel, plan=plan, save_states=save_states),
    "lightning_attention_forward", plan, scalars, operands,
    (_array(plan, k), _array(plan, k), _array(plan, v), _state(plan), *_documents(plan)),
    out, scratch, flops, reverse=False,
  )  # fmt: skip


def backward(plan: Plan, scalars, documents, query, key, value, d_output, d_final_state, states):
  """(d_query, d_key, d_value, d_initial_state); arrays in the kernels' layout."""
  k, v = plan.key_dim, plan.value_dim
  rows = [_array(plan, d, plan.dtype) for d in (k, k, v, v)]
  flops = plan.batch * plan.heads * plan.length * (2 * plan.chunk * (3 * k + 2 * v) + 8 * k * v)
  scratch = [_states_scratch(plan), pltpu.VMEM((2, 2, plan.chunk, plan.chunk), plan.dtype)]
  operands = (query, key, value, d_output, d_final_state, states, *documents)
  return _call(
    functools.partial(_backward_kernel, plan=plan),
    "lightning_attention_backward", plan, scalars, operands,
    (*rows, _state(plan), _states(plan), *_documents(plan)),
    [*rows[:3], _state(plan)], scratch, flops, reverse=True,
  )  # fmt: skip


class _Block(NamedTuple):
  """An operand: full shape, dtype, block shape and where the block lies at grid point (b, h, t)."""

  shape: tuple[int, ...]
  dtype: DTypeLike | None
  block: tuple[int | None, ...]
  place: object


def _array(plan, dim, dtype=None):
  shape = kernel_shape(plan.batch, plan.length, plan.heads, dim)
  if len(shape) == 3:  # [B, T, H * D]: a head is a column block, no transpose is needed
    return _Block(shape, dtype, (None, plan.rows, dim), lambda b, h, t: (b, t, h))
  return _Block(shape, dtype, (None, None, plan.rows, dim), lambda b, h, t: (b, h, t, 0))


def _state(plan):
  dims = (plan.key_dim, plan.value_dim)
  shape = (plan.batch, plan.heads, *dims)
  return _Block(shape, jnp.float32, (None, None, *dims), lambda b, h, t: (b, h, 0, 0))


def _states(plan):
  dims = (plan.key_dim, plan.value_dim)
  shape = (plan.batch, plan.heads, plan.steps * plan.unroll, *dims)
  block = (None, None, plan.unroll, *dims)
  return _Block(shape, plan.dtype, block, lambda b, h, t: (b, h, t, 0, 0))


def _documents(plan):
  if not plan.packed:
    return ()
  shape = (plan.batch, plan.steps, plan.unroll, plan.chunk)
  block = (None, None, plan.unroll, plan.chunk)
  return (_Block(shape, jnp.int32, block, lambda b, h, t: (b, t, 0, 0)),)


def _call(kernel, name, plan, scalars, operands, inputs, outputs, scratch, flops, reverse):
  def spec(item):
    def index(b, h, t, *_):
      return item.place(b, h, plan.steps - 1 - t if reverse else t)

    return pl.BlockSpec(item.block, index)

  out_shape = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs]
  moved = sum(math.prod(x.shape) * x.dtype.itemsize for x in (*operands, *out_shape))
  return pl.pallas_call(
    kernel,
    out_shape=out_shape,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(scalars),
      grid=(plan.batch, plan.heads, plan.steps),
      in_specs=[spec(x) for x in inputs],
      out_specs=[spec(x) for x in outputs],
      scratch_shapes=[*_decay_scratch(plan), *scratch],
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"),
    ),
    cost_estimate=pl.CostEstimate(
      flops=flops,
      transcendentals=plan.batch * plan.heads * plan.chunk**2,
      bytes_accessed=moved,
    ),
    interpret=plan.interpret,
    name=name,
  )(*scalars, *operands)


def _decay_scratch(plan):
  """mask [C, C], up [C, D] and down [C, D] (twice as many rows if padded), equal along D."""
  chunk, dim = plan.chunk, max(plan.key_dim, plan.value_dim)
  shapes = (chunk, chunk), (chunk, dim), (2 * chunk if plan.padded else chunk, dim)
  return [pltpu.VMEM(shape, jnp.float32) for shape in shapes]


def _states_scratch(plan):
  return pltpu.VMEM((plan.unroll, plan.key_dim, plan.value_dim), plan.dtype)


def kernel_shape(batch: int, length: int, heads: int, dim: int) -> tuple[int, ...]:
  return (batch, length, heads * dim) if dim % _LANES == 0 else (batch, heads, length, dim)


def to_kernel_layout(x: jax.Array) -> jax.Array:
  """[B, T, H, D] -> [B, T, H * D] where a head fills whole lane tiles, else [B, H, T, D]."""
  shape = kernel_shape(*x.shape)
  return jnp.reshape(x, shape) if len(shape) == 3 else jnp.transpose(x, (0, 2, 1, 3))


def from_kernel_layout(x: jax.Array, heads: int) -> jax.Array:
  return x.reshape(*x.shape[:2], heads, -1) if x.ndim == 3 else x.transpose(0, 2, 1, 3)
