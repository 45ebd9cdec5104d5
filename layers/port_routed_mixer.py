"""The token mixer of the PyTorch port of the Routing Transformer."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ..pallas_kernels import (
  Routing,
  block_attention,
  block_attention_step,
  block_window,
  empty_routed_state,
  empty_window,
  routed_attention,
  routed_attention_step,
  sharded_routed_attention,
)
from ..pallas_kernels.segments import count_seen, run_index
from .norms import unit
from .notes import Note
from .partitioning import constrain, logical, operator_axes
from .port_centroids import PortCentroids
from .positions import position_after, positions_from, rotary, rotary_pairs
from .projections import HeadsIn, HeadsOut
from .routed_mixer import RoutedMixerState


@dataclasses.dataclass(frozen=True)
class PortRoutedMixerConfig:
  """Sizes and variants. The defaults are the port's, but for `membership`."""

  features: int  # model width D
  heads: int  # of both kinds
  local_heads: int  # the first ones; the others are routed
  head_dim: int
  clusters: int
  window_size: int  # members of a cluster
  block_size: int  # of local heads
  look_back: int | None = None  # tokens before the own block that local heads see; None: one block
  membership: str = "causal_recent"  # "official" is the port's; see `Routing`
  shared: bool = True  # routed queries are the keys, too
  memory_slots: int = 0  # keys and values that all members of a cluster see
  gain: bool = False  # a learned factor of the output, at first 0 (ReZero)
  commitment: float = 1e-4  # weight of the distance to the centroids in the loss
  centroid_decay: float = 0.999
  init: nnx.Initializer = nnx.initializers.normal(0.02)
  implementation: str | None = None  # of routed_attention

  def __post_init__(self):
    if not 0 <= self.local_heads <= self.heads:
      self._refuse("local_heads", f"lie between 0 and heads ({self.heads})", "others are routed")
    rotary_pairs(self.head_dim, 1.0)  # raises for an odd head_dim
    if self.block_size < 1:
      self._refuse("block_size", "be at least 1", "tokens of a block")
    if self.look_back is not None and (self.look_back < 0 or self.look_back % self.block_size):
      self._refuse("look_back", f"be a multiple of block_size ({self.block_size})", "whole blocks")
    if self.memory_slots < 0:
      self._refuse("memory_slots", "be at least 0", "0 for none")
    if self.membership == "causal_recent" and self.memory_slots:
      self._refuse("memory_slots", "be 0 with membership 'causal_recent'", "it has no memory")
    if not self.shared and (self.membership != "official" or self.memory_slots < 1):
      self._refuse(
        "shared", "be True but with membership 'official' and a memory",
        "queries and keys have members of their own, and a query may see none of them",
      )  # fmt: skip
    self.routing()  # raises for what does not fit

  @property
  def routed_heads(self) -> int:
    return self.heads - self.local_heads

  def routing(self, with_state: bool = False) -> Routing:
    """Options of the operator; what is not there yet cannot be a member."""
    membership = self.membership
    if with_state and membership == "official":
      membership = "topk_prefix"
    # With "causal_recent" a token is one of the tokens it sees.
    own_last = self.shared and membership != "causal_recent"
    return Routing(
      self.window_size,
      membership,
      scale=self.head_dim**-0.5,
      own_pair="last_resort" if own_last else "seen",
      combine_eps=1e-5,
    )

  def _refuse(self, name, rule, hint):
    got = getattr(self, name)
    raise ValueError(f"PortRoutedMixerConfig: {name} must {rule}; got {got!r} ({hint})")


