"""What the TPU kernels of routed attention share: the plan, tiles of a cluster, logits, masks.

One grid step is a cluster of a unit: a head, or two heads of up to 64 channels that share a lane
tile. The unit's tokens are in VMEM as a whole. Rows of a tile are queries, columns keys, both slots
of the cluster. A panel of queries meets all its keys before the softmax, so that nothing is
rescaled: in one tile where a cluster is small, else in a loop over tiles.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..dots import NT, dot_f32
from . import tpu_rows
from .reference import OWN_PAIR
from .tpu_rows import (
  chunks,
  columns,
  gather,
  iota,
  lane_tiles,
  pack,
  reversed_in_eights,
  skew,
  unpack,
)


class Plan(NamedTuple):
  """What a kernel is specialised for."""

  batch: int
  length: int  # T, a multiple of 128
  units: int
  fold: int  # heads per unit
  width: int  # lanes of a head where several share a lane tile
  lanes: int  # of a unit, for keys and values alike
  clusters: int
  slots: int  # W, a multiple of panel
  panel: int  # queries of a tile
  tile: int  # keys of a tile; 0: one tile with all the keys of a panel
  shared_keys: bool  # queries and keys are one array
  shared_members: bool  # of queries and keys
  mask: str | None  # "triangle", "position"
  own_last: bool  # a token sees itself as a last resort
  zeros_seen: bool  # values of 0 are
  scale: float
  relative: bool
  buffers: int  # of blocks of tokens: 1 or 2
  dtype: jnp.dtype
  interpret: bool | pltpu.InterpretParams

  @property
  def sides(self) -> int:
    """Lists of members of a cluster."""
    return 1 if self.shared_members else 2

  @property
  def compared(self) -> bool:
    """Whether it matters where keys of other members are."""
    return not self.shared_members and (self.mask == "position" or self.own_last)

  @property
  def lane_tiles(self) -> int:
    return self.lanes // tpu_rows.LANES

  @property
  def tile_shape(self) -> tuple[int, int]:
    """(tiles of a panel, keys of a tile)."""
    return (self.slots // self.tile, self.tile) if self.tile else (1, self.slots)

  @property
  def offsets(self) -> int:
    """Rows of a relative table spread out by offset: from -(slots - 1) on."""
    ahead = self.panel if self.mask == "triangle" else self.slots
    return self.slots + ahead

  def groups(self, backward: bool) -> list[tuple[int, tuple[str, ...]]]:
    """(side whose members take them, arrays packed together)."""
    if self.shared_members:
      arrays = ["q", "v"] if self.shared_keys else ["q", "k", "v"]
      found = [(0, arrays + (["d"] if backward else []))]
    else:
      found = [(0, ["q", "d"] if backward else ["q"]), (1, ["k", "v"])]
    step = 1 if self.dtype == jnp.float32 else 2
    return [(side, tuple(x[i : i + step])) for side, x in found for i in range(0, len(x), step)]


class Tile(NamedTuple):
  """Keys that a panel of queries meets at a time."""

  index: Any  # where its strip is
  start: Any  # first key
  width: int
  diagonal: bool  # the last `panel` keys are the queries' own slots


class Cluster(NamedTuple):
  """A cluster's members in VMEM, of one head (other heads' lanes are 0)."""

  q: Any  # [W, lanes] in the plan's dtype; k, v, d alike; k is q where they are shared
  k: Any
  v: Any
  d: Any  # cotangent of the output over its divisor; None forward
  head: Any  # which of the unit's it is
  bias: Any  # float32 [tiles, 1, keys of a tile]: 0, or -inf for what is not seen
  places: Any  # int32 [tiles, 1, keys of a tile] of keys, where they are `compared`
  own_places: Any  # int32 [W, 128] of queries
  keys_table: Any  # [offsets, lanes], or None; values_table alike
  values_table: Any


def heads(plan: Plan, body: Callable) -> None:
  """body(head) for every head of a unit."""
  if plan.fold == 1 or not plan.tile:
    for head in range(plan.fold):
      body(head)
  else:
    jax.lax.fori_loop(0, plan.fold, lambda head, _: body(head), None)


def panels(plan: Plan, body: Callable) -> None:
  """body(i) for every panel."""
  count = plan.slots // plan.panel
  if plan.tile:
    jax.lax.fori_loop(0, count, lambda i, _: body(i), None)
    return
  for i in range(count):
    body(i)


def tiles(plan: Plan, panel, body: Callable, carry: Any) -> Any:
  """carry = body(tile, carry) for every tile that the panel sees."""
  triangle = plan.mask == "triangle"
  if not plan.tile:
    width = (panel + 1) * plan.panel if triangle else plan.slots
    return body(Tile(0, 0, width, triangle), carry)

  def turn(n, carry):
    return body(Tile(n, pl.multiple_of(n * plan.tile, plan.tile), plan.tile, False), carry)

  whole = panel if triangle else plan.slots // plan.tile
  carry = jax.lax.fori_loop(0, whole, turn, carry)
  if triangle:
    start = pl.multiple_of(panel * plan.tile, plan.tile)
    carry = body(Tile(panel, start, plan.tile, True), carry)
  return carry


class Strip:
  """What is known of a panel's tiles: in VMEM, or as a value where there is only one tile."""

  def __init__(self, ref=None):
    self.ref: Any = ref
    self.value: Any = None

  def put(self, tile: Tile, x: jax.Array) -> None:
    if self.ref is None:
      self.value = x
    else:
      self.ref[tile.index] = x

  def get(self, tile: Tile) -> jax.Array:
    return self.value if self.ref is None else self.ref[tile.index]


