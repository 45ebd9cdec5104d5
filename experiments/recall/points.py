"""The models of the sweep: a row per kind of model, a point per size."""

from typing import Any, NamedTuple

import jax
from flax import nnx

from attnzoo import zoo
from attnzoo.zoo import models
from attnzoo.zoo.mqar import MQARConfig


class Point(NamedTuple):
  """One model."""

  series: str  # key of SERIES
  size: str
  model: Any  # a configuration of the zoo


class Series(NamedTuple):
  """One kind of model, from small to large. Any configuration of the zoo will do."""

  label: str
  sizes: dict[str, dict[str, Any]]  # name of the task -> name of the size -> configuration


def _small(mixers: tuple[str, str], features: int = 32, **sizes) -> MQARConfig:
  return MQARConfig(features, mixers, vocab_size=256, **sizes)


def _paper(mixers: tuple[str, str], features: int, **sizes) -> MQARConfig:
  return MQARConfig(features, mixers, vocab_size=8192, loss_chunk=64, **sizes)


def _taylor(make, mixers, sizes) -> dict[str, MQARConfig]:
  return {f"width {d}, f {f}": make(mixers, d, feature_dim=f) for d, f in sizes}


def _windows(make, features, windows) -> dict[str, MQARConfig]:
  return {
    f"width {features}, window {w}": make(("conv", "sliding"), features, window=w) for w in windows
  }


def _attention(make, widths) -> dict[str, MQARConfig]:
  return {f"width {d}": make(("conv", "attention"), d) for d in widths}


_BASED, _LINEAR = ("conv", "taylor"), ("taylor", "taylor")

# A further model of the zoo is one more row.
SERIES = {
  "based": Series(
    "BASED (convolution, Taylor)",
    dict(
      small=_taylor(_small, _BASED, ((16, 4), (32, 4), (32, 8), (32, 12))),
      paper=_taylor(
        _paper,
        _BASED,
        ((32, 8), (64, 8), (128, 8), (64, 16), (256, 8), (128, 16), (64, 24), (256, 16)),
      ),
    ),
  ),
  "sliding": Series(
    "sliding window (convolution, window)",
    dict(
      small=_windows(_small, 32, (16, 32, 64)),
      paper=_windows(_paper, 128, (8, 16, 32, 64, 128, 256, 512, 1024)),
    ),
  ),
  "linear": Series(
    "linear attention alone (Taylor, Taylor)",
    dict(
      small=_taylor(_small, _LINEAR, ((32, 4), (32, 8))),
      paper=_taylor(_paper, _LINEAR, ((64, 8), (64, 16), (128, 16))),
    ),
  ),
  "attention": Series(
    "full attention (convolution, attention)",
    dict(small=_attention(_small, (32,)), paper=_attention(_paper, (64, 128))),
  ),
}


def points(task: str, series: list[str]) -> list[Point]:
  """All sizes of some series, in the order of the table above.

  Raises:
    ValueError: an unknown series (the nearest one is suggested).
  """
  for name in series:
    if name not in SERIES:
      hint = models.nearest(name, list(SERIES))
      raise ValueError(f"--series must be among {', '.join(SERIES)}; got {name!r} ({hint})")
  return [
    Point(name, size, model)
    for name, row in SERIES.items()
    if name in series
    for size, model in row.sizes[task].items()
  ]


def state_bytes(model: Any, length: int) -> int:
  """Bytes that one sequence of so many tokens is remembered with.

  As the model's own module counts them (the recall models leave out the convolution, as the paper
  does), else everything in the decoder's state.
  """
  module = models.module_of(models.family_of(model))
  if hasattr(module, "state_bytes"):
    return module.state_bytes(model, length)
  state = jax.eval_shape(lambda: zoo.build(model, nnx.Rngs(0)).init_state(1, length))
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
