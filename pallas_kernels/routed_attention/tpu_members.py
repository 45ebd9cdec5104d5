"""Members of the clusters as the TPU kernels take them: a kernel, and the same in XLA.

The kernel sorts nothing. A cluster's least member is found by bisection over the bits of its score,
32 counts of who is at least as near; equals are taken from the front, by a cumulative sum. Members
then move to their slots, and so into the order of their positions, bit by bit of how far they have
to go: those before them that are no members.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from ..dots import NN, dot_f32
from ..tpu_sizes import round_up
from . import tpu_rows

ABSENT = -(2**31)  # the score, as an integer, of what is no token
PLACE_BITS = 14
VMEM = 13 * 2**20  # most bytes of a block of rows and of what is made of them


def members_and_counts(
  scores: Float[Array, "B T H C"],
  window: int,
  slots: int,
  absent: int,
  interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Int[Array, "B H C W"], Float[Array, "B H T"]]:
  """(members in the order of their positions, of how many clusters each token is one).

  As `members.top_members`, but slots that no token can fill hold `absent`, which is at least T, and
  are last; there are `slots` of them.
  """
  scores = jnp.where(scores == 0, 0.0, scores)  # a ranking has -0 below 0
  by_cluster = scores.transpose(0, 2, 3, 1)  # [B, H, C, T]
  window = min(window, by_cluster.shape[-1])
  heads = heads_inside(by_cluster.shape)
  if not heads or scores.dtype != jnp.float32:
    return _ranked(by_cluster, window, slots, absent)
  return _selected(by_cluster, window, slots, absent, heads, interpret)


def _ranked(by_cluster, window, slots, absent):
  """By sorting. Counts come from the last of the ranking, not from a scatter."""
  values, index = jax.lax.top_k(by_cluster, window)
  least = values[..., -1:]
  last = jnp.max(jnp.where(values == least, index, -1), axis=-1, keepdims=True)
  place = jnp.arange(by_cluster.shape[-1])
  inside = (by_cluster > least) | ((by_cluster == least) & (place <= last))
  count = jnp.sum(inside & jnp.isfinite(by_cluster), axis=2, dtype=jnp.float32)
  members = jnp.sort(jnp.where(jnp.isfinite(values), index, absent), axis=-1)
  short = slots - members.shape[-1]
  return jnp.pad(members, ((0, 0),) * 3 + ((0, short),), constant_values=absent), count


def heads_inside(shape: tuple[int, ...]) -> int:
  """How many heads of [B, H, C, T] the kernel takes at a time; 0 for rows that are too long."""
  _, heads, clusters, length = shape
  if length > 2**PLACE_BITS:
    return 0
  each = round_up(length, tpu_rows.LANES) * clusters * 4 * 5  # two blocks, keys, twice the words
  return next((n for n in range(heads, 0, -1) if heads % n == 0 and n * each <= VMEM), 0)


def _selected(by_cluster, window, slots, absent, heads, interpret):
  batch, all_heads, clusters, length = by_cluster.shape
  padded = max(round_up(length, tpu_rows.LANES), slots)
  rows = heads * clusters
  x = by_cluster.reshape(batch, -1, rows, length)
  x = jnp.pad(x, ((0, 0),) * 3 + ((0, padded - length),), constant_values=-jnp.inf)
  shapes = (rows, padded), (rows, slots), (heads, padded)
  blocks = [pl.BlockSpec((None, None, *x), lambda b, i: (b, i, 0, 0)) for x in shapes]
  lead = batch, all_heads // heads
  members, count = pl.pallas_call(
    functools.partial(_kernel, window=window, absent=absent, heads=heads),
    out_shape=[
      jax.ShapeDtypeStruct((*lead, *shapes[1]), jnp.int32),
      jax.ShapeDtypeStruct((*lead, *shapes[2]), jnp.float32),
    ],
    grid=lead,
    in_specs=blocks[:1],
    out_specs=blocks[1:],
    scratch_shapes=[pltpu.VMEM((rows, size), jnp.int32) for size in (padded, 2 * padded)],
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
    interpret=interpret,
    name="routed_attention_members",
  )(x)
  members = members.reshape(batch, all_heads, clusters, slots)
  return members, count.reshape(batch, all_heads, padded)[..., :length]


def _kernel(scores, members, count, keys, words, *, window, absent, heads):
  """scores [R, T], members [R, W], count [heads, T], keys [R, T], words [R, 2 T]."""
  rows, length = scores.shape
  x = scores[...]
  bits = pltpu.bitcast(x, jnp.int32)
  ordered = jnp.where(bits < 0, bits ^ (2**31 - 1), bits)
  keys[...] = jnp.where(x == -jnp.inf, ABSENT, ordered)
  least = _least(keys, window)
  above = _total(keys, lambda x: x > least)
  _mark(keys, words, count, least, window - above, heads)
  _compress(words, length)
  slots = members.shape[1]
  found = words[:, :slots]
  place = found & (2**PLACE_BITS - 1)
  members[...] = jnp.where(found >= 2 ** (2 * PLACE_BITS), place, absent)


def _tiles(length, body, carry, most=1):
  """carry = body(start, columns, carry) for some lane tiles at a time, up to `most`."""
  some = next(n for n in (4, 2, 1) if n <= most and length % (n * tpu_rows.LANES) == 0)
  size = some * tpu_rows.LANES

  def turn(n, carry):
    start = pl.multiple_of(n * size, size)
    return body(start, pl.ds(start, size), carry)

  return jax.lax.fori_loop(0, length // size, turn, carry)


def _total(keys, test):
  """How many keys of each row pass, float32 [R, 1]."""

  def tile(_, here, total):
    for passed in tpu_rows.lane_tiles(jnp.where(test(keys[:, here]), 1.0, 0.0)):
      total += passed
    return total

  zeros = jnp.zeros((keys.shape[0], tpu_rows.LANES), jnp.float32)
  return jnp.sum(_tiles(keys.shape[1], tile, zeros, most=4), 1, keepdims=True)


def _least(keys, window):
  """The key of the last of `window`, [R, 1]."""

  def bit(n, least):
    trial = least + jax.lax.shift_left(jnp.int32(1), 31 - n)
    return jnp.where(_total(keys, lambda x: x >= trial) >= window, trial, least)

  return jax.lax.fori_loop(0, 32, bit, jnp.full((keys.shape[0], 1), ABSENT, jnp.int32))


def _mark(keys, words, count, least, equals, heads):
  """Words of members: a bit, how far they have to move, and where they are; others are 0."""
  rows, lanes = keys.shape[0], tpu_rows.LANES
  shape = (lanes, lanes)
  until = jnp.where(tpu_rows.iota(shape, 0) <= tpu_rows.iota(shape, 1), 1.0, 0.0)
  until = until.astype(jnp.bfloat16)
  shape = (heads, rows)
  own = tpu_rows.iota(shape, 1) // (rows // heads) == tpu_rows.iota(shape, 0)
  own = jnp.where(own, 1.0, 0.0).astype(jnp.bfloat16)
  place = tpu_rows.iota((rows, lanes), 1)

  def tile(start, here, carry):
    same, before = carry
    key = keys[:, here]
    equal = jnp.where(key == least, 1.0, 0.0)
    rank = same + dot_f32(equal.astype(jnp.bfloat16), until, NN)
    inside = (key > least) | ((key == least) & (rank <= equals))
    inside = jnp.where(inside & (key != ABSENT), 1.0, 0.0)
    upto = before + dot_f32(inside.astype(jnp.bfloat16), until, NN)
    count[:, here] = dot_f32(own, inside.astype(jnp.bfloat16), NN)
    way = start + place + 1 - upto.astype(jnp.int32)
    word = 2 ** (2 * PLACE_BITS) + way * 2**PLACE_BITS + start + place
    words[:, here] = jnp.where(inside > 0, word, 0)
    return rank[:, lanes - 1 :], upto[:, lanes - 1 :]

  _tiles(keys.shape[1], tile, (jnp.zeros((rows, 1), jnp.float32),) * 2)


def _compress(words, length):
  """Moves every word as far to the left as it says."""
  rows, lanes = words.shape[0], tpu_rows.LANES
  words[:, length:] = jnp.zeros((rows, length), jnp.int32)
  lane = tpu_rows.iota((rows, lanes), 1)
  shift, bit = 1, PLACE_BITS
  while shift < length:

    def tile(start, here, _, shift=shift, bit=bit):
      own = words[:, here]
      count = own.shape[1]
      if shift < lanes:
        after = words[:, pl.ds(start + count, lanes)]
        turned = [pltpu.roll(x, lanes - shift, axis=1) for x in (*tpu_rows.lane_tiles(own), after)]
        pairs = zip(turned[:-1], turned[1:], strict=True)
        other = jnp.concatenate([jnp.where(lane < lanes - shift, *x) for x in pairs], 1)
      else:
        other = words[:, pl.ds(start + shift, count)]
      stays = jnp.where(own & 2**bit != 0, 0, own)
      words[:, here] = jnp.where(other & 2**bit != 0, other, stays)

    _tiles(length, tile, None, most=4)
    shift, bit = 2 * shift, bit + 1
