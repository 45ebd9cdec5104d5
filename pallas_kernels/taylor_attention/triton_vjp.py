"""Taylor attention on NVIDIA GPUs: the differentiable function."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..triton_call import run_launches, target_gpu
from .triton import (
  CHUNKS,
  Problem,
  backward_launches,
  choose_config,
  fits,
  forward_launches,
  sum_tiles,
)
from .xla import taylor_attention_xla

NAME = "taylor_attention"


class Residuals(NamedTuple):
  """What the backward pass needs: the inputs, the output and its sums of weights.

  Both are kept because without them the backward pass would have to read the state first: the
  cotangents of numerator and sum are d_output / total and -(d_output . output) / total. That costs
  4 bytes per token and head (the output is alive anyway). With S > 1 pieces, also what each adds
  to the state; states of chunks are not stored, each backward sweep makes its own.
  """

  query: Float[Array, "B T H F"]
  key: Float[Array, "B T H F"]
  value: Float[Array, "B T H V"]
  log_decay: Float[Array, " H"] | None
  initial_state: Float[Array, "B H P V1"]
  segments: Int[Array, "B T"] | None
  lengths: Int[Array, " B"] | None
  output: Float[Array, "B T H V"]
  total: Float[Array, "B T H"]
  sums: Float[Array, "S-1 B H P V1"] | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def taylor_attention_triton(
  query: Float[Array, "B T H F"],
  key: Float[Array, "B T H F"],
  value: Float[Array, "B T H V"],
  log_decay: Float[Array, " H"] | None,
  initial_state: Float[Array, "B H P V1"],
  segments: Int[Array, "B T"] | None,
  lengths: Int[Array, " B"] | None,
  normalize: bool,
  chunk_size: int | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H P V1"]]:
  """Output and final state; the arguments are those of `taylor_attention_xla`.

  Compiles for NVIDIA GPUs only. float32 inputs are multiplied as three tf32 products, float16 as
  one. The gradient with respect to `log_decay` is computed by the portable path, and only where it
  is asked for.
  """
  args = (query, key, value, log_decay, initial_state, segments, lengths, normalize, chunk_size)
  return _forward(*args)[0]


def _forward(query, key, value, log_decay, initial_state, segments, lengths, normalize, chunk_size):
  inputs = (query, key, value, log_decay, initial_state, segments, lengths)
  problem, config, gpu = _plan(*inputs, normalize=normalize, chunk_size=chunk_size)
  arrays = dict(zip(Residuals._fields, inputs, strict=False))
  arrays = run_launches(forward_launches(problem, config), arrays, gpu)
  residuals = Residuals(*inputs, arrays["output"], arrays["total"], arrays.get("sums"))
  return (arrays["output"], arrays["final_state"]), residuals


def _backward(normalize, chunk_size, residuals, cotangents):
  *inputs, _, _, _ = residuals
  query, key, value, log_decay, initial_state, segments, lengths = inputs
  problem, config, gpu = _plan(*inputs, normalize=normalize, chunk_size=chunk_size)
  arrays = residuals._asdict() | dict(d_output=cotangents[0], d_final_state=cotangents[1])
  arrays = run_launches(backward_launches(problem, config), arrays, gpu)
  d_query, d_key = (sum_tiles(arrays[name], query.dtype) for name in ("d_query", "d_key"))
  d_log_decay = None
  if log_decay is not None:

    def by_decay(log_decay):
      args = (query, key, value, log_decay, initial_state, segments, lengths, normalize)
      return taylor_attention_xla(*args)

    # Models keep the decay constant; the compiler then drops this.
    (d_log_decay,) = jax.vjp(by_decay, log_decay)[1](cotangents)
  return d_query, d_key, arrays["d_value"], d_log_decay, arrays["d_initial_state"], None, None


taylor_attention_triton.defvjp(_forward, _backward)


def _plan(
  query, key, value, log_decay, initial_state, segments, lengths, normalize, chunk_size
):  # fmt: skip
  """The problem, its block sizes and the GPU; raises where the kernels cannot do it."""
  batch, length, heads, key_dim = query.shape
  if query.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
    raise NotImplementedError(
      f"{NAME}: query must be float32, bfloat16 or float16 for the Triton kernels; got "
      f'{query.dtype} (cast it, or use "xla")'
    )
  gpu = target_gpu(NAME)
  if not fits(key_dim, query.dtype.name, gpu):
    raise NotImplementedError(
      f"{NAME}: query must have fewer entries per head for the Triton kernels on this GPU; got "
      f'{key_dim} (16 or fewer always fit, or use "xla")'
    )
  if chunk_size is not None and chunk_size not in CHUNKS:
    raise NotImplementedError(
      f"{NAME}: chunk_size must be one of {CHUNKS} for the Triton kernels; got {chunk_size} "
      '(None picks one, or use "xla")'
    )
  has = tuple(x is not None for x in (log_decay, segments, lengths))
  sizes = (batch, length, heads, key_dim, value.shape[3])
  problem = Problem(*sizes, query.dtype.name, normalize, *has)
  return problem, choose_config(problem, gpu, chunk_size), gpu
