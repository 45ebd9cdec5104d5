"""Activation functions by the names that model configurations use."""

import difflib
from collections.abc import Callable

import jax
import jax.numpy as jnp


def _identity(x: jax.Array) -> jax.Array:
  return x


def _exp(x: jax.Array) -> jax.Array:
  """exp with the largest entry of the last axis subtracted."""
  return jnp.exp(x - jax.lax.stop_gradient(jnp.max(x, axis=-1, keepdims=True)))


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "identity": _identity,
  "gelu": lambda x: jax.nn.gelu(x, approximate=False),
  "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
  "relu": jax.nn.relu,
  "elu": jax.nn.elu,
  "sigmoid": jax.nn.sigmoid,
  "exp": _exp,
  "leak": jax.nn.leaky_relu,
  "1+elu": lambda x: 1 + jax.nn.elu(x),
  "2+elu": lambda x: 2 + jax.nn.elu(x),
  "silu": jax.nn.silu,
  "sine": jnp.sin,
}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
  """The function called `name`. Raises ValueError with the nearest name for an unknown one."""
  if name not in ACTIVATIONS:
    near = difflib.get_close_matches(name, ACTIVATIONS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(ACTIVATIONS)}"
    raise ValueError(f"activation: name must be a known function; got {name!r} ({hint})")
  return ACTIVATIONS[name]
