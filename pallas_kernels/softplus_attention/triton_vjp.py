"""Softplus attention on NVIDIA GPUs: the differentiable function."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..sliding_window_attention.history import Tokens
from ..triton_call import run_launches, target_gpu
from .reference import factor
from .triton import Problem, backward_launches, choose_config, fits, forward_launch
from .variants import Variant

NAME = "softplus_attention"


class Residuals(NamedTuple):
  """What the backward pass needs: the inputs, and 8 bytes per token and head; LSSA: 4."""

  query: Float[Array, "B T H K"]
  key: Float[Array, "B S G K"]
  value: Float[Array, "B S G V"]
  count: Float[Array, "P T"]
  documents: Int[Array, "B S"] | None
  total: Float[Array, "..."]  # what the first stage divides by
  rise: Float[Array, "..."]  # 1 / the largest excess over the mean; 0 in a flat row


def softplus_attention_triton(
  query: Float[Array, "B T H K"],
  tokens: Tokens,
  count: Float[Array, "P T"],
  variant: Variant,
) -> Float[Array, "B T H V"]:
  """Output; the arguments are those of `softplus_attention_xla`.

  Compiles for NVIDIA GPUs only, and for softplus of cosines with an l1 norm (any scale, count,
  power and epsilon). float32 inputs are multiplied as three tf32 products. Gradients for query, key
  and value.
  """
  if reason := fits(NAME, query, tokens.value, variant):
    raise NotImplementedError(f'{NAME}: {reason} for the Triton kernels (use "xla")')
  return _attend(query, tokens.key, tokens.value, count, tokens.documents, variant)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(query, key, value, count, documents, variant):
  return _run_forward((query, key, value, count, documents), variant, statistics=False)["output"]


def _forward(*args):
  *inputs, variant = args
  arrays = _run_forward(inputs, variant, statistics=True)
  return arrays["output"], Residuals(*(arrays[name] for name in Residuals._fields))


def _run_forward(inputs, variant, statistics):
  arrays = dict(zip(Residuals._fields, inputs, strict=False))
  problem, gpu = problem_of(arrays, variant), target_gpu(NAME)
  launch = forward_launch(problem, choose_config(problem, gpu), statistics)
  return run_launches((launch,), arrays | prepared(arrays, variant), gpu)


def _backward(variant, residuals, d_output):
  arrays = residuals._asdict() | dict(d_output=d_output)
  problem, gpu = problem_of(arrays, variant), target_gpu(NAME)
  launches = backward_launches(problem, choose_config(problem, gpu))
  arrays = run_launches(launches, arrays | prepared(arrays, variant), gpu)
  return arrays["d_query"], arrays["d_key"], arrays["d_value"], None, None


_attend.defvjp(_forward, _backward)


def problem_of(arrays: dict[str, Any], variant: Variant) -> Problem:
  """The problem of arrays under the names of `Residuals`; absent ones are None or not there."""
  query, value = arrays["query"], arrays["value"]
  batch, length, heads, dim = query.shape
  total, groups, value_dim = value.shape[1:]
  return Problem(
    batch, length, total, heads, groups, dim, value_dim, query.dtype.name,
    shared_count=arrays["count"].shape[0] == 1,
    documents=arrays.get("documents") is not None,
    variant=variant,
  )  # fmt: skip


def prepared(arrays: dict[str, Any], variant: Variant) -> dict[str, Any]:
  """`scale`, what products are multiplied by, in base 2; `first` and `stop` of documents."""
  query, documents = arrays["query"], arrays.get("documents")
  count = jnp.asarray(arrays["count"], jnp.float32)
  scale = factor(variant, count, query.shape[3]) * (1 / math.log(2))
  given = dict(count=count, scale=scale)
  if documents is None:
    return given
  documents = jnp.asarray(documents, jnp.int32)
  first, stop = extents(documents, query.shape[1])
  return given | dict(documents=documents, first=first, stop=stop)


def extents(
  documents: Int[Array, "B S"], length: int
) -> tuple[Int[Array, "B T"], Int[Array, "B S"]]:
  """(first key that a query may see, end of the queries that may see a key).

  Documents ascend along the queries; what is in front of them belongs to document 0 or to none, -1.
  """
  before = documents.shape[1] - length
  own = documents[:, before:]
  place = jnp.arange(length, dtype=jnp.int32)
  starts = jnp.pad(own[:, 1:] != own[:, :-1], ((0, 0), (1, 0)), constant_values=True)
  first = jax.lax.cummax(jnp.where(starts, before + place, 0), axis=1)
  ends = jnp.pad(own[:, 1:] != own[:, :-1], ((0, 0), (0, 1)), constant_values=True)
  stop = jax.lax.cummin(jnp.where(ends, place + 1, length), axis=1, reverse=True)
  earlier = jnp.sum(own == 0, axis=1, dtype=jnp.int32, keepdims=True)
  earlier = jnp.where(documents[:, :before] < 0, 0, earlier)
  return jnp.where(own == 0, 0, first), jnp.concatenate([earlier, stop], axis=1)
