"""The operator's arrays in the layouts of the TPU kernels (`tpu_rows`), and back."""

import jax
import jax.numpy as jnp

from ..rotary import rotary_tables
from ..segments import pad_length
from .tpu_rows import Plan

CLOSED = 1e4  # a gate's logit that leaves the running sums as they are


def to_lanes(plan: Plan, x: jax.Array) -> jax.Array:
  """[..., K] -> [..., width]; both halves of a head are padded, so that pairs stay W / 2 apart."""
  dim = x.shape[-1]
  if dim == plan.width:
    return jnp.asarray(x)
  if dim % 2:
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, plan.width - dim),))
  halves = x.reshape(*x.shape[:-1], 2, dim // 2)
  widths = ((0, 0),) * x.ndim + ((0, (plan.width - dim) // 2),)
  return jnp.pad(halves, widths).reshape(*x.shape[:-1], plan.width)


def from_lanes(plan: Plan, x: jax.Array) -> jax.Array:
  """The way back, [..., width] -> [..., K]."""
  dim = plan.head_dim
  if dim == plan.width or dim % 2:
    return x[..., :dim]
  halves = x.reshape(*x.shape[:-1], 2, plan.width // 2)[..., : dim // 2]
  return halves.reshape(*x.shape[:-1], dim)


def flat(plan: Plan, x: jax.Array) -> jax.Array:
  """[B, T, N, K] -> [B, T, N * width]."""
  x = to_lanes(plan, x)
  return x.reshape(*x.shape[:2], -1)


def heads_of(plan: Plan, x: jax.Array) -> jax.Array:
  """The way back, [B, T, N * width] -> [B, T, N, K]."""
  return from_lanes(plan, x.reshape(*x.shape[:2], -1, plan.width))


def to_kernel(plan: Plan, chunk_size: int, x: jax.Array, closed: float) -> jax.Array:
  """[B, T, N, K] -> [B * T', N * width]; `closed` fills rows that only lengthen a chunk."""
  x = flat(plan, x)
  if plan.chunk != chunk_size:
    x = pad_length(x, chunk_size).reshape(plan.batch, -1, chunk_size, x.shape[2])
    short = ((0, 0), (0, 0), (0, plan.chunk - chunk_size), (0, 0))
    x = jnp.pad(x, short, constant_values=closed).reshape(plan.batch, -1, x.shape[3])
  x = jnp.pad(x, ((0, 0), (0, plan.length - x.shape[1]), (0, 0)))
  return x.reshape(-1, x.shape[2])


def from_kernel(plan: Plan, chunk_size: int, x: jax.Array, length: int) -> jax.Array:
  """The way back, [B * T', N * width] -> [B, T, N, K]."""
  x = x.reshape(plan.batch, plan.length, -1)
  if plan.chunk != chunk_size:
    x = x.reshape(plan.batch, -1, plan.chunk, x.shape[2])[:, :, :chunk_size]
    x = x.reshape(plan.batch, -1, x.shape[3])
  return heads_of(plan, x[:, :length])


def to_summaries(plan: Plan, x: jax.Array) -> jax.Array:
  """[B, S, H, K] -> [B, outer, inner, S, lanes]."""
  x = to_lanes(plan, x).reshape(*x.shape[:2], plan.inner, plan.outer, plan.lanes)
  return x.transpose(0, 3, 2, 1, 4)


def from_summaries(plan: Plan, x: jax.Array) -> jax.Array:
  """The way back, [B, outer, inner, S, lanes] -> [B, S, H, K]."""
  x = x.transpose(0, 3, 2, 1, 4)
  return from_lanes(plan, x.reshape(*x.shape[:2], -1, plan.width))


def group_tokens(plan: Plan, x: jax.Array) -> jax.Array:
  """Repeats the groups where a unit's heads would need more than there are."""
  return jnp.tile(x, (1, 1, plan.groups * plan.fold // x.shape[2], 1))


def sum_over_heads(plan: Plan, x: jax.Array) -> jax.Array:
  """[B T', outer * lanes] -> [B T', groups * lanes]."""
  if plan.outer == plan.groups:
    return x
  return jnp.sum(x.reshape(x.shape[0], -1, plan.groups * plan.lanes), 1).astype(plan.dtype)


def turns(plan: Plan, numbers: jax.Array, base: float | None) -> tuple[jax.Array, ...]:
  """Cosines and signed sines of chunks' numbers [*B, C], float32 [*B, C, lanes]; () for no turn."""
  tables = rotary_tables(numbers, plan.head_dim, base)
  if tables is None:
    return ()
  short = plan.width // 2 - tables[0].shape[-1]
  cos, sin = (jnp.pad(x, (*((0, 0),) * numbers.ndim, (0, short))) for x in tables)
  halves = (cos, cos), (-sin, sin)
  return tuple(jnp.concatenate(x * plan.fold, -1) for x in halves)
