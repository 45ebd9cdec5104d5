"""Kinds of module variables beside `nnx.Param`."""

from flax import nnx


class Constant(nnx.Variable):
  """An array derived from the configuration alone: never trained, never saved."""


class Tracked(nnx.Variable):
  """An array that follows the data by a rule of its module: saved, but unknown to the optimiser."""


# What a checkpoint holds.
SAVED = (nnx.Param, Tracked)
