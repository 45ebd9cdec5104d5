"""Second-order features inside the TPU kernels: [F, C] tiles, features on sublanes, time on lanes.

The products x_i x_j of all pairs are x times x rolled by r sublanes, r = 0 .. F/2: whole tiles, no
gathers. A kernel's feature tile, and its state, has the rows

    r = 0 .. F/2 - 1   F rows each         x_i x_(i+r), indices modulo F
    r = F/2            F/2 rows, up to 8   x_i x_(i+F/2)
    constant           8 rows              1, then zeros
    linear             F rows              x_i

with zeros behind them up to a whole tile. F is a multiple of 8 here; a head's own, smaller F has
zeros behind it, which add rows but change nothing. F = 16 takes 160 rows for 153 features.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from ..tpu_sizes import round_up

SUBLANES = 8


class Rows(NamedTuple):
  """Where the groups of a feature tile lie."""

  dim: int  # F, a multiple of 8
  head_dim: int  # the F of the caller, which sets the scale of the scores
  multiple: int  # the tile has a multiple of so many rows

  @property
  def half(self) -> int:
    """Rows of the group r = F/2, of which F/2 are used."""
    return round_up(self.dim // 2, SUBLANES)

  @property
  def constant(self) -> int:
    return self.dim * (self.dim // 2) + self.half

  @property
  def linear(self) -> int:
    return self.constant + SUBLANES

  @property
  def total(self) -> int:
    return round_up(self.linear + self.dim, self.multiple)

  @property
  def scale(self) -> float:
    return 1 / math.sqrt(self.head_dim)


def key_features(x: jax.Array, rows: Rows) -> jax.Array:
  """float32 [F, C] -> [R, C]: raw products, the constant, x."""
  pairs = [x * _ahead(x, r) for r in range(rows.dim // 2)]
  pairs.append((x * _ahead(x, rows.dim // 2))[: rows.half])
  return _stack(rows, pairs, _first_row(x, 1.0), x)


def query_features(x: jax.Array, rows: Rows) -> jax.Array:
  """As `key_features`, with all coefficients: their products with keys' sum to 1 + s + s^2 / 2."""
  pairs = [c * x * _ahead(x, r) for r, c in enumerate(_coefficients(rows))]
  pairs.append(_half_coefficient(x, rows) * (x * _ahead(x, rows.dim // 2))[: rows.half])
  return _stack(rows, pairs, _first_row(x, 1.0), rows.scale * x)


def key_gradient(x: jax.Array, cotangent: jax.Array, rows: Rows) -> jax.Array:
  """Cotangent [R, C] of `key_features` -> cotangent [F, C] of x."""
  return _gradient(x, cotangent, rows, [1.0] * (rows.dim // 2), 1.0, 1.0)


def query_gradient(x: jax.Array, cotangent: jax.Array, rows: Rows) -> jax.Array:
  coefficients = _coefficients(rows)
  return _gradient(x, cotangent, rows, coefficients, _half_coefficient(x, rows), rows.scale)


def _gradient(x, cotangent, rows, coefficients, half_coefficient, scale):
  dim, half = rows.dim, rows.half
  total = scale * cotangent[rows.linear : rows.linear + dim]
  total += 2 * coefficients[0] * cotangent[:dim] * x
  for r in range(1, dim // 2):
    c = coefficients[r] * cotangent[r * dim : (r + 1) * dim]
    total += c * _ahead(x, r) + pltpu.roll(c * x, r, 0)
  c = half_coefficient * cotangent[rows.constant - half : rows.constant]
  if half == dim:  # the unused rows have cotangent 0
    return total + c * _ahead(x, dim // 2) + pltpu.roll(c * x, dim // 2, 0)
  return total + jnp.concatenate([c * x[half:], c * x[:half]])


def _coefficients(rows):
  """Of x_i x_(i+r) for r < F/2: a square occurs once in the expansion of s^2 / 2, a pair twice."""
  pair = 1 / rows.head_dim
  return [pair / 2] + [pair] * (rows.dim // 2 - 1)


def _half_coefficient(x, rows):
  pair = 1 / rows.head_dim
  if rows.half == rows.dim // 2:
    return pair
  row = jax.lax.broadcasted_iota(jnp.int32, (rows.half, x.shape[1]), 0)
  return jnp.where(row < rows.dim // 2, pair, 0.0)


def _ahead(x, r):
  """Row i is row (i + r) modulo F."""
  return pltpu.roll(x, x.shape[0] - r, 0) if r else x


def _first_row(x, value):
  row = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, x.shape[1]), 0)
  return jnp.where(row == 0, value, 0.0).astype(x.dtype)


def _stack(rows, pairs, constant, linear):
  short = rows.total - rows.linear - rows.dim
  end = [jnp.zeros((short, linear.shape[1]), linear.dtype)] if short else []
  return jnp.concatenate([*pairs, constant, linear, *end])


def row_numbers(rows: Rows) -> np.ndarray:
  """For each row of a tile its place in the public, packed order; -1 for unused rows."""
  dim, head_dim = rows.dim, rows.head_dim
  numbers = np.full(rows.total, -1)
  place = np.full((dim, dim), -1)
  i, j = np.triu_indices(head_dim)
  place[i, j] = place[j, i] = 1 + head_dim + np.arange(i.size)
  for r in range(dim // 2 + 1):
    first = np.arange(dim if r < dim // 2 else dim // 2)
    numbers[r * dim + first] = place[first, (first + r) % dim]
  numbers[rows.constant] = 0
  numbers[rows.linear : rows.linear + head_dim] = 1 + np.arange(head_dim)
  return numbers
