"""Reads the tensors of a `torch.save` file without PyTorch and without running code from it.

Such a file is a zip archive: `data.pkl` describes tensors as (storage, offset, shape, strides), and
each storage is a member of raw little-endian numbers. Unpickling is restricted to the handful of
names that such a description needs. Storages are not compressed, so arrays are mapped from the file
and nothing is loaded until it is used.
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
  "ShortStorage": np.int16,
  "CharStorage": np.int8,
  "ByteStorage": np.uint8,
  "BoolStorage": np.bool_,
}
# Where trainers put the state dict among other things.
_INNER = ("state_dict", "task")
# What the parts of a damaged archive or pickle raise.
_DAMAGE = (
  zipfile.BadZipFile,
  pickle.UnpicklingError,
  EOFError,
  ArithmeticError,
  AttributeError,
  LookupError,
  TypeError,
  ValueError,
)


def read_torch_file(path: str | pathlib.Path) -> dict[str, np.ndarray]:
  """The state dict of a `torch.save` file as read-only numpy arrays mapped from the file.

  The file is the state dict, or has it under "state_dict" or "task". No class is made that the file
  names: of the configurations that some trainers save, `EasyDict`s are read as plain dictionaries.

  Raises:
    ValueError: not a zip-format torch file, a damaged one, or one that holds more than plain
      tensors.
  """
  path = pathlib.Path(path)
  if not zipfile.is_zipfile(path):
    raise ValueError(
      f"import_weights: {path} must be a PyTorch file in zip format; it is not a zip archive"
      " (is the download complete? files from before PyTorch 1.6 need torch.load and torch.save)"
    )
  try:
    with zipfile.ZipFile(path) as archive:
      pickles = [name for name in archive.namelist() if name.endswith("data.pkl")]
      if len(pickles) != 1:
        raise pickle.UnpicklingError(f"it has {len(pickles)} files called data.pkl")
      root = pickles[0].removesuffix("data.pkl")
      with archive.open(pickles[0]) as stream:
        contents = _TensorUnpickler(stream, archive, path, root).load()
  except _DAMAGE as error:
    raise ValueError(
      f"import_weights: {path} must be an intact PyTorch file of plain tensors; {error}"
    ) from error
  for key in _INNER:
    contents = contents.get(key, contents) if isinstance(contents, dict) else contents
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


class _PlainDict(dict):
  """Stands for a dictionary with attributes; only its items are kept."""

  def __setstate__(self, state) -> None:
    pass


class _TensorUnpickler(pickle.Unpickler):
  def __init__(self, stream, archive: zipfile.ZipFile, path: pathlib.Path, root: str):
    super().__init__(stream)
    self._archive, self._path, self._root = archive, path, root

  def find_class(self, module: str, name: str):
    if (module, name) == ("collections", "OrderedDict"):
      return collections.OrderedDict
    if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
      return _tensor if name == "_rebuild_tensor_v2" else _parameter
    if module == "torch" and name in _DTYPES:
      return _Storage(name)
    if (module, name) == ("easydict", "EasyDict"):
      return _PlainDict
    raise pickle.UnpicklingError(
      f"it refers to {module}.{name}, which is not allowed (save the state dict alone)"
    )

  def persistent_load(self, reference):
    kind, storage, key, _, count = reference
    if kind != "storage":
      raise pickle.UnpicklingError(f"it has a persistent object of kind {kind!r}")
    member = self._archive.getinfo(f"{self._root}data/{key}")
    dtype = np.dtype(storage.dtype)
    if member.file_size < count * dtype.itemsize:
      raise pickle.UnpicklingError(
        f"storage {key} has {member.file_size} bytes for {count} numbers"
      )
    if member.compress_type != zipfile.ZIP_STORED or not count:
      return np.frombuffer(self._archive.read(member), dtype, count)
    with self._archive.open(member):  # checks the local header that precedes the numbers
      pass
    with self._path.open("rb") as header:
      header.seek(member.header_offset + 26)
      name, extra = (int.from_bytes(header.read(2), "little") for _ in range(2))
    start = member.header_offset + 30 + name + extra
    return np.memmap(self._path, dtype, mode="r", offset=start, shape=(count,))


def _tensor(storage, offset, shape, strides, *_):
  numbers = (offset, *shape, *strides)
  if not all(isinstance(n, int) and n >= 0 for n in numbers) or len(shape) != len(strides):
    raise pickle.UnpicklingError(f"a tensor has offset {offset}, shape {shape}, strides {strides}")
  last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
  if 0 not in shape and last >= len(storage):
    raise pickle.UnpicklingError(f"a tensor reaches {last}, past the {len(storage)} of its storage")
  strides = tuple(stride * storage.itemsize for stride in strides)
  return np.lib.stride_tricks.as_strided(storage[offset:], shape, strides, writeable=False)


def _parameter(tensor, *_):
  return tensor
