"""Lightning attention on NVIDIA GPUs: the differentiable function."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..triton_call import run_launches, target_gpu
from .triton import CHUNKS, MAX_DIM, Problem, backward_launches, choose_config, forward_launches
from .xla import lightning_attention_xla

NAME = "lightning_attention"


class Residuals(NamedTuple):
  """What the backward pass needs: the inputs, and with S > 1 pieces what each adds to the state."""

  query: Float[Array, "B T H K"]
  key: Float[Array, "B T H K"]
  value: Float[Array, "B T H V"]
  log_decay: Float[Array, " H"]
  initial_state: Float[Array, "B H K V"]
  segments: Int[Array, "B T"] | None
  lengths: Int[Array, " B"] | None
  sums: Float[Array, "S-1 B H K V"] | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def lightning_attention_triton(
  query: Float[Array, "B T H K"],
  key: Float[Array, "B T H K"],
  value: Float[Array, "B T H V"],
  log_decay: Float[Array, " H"],
  initial_state: Float[Array, "B H K V"],
  segments: Int[Array, "B T"] | None,
  lengths: Int[Array, " B"] | None,
  chunk_size: int | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
  """Output and final state; the arguments are those of `lightning_attention_xla`.

  Compiles for NVIDIA GPUs only. float32 inputs are multiplied as three tf32 products. The gradient
  with respect to `log_decay` is computed by the portable path, and only where it is asked for.
  """
  args = (query, key, value, log_decay, initial_state, segments, lengths, chunk_size)
  return _forward(*args)[0]


def _forward(query, key, value, log_decay, initial_state, segments, lengths, chunk_size):
  problem, config, gpu = _plan(query, value, segments, lengths, chunk_size)
  arrays = dict(query=query, key=key, value=value, initial_state=initial_state)
  arrays |= dict(log_decay=log_decay, segments=segments, lengths=lengths)
  arrays = run_launches(forward_launches(problem, config), arrays, gpu)
  residuals = Residuals(
    query, key, value, log_decay, initial_state, segments, lengths, arrays.get("sums")
  )
  return (arrays["output"], arrays["final_state"]), residuals


def _backward(chunk_size, residuals, cotangents):
  query, key, value, log_decay, initial_state, segments, lengths, _ = residuals
  problem, config, gpu = _plan(query, value, segments, lengths, chunk_size)
  arrays = residuals._asdict() | dict(d_output=cotangents[0], d_final_state=cotangents[1])
  arrays = run_launches(backward_launches(problem, config), arrays, gpu)

  def by_decay(log_decay):
    return lightning_attention_xla(query, key, value, log_decay, initial_state, segments, lengths)

  # Models keep the decay constant; the compiler then drops these two lines.
  (d_log_decay,) = jax.vjp(by_decay, log_decay)[1](cotangents)
  names = ("d_query", "d_key", "d_value")
  return (*(arrays[name] for name in names), d_log_decay, arrays["d_initial_state"], None, None)


lightning_attention_triton.defvjp(_forward, _backward)


def _plan(query, value, segments, lengths, chunk_size):
  """The problem, its block sizes and the GPU; raises where the kernels cannot do it."""
  batch, length, heads, key_dim = query.shape
  value_dim = value.shape[3]
  if query.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
    raise NotImplementedError(
      f"{NAME}: query must be float32, bfloat16 or float16 for the Triton kernels; got "
      f'{query.dtype} (cast it, or use "xla")'
    )
  if max(key_dim, value_dim) > MAX_DIM:
    raise NotImplementedError(
      f"{NAME}: head_dim must be at most {MAX_DIM} for the Triton kernels; got K={key_dim}, "
      f'V={value_dim} (use more heads, or "xla")'
    )
  if chunk_size is not None and chunk_size not in CHUNKS:
    raise NotImplementedError(
      f"{NAME}: chunk_size must be one of {CHUNKS} for the Triton kernels; got {chunk_size} "
      '(None picks one, or use "xla")'
    )
  has = (segments is not None, lengths is not None)
  problem = Problem(batch, length, heads, key_dim, value_dim, query.dtype.name, *has)
  gpu = target_gpu(NAME)
  return problem, choose_config(problem, gpu, chunk_size), gpu
