"""What layers have to say beside their output while a model is trained."""

from typing import Any, NamedTuple

from jaxtyping import Array, Float


class Note(NamedTuple):
  """Of one layer and one batch; a mixer that has one offers `with_note` beside its call."""

  loss: Float[Array, "..."]  # added to the mean loss of the targets
  sums: Any  # over the batch, of what `absorb` brings into the layer's `Tracked` variables
