"""A vector for each label, read from the tokens of a document."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from ..pallas_kernels import code_attention, code_attention_weights, sharded_code_attention
from .partitioning import active_axes, logical
from .projections import dense


class LabelAttention(nnx.Module):
  """r_l = sum over t of softmax_t(q_l . tanh(h_t W + c)) h_t, for each label l.

  Scores of the released code have a bias per label as well, `label_bias`; a softmax over tokens
  ignores it, so it changes nothing and learns nothing. It is kept for checkpoints.

  Paper: TransICD (2021), code-wise attention.
  """

  def __init__(
    self,
    features: int,
    hidden: int,
    labels: int,
    *,
    init: nnx.Initializer,
    implementation: str | None = None,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.dtype, self.implementation = dtype, implementation
    kwargs = dict(use_bias=True, init=init, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    self.key = dense(features, hidden, ("embed", "mlp"), **kwargs)
    # Drawn as [hidden, labels], so that initialisers see `hidden` as what goes in.
    query = init(rngs.params(), (hidden, labels), param_dtype).T
    self.query = nnx.Param(query, **logical("vocab", None))
    self.label_bias = nnx.Param(jnp.zeros((labels,), param_dtype), **logical("vocab"))

  def __call__(
    self, x: Float[Array, "B T D"], mask: Bool[Array, "B T"] | None = None
  ) -> Float[Array, "B L D"]:
    """What the labels read; zeros from a document whose `mask` is False everywhere."""
    query, key = self._project(x)
    options = dict(mask=mask, implementation=self.implementation)
    axes = active_axes()
    if not axes:
      return code_attention(query, key, x, **options)
    labels, parts = query.shape[0], axes.get("model", 1)
    query = jnp.pad(query, ((0, -labels % parts), (0, 0)))  # every device has equally many
    split = dict(batch_axes=("data",) if "data" in axes else (),
                 label_axes=("model",) if "model" in axes else ())  # fmt: skip
    return sharded_code_attention(query, key, x, **split, **options)[:, :labels]

  def weights(
    self, x: Float[Array, "B T D"], labels: Int[Array, " P"], mask: Bool[Array, "B T"] | None = None
  ) -> Float[Array, "B P T"]:
    """How much each of the chosen labels reads from each token; sums to 1 over real tokens."""
    query, key = self._project(x)
    return code_attention_weights(query[labels], key, mask=mask)

  def _project(self, x):
    return self.query[...].astype(self.dtype), jnp.tanh(self.key(x))
