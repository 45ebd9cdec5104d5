"""A decoder-only language model around any kind of block."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from .block import Block
from .dropout import split_key
from .embedders import FactoredEmbedding
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


class Notes(NamedTuple):
  """What the layers note of a batch while a model is trained."""

  loss: Float[Array, ""]  # to be added to the mean loss of the targets
  sums: tuple[tuple[Any, ...], ...]  # by groups, as `DecoderLM.absorb` takes them; None: nothing


class DecoderLM(nnx.Module):
  """Embedding, blocks, final norm, and a head that may be the embedding itself.

  Blocks whose structure repeats, alone or in a pattern, are stacked into one block each, whose
  variables have a leading layer axis, and run as one `jax.lax.scan`: compile time does not grow
  with depth. `layers` gives them one by one.

  Activations have `dtype`; the residual stream that the layers add to may be kept in a wider
  `residual_dtype`, which costs memory and lets no small addition be lost.

  With `learned_positions` every position has a vector of its own, which is added to the token's;
  at positions past the last one activations are NaN.

  An `embedder`, a module (tokens, positions, dropout_key=...) -> [.., features], takes the place of
  the table; the head then is one of its own, or the table of a `FactoredEmbedding`. `head_features`
  is the width behind `final_norm`, if that changes it.
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
    embedder: nnx.Module | None = None,
    tied_head: bool = True,
    head_features: int | None = None,
    head_bias: bool = False,
    pad_id: int | None = None,
    init_stddev: float = 0.02,
    init: nnx.Initializer | None = None,
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
    init = nnx.initializers.normal(init_stddev) if init is None else init
    more = dict(init=init, param_dtype=param_dtype, rngs=rngs)
    self.embedder = embedder
    if embedder is None:
      table = init(rngs.params(), (vocab_size, features), param_dtype)
      if pad_id is not None:
        table = table.at[pad_id].set(0)
      self.embedding = self._table(table)
    elif tied_head and not isinstance(embedder, FactoredEmbedding):
      raise ValueError("DecoderLM: tied_head must be False with this embedder; got True")
    count = learned_positions
    self.positions = None if count is None else LearnedPositions(count, features, **more)
    shape = (vocab_size, features if head_features is None else head_features)
    self.head = None if tied_head else self._table(init(rngs.params(), shape, param_dtype))
    bias = jnp.zeros((vocab_size,), param_dtype)
    self.head_bias = nnx.Param(bias, **logical("vocab")) if head_bias else None
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

  def mixer_inputs(self, tokens: Int[Array, "B T"]) -> list[tuple[Any, Float[Array, "B T D"]]]:
    """(mixer, what it is given) of each layer: for looking into a model."""
    positions = positions_from(tokens.shape[1], None)
    x, found = self._embed(tokens, positions), []
    for block in self.layers():
      found.append((block.mixer, block.mixer_input(x)))
      x, _ = block(x)
    return found

  def hidden(
    self,
    tokens: Int[Array, "B T"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    lengths: Int[Array, " B"] | None = None,
    state: DecoderState | None = None,
    dropout_key: jax.Array | None = None,
  ) -> tuple[Float[Array, "B T D"], DecoderState]:
    """Activations after the final norm, and the state after the last token.

    With a `dropout_key` what has dropout drops; without one nothing is random.

    Raises:
      ValueError: more tokens than there are learned positions.
    """
    x, state, _ = self._hidden(
      tokens, segment_ids, positions, lengths, state, dropout_key, notes=False
    )
    return x, state

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
    return self._loss(x, targets, weights, places)

  def loss_and_notes(
    self,
    tokens: Int[Array, "B T"],
    targets: Int[Array, "B N"],
    weights: Float[Array, "B N"] | None = None,
    *,
    places: Int[Array, "B N"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    dropout_key: jax.Array | None = None,
  ) -> tuple[LossSums, Notes]:
    """`loss` for training: what the layers note goes into the gradient and to `absorb`."""
    x, _, notes = self._hidden(tokens, segment_ids, None, None, None, dropout_key, notes=True)
    total = sum(
      (jnp.sum(note.loss) for group in notes for note in group if note is not None),
      start=jnp.zeros((), jnp.float32),
    )
    sums = tuple(tuple(None if n is None else n.sums for n in group) for group in notes)
    return self._loss(x, targets, weights, places), Notes(total, sums)

  def absorb(self, sums: tuple[tuple[Any, ...], ...]) -> None:
    """Brings the sums of a batch's notes into the layers, once per step of the optimiser."""
    for group, of_group in zip(self.groups, sums, strict=True):
      for block, of_block in zip(group, of_group, strict=True):
        if of_block is not None:
          block.absorb(of_block)

  def step(
    self, tokens: Int[Array, " B"], state: DecoderState
  ) -> tuple[Float[Array, "B V"], DecoderState]:
    """(logits, new state) after one more token per row."""
    x = self._embed(tokens, state.position)

    def call(block, x, state, key):
      del key
      return block.step(x, state)

    x, states = self._run(x, state, call, remat="none")
    return self.logits(self._final(x)), DecoderState(states, state.position + 1)

  def _hidden(self, tokens, segment_ids, positions, lengths, state, dropout_key, *, notes):
    """(activations after the final norm, state, notes by groups)."""
    batch, length = tokens.shape
    before = jnp.zeros((batch,), jnp.int32) if state is None else state.position
    options = dict(segment_ids=segment_ids, positions=positions, lengths=lengths)
    if positions is None:
      positions = positions_from(length, None if state is None else before)
    embed_key, layers_key = split_key(dropout_key, 2)

    def call(block, x, state, key):
      x, *found = block.with_note(x, state=state, dropout_key=key, **options)
      return x, tuple(found) if notes else (found[0], None)

    x = self._embed(tokens, positions, embed_key)
    x, found = self._run(x, state, call, dropout_key=layers_key)
    states, noted = (tuple(tuple(pair[n] for pair in group) for group in found) for n in (0, 1))
    after = DecoderState(states, position_after(positions, lengths, before))
    return self._final(x), after, noted

  def _run(self, x, state, call, remat=None, dropout_key=None):
    """All layers, `call(block, x, state, key) -> (x, found)` each; (x, the findings by groups)."""
    remat = self.remat if remat is None else remat
    results = []
    keys = split_key(dropout_key, len(self.groups))
    for n, group in enumerate(self.groups):
      parts = [nnx.split(block) for block in group]
      functions = [_layer(graph, call, remat) for graph, _ in parts]

      def turn(x, inputs, functions=functions):
        found = []
        for function, given in zip(functions, inputs, strict=True):
          x, of_layer = function(x, *given)
          found.append(of_layer)
        return x, tuple(found)

      before = (None,) * len(parts) if state is None else state.groups[n]
      inputs = []
      for block, (_, variables), old, key in zip(
        group, parts, before, split_key(keys[n], len(parts)), strict=True
      ):
        own_keys = None if key is None else jax.random.split(key, _depth(block))
        inputs.append((variables, old, own_keys))
      x, found = jax.lax.scan(turn, x, inputs)
      results.append(found)
    return x, tuple(results)

  def _embed(self, tokens, positions, key=None):
    if self.embedder is not None:
      x = self.embedder(tokens, positions, dropout_key=key).astype(self.residual_dtype)
      return constrain(x, "batch", "length", None) if x.ndim == 3 else x
    x = self.embedding[...][tokens].astype(self.residual_dtype)  # [B, T, D] or [B, D]
    if self.pad_id is not None:  # the row of the padding token learns through the head alone
      x = jnp.where((tokens == self.pad_id)[..., None], jax.lax.stop_gradient(x), x)
    x = x * jnp.asarray(self.embedding_scale, x.dtype)
    if self.positions is not None:
      x += self.positions(positions).astype(x.dtype)
    return constrain(x, "batch", "length", None) if x.ndim == 3 else x

  def _loss(self, x, targets, weights, places):
    if places is not None:
      x = jnp.take_along_axis(x, places[..., None], axis=1)  # [B, T, D] -> [B, N, D]
    bias = None if self.head_bias is None else self.head_bias[...]
    return chunked_cross_entropy(
      x, self._head(), targets, weights, bias=bias, chunk_size=self.loss_chunk
    )

  def _final(self, x):
    return self.final_norm(x).astype(self.dtype)

  @staticmethod
  def _table(values: jax.Array) -> nnx.Param:
    return nnx.Param(values, **logical("vocab", "embed"))

  def _head(self):
    if self.head is not None:
      return self.head[...]
    if isinstance(self.embedder, FactoredEmbedding):
      return self.embedder.table[...]
    return self.embedding[...]

  def logits(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """float32 logits of activations after the final norm."""
    head = self._head().astype(x.dtype)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    logits = jnp.einsum("...d,vd->...v", x, head, preferred_element_type=wide)
    return logits if self.head_bias is None else logits + self.head_bias[...].astype(wide)


def _layer(graph, call, remat):
  """One layer as a function of its variables, recomputed in the backward pass if wanted."""

  def layer(x, variables, state, key):
    return call(nnx.merge(graph, variables), x, state, key)

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
