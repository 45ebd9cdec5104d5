"""What the operators that are split over a device mesh share: checks, and the call itself."""

import difflib
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from .checks import fail

Mesh = jax.sharding.Mesh | jax.sharding.AbstractMesh


def axis_names(names: str | Sequence[str] | None) -> tuple[str, ...]:
  """One name, several or none, as a tuple."""
  if names is None:
    return ()
  return (names,) if isinstance(names, str) else tuple(names)


def check_mesh(
  function: str,
  mesh: Mesh,
  batch_axes: tuple[str, ...],
  head_axes: tuple[str, ...],
  sequence_axes: tuple[str, ...],
  shape: tuple[int, ...],
  *,
  last: tuple[str, str] = ("head_axes", "heads"),
) -> None:
  """Raises ValueError unless the axes exist, are used once and divide `shape`, [B, T, H, ...].

  `last`: what `head_axes` is called, and what it splits.
  """
  if mesh.empty:
    fail(function, "mesh", "be given or be in force", "None and no mesh in force",
         "pass mesh=..., or call it under jax.set_mesh")  # fmt: skip
  used = (*batch_axes, *head_axes, *sequence_axes)
  parts = (("batch_axes", "batch", batch_axes, shape[0]),
           ("sequence_axis", "length", sequence_axes, shape[1]),
           (*last, head_axes, shape[2]))  # fmt: skip
  for argument, what, axes, size in parts:
    for axis in axes:
      if axis not in mesh.axis_names:
        near = difflib.get_close_matches(axis, mesh.axis_names, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else "() leaves that axis whole"
        fail(
          function, argument, f"name axes of the mesh {tuple(mesh.axis_names)}", repr(axis), hint
        )
      if used.count(axis) > 1:
        fail(function, argument, "use each mesh axis once", repr(axis), f"all axes named: {used}")
    count = math.prod(mesh.shape[axis] for axis in axes)
    if size % count:
      fail(function, what, f"be divisible by the {count} devices along {axes}", size,
           f"pad it, or change {argument}")  # fmt: skip


def run_on_mesh(
  local: Callable, mesh: Mesh, arrays: dict[str, Any], specs: dict[str, Any], out_specs: Any
) -> Any:
  """`local(arrays)` on every device, each with its part; arrays that are None are left out."""
  given = {name: array for name, array in arrays.items() if array is not None}
  # check_vma: kernels do not declare over which mesh axes their results vary.
  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=({name: specs[name] for name in given},),
    out_specs=out_specs,
    check_vma=False,
  )(given)
