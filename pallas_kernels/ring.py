"""Sums over the devices of a mesh axis while arrays travel around it, inside `shard_map`.

Every device ends with a sum of its own: of `function(local, fixed, moving_d, labels_d)` over all
devices d, where the first two stay and the others are those of device d; and with the largest of
what is to be compared. Nothing is gathered: at any time a device holds its own part and one other.
The gradient goes around once more, that of what moves travelling with it until it is home.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def ring_reduce(
  function: Callable, axis: str, local: Any, fixed: Any, moving: Any, labels: Any
) -> tuple[Any, Any]:
  """(sums, largest) over the devices of `axis`; see above.

  `local` and `moving` are pytrees of float arrays, `fixed` and `labels` of integers and booleans.
  `function` closes over no arrays and returns two pytrees, float32 or wider: what is summed, and
  what the largest is taken of, through which no gradient passes.
  """
  return _forward(function, axis, local, fixed, moving, labels)[0]


def _forward(function, axis, local, fixed, moving, labels):
  def step(_, carry):
    result, *travelling = carry
    moving, labels = _pass_on(travelling, axis)
    return combine(result, function(local, fixed, moving, labels)), moving, labels

  start = (function(local, fixed, moving, labels), moving, labels)
  result, *_ = jax.lax.fori_loop(1, jax.lax.axis_size(axis), step, start)
  return result, (local, fixed, moving, labels)


def _backward(function, axis, residuals, cotangents):
  local, fixed, moving, labels = residuals
  d_sums, _ = cotangents

  def step(_, carry):
    d_local, d_moving, moving, labels = carry
    sums = lambda own, other: function(own, fixed, other, labels)[0]  # noqa: E731
    _, pull = jax.vjp(sums, local, moving)
    own, passing = pull(d_sums)
    d_local, d_moving = _add(d_local, own), _add(d_moving, passing)
    return (d_local, *_pass_on((d_moving, moving, labels), axis))

  start = (_wide_zeros(local), _wide_zeros(moving), moving, labels)
  d_local, d_moving, *_ = jax.lax.fori_loop(0, jax.lax.axis_size(axis), step, start)
  return _like(d_local, local), None, _like(d_moving, moving), None


ring_reduce.defvjp(_forward, _backward)


def combine(one: tuple[Any, Any], other: tuple[Any, Any]) -> tuple[Any, Any]:
  """(sums, largest) of two parts together."""
  return _add(one[0], other[0]), jax.tree.map(jnp.maximum, one[1], other[1])


def _pass_on(tree, axis):
  count = jax.lax.axis_size(axis)
  pairs = [(source, (source + 1) % count) for source in range(count)]
  return jax.tree.map(lambda x: jax.lax.ppermute(x, axis, pairs), tree)


def _add(total, part):
  return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, part)


def _wide_zeros(tree):
  return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), tree)


def _like(tree, model):
  return jax.tree.map(lambda x, m: x.astype(m.dtype), tree, model)
