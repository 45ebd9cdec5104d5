"""Position encodings."""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

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
