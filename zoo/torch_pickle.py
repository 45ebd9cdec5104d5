"""Reads the tensors of a `torch.save` file without PyTorch and without running code from it.

Such a file is a zip archive: `data.pkl` describes tensors as (storage, offset, shape, strides), and
each storage is a member of raw little-endian numbers. Unpickling is restricted to the handful of
names that such a description needs.
"""

import collections
import pathlib
import pickle
import zipfile

import ml_dtypes
import numpy as np

_DTYPES = {
  "FloatStorage": np.float32,
  "DoubleStorage": np.float64,
  "HalfStorage": np.float16,
  "BFloat16Storage": ml_dtypes.bfloat16,
  "LongStorage": np.int64,
  "IntStorage": np.int32,
  "BoolStorage": np.bool_,
}


def read_torch_file(path: str | pathlib.Path) -> dict[str, np.ndarray]:
  """The state dict of a `torch.save` file as numpy arrays.

  Raises:
    ValueError: not a zip-format torch file, or one that holds more than plain tensors.
  """
  path = pathlib.Path(path)
  if not zipfile.is_zipfile(path):
    raise ValueError(
      f"import_weights: {path} must be a PyTorch file in zip format; it is not a zip archive"
      " (is the download complete? files from before PyTorch 1.6 need torch.load and torch.save)"
    )
  with zipfile.ZipFile(path) as archive:
    pickles = [name for name in archive.namelist() if name.endswith("data.pkl")]
    if len(pickles) != 1:
      raise ValueError(
        f"import_weights: {path} must hold one data.pkl; got {len(pickles)} (not a torch file)"
      )
    root = pickles[0].removesuffix("data.pkl")
    try:
      with archive.open(pickles[0]) as stream:
        contents = _TensorUnpickler(stream, archive, root).load()
    except pickle.UnpicklingError as error:
      raise ValueError(f"import_weights: {path} must hold plain tensors only; {error}") from error
  contents = contents.get("state_dict", contents) if isinstance(contents, dict) else contents
  if not isinstance(contents, dict) or not contents:
    raise ValueError(
      f"import_weights: {path} must hold a mapping of names to tensors; got"
      f" {type(contents).__name__} (save model.state_dict())"
    )
  return {name: tensor for name, tensor in contents.items() if isinstance(tensor, np.ndarray)}


class _Storage:
  """Stands for a class like torch.FloatStorage inside the pickle."""

  def __init__(self, name: str):
    self.dtype = _DTYPES[name]


class _TensorUnpickler(pickle.Unpickler):
  def __init__(self, stream, archive: zipfile.ZipFile, root: str):
    super().__init__(stream)
    self._archive, self._root = archive, root

  def find_class(self, module: str, name: str):
    if (module, name) == ("collections", "OrderedDict"):
      return collections.OrderedDict
    if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
      return _tensor if name == "_rebuild_tensor_v2" else _parameter
    if module == "torch" and name in _DTYPES:
      return _Storage(name)
    raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is not allowed")

  def persistent_load(self, reference):
    kind, storage, key, _, count = reference
    if kind != "storage":
      raise pickle.UnpicklingError(f"it has a persistent object of kind {kind!r}")
    raw = self._archive.read(f"{self._root}data/{key}")
    return np.frombuffer(raw, storage.dtype, count)


def _tensor(storage, offset, shape, strides, *_):
  if not shape:
    return storage[offset].copy()
  width = storage.itemsize
  strides = tuple(stride * width for stride in strides)
  view = np.lib.stride_tricks.as_strided(storage[offset:], shape, strides, writeable=False)
  return np.array(view)


def _parameter(tensor, *_):
  return tensor
