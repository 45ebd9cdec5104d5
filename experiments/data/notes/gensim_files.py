"""Reading what gensim's `save` wrote, without gensim: its files are pickles, which may run code.

Only arrays of numbers and plain values are made; every other object is a bag for its attributes.
Large arrays are files of their own beside the pickle (`<file>.vectors.npy`).
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from attnzoo.experiments.data.array_pickle import ArrayUnpickler, PickledArray
from attnzoo.experiments.data.errors import refuse

_MAGIC = b"\x80"  # how pickles of protocol 2 and later begin


def is_pickle(path: Path) -> bool:
  with path.open("rb") as file:
    return file.read(1) == _MAGIC


class _Bag:
  """Stands for any object of gensim or numpy's random numbers; nothing of theirs is called."""

  def __init__(self, *_):
    pass

  def __setstate__(self, state: Any) -> None:
    if isinstance(state, dict):
      self.__dict__.update(state)


class _Counts(dict):
  """Stands for a defaultdict."""

  def __init__(self, *_):
    super().__init__()


# What a Word2Vec refers to besides: its counter of words, its hash function.
_KNOWN = {
  ("collections", "defaultdict"): _Counts,
  ("builtins", "int"): _Bag,
  ("builtins", "hash"): _Bag,
}


class _Unpickler(ArrayUnpickler):
  def find_class(self, module: str, name: str) -> Any:
    if module.split(".")[0] == "gensim" or module.startswith("numpy.random."):
      return _Bag
    if (module, name) in _KNOWN:
      return _KNOWN[module, name]
    return super().find_class(module, name)


def read_gensim(path: Path) -> tuple[list[str], np.ndarray]:
  """(words, vectors [V, E]) of a saved KeyedVectors or Word2Vec.

  Raises:
    DataError: the file holds something else.
  """
  found = None
  try:
    with path.open("rb") as file:
      found = _Unpickler(file, encoding="bytes").load()
  except (pickle.UnpicklingError, ValueError, KeyError, EOFError, AttributeError, TypeError,
          IndexError, MemoryError, UnicodeError, ImportError):  # fmt: skip
    pass  # refused below: what these say may quote the file
  saved = path
  if hasattr(found, "wv"):  # a whole model, whose arrays have `.wv` in their names
    found, saved = found.wv, path.with_name(f"{path.name}.wv")
  words = getattr(found, "index_to_key", None)
  vectors = getattr(found, "vectors", None)
  if isinstance(vectors, PickledArray):
    vectors = vectors.array
  if vectors is None:
    vectors = _beside(saved)
  good = isinstance(words, list) and isinstance(vectors, np.ndarray) and vectors.ndim == 2
  if not good or len(words) != len(vectors) or vectors.dtype.kind != "f":
    raise refuse("embedding", "be a KeyedVectors or Word2Vec that gensim 4 saved", str(path),
                 "save it as text with save_word2vec_format")  # fmt: skip
  return [str(word) for word in words], np.asarray(vectors, np.float32)


def _beside(saved: Path) -> np.ndarray | None:
  file = saved.with_name(f"{saved.name}.vectors.npy")
  try:
    return np.load(file, allow_pickle=False)
  except (OSError, ValueError):
    return None