class PortRoutedMixer(nnx.Module):
  """y = concat(local heads, routed heads) W_out, each kind with projections of its own.

  Local heads are `block_attention` with rotary positions of queries and keys. Routed heads turn
  queries, keys AND values by rotary positions; the unit queries find the clusters
  (`PortCentroids`), the queries attend as they are to unit keys, and a token attends to itself only
  where it sees nothing else. `with_note` gives beside the output the commitment loss,
  commitment mean (q / |q| - mu)^2, and what moves the centroids.

  Membership "official" LEAKS the future into the past (`Routing`). Where a `state` is given, it is
  read as "topk_prefix": tokens to come are not there, as in decoding. With a memory there is no
  state.

  Source: the routing-transformer package for PyTorch, version 1.6.1, as its code has it; paper:
  Efficient Content-Based Sparse Attention with Routing Transformers (2021), section 4.
  """

  def __init__(
    self,
    config: PortRoutedMixerConfig,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.config = c = config
    self.dtype = dtype
    more = dict(param_dtype=param_dtype, rngs=rngs)
    kwargs = dict(init=c.init, dtype=dtype, **more)
    local, routed, dim = c.local_heads, c.routed_heads, c.head_dim

    def heads_in(heads, parts, use_bias):
      return HeadsIn(c.features, heads, dim, parts=parts, use_bias=use_bias, **kwargs)

    def memory(*shape):
      values = jax.random.normal(rngs.params(), shape, param_dtype)
      return nnx.Param(values, **logical(None, "heads", None, None, None))

    centroids = dict(decay=c.centroid_decay, **more)
    slots = c.memory_slots
    self.local_heads_in: Any = heads_in(local, 3, use_bias=True) if local else None
    # Queries, values and, if they differ from the queries, keys.
    parts = 2 if c.shared else 3
    self.routed_heads_in: Any = heads_in(routed, parts, use_bias=False) if routed else None
    self.centroids = PortCentroids(routed, c.clusters, dim, **centroids) if routed else None
    # Keys and values.
    self.memory = memory(2, routed, c.clusters, slots, dim) if routed and slots else None
    self.heads_out = HeadsOut(c.heads, dim, c.features, use_bias=False, **kwargs)
    self.gain = nnx.Param(jnp.zeros((1,), param_dtype), **logical(None)) if c.gain else None

  def init_state(self, batch: int, max_length: int | None = None) -> RoutedMixerState:
    """The state before the first token; its size does not depend on `max_length`.

    Raises:
      ValueError: the mixer has a memory.
    """
    del max_length
    c, dtype = self.config, jnp.dtype(self.dtype)
    self._check_no_memory("init_state")
    sizes = (c.clusters, c.window_size, c.head_dim, c.head_dim)
    left = block_window(c.block_size, self._look_back())
    local, routed = c.local_heads, c.routed_heads
    return RoutedMixerState(
      empty_routed_state(batch, routed, *sizes, dtype) if routed else None,
      empty_window(batch, left, local, c.head_dim, c.head_dim, dtype) if local else None,
      jnp.zeros((batch,), jnp.int32),
    )

  def __call__(
    self,
    x: Float[Array, "B T D"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    lengths: Int[Array, " B"] | None = None,
    state: RoutedMixerState | None = None,
    dropout_key: jax.Array | None = None,
  ) -> tuple[Float[Array, "B T D"], RoutedMixerState]:
    """Mixes a whole sequence; see the mixer protocol in WORKSPACE.md."""
    del dropout_key  # nothing here is random
    return self._mix(x, segment_ids, positions, lengths, state)[:2]

  def with_note(
    self, x: Float[Array, "B T D"], **options
  ) -> tuple[Float[Array, "B T D"], RoutedMixerState, Note | None]:
    """The call, and what training needs beside it; None without routed heads."""
    options.pop("dropout_key", None)
    names = ("segment_ids", "positions", "lengths", "state")
    y, state, routed = self._mix(x, *map(options.get, names))
    if self.centroids is None:
      return y, state, None
    distance, sums = self.centroids.spread(*routed)
    return y, state, Note(self.config.commitment * distance, sums)

  def absorb(self, sums: Any) -> None:
    """Moves the centroids by the sums of a whole batch's notes."""
    if self.centroids is not None:
      self.centroids.absorb(sums)

  def start(self, x: Float[Array, "B T D"], key: jax.Array) -> None:
    """Finds the centroids' first places among the queries (and keys) of a first batch."""
    if self.routed_heads_in is not None and self.centroids is not None:
      query, _, *other = self._routed(x, positions_from(x.shape[1], None))
      self.centroids.start(jnp.concatenate([query, *other], axis=1), key)

  def step(
    self, x: Float[Array, "B D"], state: RoutedMixerState
  ) -> tuple[Float[Array, "B D"], RoutedMixerState]:
    """One token."""
    c, parts = self.config, []
    self._check_no_memory("step")
    routed: Any = state.routed
    local: Any = state.local
    turn = state.position[:, None]
    if self.local_heads_in is not None:
      q, k, v = (y[:, 0] for y in self._local(x[:, None], turn))
      output, local = block_attention_step(q, k, v, local, **self._blocks())
      parts.append(output)
    if self.centroids is not None:
      query, value = (y[:, 0] for y in self._routed(x[:, None], turn))
      near = unit(query)
      output, routed = routed_attention_step(
        query, near.astype(self.dtype), value, self.centroids.scores(near), routed,
        options=c.routing(with_state=True),
      )  # fmt: skip
      parts.append(output)
    state = RoutedMixerState(routed, local, state.position + 1)
    return self._out(jnp.concatenate(parts, axis=-2)), state

  def _mix(self, x, segment_ids, positions, lengths, state):
    """(output, state, (unit vectors that are clustered, their scores))."""
    c = self.config
    batch, length, _ = x.shape
    if state is not None:
      self._check_no_memory("call")
    before = jnp.zeros((batch,), jnp.int32) if state is None else state.position
    if positions is None:
      positions = self._positions(segment_ids, None if state is None else before, length)
    parts = []
    note: Any = None
    routed = local = None
    documents = dict(segment_ids=segment_ids, lengths=lengths)
    if self.local_heads_in is not None:
      q, k, v = self._local(x, positions)
      output, local = block_attention(
        q, k, v,
        initial_state=None if state is None else state.local,
        **documents,
        **self._blocks(),
      )  # fmt: skip
      parts.append(output)
    if self.centroids is not None:
      query, value, *other = self._routed(x, positions)
      near = unit(query)
      scores = self.centroids.scores(near)
      key, more, note = near.astype(self.dtype), {}, (near, scores)
      if not c.shared:
        key, near_key = other[0], unit(other[0])
        more["key_scores"] = self.centroids.scores(near_key)
        pairs = zip(note, (near_key, more["key_scores"]), strict=True)
        note = tuple(jnp.concatenate(pair, axis=1) for pair in pairs)
      if self.memory is not None:
        more["memory_key"], more["memory_value"] = self.memory[...].astype(self.dtype)
      axes = operator_axes()
      function = routed_attention if axes is None else sharded_routed_attention
      output, routed = function(
        query, key, value, scores,
        options=c.routing(with_state=state is not None),
        initial_state=None if state is None else state.routed,
        implementation=c.implementation,
        **documents,
        **more,
        **(axes or {}),
      )  # fmt: skip
      parts.append(output)
    output = constrain(jnp.concatenate(parts, axis=-2), "batch", "length", "heads", None)
    following = position_after(positions, lengths, before)
    return self._out(output), RoutedMixerState(routed, local, following), note

  @staticmethod
  def _positions(segment_ids, before, length):
    """Counted anew in every document: they turn the values, too, and so choose the clusters."""
    segments = None if segment_ids is None else run_index(segment_ids)
    return count_seen(segments, before, length) - 1

  def _local(self, x, positions):
    query, key, value = self.local_heads_in(x)
    return rotary(query, positions), rotary(key, positions), value

  def _routed(self, x, positions):
    """Queries, values and, where they are not shared, keys; all of them turned."""
    return [rotary(y, positions, neighbours=True) for y in self.routed_heads_in(x)]

  def _out(self, output):
    y = self.heads_out(output)
    return y if self.gain is None else y * self.gain[...].astype(y.dtype)

  def _look_back(self):
    c = self.config
    return c.block_size if c.look_back is None else c.look_back

  def _blocks(self):
    return dict(block_size=self.config.block_size, look_back=self._look_back())

  def _check_no_memory(self, what):
    if self.memory is not None:
      raise ValueError(
        f"PortRoutedMixer: memory_slots must be 0 for a state ({what}); got"
        f" {self.config.memory_slots} (a memory is for whole rows; its clusters decode no tokens)"
      )
