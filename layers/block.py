"""One layer of a decoder: a token mixer and a channel mixer, each on the normalised stream."""

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from .dropout import dropout, split_key
from .notes import Note
from .partitioning import constrain


class Block(nnx.Module):
  """x += mixer(norm(x)); x += feed_forward(norm(x)).

  With `post_norm` the norm is behind the sum, x = norm(x + mixer(x)), and likewise for the
  feed-forward. `dropout` is the share of a layer's output that is dropped before it is added.

  `mixer` is any module with the three calls of the mixer protocol (WORKSPACE.md): `__call__`,
  `init_state` and `step`. The block passes the mixer's state through without looking into it.
  """

  def __init__(
    self,
    mixer: Any,  # a token mixer: call, init_state, step
    feed_forward: Any,
    mixer_norm: Any,
    feed_forward_norm: Any,
    *,
    post_norm: bool = False,
    dropout: float = 0.0,
  ):
    self.mixer = mixer
    self.feed_forward = feed_forward
    self.mixer_norm = mixer_norm
    self.feed_forward_norm = feed_forward_norm
    self.post_norm = post_norm
    self.dropout = dropout

  def init_state(self, batch: int, max_length: int | None = None) -> Any:
    return self.mixer.init_state(batch, max_length)

  def __call__(
    self,
    x: Float[Array, "B T D"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    lengths: Int[Array, " B"] | None = None,
    state: Any = None,
    dropout_key: jax.Array | None = None,
  ) -> tuple[Float[Array, "B T D"], Any]:
    """(output, state)."""
    y, state, _ = self.with_note(
      x,
      segment_ids=segment_ids,
      positions=positions,
      lengths=lengths,
      state=state,
      dropout_key=dropout_key,
    )
    return y, state

  def with_note(
    self, x: Float[Array, "B T D"], *, dropout_key: jax.Array | None = None, **options
  ) -> tuple[Float[Array, "B T D"], Any, Note | None]:
    """The call, and what the mixer notes for training, if it does."""
    keys = split_key(dropout_key, 4)
    note = None
    mixer, given = self.mixer, self.mixer_input(x)
    if hasattr(mixer, "with_note"):
      mixed, state, note = mixer.with_note(given, dropout_key=keys[0], **options)
    else:
      mixed, state = mixer(given, dropout_key=keys[0], **options)
    x = self._add(x, dropout(mixed, self.dropout, keys[1]), self.mixer_norm)
    x = constrain(x, "batch", "length", None)
    mixed = self.feed_forward(self._feed_forward_input(x), dropout_key=keys[2])
    x = self._add(x, dropout(mixed, self.dropout, keys[3]), self.feed_forward_norm)
    return constrain(x, "batch", "length", None), state, note

  def absorb(self, sums: Any) -> None:
    """Brings the sums of a batch's notes into the mixer."""
    self.mixer.absorb(sums)

  def step(self, x: Float[Array, "B D"], state: Any) -> tuple[Float[Array, "B D"], Any]:
    mixed, state = self.mixer.step(self.mixer_input(x), state)
    x = self._add(x, mixed, self.mixer_norm)
    mixed = self.feed_forward(self._feed_forward_input(x))
    return self._add(x, mixed, self.feed_forward_norm), state

  def mixer_input(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """What the mixer is given of the block's input."""
    return x if self.post_norm else self.mixer_norm(x)

  def _feed_forward_input(self, x):
    return x if self.post_norm else self.feed_forward_norm(x)

  def _add(self, x, y, norm):
    return norm(x + y) if self.post_norm else x + y
