"""What a byte-level language model is measured against on the same bytes: xz and n-gram models.

`python -m attnzoo.experiments.baselines --path=FOLDER` prints the table for a corpus of
`experiments/data` (without --path: the Python standard library).
"""

import lzma
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from absl import app, flags
from jaxtyping import Float, Int, UInt64

from attnzoo.experiments.data import DataConfig, DataError, read_text

_LARGEST_ORDER = 7  # context and byte packed into 64 bits


class _Counts(NamedTuple):
  """Counts of one order k: n-grams are packed big-endian into integers, contexts likewise."""

  grams: UInt64[np.ndarray, "g"]  # sorted, context and next byte
  seen: Int[np.ndarray, "g"]  # occurrences of each
  contexts: UInt64[np.ndarray, "c"]  # sorted
  total: Int[np.ndarray, "c"]  # occurrences of the context with a next byte
  types: Int[np.ndarray, "c"]  # distinct next bytes


class ByteNgram:
  """Witten-Bell interpolated model of bytes; all orders from 0 up share their counts.

    P_k(b | c) = (n(c b) + t(c) P_{k-1}(b | c')) / (n(c) + t(c)),   P_{-1} = 1 / 256

  c: the k bytes before b, c': without its first one; n: counts in the training text, t(c): number
  of distinct bytes seen after c. A context never seen leaves P_{k-1}.
  """

  def __init__(self, train: bytes, order: int):
    if not 0 <= order <= _LARGEST_ORDER:
      raise ValueError(f"ByteNgram: order must lie in 0..{_LARGEST_ORDER}; got {order} (try 3)")
    if len(train) <= order:
      raise ValueError(
        f"ByteNgram: train must be longer than the order {order}; got {len(train)} bytes (no text?)"
      )
    self.order = order
    self._counts = [_count(_pack(train, k)) for k in range(order + 1)]

  def probability(self, data: bytes, order: int | None = None) -> Float[np.ndarray, "n"]:
    """P of each byte of data given those before it, float64; the first ones have less context."""
    order = self.order if order is None else order
    if not 0 <= order <= self.order:
      raise ValueError(f"probability: order must lie in 0..{self.order}; got {order} (as counted)")
    result = np.full(len(data), 1 / 256)
    for k in range(min(order, len(data) - 1) + 1):
      counts = self._counts[k]
      grams = _pack(data, k)  # [n - k]
      seen = _look_up(counts.grams, counts.seen, grams)
      total = _look_up(counts.contexts, counts.total, grams >> np.uint64(8))
      types = _look_up(counts.contexts, counts.types, grams >> np.uint64(8))
      lower = result[k:]
      known = total > 0
      mixed = (seen + types * lower) / np.where(known, total + types, 1)
      result[k:] = np.where(known, mixed, lower)
    return result

  def bits_per_byte(self, data: bytes, order: int | None = None) -> float:
    if not data:
      raise ValueError("bits_per_byte: data must hold text; got 0 bytes (empty split?)")
    return float(-np.mean(np.log2(self.probability(data, order))))


def ngram_bits_per_byte(train: bytes, validation: bytes, order: int) -> float:
  """Bits per byte of `validation` under the order-n Witten-Bell model of `train`."""
  return ByteNgram(train, order).bits_per_byte(validation)


def xz_bits_per_byte(train: bytes, validation: bytes, *, after_train: bool = False) -> float:
  """Size of `validation` under `xz -9 --extreme`, in bits per byte.

  Alone, as a file of its own (the training text is then not used), or with `after_train` as what
  it adds to the compressed training text: how well a compressor does that has read it, too, as far
  as the 64 MiB window of xz reaches back.
  """
  if not validation:
    raise ValueError("xz_bits_per_byte: validation must hold text; got 0 bytes (empty split?)")
  size = _xz_size(train + validation) - _xz_size(train) if after_train else _xz_size(validation)
  return 8 * size / len(validation)


def baselines(
  train: bytes, validation: bytes, *, orders: Sequence[int] = (2, 3), xz_after_train: bool = False
) -> dict[str, float]:
  """Name of the baseline -> bits per byte of `validation`."""
  result = {"xz -9e": xz_bits_per_byte(train, validation)}
  if xz_after_train:
    result["xz -9e after train"] = xz_bits_per_byte(train, validation, after_train=True)
  model = ByteNgram(train, max(orders))
  for order in orders:
    result[f"order-{order} bytes"] = model.bits_per_byte(validation, order)
  return result


def format_table(figures: dict[str, float], validation_bytes: int) -> str:
  width = max(map(len, figures))
  lines = [f"{name:<{width}}  {value:6.3f} bits per byte" for name, value in figures.items()]
  return "\n".join([f"baselines on {validation_bytes:,} held-out bytes", *lines])


def print_baselines(train: bytes, validation: bytes, **options) -> dict[str, float]:
  """Computes the baselines, prints them as a table and returns them."""
  figures = baselines(train, validation, **options)
  print(format_table(figures, len(validation)))
  return figures


def _xz_size(data: bytes) -> int:
  return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))


def _pack(data: bytes, k: int) -> UInt64[np.ndarray, "n_minus_k"]:
  """Every run of k + 1 bytes as one integer, the context in the upper bytes."""
  values = np.frombuffer(data, np.uint8)
  count = max(0, len(values) - k)
  packed = np.zeros(count, np.uint64)
  for offset in range(k + 1):
    packed = (packed << np.uint64(8)) | values[offset : offset + count]
  return packed


def _count(grams: UInt64[np.ndarray, "n"]) -> _Counts:
  narrow = grams.astype(np.uint32) if grams.max() < 1 << 32 else grams  # sorts twice as fast
  distinct, seen = np.unique(narrow, return_counts=True)
  distinct = distinct.astype(np.uint64)
  context = distinct >> np.uint64(8)
  starts = np.flatnonzero(
    np.diff(context, prepend=context[:1] + np.uint64(1))
  )  # first gram of each
  types = np.diff(starts, append=len(context))
  return _Counts(distinct, seen, context[starts], np.add.reduceat(seen, starts), types)


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
  """values[keys == wanted], 0 where there is none; keys are sorted."""
  at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
  return np.where(keys[at] == wanted, values[at], 0)


def main(_) -> None:
  options = flags.FLAGS
  try:
    config = DataConfig(path=options.path)
    train, validation = read_text(config, "train"), read_text(config, "validation")
  except DataError as error:
    raise SystemExit(f"error: {error}") from error
  orders = [int(order) for order in options.orders]
  print_baselines(train, validation, orders=orders, xz_after_train=options.xz_after_train)


if __name__ == "__main__":  # flags are global: none are defined for those who import the functions
  flags.DEFINE_string("path", "", "text file or folder; empty = the standard library")
  flags.DEFINE_list("orders", ["2", "3"], "orders of the n-gram models")
  flags.DEFINE_bool("xz_after_train", False, "also xz with the training text before it")
  app.run(main)
