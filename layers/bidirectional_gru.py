"""Gated recurrent units over a document in both directions."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int


class BidirectionalGRU(nnx.Module):
  """Flax's GRU cells, one reading forwards and one backwards; padding is not read."""

  def __init__(
    self,
    features: int,
    hidden: int,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.hidden = hidden

    def make():
      cell = nnx.GRUCell(features, hidden, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
      return nnx.RNN(cell, return_carry=True, rngs=False)

    self.forward, self.backward = make(), make()

  def __call__(
    self, x: Float[Array, "B T D"], lengths: Int[Array, " B"]
  ) -> tuple[Float[Array, "B T J"], Float[Array, "B J"]]:
    """(states at each token, the last states of both directions); J is twice `hidden`."""
    start = jnp.zeros((x.shape[0], self.hidden), x.dtype)
    options = dict(seq_lengths=lengths, initial_carry=start)
    last, ahead = self.forward(x, **options)
    first, back = self.backward(x, **options, reverse=True, keep_order=True)
    ends = jnp.concatenate([last, first], axis=-1)
    # A document without tokens leaves both where they began.
    ends = jnp.where((lengths > 0)[:, None], ends, 0)
    return jnp.concatenate([ahead, back], axis=-1), ends
