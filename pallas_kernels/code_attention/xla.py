"""The portable path: some labels at a time, so that no array of labels x tokens is kept.

The rows of a strip are whole, so their softmax needs no rescaling. The backward pass makes each
strip again.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..dots import einsum_f32

# Scores of a strip; a few arrays of this size live at the same time.
_STRIP_BYTES = 32 << 20


def labels_per_strip(batch: int, labels: int, length: int) -> int:
  """How many labels are worked on together by default."""
  return max(1, min(labels, _STRIP_BYTES // (4 * batch * length)))


def code_attention_xla(
  query: Float[Array, "L K"],
  key: Float[Array, "B T K"],
  value: Float[Array, "B T V"],
  mask: Bool[Array, "B T"] | None,
  scale: float,
  chunk_size: int | None,
) -> Float[Array, "B L V"]:
  batch, length, _ = key.shape
  labels = query.shape[0]
  chunk = min(chunk_size or labels_per_strip(batch, labels, length), labels)
  count = -(-labels // chunk)
  chunk = -(-labels // count)  # of like size
  if count == 1:
    return _strip(query, key, value, mask, scale)
  # Wide where they are closed over, so that their gradient is summed over strips in float32.
  wide = jnp.promote_types(key.dtype, jnp.float32)
  keys, values = key.astype(wide), value.astype(wide)

  @jax.checkpoint
  def strip(some):
    return _strip(some, keys.astype(key.dtype), values.astype(value.dtype), mask, scale)

  queries = jnp.pad(query, ((0, count * chunk - labels), (0, 0))).reshape(count, chunk, -1)
  output = jax.lax.map(strip, queries)  # [n, B, C, V]
  return output.swapaxes(0, 1).reshape(batch, count * chunk, -1)[:, :labels]


def _strip(query, key, value, mask, scale):
  """[B, C, V] of C labels."""
  scores = scale * einsum_f32("btk,lk->blt", key, query)
  if mask is not None:
    scores = jnp.where(mask[:, None, :], scores, -jnp.inf)
  # The gradient of a row's largest score cancels; of a row without tokens it is -inf.
  largest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
  weights = jnp.exp(scores - jnp.where(jnp.isfinite(largest), largest, 0))
  total = jnp.sum(weights, axis=-1, keepdims=True)
  output = einsum_f32("btv,blt->blv", value, weights)
  return (output / jnp.where(total == 0, 1, total)).astype(value.dtype)
