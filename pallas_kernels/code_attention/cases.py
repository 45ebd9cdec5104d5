"""Named shapes of label-wise attention.

Options: `mask`: "padding" (rows end early; the second is empty), or "scattered"; `spread`: factor
of the queries, for sharper or flatter weights; `chunk_size`: labels that the portable path takes
together.
"""

from typing import Any

import numpy as np

from ..cases import Case
from .api import code_attention


def _case(name, tags, batch, length, labels, key_dim, value_dim, **options):
  sizes = dict(batch=batch, length=length, labels=labels, key_dim=key_dim, value_dim=value_dim)
  sizes |= dict(heads=1)  # documents have none; for reports that count them
  return Case(name, tags, sizes, options)


CASES = (
  _case("one_token", ("ci",), 2, 1, 1, 8, 4),
  _case("one_label", ("ci",), 2, 40, 1, 16, 24, mask="padding"),
  _case("layer_small", ("ci",), 3, 70, 50, 32, 16, mask="padding"),
  _case("scattered", ("ci",), 4, 150, 20, 24, 40, mask="scattered"),
  _case("strips", ("ci",), 2, 33, 45, 8, 12, mask="padding", chunk_size=7),
  _case("many_labels", ("ci",), 2, 130, 300, 16, 8, mask="padding"),
  _case("sharp", ("ci",), 2, 90, 30, 16, 16, mask="padding", spread=40.0),
  # The published models on MIMIC-III: the 50 most frequent codes, and all of them.
  _case("top50", ("bench", "aot"), 8, 2500, 50, 256, 128, mask="padding"),
  _case("full", ("bench", "aot"), 8, 2500, 8922, 256, 128, mask="padding"),
  _case("ragged", ("aot",), 3, 1000, 333, 100, 72, mask="scattered"),
)


def make_inputs(case: Case, dtype=np.float32, seed: int = 0) -> dict[str, np.ndarray]:
  """Keyword arguments of `operator` below for a case. Keys lie in -1..1, as behind a tanh."""
  rng = np.random.default_rng(seed)
  size, option = case.sizes, case.options
  batch, length, labels = (size[n] for n in ("batch", "length", "labels"))
  spread = option.get("spread", 2.0) / size["key_dim"] ** 0.5
  query = spread * rng.standard_normal((labels, size["key_dim"]))
  key = np.tanh(rng.standard_normal((batch, length, size["key_dim"])))
  value = rng.standard_normal((batch, length, size["value_dim"]))
  inputs = dict(query=query.astype(dtype), key=key.astype(dtype), value=value.astype(dtype))
  if option.get("mask") == "padding":
    lengths = rng.integers(1, length + 1, batch)
    lengths[:2] = (length, 0)[:batch]
    inputs["mask"] = np.arange(length) < lengths[:, None]
  elif option.get("mask") == "scattered":
    inputs["mask"] = rng.random((batch, length)) < 0.5
    inputs["mask"][1] = False
    inputs["mask"][2] = np.arange(length) >= length - 3  # real tokens at the end alone
  return inputs


def static_options(case: Case) -> dict:
  """Keyword arguments of `operator` for a case that are not arrays."""
  return {n: case.options[n] for n in ("chunk_size",) if n in case.options}


RESULTS = ("output",)


def operator(**arguments: Any) -> tuple:
  """`code_attention`, its result named by RESULTS."""
  return (code_attention(**arguments),)


def flops(case: Case, chunk_size: int, backward: bool = False) -> int:
  """Of what is computed, padding included; with `backward`, forward and backward together."""
  size = case.sizes
  k, v = size["key_dim"], size["value_dim"]
  pairs = size["batch"] * size["length"] * size["labels"]
  return pairs * (2 * (k + v) + (2 * (3 * k + 2 * v) if backward else 0))


def minimum_bytes(case: Case, dtype=np.float32, backward: bool = False) -> int:
  """Least memory traffic: every input read once, every output written once; `backward`: both."""
  size = case.sizes
  k, v = size["key_dim"], size["value_dim"]
  numbers = size["labels"] * k + size["batch"] * (size["length"] * (k + v) + size["labels"] * v)
  return np.dtype(dtype).itemsize * numbers * (3 if backward else 1)
