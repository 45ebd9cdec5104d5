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

REMAT_POLICIES = {
  "none": None,
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class DecoderState(NamedTuple):
  """The state of every group of layers; leaves have a leading layer axis."""

  groups: tuple[Any, ...]


class DecoderLM(nnx.Module):
  """Embedding, blocks, final norm, and a head that may be the embedding itself.

  Runs of neighbouring blocks of the same structure are stacked into one block whose variables have
  a leading layer axis, and run as one `jax.lax.scan`: compile time does not grow with depth.

  Activations have `dtype`; the residual stream that the layers add to may be kept in a wider
  `residual_dtype`, which costs memory and lets no small addition be lost.
  """

  def __init__(
    self,
    blocks: Sequence[Block],
    final_norm: nnx.Module,
    *,
    vocab_size: int,
    features: int,
    embedding_scale: float = 1.0,
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
    self.head = None if tied_head else self._table(init(rngs.params(), table.shape, param_dtype))
    self.groups = nnx.List(_stack_runs(blocks))
    self.final_norm = final_norm

  def init_state(self, batch: int, max_length: int | None = None) -> DecoderState:
    """State before the first token; `max_length` bounds the caches of mixers that have them."""

    def group_state(group):
      count = _depth(group)
      one = group.init_state(batch, max_length)
      return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape)), one)

    return DecoderState(tuple(group_state(group) for group in self.groups))

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
    """Activations after the final norm, and the state after the last token."""
    options = dict(
      segment_ids=segment_ids, positions=positions, lengths=lengths, deterministic=deterministic
    )
    x = self._embed(tokens)
    states = (None,) * len(self.groups) if state is None else state.groups
    new_states = []
    for group, group_state in zip(self.groups, states, strict=True):
      graph, variables = nnx.split(group)

      def layer(x, inputs, graph=graph):
        layer_variables, layer_state = inputs
        return nnx.merge(graph, layer_variables)(x, state=layer_state, **options)

      if self.remat != "none":
        layer = jax.checkpoint(layer, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
      x, group_state = jax.lax.scan(layer, x, (variables, group_state))
      new_states.append(group_state)
    return self._final(x), DecoderState(tuple(new_states))

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
    x = self._embed(tokens)
    new_states = []
    for group, group_state in zip(self.groups, state.groups, strict=True):
      graph, variables = nnx.split(group)

      def layer(x, inputs, graph=graph):
        layer_variables, layer_state = inputs
        return nnx.merge(graph, layer_variables).step(x, layer_state)

      x, group_state = jax.lax.scan(layer, x, (variables, group_state))
      new_states.append(group_state)
    return self.logits(self._final(x)), DecoderState(tuple(new_states))

  def _embed(self, tokens):
    x = self.embedding[...][tokens].astype(self.residual_dtype)  # [B, T, D] or [B, D]
    if self.pad_id is not None:  # the row of the padding token learns through the head alone
      x = jnp.where((tokens == self.pad_id)[..., None], jax.lax.stop_gradient(x), x)
    x = x * jnp.asarray(self.embedding_scale, x.dtype)
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


def _stack_runs(blocks: Sequence[Block]) -> list[Block]:
  """One block per run of blocks of equal structure, its variables stacked on a leading axis."""
  runs: list[tuple[nnx.GraphDef, list[nnx.State]]] = []
  for block in blocks:
    graph, variables = nnx.split(block)
    if runs and runs[-1][0] == graph and _shapes(runs[-1][1][0]) == _shapes(variables):
      runs[-1][1].append(variables)
    else:
      runs.append((graph, [variables]))
  stacked = []
  for graph, states in runs:
    variables = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    stacked.append(nnx.merge(graph, variables))
  return stacked


def _shapes(variables: nnx.State) -> list[tuple]:
  return [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(variables)]


def _depth(group: Block) -> int:
  return jax.tree.leaves(nnx.state(group))[0].shape[0]
