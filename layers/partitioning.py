"""From logical axis names to a device mesh.

Every parameter carries the names of its axes; a rule table says which mesh axis each is split over.
Meshes have some of the axes "data" (batch, and parameters in the FSDP manner), "seq" (length) and
"model" (heads, feed-forward width, vocabulary).
"""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

MESH_AXES = ("data", "seq", "model")

# Where each axis of a parameter goes.
PARAMETER_RULES = {"embed": "data", "heads": "model", "mlp": "model", "vocab": "model"}
# Where each axis of an activation goes.
ACTIVATION_RULES = {"batch": "data", "length": "seq", "heads": "model", "mlp": "model"}


def logical(*axes: str | None) -> dict[str, Any]:
  """Metadata for a variable: `nnx.Param(value, **logical("embed", "mlp"))`."""
  return {"logical_axes": axes}


def parameter_spec(
  variable: nnx.Variable, mesh: Mesh, rules: Mapping[str, str] = PARAMETER_RULES
) -> P:
  """PartitionSpec of one variable; an axis that the mesh does not divide stays whole."""
  shape = variable.get_value().shape
  names = variable.get_metadata().get("logical_axes", ())
  names = (None,) * (len(shape) - len(names)) + tuple(names)  # stacked layers come first
  spec, used = [], set()
  for size, name in zip(shape, names, strict=True):
    axis = rules.get(name) if name else None
    if axis not in mesh.shape or axis in used or size % mesh.shape[axis]:
      axis = None
    used.add(axis)
    spec.append(axis)
  return P(*spec)


def parameter_shardings(state: nnx.State, mesh: Mesh) -> nnx.State:
  """A NamedSharding for every variable of `state`, in a tree of the same structure."""
  return jax.tree.map(
    lambda variable: variable.replace(NamedSharding(mesh, parameter_spec(variable, mesh))),
    state,
    is_leaf=lambda x: isinstance(x, nnx.Variable),
  )


def active_axes() -> dict[str, int]:
  """Our axes of the mesh in force that the compiler may still split over, with their sizes."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return {}
  types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
  return {a: mesh.shape[a] for a in MESH_AXES if a in types and types[a] != AxisType.Manual}


def operator_axes() -> dict[str, Any] | None:
  """How the sharded operators split their arrays over the mesh in force; None without a mesh."""
  axes = active_axes()
  if not axes:
    return None
  return dict(
    batch_axes=("data",) if "data" in axes else (),
    head_axes=("model",) if "model" in axes else (),
    sequence_axis="seq" if axes.get("seq", 1) > 1 else None,
  )


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Pins an activation with the given logical axes to the mesh in force, if there is one."""
  mesh_axes = active_axes()
  if not mesh_axes:
    return x
  spec = []
  for size, name in zip(x.shape, axes, strict=True):
    axis = ACTIVATION_RULES.get(name) if name else None
    spec.append(axis if axis in mesh_axes and size % mesh_axes[axis] == 0 else None)
  return jax.lax.with_sharding_constraint(x, P(*spec))