def panel_rows(plan: Plan, panel):
  start = panel * plan.panel
  return pl.ds(start if isinstance(panel, int) else pl.multiple_of(start, plan.panel), plan.panel)


def table_rows(plan: Plan, panel, tile: Tile):
  """Rows of the spread tables for the offsets of a tile: its width + panel of them."""
  start = plan.slots - plan.panel - panel * plan.panel + tile.start
  if not isinstance(start, int):
    start = pl.multiple_of(start, tpu_rows.LANES)
  return pl.ds(start, tile.width + plan.panel)


def in_raw_units(plan: Plan) -> bool:
  """Whether logits are kept without their scale, which the exponential then brings in."""
  return plan.scale > 0 and not plan.relative


def logits(plan: Plan, c: Cluster, panel, tile: Tile) -> jax.Array:
  """float32 [panel, keys], masked; in units of 1 / scale if `in_raw_units`."""
  q = c.q[panel_rows(plan, panel), :]
  scores = dot_f32(q, c.k[pl.ds(tile.start, tile.width), :], NT)
  if not in_raw_units(plan) and plan.scale != 1:
    scores *= plan.scale
  if plan.relative:
    table = c.keys_table[table_rows(plan, panel, tile), :]
    scores += skew(dot_f32(q, table, NT), tile.width)
  if plan.own_last:
    least = OWN_PAIR / plan.scale if in_raw_units(plan) else OWN_PAIR
    scores = jnp.where(own_pairs(plan, c, panel, tile), least, scores)
  scores += c.bias[tile.index, :, : tile.width]
  if plan.mask == "position":
    seen = c.places[tile.index, :, : tile.width] <= c.own_places[panel_rows(plan, panel), 0:1]
    return jnp.where(seen, scores, -jnp.inf)
  if not tile.diagonal:
    return scores
  before, own = scores[:, : tile.width - plan.panel], scores[:, tile.width - plan.panel :]
  own = jnp.where(iota(own.shape, 1) <= iota(own.shape, 0), own, -jnp.inf)
  return jnp.concatenate([before, own], 1) if before.shape[1] else own


