"""Position encodings, and counting positions."""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ..pallas_kernels.rotary import rotary_tables, rotate
from .partitioning import logical


def lrpe(
  x: Float[Array, "B T H K"], theta: Float[Array, "H K"], positions: Int[Array, "#B T"]
) -> Float[Array, "B T H 2*K"]:
  """concat(x cos(theta t), x sin(theta t)): scores depend on the distance of two tokens alone.

  q'_t . k'_j = sum over c of q_c k_c cos(theta_c (t - j)). Phases are float32 (or wider), whatever
  the dtype of x. Paper: Various Lengths, Constant Speed (2024), LRPE, as the released code has it.
  """
  wide = jnp.promote_types(theta.dtype, jnp.float32)
  phase = positions[..., None, None].astype(wide) * theta.astype(wide)  # [B, T, H, K]
  rotated = jnp.concatenate([x * jnp.cos(phase), x * jnp.sin(phase)], axis=-1)
  return rotated.astype(x.dtype)


class LRPE(nnx.Module):
  """Learned phases of `lrpe`: one geometric ladder over all channels of all heads."""

  def __init__(self, heads: int, head_dim: int, *, param_dtype=jnp.float32):
    index = np.arange(heads * head_dim).reshape(heads, head_dim)
    theta = 10000.0 ** (-2.0 * index / (heads * head_dim))
    self.theta = nnx.Param(jnp.asarray(theta, param_dtype), **logical("heads", None))

  def __call__(
    self, x: Float[Array, "B T H K"], positions: Int[Array, "#B T"]
  ) -> Float[Array, "B T H 2*K"]:
    return lrpe(x, self.theta[...], positions)


class LearnedPositions(nnx.Module):
  """A vector for each of the first `count` positions; NaN at those behind, which have none."""

  def __init__(
    self,
    count: int,
    features: int,
    *,
    init: nnx.Initializer,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    table = init(rngs.params(), (count, features), param_dtype)
    self.table = nnx.Param(table, **logical(None, "embed"))

  def __call__(self, positions: Int[Array, "*B"]) -> Float[Array, "*B D"]:
    """Raises ValueError if the last axis has more positions than there are."""
    count, length = self.table.shape[0], positions.shape[-1]
    if positions.ndim > 1 and length > count:
      raise ValueError(
        f"LearnedPositions: tokens must be at most the {count} positions that were learned; got"
        f" {length} (rotary positions have no such end)"
      )
    return jnp.take(self.table[...], positions, axis=0, mode="fill", fill_value=jnp.nan)


def rotary_pairs(head_dim: int, fraction: float) -> int:
  """Pairs of channels that `rotary` turns: half of int(fraction head_dim), rounded up.

  Raises:
    ValueError: a fraction outside [0, 1], or an odd head_dim that would have to be turned whole.
  """
  pairs = (int(fraction * head_dim) + 1) // 2
  if not 0 <= fraction <= 1 or 2 * pairs > head_dim:
    raise ValueError(
      f"rotary: fraction must lie in [0, 1] and leave whole pairs; got {fraction} of {head_dim}"
      " channels (0 for no rotary positions)"
    )
  return pairs


def rotary(
  x: Float[Array, "B T H K"],
  positions: Int[Array, "#B T"],
  *,
  fraction: float = 1.0,
  base: float = 10000.0,
  neighbours: bool = False,
) -> Float[Array, "B T H K"]:
  """Turns pairs of channels by angles t base^(-2 i / n), so that scores depend on distances alone.

  Of each head's K channels the first n = int(fraction K) are turned: channel i together with
  channel i + n/2, or 2 i with its `neighbours` 2 i + 1, to (x1 cos - x2 sin, x2 cos + x1 sin).
  An odd n is a case of its own: (n + 1)/2 pairs, n + 1 channels, exponents still over n, which is
  what trained the released 1.3B baseline (70 channels, half of them). Angles are float32 (or
  wider). Paper: RoFormer (2021).
  """
  head_dim = x.shape[-1]
  turned = 2 * rotary_pairs(head_dim, fraction)
  if not turned:
    return x
  wide = jnp.promote_types(x.dtype, jnp.float32)
  # Tables [B, T, 1, pairs]: all heads turn alike.
  tables = rotary_tables(positions[..., None], int(fraction * head_dim), base, wide)
  first = x[..., :turned]
  if neighbours:
    first = _regrouped(rotate(_regrouped(first, 2), tables), turned // 2)
  else:
    first = rotate(first, tables)
  return jnp.concatenate([first, x[..., turned:]], axis=-1)


def _regrouped(x, size):
  """Channels [n / size, size] as [size, n / size]: neighbours to halves with 2, back with n / 2."""
  return x.reshape(*x.shape[:-1], -1, size).swapaxes(-1, -2).reshape(x.shape)


def positions_from(length: int, start: Int[Array, " B"] | None) -> Int[Array, "#B T"]:
  """Counts on from `start`; [1, T] if it is None, so that phases are computed once for all rows."""
  return jnp.arange(length)[None] + (0 if start is None else start[:, None])


def position_after(
  positions: Int[Array, "#B T"],
  lengths: Int[Array, " B"] | None,
  before: Int[Array, " B"],
) -> Int[Array, " B"]:
  """Position of the token that follows each row's last real one; `before` where a row has none."""
  batch, length = before.shape[0], positions.shape[1]
  last = jnp.full((batch,), length) if lengths is None else lengths
  positions = jnp.broadcast_to(positions, (batch, length))
  following = jnp.take_along_axis(positions, jnp.maximum(last - 1, 0)[:, None], axis=1)[:, 0] + 1
  return jnp.where(last == 0, before, following).astype(jnp.int32)


def sinusoids(count: int, features: int) -> np.ndarray:
  """[count, features], float64: sin(t w_i) and cos(t w_i) side by side, w_i = 10000^(-2 i / D).

  Raises:
    ValueError: an odd number of features. Paper: Attention Is All You Need (2017), section 3.5.
  """
  if features % 2:
    raise ValueError(f"sinusoids: features must be even; got {features} (a sine and a cosine each)")
  rate = 10000.0 ** (-np.arange(0, features, 2) / features)
  phase = np.arange(count)[:, None] * rate
  return np.stack([np.sin(phase), np.cos(phase)], axis=-1).reshape(count, features)
