"""Reading a pickled dictionary of numpy arrays and plain values, and nothing else.

A pickle can name any function to be called, and numpy's own ones trust what they are given. So the
names that a pickled array needs stand for classes of ours here, and all other names are refused.
"""

import io
import pickle
import re
from typing import Any

import numpy as np

_NUMBERS = re.compile(r"[<>|=]?[biuf]\d+")


def read_pickled_arrays(data: bytes) -> dict[str, Any]:
  """The dictionary in a pickle, of Python 2 as well; text of values may come as bytes from there.

  Raises:
    ValueError: it is cut off, no pickle, or holds something else.
  """
  try:
    found = ArrayUnpickler(io.BytesIO(data), encoding="bytes").load()
  except ValueError:
    raise
  except Exception as error:  # bytes that are no pickle raise almost anything
    raise ValueError(f"no whole pickle of arrays ({type(error).__name__}: {error})") from error
  if not isinstance(found, dict):
    raise ValueError(f"a pickle of a {type(found).__name__}, not of a dictionary")
  names = (key.decode() if isinstance(key, bytes) else str(key) for key in found)
  values = (value.array if isinstance(value, PickledArray) else value for value in found.values())
  return dict(zip(names, values, strict=True))


class PickledArray:
  """Stands for an array until its state is read."""

  array: np.ndarray

  def __init__(self, *_):
    self.array = np.zeros(0, np.uint8)

  def __setstate__(self, state: tuple) -> None:
    _, shape, dtype, columns_first, data = state
    order = "F" if columns_first else "C"
    self.array = np.frombuffer(data, dtype.dtype).reshape(shape, order=order)


class _Dtype:
  """Stands for the type of an array's numbers."""

  dtype: np.dtype

  def __init__(self, code: str | bytes, *_):
    code = code.decode() if isinstance(code, bytes) else code
    if not _NUMBERS.fullmatch(code):
      raise ValueError(f"a pickled array of type {code!r}, which is refused: numbers only")
    self.dtype = np.dtype(code)

  def __setstate__(self, state: tuple) -> None:
    order = state[1].decode() if isinstance(state[1], bytes) else state[1]
    self.dtype = self.dtype.newbyteorder(order)


def _encode(text: str, encoding: str | bytes) -> bytes:
  """How Python 3 writes bytes in the pickle format of Python 2."""
  if encoding not in ("latin1", b"latin1"):
    raise ValueError(f"a pickle with text in {encoding!r}, which is refused")
  return text.encode("latin1")


_KNOWN = {
  ("numpy.core.multiarray", "_reconstruct"): PickledArray,
  ("numpy._core.multiarray", "_reconstruct"): PickledArray,
  ("numpy", "ndarray"): PickledArray,
  ("numpy", "dtype"): _Dtype,
  ("_codecs", "encode"): _encode,
}


class ArrayUnpickler(pickle.Unpickler):
  def find_class(self, module: str, name: str) -> Any:
    if (module, name) not in _KNOWN:
      raise ValueError(f"a pickle of {module}.{name}, which is refused: arrays only")
    return _KNOWN[module, name]

  def persistent_load(self, pid: Any) -> Any:
    raise ValueError("a pickle that refers to other files, which is refused")