def own_pairs(plan: Plan, c: Cluster, panel, tile: Tile) -> jax.Array:
  """Which pairs are a token with itself, bool [panel, keys]."""
  shape = plan.panel, tile.width
  if plan.shared_members:
    return iota(shape, 1) + tile.start == iota(shape, 0) + panel * plan.panel
  return c.places[tile.index, :, : tile.width] == c.own_places[panel_rows(plan, panel), 0:1]


def with_table(plan: Plan, c: Cluster, parts) -> jax.Array:
  """What comes from keys or values and, if there are any, from a table: float32 [panel, lanes].

  parts: one or two [panel, lanes], the second `reversed_in_eights` and in all heads' lanes.
  """
  if not plan.relative:
    return parts[0]
  extra = reversed_in_eights(parts[1])
  if plan.fold > 1:
    extra = jnp.where(iota(extra.shape, 1) // plan.width == c.head, extra, 0)
  return parts[0] + extra


def lanes_sum(x: jax.Array, combine=jnp.add) -> jax.Array:
  """[R, N] -> [R, 128]: lane tiles are combined, lanes are not."""
  first, *rest = lane_tiles(x)
  for other in rest:
    first = combine(first, other)
  return first


def pack_tokens(plan: Plan, blocks: dict, words: list, weights, backward: bool) -> None:
  """Blocks [T, lanes] to words [L, T + 8, 128]; "d" is multiplied by `weights` [fold, T]."""

  def body(rows):
    found = {name: ref[rows, :] for name, ref in blocks.items()}
    if "d" in found:
      factor = jnp.concatenate([columns(weights[:, rows], plan.width)] * plan.lane_tiles, 1)
      found["d"] = (found["d"].astype(jnp.float32) * factor).astype(plan.dtype)
    for (_, names), ref in zip(plan.groups(backward), words, strict=True):
      packed = pack(found[names[0]], found[names[1]] if len(names) > 1 else None)
      for n, tile in enumerate(lane_tiles(packed)):
        ref[n, rows, :] = tile

  chunks(plan.length, body)
  for ref in words:
    for n in range(plan.lane_tiles):
      ref[n, plan.length :, :] = jnp.zeros_like(ref[n, plan.length :, :])


def take_members(plan: Plan, head, members, words, rows: dict, backward: bool) -> None:
  """The members' rows, to `rows` by name, with other heads' lanes 0.

  members: [fold, W] in SMEM for each side; words: for each group.
  """
  groups = list(zip(plan.groups(backward), words, strict=True))
  for side in range(plan.sides):
    mine = [(names, ref) for (one, names), ref in groups if one == side]

    def take(here, found, mine=mine):
      for (names, _), x in zip(mine, found, strict=True):
        for name, part in zip(names, unpack(x, len(names)), strict=True):
          if plan.fold > 1:
            part = jnp.where(iota(part.shape, 1) // plan.width == head, part, 0)
          rows[name][here, :] = part.astype(plan.dtype)

    gather(members[side], head, plan.slots, [ref for _, ref in mine], take)


def find_unseen(plan: Plan, places, c: Cluster) -> None:
  """Fills bias, places and own_places of a cluster; places: int32 [fold, W] for each side."""
  row = [ref[pl.ds(c.head, 1), :] for ref in places]  # [1, W]
  unseen = row[-1] >= plan.length
  if not plan.zeros_seen:
    nonzero = jnp.where(c.v[...].astype(jnp.float32) != 0, 1.0, 0.0).astype(plan.dtype)
    ones = jnp.ones((16, plan.lanes), plan.dtype)
    unseen |= dot_f32(ones, nonzero, NT)[:1] == 0
  bias = jnp.where(unseen, -jnp.inf, 0.0)
  (count, width), lanes = plan.tile_shape, tpu_rows.LANES
  for n in range(count):
    c.bias[n] = bias[:, n * width : (n + 1) * width]
  if c.places is None:
    return
  for n in range(count):
    c.places[n] = row[-1][:, n * width : (n + 1) * width]
  for n, tile in enumerate(lane_tiles(row[0])):
    c.own_places[n * lanes : (n + 1) * lanes, :] = jnp.broadcast_to(tile, (lanes, lanes)).T


def token_names(plan: Plan, backward: bool) -> list[str]:
  """Arrays of tokens that a kernel reads."""
  return ["q", *([] if plan.shared_keys else ["k"]), "v", *(["d"] if backward else [])]


def scratch(plan: Plan, backward: bool, strips: int) -> list:
  """Of both kernels: strips, words of every group, rows by name, and what `Cluster` has."""
  names = token_names(plan, backward)
  words = plan.lane_tiles, plan.length + tpu_rows.SUBLANES, tpu_rows.LANES
  count, width = plan.tile_shape
  found = [pltpu.VMEM((count, plan.panel, width), jnp.float32)] * strips if plan.tile else []
  found += [pltpu.VMEM(words, jnp.int32) for _ in plan.groups(backward)]
  found += [pltpu.VMEM((plan.slots, plan.lanes), plan.dtype) for _ in names]
  found.append(pltpu.VMEM((count, 1, width), jnp.float32))
  if plan.compared:
    found.append(pltpu.VMEM((count, 1, width), jnp.int32))
    found.append(pltpu.VMEM((plan.slots, tpu_rows.LANES), jnp.int32))
  return found


def split_scratch(plan: Plan, refs: list, backward: bool, count: int) -> tuple:
  """(strips, words, rows by name, Cluster, the other refs)."""
  refs = list(refs)
  take = lambda count: [refs.pop(0) for _ in range(count)]  # noqa: E731
  strips = [Strip(ref) for ref in (take(count) if plan.tile else [None] * count)]
  words, names = take(len(plan.groups(backward))), token_names(plan, backward)
  rows = dict(zip(names, take(len(names)), strict=True))
  (bias,) = take(1)
  places, own_places = take(2) if plan.compared else (None, None)
  cluster = Cluster(
    rows["q"], rows.get("k", rows["q"]), rows["v"], rows.get("d"), None, bias, places, own_places,
    None, None,
  )  # fmt: skip
  return strips, words, rows, cluster, refs


def member_specs(plan: Plan) -> list[pl.BlockSpec]:
  """Every side's members in SMEM, then again in VMEM."""
  block = (None, None, None, plan.fold, plan.slots)
  place = lambda b, u, c: (b, u, c, 0, 0)  # noqa: E731
  spaces = [pltpu.SMEM, pltpu.VMEM]
  return [pl.BlockSpec(block, place, memory_space=x) for x in spaces for _ in range(plan.sides)]


def weight_spec(plan: Plan) -> pl.BlockSpec:
  return pl.BlockSpec((None, None, plan.fold, plan.length), lambda b, u, c: (b, u, 0, 0))


def token_spec(plan: Plan) -> pl.BlockSpec:
  """A unit's tokens."""
  mode = None if plan.buffers == 2 else pl.Buffered(plan.buffers)
  block, place = (None, plan.length, plan.lanes), lambda b, u, c: (b, 0, u)
  return pl.BlockSpec(block, place, pipeline_mode=mode)


def table_spec(plan: Plan) -> pl.BlockSpec:
  """A relative table, the same for everything."""
  return pl.BlockSpec((plan.offsets, plan.lanes), lambda b, u, c: (0, 0))


def pairs(plan: Plan) -> int:
  """Of queries and keys."""
  found = plan.batch * plan.units * plan.fold * plan.clusters * plan.slots**2
  return found // 2 if plan.mask == "triangle" else found


def cost(plan: Plan, operands, results, pairs: int, products: int) -> pl.CostEstimate:
  return pl.CostEstimate(
    flops=2 * products * pairs * (plan.width if plan.fold > 1 else plan.lanes),
    transcendentals=pairs,
    bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*operands, *results)),
  )
