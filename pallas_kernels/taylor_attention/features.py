"""The packed second-order Taylor features: their order, and ways between query, key and features.

With s = q . k / sqrt(F), 1 + s + s^2 / 2 is the product of `query_features(q)` and
`key_features(k)`, P = 1 + F + F (F + 1) / 2 numbers each: a constant, the F entries, and x_i x_j
for the pairs i <= j in row-major order. Keys carry no coefficients, so the state of the operator is
a sum of plain products; the query side has all of them: 1, 1 / sqrt(F), and 1 / (2 F) for i = j or
1 / F for i < j, which stands for both (i, j) and (j, i).
Paper: Simple linear attention language models balance the recall-throughput tradeoff (2024),
equation 4, with the scaling of the released code.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..dots import einsum_f32


def feature_count(dim: int) -> int:
  """P: features of a query or key of `dim` numbers."""
  return 1 + dim + dim * (dim + 1) // 2


def pairs(dim: int) -> tuple[np.ndarray, np.ndarray]:
  """(i, j) of the second-order features, i <= j, row-major."""
  return np.triu_indices(dim)


def query_coefficients(dim: int) -> np.ndarray:
  """float64 [P], what each product of the query is multiplied with."""
  i, j = pairs(dim)
  return np.concatenate([[1.0], np.full(dim, dim**-0.5), np.where(i == j, 0.5, 1.0) / dim])


def key_features(key: Float[Array, "*B F"]) -> Float[Array, "*B P"]:
  """[1, k_i, k_i k_j], in the dtype of `key`."""
  first, second = _selections(key)
  return jnp.concatenate([jnp.ones_like(key[..., :1]), key, first * second], -1)


def query_features(query: Float[Array, "*B F"]) -> Float[Array, "*B P"]:
  """[1, q_i, q_i q_j] times `query_coefficients`."""
  return key_features(query) * jnp.asarray(query_coefficients(query.shape[-1]), query.dtype)


def features_transposed(
  x: Float[Array, "*B F"], d_features: Float[Array, "*B P"]
) -> Float[Array, "*B F"]:
  """Cotangent of x from that of `key_features(x)`."""
  dim = x.shape[-1]
  first, second = _selections(x)
  to_first, to_second = _selection_matrices(dim)
  linear, products = d_features[..., 1 : dim + 1], d_features[..., dim + 1 :]
  linear += einsum_f32("...p,fp->...f", products * second, jnp.asarray(to_first, x.dtype))
  return linear + einsum_f32("...p,fp->...f", products * first, jnp.asarray(to_second, x.dtype))


def _selections(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """x_i and x_j of every pair. Products with 0/1 matrices: exact, and faster than a gather."""
  first, second = (jnp.asarray(m, x.dtype) for m in _selection_matrices(x.shape[-1]))
  first, second = (einsum_f32("...f,fp->...p", x, m).astype(x.dtype) for m in (first, second))
  return first, second


def _selection_matrices(dim: int) -> tuple[np.ndarray, np.ndarray]:
  i, j = pairs(dim)
  one_hot = np.eye(dim)
  return one_hot[:, i], one_hot[:, j]  # [F, F (F + 1) / 2] each
