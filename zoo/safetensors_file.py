"""Reads .safetensors files as arrays that lie in the file: nothing is loaded until it is used.

A file is the length of a header (8 bytes, little-endian), the header (JSON: name -> dtype, shape,
begin and end of the data), and the data, little-endian and row by row.
"""

import json
import math
import pathlib

import ml_dtypes
import numpy as np

_DTYPES = {
  "F64": np.float64,
  "F32": np.float32,
  "F16": np.float16,
  "BF16": ml_dtypes.bfloat16,
  "I64": np.int64,
  "I32": np.int32,
  "I16": np.int16,
  "I8": np.int8,
  "U8": np.uint8,
  "BOOL": np.bool_,
}
_LARGEST_HEADER = 100 << 20


def read_safetensors(path: str | pathlib.Path) -> dict[str, np.ndarray]:
  """Name -> read-only array mapped from the file.

  Raises:
    ValueError: not a safetensors file, an incomplete one, or a dtype that weights do not have.
  """
  path = pathlib.Path(path)
  data = np.memmap(path, np.uint8, mode="r") if path.stat().st_size else np.zeros(0, np.uint8)
  try:
    size = int.from_bytes(data[:8].tobytes(), "little")
    if len(data) < 8 or size > min(_LARGEST_HEADER, len(data) - 8):
      raise ValueError(f"a header of {size} bytes in {len(data)} bytes")
    header = json.loads(data[8 : 8 + size].tobytes())
    header.pop("__metadata__", None)
    return {name: _tensor(data[8 + size :], entry) for name, entry in header.items()}
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(
      f"import_weights: {path} must be a safetensors file; {error!r} (is the download complete?)"
    ) from error


def _tensor(data: np.ndarray, entry: dict) -> np.ndarray:
  dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"])
  begin, end = entry["data_offsets"]
  if min(shape, default=0) < 0 or end - begin != math.prod(shape) * dtype.itemsize:
    raise ValueError(f"{end - begin} bytes for {dtype} of shape {shape}")
  if not 0 <= begin <= end <= len(data):
    raise ValueError(f"a tensor at {begin}..{end} of {len(data)} bytes")
  raw = data[begin:end]
  if begin % dtype.itemsize or raw.ctypes.data % dtype.itemsize:
    raw = raw.copy()  # the header may have any length
  return raw.view(dtype).reshape(shape)
