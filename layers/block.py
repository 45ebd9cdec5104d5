"""One layer of a decoder: a token mixer and a channel mixer, each on the normalised stream."""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float, Int

from .partitioning import constrain


class Block(nnx.Module):
  """x += mixer(norm(x)); x += feed_forward(norm(x)).

  `mixer` is any module with the three calls of the mixer protocol (WORKSPACE.md): `__call__`,
  `init_state` and `step`. The block passes the mixer's state through without looking into it.
  """

  def __init__(
    self,
    mixer: Any,  # a token mixer: call, init_state, step
    feed_forward: Any,
    mixer_norm: Any,
    feed_forward_norm: Any,
  ):
    self.mixer = mixer
    self.feed_forward = feed_forward
    self.mixer_norm = mixer_norm
    self.feed_forward_norm = feed_forward_norm

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
    deterministic: bool = True,
  ) -> tuple[Float[Array, "B T D"], Any]:
    mixed, state = self.mixer(
      self.mixer_norm(x),
      segment_ids=segment_ids,
      positions=positions,
      lengths=lengths,
      state=state,
      deterministic=deterministic,
    )
    x = constrain(x + mixed, "batch", "length", None)
    x = x + self.feed_forward(self.feed_forward_norm(x))
    return constrain(x, "batch", "length", None), state

  def step(self, x: Float[Array, "B D"], state: Any) -> tuple[Float[Array, "B D"], Any]:
    mixed, state = self.mixer.step(self.mixer_norm(x), state)
    x = x + mixed
    return x + self.feed_forward(self.feed_forward_norm(x)), state
