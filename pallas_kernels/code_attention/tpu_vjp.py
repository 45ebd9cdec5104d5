"""The differentiable TPU operator: what is known of the tokens, the kernels, residuals."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

from . import tpu, tpu_backward, tpu_tuning
from . import tpu_tiles as tiles_of
from .tpu_tiles import Plan, Tables


class Residuals(NamedTuple):
  """What the backward pass needs; L' and T' are padded to whole blocks."""

  operands: tuple  # query, key, value and real tokens float32 [B, 1, T']
  tables: Tables
  output: Float[Array, "B L V"]
  stats: Float[Array, "B 2 M"]  # of each label: largest score, 1 / sum of weights


def code_attention_tpu(
  query: Float[Array, "L K"],
  key: Float[Array, "B T K"],
  value: Float[Array, "B T V"],
  mask: Bool[Array, "B T"] | None,
  scale: float,
  interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, "B L V"]:
  """As `code_attention_xla`; `interpret` runs the kernels on a CPU.

  Raises:
    NotImplementedError: what `fits` has a reason against.
  """
  reason = fits(query, key, value)
  plan = make_plan(query, key, value, scale, interpret)
  if reason or plan is None:
    raise NotImplementedError(f"code_attention: {reason}")
  mask = jnp.ones(key.shape[:2], bool) if mask is None else mask
  mask = jnp.pad(mask, ((0, 0), (0, plan.padded_length - plan.length)))
  real = mask.astype(jnp.float32)[:, None]
  return _attend(query, key, value, real, tiles_of.describe(plan, mask), plan)


def fits(query: Any, key: Any, value: Any) -> str | None:
  """Why the kernels do not take a problem; None if they do."""
  if value.dtype not in (jnp.float32, jnp.bfloat16):
    return (
      "value must be float32 or bfloat16 for the TPU kernels; got "
      f'{value.dtype} (cast it, or use implementation="xla")'
    )
  if make_plan(query, key, value, 1.0, False) is None:
    return (
      "query must be narrow enough for a block of labels and tokens to stay in the TPU's VMEM; "
      f'got {query.shape} (use implementation="xla")'
    )
  return None


def make_plan(query, key, value, scale: float, interpret) -> Plan | None:
  """How the kernels would do it; None if VMEM is too small."""
  (labels, key_dim), (batch, length, value_dim) = query.shape, value.shape
  plan = Plan(
    batch=batch, labels=labels, length=length, key_dim=key_dim, value_dim=value_dim, tile=0, span=0,
    block=0, panel=0, parts=1, resident=True, scale=float(scale), dtype=value.dtype,
    interpret=interpret,
  )  # fmt: skip
  return tpu_tuning.sized(plan)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(query, key, value, real, tables, plan):
  """Output [B, L, V]; real: float32 [B, 1, T']."""
  return tpu.forward(plan, tables, (query, key, value, real), save=False)[0]


def _forward(query, key, value, real, tables, plan):
  operands = (query, key, value, real)
  output, stats = tpu.forward(plan, tables, operands, save=True)
  return output, Residuals(operands, tables, output, stats)


def _backward(plan, residuals, d_output):
  r = residuals
  delta = _delta(plan, r.output, d_output)
  grads = tpu_backward.backward(plan, r.tables, r.operands, d_output, r.stats, delta)
  return *grads, None, None


def _delta(plan, output, d_output):
  """D [B, 1, L']."""
  delta = jnp.sum(d_output.astype(jnp.float32) * output.astype(jnp.float32), 2)[:, None]
  return jnp.pad(delta, ((0, 0), (0, 0), (0, plan.padded_labels - plan.labels)))


_attend.defvjp(_forward, _backward)
