"""Full causal attention over a device mesh: batch and heads."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Array, Float, Int

from ..mesh import Mesh
from ..sliding_window_attention.sharding import over_mesh
from .api import check_arguments, softmax_attention
from .cache import CacheState

NAME = "sharded_softmax_attention"


def sharded_softmax_attention(
  query: Float[Array, "B T H K"],
  key: Float[Array, "B T G K"],
  value: Float[Array, "B T G V"],
  *,
  mesh: Mesh | None = None,
  batch_axes: str | Sequence[str] = ("data",),
  head_axes: str | Sequence[str] = ("model",),
  sequence_axis: str | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
  lengths: Int[Array, " B"] | None = None,
  initial_state: CacheState | None = None,
  scale: float | None = None,
  implementation: str | None = None,
  interpret: Any = False,
) -> tuple[Float[Array, "B T H V"], CacheState]:
  """`softmax_attention` with the batch and the heads over mesh axes; nothing is communicated.

  Args:
    mesh: the mesh whose axes are named; None takes the one in force (`jax.set_mesh`).
    batch_axes, head_axes: mesh axes over which batch and heads are split; () splits nothing.
    sequence_axis: must be None.
    Everything else: see `softmax_attention`.

  Raises:
    ValueError: as `softmax_attention`; also for an unknown or repeated mesh axis, and for a batch
      or number of key heads that its mesh axes do not divide.
    NotImplementedError: a `sequence_axis`; an explicit `implementation` that cannot run here.
  """
  check_arguments(NAME, query, key, value, segment_ids, lengths, initial_state, implementation)
  if sequence_axis is not None:
    raise NotImplementedError(
      f"{NAME}: sequence_axis must be None; got {sequence_axis!r} (every query needs all keys; use "
      "sharded_sliding_window_attention or a linear operator, or split batch and heads)"
    )
  options = dict(scale=scale, implementation=implementation, interpret=interpret)
  arrays = dict(query=query, key=key, value=value, segment_ids=segment_ids, lengths=lengths,
                initial_state=initial_state)  # fmt: skip

  def local(inputs):
    return softmax_attention(**inputs, **options)

  return over_mesh(NAME, local, arrays, CacheState, mesh, batch_axes, head_axes, None)
