"""Formats of pictures: scikit-learn's digits, MNIST, CIFAR-10, ImageNet-64, folders of PNG."""

import dataclasses
import gzip
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from attnzoo.experiments.data.array_pickle import read_pickled_arrays
from attnzoo.experiments.data.documents import digest, existing, file_digest
from attnzoo.experiments.data.errors import DataError, refuse

_BYTES = 256  # levels of a channel in all formats but digits
_BLOCK = 1024  # PNG files decoded at a time
_SPLIT_FOLDER = re.compile(r"(train|validation|valid|val|test)(_\d+x\d+)?")
_GREY, _COLOUR = ("1", "L"), ("P", "RGB")  # Pillow's modes that become one or three channels
# What reading a damaged file raises.
_DAMAGED = (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile, zlib.error)

Images = UInt8[np.ndarray, "N H W C"]


@dataclasses.dataclass(frozen=True)
class ImageSource:
  """Pictures by split. `splits[name]()` starts a fresh pass over arrays of some pictures each."""

  name: str
  content: str  # sha256 of the files
  size: int  # bytes of the files
  levels: int  # values that a channel may have
  splits: Mapping[str, Callable[[], Iterator[Images]]]
  note: str = ""  # what figures measured on these pictures must say


def digits() -> ImageSource:
  """1797 handwritten digits, 8 x 8 with 17 levels, that come with scikit-learn: no download."""
  try:
    from sklearn.datasets import load_digits
  except ImportError as error:
    raise refuse("source", "have its package installed", "'digits' without `scikit-learn`",
                 "pip install scikit-learn, or name a folder of PNG files") from error  # fmt: skip
  images = load_digits().images.astype(np.uint8)[..., None]  # [1797, 8, 8, 1]
  content = digest("digits", images.tobytes())
  return ImageSource("digits", content, images.nbytes, 17, {"train": lambda: iter([images])})


def mnist(path: Path) -> ImageSource:
  """MNIST, or what is stored like it: train- and t10k-images-idx3-ubyte, also compressed (.gz)."""
  names = dict(train="train", test="t10k")
  files = {split: _mnist_file(path, name) for split, name in names.items()}
  return _source("mnist", {split: [file] for split, file in files.items()}, _idx)


def _mnist_file(folder: Path, part: str) -> Path:
  forms = [f"{part}-images{dot}idx3-ubyte{end}" for dot in "-." for end in ("", ".gz")]
  found = [folder / form for form in forms if (folder / form).is_file()]
  if not found:
    raise refuse("path", f"be a folder with {forms[0]} or {forms[1]}", folder,
                 "download the idx files of MNIST")  # fmt: skip
  return existing(found[0])


def _idx(file: Path) -> Images:
  """An idx file: 0, 0, type 8 (bytes), rank 3, three big-endian sizes, the bytes."""
  with _reading(file, "download it again"):
    data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
  header = data[:16].ljust(16, b"\0")
  count, height, width = (int.from_bytes(header[at : at + 4], "big") for at in (4, 8, 12))
  size = count * height * width
  if header[:4] != b"\0\0\x08\x03" or not size or len(data) != 16 + size:
    raise refuse("path", "name idx files of bytes with 3 axes, whole",
                 f"{file} with {len(data):,} bytes, header {header.hex()}",
                 "download it again")  # fmt: skip
  return np.frombuffer(data, np.uint8, offset=16).reshape(count, height, width, 1)


def cifar10(path: Path) -> ImageSource:
  """CIFAR-10's Python version: data_batch_1 to 5 for training, test_batch.

  The files are pickles; they are read so that nothing but arrays can come of them.
  """
  inside = path / "cifar-10-batches-py"
  folder = inside if inside.is_dir() else path
  names = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
  files = {split: [_part(folder, name, _CIFAR) for name in group] for split, group in names.items()}
  return _source("cifar10", files, _cifar)


_CIFAR = "unpack cifar-10-python.tar.gz and name its folder"


def _cifar(file: Path) -> Images:
  with _reading(file, _CIFAR):
    batch = read_pickled_arrays(file.read_bytes())
    return _planar(batch, 32)


def imagenet64(path: Path) -> ImageSource:
  """ImageNet at 64 x 64 as npz: train_data_batch_1 to 10, and val_data, which is the validation."""
  names = {"train": [f"train_data_batch_{i}.npz" for i in range(1, 11)]}
  names["validation"] = ["val_data.npz"]
  files = {split: [_part(path, name, _NPZ) for name in group] for split, group in names.items()}
  note = (
    "down-sampled with a box filter where the npz files are the published ones; bits per dim do not"
    " compare with those on the older PNG archives"
  )
  return dataclasses.replace(_source("imagenet64", files, _npz), note=note)


_NPZ = "download the npz files again; source 'images' reads folders of PNG"


def _npz(file: Path) -> Images:
  with _reading(file, _NPZ), np.load(file, allow_pickle=False) as arrays:
    return _planar(arrays, 64)


def _planar(batch: Mapping[str, Any], side: int) -> Images:
  """Rows of three planes [n, 3 side^2] with n labels, as pictures [n, side, side, 3]."""
  missing = [name for name in ("data", "labels") if name not in batch]
  if missing:
    raise ValueError(f"no {missing[0]!r} among {sorted(batch)}")
  data, labels = batch["data"], batch["labels"]
  if not isinstance(data, np.ndarray) or data.dtype != np.uint8:
    raise ValueError("data that are no uint8 array")
  if not isinstance(labels, list | np.ndarray):
    raise ValueError(f"labels of type {type(labels).__name__}")
  if data.ndim != 2 or data.shape[1] != 3 * side**2 or not len(data) == len(labels) > 0:
    raise ValueError(f"data {list(data.shape)} with {len(labels)} labels, not [n, {3 * side**2}]")
  return np.ascontiguousarray(data.reshape(-1, 3, side, side).transpose(0, 2, 3, 1))


