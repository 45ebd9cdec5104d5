"""A decoder-only language model around any kind of block."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from .block import Block
from .losses import LossSums, chunked_cross_entropy
from .partitioning import constrain, logical
from .positions import LearnedPositions, position_after, positions_from
from .stacking import layer_places

REMAT_POLICIES = {
  "none": None,
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class DecoderState(NamedTuple):
  """The states of every group's blocks; leaves have a leading layer axis."""

  groups: tuple[tuple[Any, ...], ...]
  position: Int[Array, " B"]  # of the next token


class DecoderLM(nnx.Module):
  """Embedding, blocks, final norm, and a head that may be the embedding itself.

  Blocks whose structure repeats, alone or in a pattern, are stacked into one block each, whose
  variables have a leading layer axis, and run as one `jax.lax.scan`: compile time does not grow
  with depth. `layers` gives them one by one.

  Activations have `dtype`; the residual stream that the layers add to may be kept in a wider
  `residual_dtype`, which costs memory and lets no small addition be lost.

  With `learned_positions` every position has a vector of its own, which is added to the token's;
  at positions past the last one activations are NaN.
  """

  def __init__(
    self,
    blocks: Sequence[Block],
    final_norm: nnx.Module,
    *,
    vocab_size: int,
    features: int,
    embedding_scale: float = 1.0,
    learned_positions: int | None = None,
    tied_head: bool = True,
    pad_id: int | None = None,
    init_stddev: float = 0.02,
    remat: str = "none",
    loss_chunk: int = 256,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    residual_dtype: DTypeLike | None = None,
    rngs: nnx.Rngs,
  ):
    if remat not in REMAT_POLICIES:
      raise ValueError(
        f"DecoderLM: remat must be one of {list(REMAT_POLICIES)}; got {remat!r}"
        " ('full' recomputes every layer in the backward pass)"
      )
    self.vocab_size, self.features = vocab_size, features
    self.embedding_scale, self.pad_id = embedding_scale, pad_id
    self.remat, self.loss_chunk, self.dtype = remat, loss_chunk, dtype
    self.residual_dtype = dtype if residual_dtype is None else residual_dtype
    init = nnx.initializers.normal(init_stddev)
    table = init(rngs.params(), (vocab_size, features), param_dtype)
    if pad_id is not None:
      table = table.at[pad_id].set(0)
    self.embedding = self._table(table)
    more = dict(init=init, param_dtype=param_dtype, rngs=rngs)
    count = learned_positions
    self.positions = None if count is None else LearnedPositions(count, features, **more)
    self.head = None if tied_head else self._table(init(rngs.params(), table.shape, param_dtype))
    self.groups = nnx.List([nnx.List(group) for group in _stack(blocks)])
    self.final_norm = final_norm

  def init_state(self, batch: int, max_length: int | None = None) -> DecoderState:
    """State before the first token; `max_length` bounds the caches of mixers that have them."""

    def states(block):
      count = _depth(block)
      one = block.init_state(batch, max_length)
      return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape)), one)

    groups = tuple(tuple(map(states, group)) for group in self.groups)
    return DecoderState(groups, jnp.zeros((batch,), jnp.int32))

  def layers(self) -> list[Block]:
    """The blocks in their order, each with its own variables (copies)."""
    found = []
    for group in self.groups:
      parts = [nnx.split(block) for block in group]
      for index in range(_depth(group[0])):
        for graph, variables in parts:
          found.append(nnx.merge(graph, jax.tree.map(lambda leaf, i=index: leaf[i], variables)))
    return found

  def hidden(
    self,
    tokens: Int[Array, "B T"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    lengths: Int[Array, " B"] | None = None,
    state: DecoderState | None = None,
    deterministic: bool = True,
  ) -> tuple[Float[Array, "B T D"], DecoderState]:
    """Activations after the final norm, and the state after the last token.

    Raises:
      ValueError: more tokens than there are learned positions.
    """
    options = dict(
      segment_ids=segment_ids, positions=positions, lengths=lengths, deterministic=deterministic
    )
    batch, length = tokens.shape
    before = jnp.zeros((batch,), jnp.int32) if state is None else state.position
    if positions is None:
      positions = positions_from(length, None if state is None else before)
    x = self._embed(tokens, positions)
    x, states = self._run(x, state, lambda block, x, state: block(x, state=state, **options))
    return self._final(x), DecoderState(states, position_after(positions, lengths, before))

  def __call__(
    self, tokens: Int[Array, "B T"], **options
  ) -> tuple[Float[Array, "B T V"], DecoderState]:
    """(float32 logits, state after the last token); options are those of `hidden`."""
    x, state = self.hidden(tokens, **options)
    return self.logits(x), state

  def loss(
    self,
    tokens: Int[Array, "B T"],
    targets: Int[Array, "B N"],
    weights: Float[Array, "B N"] | None = None,
    *,
    places: Int[Array, "B N"] | None = None,
    **options,
  ) -> LossSums:
    """Summed cross-entropy (nats) of `targets`; the logits of the batch are never held at once.

    Targets belong to the positions `places` of each row, or to all of them: then N = T.
    """
    x, _ = self.hidden(tokens, **options)
    if places is not None:
      x = jnp.take_along_axis(x, places[..., None], axis=1)  # [B, T, D] -> [B, N, D]
    return chunked_cross_entropy(x, self._head(), targets, weights, chunk_size=self.loss_chunk)

  def step(
    self, tokens: Int[Array, " B"], state: DecoderState
  ) -> tuple[Float[Array, "B V"], DecoderState]:
    """(logits, new state) after one more token per row."""
    x = self._embed(tokens, state.position)
    x, states = self._run(x, state, lambda block, x, state: block.step(x, state), remat="none")
    return self.logits(self._final(x)), DecoderState(states, state.position + 1)

  def _run(self, x, state, call, remat=None):
    """All layers, `call(block, x, state) -> (x, state)` each; (x, their states by groups)."""
    remat = self.remat if remat is None else remat
    new_states = []
    for n, group in enumerate(self.groups):
      parts = [nnx.split(block) for block in group]
      functions = [_layer(graph, call, remat) for graph, _ in parts]

      def turn(x, inputs, functions=functions):
        states = []
        for function, (variables, before) in zip(functions, inputs, strict=True):
          x, after = function(x, variables, before)
          states.append(after)
        return x, tuple(states)

      before = (None,) * len(parts) if state is None else state.groups[n]
      inputs = [(variables, old) for (_, variables), old in zip(parts, before, strict=True)]
      x, after = jax.lax.scan(turn, x, inputs)
      new_states.append(after)
    return x, tuple(new_states)

  def _embed(self, tokens, positions):
    x = self.embedding[...][tokens].astype(self.residual_dtype)  # [B, T, D] or [B, D]
    if self.pad_id is not None:  # the row of the padding token learns through the head alone
      x = jnp.where((tokens == self.pad_id)[..., None], jax.lax.stop_gradient(x), x)
    x = x * jnp.asarray(self.embedding_scale, x.dtype)
    if self.positions is not None:
      x += self.positions(positions).astype(x.dtype)
    return constrain(x, "batch", "length", None) if x.ndim == 3 else x

  def _final(self, x):
    return self.final_norm(x).astype(self.dtype)

  @staticmethod
  def _table(values: jax.Array) -> nnx.Param:
    return nnx.Param(values, **logical("vocab", "embed"))

  def _head(self):
    return (self.embedding if self.head is None else self.head)[...]

  def logits(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """float32 logits of activations after the final norm."""
    head = self._head().astype(x.dtype)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum("...d,vd->...v", x, head, preferred_element_type=wide)


def _layer(graph, call, remat):
  """One layer as a function of its variables, recomputed in the backward pass if wanted."""

  def layer(x, variables, state):
    return call(nnx.merge(graph, variables), x, state)

  if remat == "none":
    return layer
  return jax.checkpoint(layer, policy=REMAT_POLICIES[remat], prevent_cse=False)


def _stack(blocks: Sequence[Block]) -> list[list[Block]]:
  """Groups of blocks that take turns, the variables of each stacked on a leading axis."""
  kinds: list[tuple] = []  # what a layer compiles to
  numbers, variables = [], []
  for block in blocks:
    graph, own = nnx.split(block)
    kind = (graph, _shapes(own))
    if kind not in kinds:
      kinds.append(kind)
    numbers.append(kinds.index(kind))
    variables.append(own)
  members: dict[tuple[int, int], list[int]] = {}
  for layer, place in enumerate(layer_places(numbers)):
    members.setdefault(place[:2], []).append(layer)
  groups: dict[int, list[Block]] = {}
  for (group, _), layers in members.items():
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(variables[n] for n in layers))
    groups.setdefault(group, []).append(nnx.merge(kinds[numbers[layers[0]]][0], stacked))
  return list(groups.values())


def _shapes(variables: nnx.State) -> list[tuple]:
  return [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(variables)]


def _depth(group: Block) -> int:
  return jax.tree.leaves(nnx.state(group))[0].shape[0]
