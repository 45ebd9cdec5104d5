"""The token mixer of the Routing Transformer: heads attending inside clusters, and local heads."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from ..pallas_kernels import (
  RoutedState,
  Routing,
  WindowState,
  block_attention,
  block_attention_step,
  block_window,
  empty_routed_state,
  empty_window,
  routed_attention,
  routed_attention_step,
  sharded_routed_attention,
)
from ..pallas_kernels.routed_attention.members import top_members
from .base_conv import short_convolution
from .centroids import Centroids, CentroidsConfig
from .dropout import split_key
from .norms import standardise
from .notes import Note
from .partitioning import constrain, logical, operator_axes
from .positions import position_after, positions_from, rotary, rotary_pairs
from .projections import HeadsIn, HeadsOut

POSITIONS = ("none", "shaw", "rotary")
KEYS = ("queries", "own", "previous")


class RoutedMixerState(NamedTuple):
  """What the next token may see."""

  routed: RoutedState | None  # None without routed heads
  local: WindowState | None  # None without local heads
  position: Int[Array, " B"]  # of the next token
  previous: Float[Array, "B 1 X"] | None = None  # the last token's queries, where they are keys


@dataclasses.dataclass(frozen=True)
class RoutedMixerConfig:
  """Sizes and variants. The defaults are the released text models', but for `routing`."""

  features: int  # model width D
  heads: int  # of both kinds
  routed_heads: int  # the first ones; the others are local
  head_dim: int
  clusters: int
  routing: Routing  # its membership and how many members a cluster has
  block_size: int  # of local heads
  look_back: int | None = None  # tokens before the own block that local heads see; None: one block
  routed_keys: str = "queries"  # "own": another projection; "previous": queries of the token before
  positions: str = "shaw"  # learned tables by distance; or "rotary", "none"
  max_distance: int = 513  # of the tables of "shaw"
  rotary_base: float = 10000.0
  head_mix: bool = True  # one more matrix [K, K] behind the heads, the same for all
  attention_dropout: float = 0.0  # of the weights of both kinds of heads
  commitment: float = 1e-4  # weight of the distance to the centroids in the loss
  centroid_decay: float = 0.999
  counts: str = "per_head"  # see `CentroidsConfig`
  initial_count: float = 0.0
  init: nnx.Initializer = nnx.initializers.normal(0.02)
  implementation: str | None = None  # of routed_attention

  def __post_init__(self):
    if not 0 <= self.routed_heads <= self.heads:
      self._refuse("routed_heads", f"lie between 0 and heads ({self.heads})", "others are local")
    if self.positions not in POSITIONS:
      self._refuse("positions", f"be one of {POSITIONS}", "'shaw' as in the released text models")
    if self.positions == "shaw" and self.max_distance < 1:
      self._refuse("max_distance", "be at least 1", "rows of the tables: 2 max_distance + 1")
    if self.routed_keys not in KEYS:
      self._refuse("routed_keys", f"be one of {KEYS}", "'queries' as published")
    if not self.shared and self.routing.membership != "causal_recent":
      rule = "be 'queries' unless membership is 'causal_recent'"
      self._refuse("routed_keys", rule, "as published")
    if self.positions == "rotary":
      rotary_pairs(self.head_dim, 1.0)  # raises for an odd head_dim
    if self.block_size < 1:
      self._refuse("block_size", "be at least 1", "tokens of a block")
    if self.look_back is not None and (self.look_back < 0 or self.look_back % self.block_size):
      self._refuse("look_back", f"be a multiple of block_size ({self.block_size})", "whole blocks")
    if not 0 <= self.attention_dropout < 1:
      self._refuse("attention_dropout", "lie in [0, 1)", "a probability")
    if self.attention_dropout and self.routed_heads and self.routing.membership != "official":
      self._refuse("attention_dropout", "be 0 unless membership is 'official'", "drop elsewhere")
    if self.shaw_routed and self.routing.membership == "causal_recent":
      self._refuse("positions", "not be 'shaw' with membership 'causal_recent'", "use 'rotary'")
    if self.routed_heads:
      self.centroids()  # raises for what does not fit

  @property
  def shared(self) -> bool:
    """Whether routed queries are the keys, too."""
    return self.routed_keys == "queries"

  @property
  def shaw_routed(self) -> bool:
    """Whether routed heads have tables by distance."""
    return self.positions == "shaw" and self.routed_heads > 0

  def centroids(self) -> CentroidsConfig:
    return CentroidsConfig(
      self.routed_heads,
      self.clusters,
      self.head_dim,
      decay=self.centroid_decay,
      counts=self.counts,
      initial_count=self.initial_count,
    )

  def _refuse(self, name, rule, hint):
    raise ValueError(f"RoutedMixerConfig: {name} must {rule}; got {getattr(self, name)!r} ({hint})")