def png_folder(path: Path) -> ImageSource:
  """PNG files of one size, 8 bits deep, grey or coloured, anywhere below a folder.

  Folders named train, validation (valid, val) and test, also with a size behind (`train_64x64`),
  are the splits.
  """
  folders = _split_folders(path)
  if folders and "train" not in folders:
    raise refuse("path", "hold a folder 'train' beside its other splits",
                 f"{path} with {sorted(folder.name for folder in folders.values())}",
                 "name the folder above, or a folder without splits")  # fmt: skip
  files = {split: _pngs(folder) for split, folder in (folders or {"train": path}).items()}
  first, _ = _png(files["train"][0])

  def blocks(group: Sequence[Path]) -> Iterator[Images]:
    for start in range(0, len(group), _BLOCK):
      yield np.stack([_like(first, files["train"][0], file) for file in group[start:][:_BLOCK]])

  readers = {split: (lambda group=group: blocks(group)) for split, group in files.items()}
  everything = [file for group in files.values() for file in group]
  note = "how they were scaled is not known" if first.shape[:2] in ((32, 32), (64, 64)) else ""
  return dataclasses.replace(_source("images", files, None), splits=readers, note=note,
                             size=sum(file.stat().st_size for file in everything))  # fmt: skip


def _split_folders(path: Path) -> dict[str, Path]:
  names = dict(valid="validation", val="validation")
  found = {}
  for folder in sorted(path.iterdir()) if path.is_dir() else ():
    match = _SPLIT_FOLDER.fullmatch(folder.name)
    if match and folder.is_dir():
      split = names.get(match[1], match[1])
      if split in found:
        raise refuse("path", f"hold one folder for the {split} split",
                     f"{found[split]} and {folder}", "name a folder with one size")  # fmt: skip
      found[split] = folder
  return found


def _pngs(folder: Path) -> list[Path]:
  files = [file for file in sorted(folder.rglob("*")) if file.suffix.lower() == ".png"]
  if not files:
    raise refuse("path", "hold PNG files", f"{folder} without any", "other formats: convert them")
  return files


def _like(first: np.ndarray, first_file: Path, file: Path) -> UInt8[np.ndarray, "H W C"]:
  image, mode = _png(file)
  if image.shape != first.shape:
    raise refuse("path", f"hold pictures of one shape, {list(first.shape)} as {first_file.name}",
                 f"{file} of {list(image.shape)} ({mode})", "scale or convert it")  # fmt: skip
  return image


def _png(file: Path) -> tuple[UInt8[np.ndarray, "H W C"], str]:
  """(pixels, Pillow's name of how they are stored)."""
  from PIL import Image

  with _reading(file, "remove or repair it"), Image.open(file, formats=["PNG"]) as image:
    mode = image.mode
    if mode not in (*_GREY, *_COLOUR) or "transparency" in image.info:
      raise ValueError(f"mode {mode}: only 8 bits, grey or coloured, and opaque")
    pixels = np.asarray(image.convert("L" if mode in _GREY else "RGB"))
  return pixels.reshape(*pixels.shape[:2], -1), mode


def _part(folder: Path, name: str, remedy: str) -> Path:
  if not (folder / name).is_file():
    raise refuse("path", f"be a folder with {name}", folder, remedy)
  return existing(folder / name)


def _source(name: str, files: Mapping[str, Sequence[Path]], read) -> ImageSource:
  """Each file is one array of pictures, read when it is asked for."""
  everything = [file for group in files.values() for file in group]
  content = digest(name, *(f"{split} {len(group)}" for split, group in files.items()),
                   *(file_digest(file) for file in everything))  # fmt: skip
  size = sum(file.stat().st_size for file in everything)
  splits = {split: (lambda group=group: map(read, group)) for split, group in files.items()}
  return ImageSource(name, content, size, _BYTES, splits)


class _reading:
  """Turns what a damaged file raises into an error that names the file and the remedy."""

  def __init__(self, file: Path, remedy: str):
    self._file, self._remedy = file, remedy

  def __enter__(self):
    return self

  def __exit__(self, kind, error, traceback):
    if isinstance(error, _DAMAGED) and not isinstance(error, DataError):
      raise refuse("path", "name files that can be read", f"{self._file}: {error or kind.__name__}",
                   self._remedy) from error  # fmt: skip


def guess_images(folder: Path) -> str | None:
  """The source that can read this folder, told by the names in it; None if it holds no pictures."""
  if (folder / "data_batch_1").is_file() or (folder / "cifar-10-batches-py").is_dir():
    return "cifar10"
  if (folder / "train_data_batch_1.npz").is_file():
    return "imagenet64"
  if any(folder.glob("train-images*idx3-ubyte*")):
    return "mnist"
  places = list(_split_folders(folder).values()) or [folder]
  return "images" if all(_only_pngs(place) for place in places) else None


def _only_pngs(folder: Path) -> bool:
  """A folder of texts may hold some pictures, too."""
  endings = {entry.suffix.lower() for entry in folder.iterdir()}
  return endings == {".png"}


def open_images(kind: str, path: str) -> ImageSource:
  """Opens the source `kind`; raises DataError where files are missing or of another form."""
  if kind == "digits":
    return digits()
  readers = dict(mnist=mnist, cifar10=cifar10, imagenet64=imagenet64, images=png_folder)
  return readers[kind](existing(path))
