"""Label-wise attention over a device mesh: batch and labels."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from ..mesh import Mesh, axis_names, check_mesh, run_on_mesh
from .api import check_arguments, code_attention

NAME = "sharded_code_attention"


def sharded_code_attention(
  query: Float[Array, "L K"],
  key: Float[Array, "B T K"],
  value: Float[Array, "B T V"],
  *,
  mesh: Mesh | None = None,
  batch_axes: str | Sequence[str] = ("data",),
  label_axes: str | Sequence[str] = ("model",),
  mask: Bool[Array, "B T"] | None = None,
  scale: float = 1.0,
  chunk_size: int | None = None,
  implementation: str | None = None,
  interpret: Any = False,
) -> Float[Array, "B L V"]:
  """`code_attention` with documents and labels over mesh axes.

  Forward nothing is communicated. Backward the gradient of the queries is summed over
  `batch_axes`, those of keys and values over `label_axes`.

  Args:
    mesh: the mesh whose axes are named; None takes the one in force (`jax.set_mesh`).
    batch_axes, label_axes: mesh axes over which batch and labels are split; () splits nothing.
    Everything else: see `code_attention`.

  Raises:
    ValueError: as `code_attention`; also for an unknown or repeated mesh axis, and for a batch or
      number of labels that its mesh axes do not divide.
    NotImplementedError: an explicit `implementation` that cannot run here.
  """
  check_arguments(NAME, query, key, value, mask, chunk_size, implementation)
  mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
  batch_axes, label_axes = axis_names(batch_axes), axis_names(label_axes)
  shape = (*key.shape[:2], query.shape[0])
  check_mesh(NAME, mesh, batch_axes, label_axes, (), shape, last=("label_axes", "labels"))
  batch, labels = batch_axes or None, label_axes or None
  tokens = PartitionSpec(batch, None, None)
  specs = dict(query=PartitionSpec(labels, None), key=tokens, value=tokens,
               mask=PartitionSpec(batch, None))  # fmt: skip
  arrays = dict(query=query, key=key, value=value, mask=mask)
  options: dict[str, Any] = dict(scale=scale, chunk_size=chunk_size, implementation=implementation,
                                 interpret=interpret)  # fmt: skip
  local = lambda inputs: code_attention(**inputs, **options)  # noqa: E731
  return run_on_mesh(local, mesh, arrays, specs, PartitionSpec(batch, labels, None))
