"""The differentiable TPU operator: members, layouts, tables by offset, the kernels."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from ..compat import target_platform
from ..segments import pad_length
from ..tpu_sizes import round_up
from . import tpu, tpu_backward, tpu_rows, tpu_tuning
from .attend import Extras
from .options import Routing
from .state import Tokens
from .tpu_members import members_and_counts
from .tpu_tiles import Plan

NAME = "routed_attention"


def attend_clusters_tpu(
  query: Float[Array, "B T H K"],
  tokens: Tokens,
  scores: Float[Array, "B T H C"],
  options: Routing,
  extras: Extras,
  interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, "B T H V"]:
  """Output, as `attend_clusters`; gradients for query, key, value and the relative tables.

  `interpret` runs the kernels on the CPU: True, or a `pltpu.InterpretParams`.

  Raises:
    NotImplementedError: what `fits` has a reason against.
  """
  reason = fits(query, tokens, scores, options, extras)
  plan = make_plan(query, tokens, scores, options, extras, interpret)
  if reason or plan is None:
    raise NotImplementedError(f"{NAME}: {reason}")
  batch, length, heads, _ = query.shape
  find = functools.partial(
    members_and_counts,
    window=options.window_size,
    slots=plan.slots,
    absent=plan.length,
    interpret=interpret,
  )
  found, count = find(scores)
  members = [found]
  if not plan.shared_members:
    members.append(find(tokens.scores)[0])
  members = tuple(_by_unit(plan, x).swapaxes(2, 3) for x in members)  # [B, U, C, fold, W]
  weights = 1 / (count + options.combine_eps)
  weights = _by_unit(plan, jnp.pad(weights, ((0, 0), (0, 0), (0, plan.length - length))))
  arrays = dict(q=query, v=tokens.value)
  if not plan.shared_keys:
    arrays["k"] = tokens.key
  arrays = {name: _to_lanes(plan, x) for name, x in arrays.items()}
  tables = () if extras.relative is None else tuple(_spread(plan, x) for x in extras.relative)
  output = _attend(arrays, tables, members, weights, plan)
  output = output.reshape(batch, plan.length, heads, -1)
  return output[:, :length, :, : tokens.value.shape[3]]


def fits(query: Any, tokens: Tokens, scores: Any, options: Routing, extras: Extras) -> str | None:
  """Why the kernels do not take a problem; None if they do."""
  if tokens.value.dtype not in (jnp.float32, jnp.bfloat16):
    return (
      "value must be float32 or bfloat16 for the TPU kernels; got "
      f'{tokens.value.dtype} (cast it, or use implementation="xla")'
    )
  if extras.memory is not None:
    return 'memory_key must be None for the TPU kernels; got an array (use implementation="xla")'
  if extras.relative is not None and _is_old():
    return (
      "relative_keys must be None on this TPU, which cannot turn every row by another number of "
      'lanes; got an array (use implementation="xla")'
    )
  if make_plan(query, tokens, scores, options, extras, False) is None:
    return (
      "query must be short enough for a head's tokens to stay in the TPU's VMEM; got "
      f'{query.shape} (use implementation="xla")'
    )
  return None


def _is_old() -> bool:
  """Whether it is compiled for a TPU older than v5."""
  return target_platform() == "tpu" and pltpu.get_tpu_info().generation < 5


def make_plan(query, tokens, scores, options, extras, interpret) -> Plan | None:
  """How the kernels would do it; None if VMEM is too small."""
  batch, length, heads, dim = query.shape
  fold, width, lanes = tpu_tuning.head_width(heads, max(dim, tokens.value.shape[3]))
  window = min(options.window_size, length)
  shared = tokens.scores is scores
  relative = extras.relative is not None
  mask = None
  if options.causal:
    mask = "triangle" if shared or options.mask == "rank" else "position"
  plan = Plan(
    batch=batch, length=round_up(length, tpu_rows.LANES), units=heads // fold, fold=fold,
    width=width, lanes=lanes, clusters=scores.shape[3], slots=0, panel=0, tile=0,
    shared_keys=shared and tokens.key is query, shared_members=shared, mask=mask,
    own_last=options.own_pair == "last_resort", zeros_seen=options.zero_values_seen,
    scale=options.scale, relative=relative, buffers=0, dtype=tokens.value.dtype,
    interpret=interpret,
  )  # fmt: skip
  return tpu_tuning.sized(plan, window)


def _by_unit(plan, x):
  """[B, H, ...] -> [B, U, fold, ...]."""
  return x.reshape(plan.batch, plan.units, plan.fold, *x.shape[2:])


def _to_lanes(plan, x):
  """[B, T, H, K] -> [B, T', U * lanes]."""
  own = plan.lanes // plan.fold
  if x.shape[3] != own:
    x = jnp.pad(x, ((0, 0),) * 3 + ((0, own - x.shape[3]),))
  return pad_length(x, tpu_rows.LANES).reshape(plan.batch, plan.length, -1)


def _spread(plan, table):
  """[2 R + 1, K] -> [offsets, lanes]: a row for every offset, clipped, for each head of a unit."""
  middle = table.shape[0] // 2
  before, behind = plan.slots - 1 - middle, plan.offsets - plan.slots - middle
  table = table[max(-before, 0) : table.shape[0] + min(behind, 0)]
  table = jnp.pad(table, ((max(before, 0), max(behind, 0)), (0, 0)), mode="edge")
  table = jnp.pad(table, ((0, 0), (0, plan.lanes // plan.fold - table.shape[1])))
  return jnp.tile(table, (1, plan.fold))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(arrays, tables, members, weights, plan):
  """Output [B, T', U * lanes]; arrays: q, v and maybe k, by name."""
  return tpu.forward(plan, members, weights, arrays, _rounded(plan, tables))


def _forward(arrays, tables, members, weights, plan):
  return _attend(arrays, tables, members, weights, plan), (arrays, tables, members, weights)


def _backward(plan, residuals, d_output):
  arrays, tables, members, weights = residuals
  tokens = dict(arrays, d=d_output)
  grads, d_tables = tpu_backward.backward(plan, members, weights, tokens, _rounded(plan, tables))
  d_tables = tuple(d.astype(x.dtype) for d, x in zip(d_tables, tables, strict=True))
  return grads, d_tables, None, None


def _rounded(plan, tables):
  return tuple(x.astype(plan.dtype) for x in tables)


_attend.defvjp(_forward, _backward)
