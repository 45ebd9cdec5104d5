"""Kinds of module variables beside `nnx.Param`."""

from flax import nnx


class Constant(nnx.Variable):
  """An array derived from the configuration alone: never trained, never saved."""