class RoutedMixer(nnx.Module):
  """y = concat(routed heads, local heads) M W_out, with query, key, value = x W, query / sqrt(K).

  Routed heads standardise their queries, use them as keys, too, and attend inside clusters
  (`routed_attention`) around centroids that follow the queries (`Centroids`); their columns of the
  key projection are not used. Local heads are `block_attention`. `with_note` gives beside the
  output the commitment loss, 2 commitment mean (q - mu)^2, and what moves the centroids.

  Not of the paper, with "causal_recent" only: `routed_keys` "own" have the columns of the key
  projection; "previous" are the queries of the token before (0 before a document's first), so that
  a query finds the tokens that came after others like its own.

  Membership "official" LEAKS the future into the past (`Routing`). Where a `state` is given, it is
  read as "topk_prefix": tokens to come are not there, as in decoding.

  Paper: Efficient Content-Based Sparse Attention with Routing Transformers (2021), section 4, as
  the released code has it.
  """

  def __init__(
    self,
    config: RoutedMixerConfig,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.config = c = config
    self.dtype = dtype
    kwargs = dict(use_bias=False, init=c.init, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    self.heads_in = HeadsIn(c.features, c.heads, c.head_dim, parts=3, **kwargs)
    self.heads_out = HeadsOut(c.heads, c.head_dim, c.features, **kwargs)

    def param(*shape):
      return nnx.Param(c.init(rngs.params(), shape, param_dtype), **logical(*(None,) * len(shape)))

    local = c.heads > c.routed_heads
    tables = (2, 2 * c.max_distance + 1, c.head_dim)  # of keys and values
    self.head_mix = param(c.head_dim, c.head_dim) if c.head_mix else None
    self.local_tables = param(*tables) if c.positions == "shaw" and local else None
    self.routed_tables = param(*tables) if c.shaw_routed else None
    kwargs = dict(param_dtype=param_dtype, rngs=rngs)
    self.centroids = Centroids(c.centroids(), **kwargs) if c.routed_heads else None

  def init_state(self, batch: int, max_length: int | None = None) -> RoutedMixerState:
    """The state before the first token; its size does not depend on `max_length`."""
    del max_length
    c, dtype = self.config, jnp.dtype(self.dtype)
    sizes = (c.clusters, c.routing.window_size, c.head_dim, c.head_dim)
    local = c.heads - c.routed_heads
    left = block_window(c.block_size, self._look_back())
    previous = None
    if c.routed_heads and c.routed_keys == "previous":
      wide = jnp.promote_types(dtype, jnp.float32)
      previous = jnp.zeros((batch, 1, c.routed_heads * c.head_dim), wide)
    return RoutedMixerState(
      empty_routed_state(batch, c.routed_heads, *sizes, dtype) if c.routed_heads else None,
      empty_window(batch, left, local, c.head_dim, c.head_dim, dtype) if local else None,
      jnp.zeros((batch,), jnp.int32),
      previous,
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
    return self._mix(x, segment_ids, positions, lengths, state, dropout_key)[:2]

  def with_note(
    self, x: Float[Array, "B T D"], **options
  ) -> tuple[Float[Array, "B T D"], RoutedMixerState, Note | None]:
    """The call, and what training needs beside it; None without routed heads."""
    names = ("segment_ids", "positions", "lengths", "state", "dropout_key")
    y, state, routed = self._mix(x, *map(options.get, names))
    if self.centroids is None or routed is None:
      return y, state, None
    found = [self.centroids.spread(*one) for one in routed]
    distance = 2 * jnp.mean(jnp.stack([distance for distance, _ in found]))  # queries' and keys'
    sums = jax.tree.map(lambda *parts: sum(parts), *(sums for _, sums in found))
    return y, state, Note(self.config.commitment * distance, sums)

  def clusters_of(
    self, x: Float[Array, "B T D"], *, as_key: bool = False
  ) -> Bool[Array, "B T H C"]:
    """Which clusters of its routed heads each token belongs to, in a pass over the whole row.

    By its query; `as_key`: by its key, which is another vector unless queries are the keys.
    """
    if self.centroids is None:
      return jnp.zeros((*x.shape[:2], 0, self.config.clusters), bool)
    vector, key, _ = self._routed_vectors(*self._project(x)[:2])
    near = self.centroids.scores(key if as_key else vector)
    if self.config.routing.membership == "causal_recent":
      return jnp.argmax(near, -1)[..., None] == jnp.arange(near.shape[-1])
    members = top_members(near, self.config.routing.window_size)  # [B, H, C, W]
    token = jnp.arange(x.shape[1])[:, None]
    return jnp.any(members[..., None, :] == token, axis=-1).transpose(0, 3, 1, 2)

  def absorb(self, sums: Any) -> None:
    """Moves the centroids by the sums of a whole batch's notes."""
    if self.centroids is not None:
      self.centroids.absorb(sums)

  def step(
    self, x: Float[Array, "B D"], state: RoutedMixerState
  ) -> tuple[Float[Array, "B D"], RoutedMixerState]:
    """One token."""
    c = self.config
    query, key, value = self._project(x)
    split, parts = c.routed_heads, []
    routed, local, previous = state.routed, state.local, state.previous
    turn = state.position[:, None]
    if self.centroids is not None and routed is not None:
      q, k, previous = self._routed_vectors(query[:, None], key[:, None], previous)
      q, k = q[:, 0], k[:, 0]
      near = self.centroids.scores(q)
      key_near = None if c.shared else self.centroids.scores(k)
      q, k = (self._turn(y.astype(self.dtype)[:, None], turn)[:, 0] for y in (q, k))
      output, routed = routed_attention_step(
        q, k, value[:, :split], near, routed,
        options=self._routing(True),
        key_scores=key_near,
        **self._tables("routed"),
      )  # fmt: skip
      parts.append(output)
    if local is not None:
      q, k = (self._turn(y[:, None, split:], turn)[:, 0] for y in (query, key))
      output, local = block_attention_step(
        q, k, value[:, split:], local, **self._blocks(), **self._tables("local")
      )
      parts.append(output)
    state = RoutedMixerState(routed, local, state.position + 1, previous)
    return self._out(jnp.concatenate(parts, axis=-2)), state

  def _mix(self, x, segment_ids, positions, lengths, state, dropout_key):
    """(output, state, (vectors, their scores) of queries, and of keys if they are others)."""
    c = self.config
    batch, length, _ = x.shape
    query, key, value = self._project(x)
    if positions is None:
      positions = positions_from(length, None if state is None else state.position)
    split, parts, note = c.routed_heads, [], None
    routed = local = previous = None
    documents: dict[str, Any] = dict(segment_ids=segment_ids, lengths=lengths)
    routed_drop, local_drop = self._drops(dropout_key)
    if self.centroids is not None:
      before = None if state is None else state.previous
      q, k, previous = self._routed_vectors(query, key, state=before, **documents)
      near = self.centroids.scores(q)
      note, key_near = [(q, near)], None
      if not c.shared:
        key_near = self.centroids.scores(k)
        if c.routed_keys == "own":
          note.append((k, key_near))
      q = self._turn(q.astype(self.dtype), positions)
      k = q if c.shared else self._turn(k.astype(self.dtype), positions)
      axes = None if routed_drop else operator_axes()  # with dropout the compiler splits it
      function = routed_attention if axes is None else sharded_routed_attention
      output, routed = function(
        q, k, value[:, :, :split], near,
        key_scores=key_near,
        options=self._routing(state is not None),
        initial_state=None if state is None else state.routed,
        implementation=c.implementation,
        **documents,
        **self._tables("routed"),
        **routed_drop,
        **(axes or {}),

      )  # fmt: skip
      parts.append(output)
    if split < c.heads:
      q, k = (self._turn(y[:, :, split:], positions) for y in (query, key))
      v = value[:, :, split:]
      seen = None
      if not c.routing.zero_values_seen and state is None:
        seen = jnp.any(v != 0, axis=-1)
      output, local = block_attention(
        q, k, v,
        key_seen=seen,
        initial_state=None if state is None else state.local,
        **documents,
        **self._blocks(),
        **local_drop,
        **self._tables("local"),
      )  # fmt: skip
      parts.append(output)
    output = constrain(jnp.concatenate(parts, axis=-2), "batch", "length", "heads", None)
    before = jnp.zeros((batch,), jnp.int32) if state is None else state.position
    following = position_after(positions, lengths, before)
    return self._out(output), RoutedMixerState(routed, local, following, previous), note

  def _project(self, x):
    query, key, value = self.heads_in(x)  # [..., H, K] each
    return query * self.config.head_dim**-0.5, key, value

  def _routed_vectors(self, query, key, state=None, **documents):
    """(queries, keys) of the routed heads before they are turned, and what the next call needs.

    Standardised in float32 (or wider): who is near is not to depend on rounding.
    """
    c = self.config

    def standard(x):
      x = x[:, :, : c.routed_heads]
      return standardise(x.astype(jnp.promote_types(x.dtype, jnp.float32)))

    query = standard(query)
    if c.routed_keys == "queries":
      return query, query, None
    if c.routed_keys == "own":
      return query, standard(key), None
    flat = query.reshape(*query.shape[:2], -1)
    state = jnp.zeros_like(flat[:, :1]) if state is None else state
    one_before = jnp.zeros((2, flat.shape[-1]), flat.dtype).at[0].set(1)
    late, state = short_convolution(flat, one_before, state=state, **documents)
    return query, late.reshape(query.shape), state

  def _out(self, output):
    if self.head_mix is not None:
      output = output @ self.head_mix[...].astype(output.dtype)
    return self.heads_out(output)

  def _routing(self, with_state):
    """Options of the operator; what is not there yet cannot be a member."""
    routing = self.config.routing
    if not with_state or routing.membership != "official":
      return routing
    return dataclasses.replace(
      routing, membership="topk_prefix", mask="position", zero_values_seen=True
    )

  def _drops(self, key) -> list[dict[str, Any]]:
    """Options of the two operators."""
    rate = self.config.attention_dropout
    keys = split_key(key if rate else None, 2)
    return [{} if key is None else dict(dropout_rate=rate, dropout_key=key) for key in keys]

  def _turn(self, x, positions):
    if self.config.positions != "rotary":
      return x
    return rotary(x, positions, base=self.config.rotary_base)

  def _look_back(self):
    c = self.config
    return c.block_size if c.look_back is None else c.look_back

  def _blocks(self) -> dict[str, Any]:
    return dict(block_size=self.config.block_size, look_back=self._look_back(), scale=1.0)

  def _tables(self, kind) -> dict[str, Any]:
    tables = self.local_tables if kind == "local" else self.routed_tables
    if tables is None:
      return {}
    keys, values = tables[...].astype(self.dtype)
    return dict(relative_keys=keys, relative_values=values)
