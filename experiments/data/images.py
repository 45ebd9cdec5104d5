"""Pictures as sequences: row by row, in a row pixel by pixel, the channels of a pixel together.

A token is the value of one channel, so a picture [H, W, C] is a row of T = H W C tokens. A batch is
a dictionary of arrays [rows, T]:
  tokens   int32    the targets shifted right by one, with 0 in front
  targets  int32    all values of a picture
  weights  float32  1 everywhere, for 0 is a value as any other; 0 in rows that fill up a batch
Loss in nats per target / ln 2 = bits per dim.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8

from attnzoo.experiments.data.cache import written_once
from attnzoo.experiments.data.config import IMAGE_SOURCES, DataConfig
from attnzoo.experiments.data.documents import digest, place, threshold
from attnzoo.experiments.data.errors import refuse
from attnzoo.experiments.data.image_formats import ImageSource, guess_images, open_images
from attnzoo.experiments.data.pipeline import Batch, OrderedRows, ShuffledRows

_LAYOUT = 1  # raise it when other tokens come of the same files
# Files of more than this are written once as plain arrays and mapped from there.
_LARGE_BYTES = 1 << 30

Shape = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class ImageSplit:
  """Some of the pictures that were read together."""

  values: UInt8[np.ndarray, "N T"]
  chosen: Int[np.ndarray, "n"]  # rows of `values`

  def __len__(self) -> int:
    return len(self.chosen)

  def __getitem__(self, numbers) -> UInt8[np.ndarray, "*n T"]:
    return self.values[self.chosen[numbers]]


@dataclasses.dataclass(frozen=True)
class ImageSet:
  """All splits. Takes the place of a `Corpus`: there is no tokenizer and no end id."""

  name: str
  splits: Mapping[str, ImageSplit]
  shape: Shape  # height, width, channels
  vocab_size: int  # levels of a channel
  fingerprint: str  # of the files and the split; stored with the position in the data
  note: str = ""  # what figures measured on these pictures must say
  tokenizer: None = None
  end_id: None = None

  @property
  def dims(self) -> int:
    """Values of a picture: T."""
    return int(np.prod(self.shape))

  def as_images(self, values: np.ndarray) -> np.ndarray:
    """Sequences [N, T] as pictures [N, H, W, C]."""
    return values.reshape(-1, *self.shape)

  def describe(self) -> str:
    """One line a split."""
    size = " x ".join(map(str, self.shape))
    first = f"data {self.name}, {size} = {self.dims:,} values of {self.vocab_size} levels"
    lines = [f"{first} ({self.note})" if self.note else first]
    lines += [f"  {name}: {len(split):,} pictures" for name, split in self.splits.items()]
    return "\n".join(lines)


def image_kind(config: DataConfig) -> str | None:
  """The format of pictures that the config means; None if it means something else."""
  if config.source in IMAGE_SOURCES:
    return config.source
  path = Path(config.path).expanduser()
  return guess_images(path) if config.source == "auto" and config.path and path.is_dir() else None


def load_images(config: DataConfig, cache: str | Path | None = None) -> ImageSet:
  """Reads what the config names.

  Where the format has no validation split, pictures of the training split are held out by their
  hash: equal ones stay together, and which side one falls on depends on no other.

  Args:
    config: source; `sequence_length` is 0 or that of a picture.
    cache: folder for large sets unless `config.cache` names one; None keeps all in memory.

  Raises:
    DataError: a file is missing or of another form, a split is empty, the length is another one.
  """
  source = open_images(image_kind(config), config.path)
  cache = config.cache or cache
  if cache and source.size > _LARGE_BYTES:
    entry = Path(cache).expanduser() / digest(_LAYOUT, source.content)[:32]
    values, shape = _mapped(source, entry)
  else:
    values, shape = _in_memory(source)
  splits = {name: ImageSplit(rows, np.arange(len(rows))) for name, rows in values.items()}
  key = digest(_LAYOUT, source.content)
  if "validation" not in splits:
    key = digest(key, config.validation_fraction)
    splits |= _hold_out(values["train"], config.validation_fraction)
  images = ImageSet(source.name, splits, shape, source.levels, key, source.note)
  if config.sequence_length not in (0, images.dims):
    raise refuse("sequence_length", f"be 0 or {images.dims}, the values of a picture of {shape}",
                 config.sequence_length, "each picture is a row of its own")  # fmt: skip
  return images


def _hold_out(values: np.ndarray, fraction: float) -> dict[str, ImageSplit]:
  places = np.array([place(picture.tobytes()) for picture in values])
  held = places < threshold(places.min(), places.max(), fraction)
  parts = {"train": np.flatnonzero(~held), "validation": np.flatnonzero(held)}
  for name, chosen in parts.items():
    if not len(chosen):
      raise refuse("path", f"leave a non-empty {name} split", f"{len(values)} pictures, all alike",
                   "give more pictures, or another validation_fraction")  # fmt: skip
  return {name: ImageSplit(values, chosen) for name, chosen in parts.items()}


def _in_memory(source: ImageSource) -> tuple[dict[str, np.ndarray], Shape]:
  images = {name: np.concatenate(list(blocks())) for name, blocks in source.splits.items()}
  shape = images["train"].shape[1:]
  for name, split in images.items():
    _check_shape(name, split.shape[1:], shape, source)
  return {name: split.reshape(len(split), -1) for name, split in images.items()}, shape


def _mapped(source: ImageSource, entry: Path) -> tuple[dict[str, np.ndarray], Shape]:
  """Maps the entry of the cache, which is written first where it is not there."""

  def write(folder: Path) -> None:
    meta = {}
    for name, blocks in source.splits.items():
      with (folder / f"{name}.values").open("wb") as file:
        count = 0
        for images in blocks():
          meta.setdefault("shape", list(images.shape[1:]))
          _check_shape(name, images.shape[1:], tuple(meta["shape"]), source)
          file.write(images.tobytes())
          count += len(images)
      meta[name] = count
    (folder / "meta.json").write_text(json.dumps(meta))

  meta = json.loads((written_once(entry, write) / "meta.json").read_text())
  shape = tuple(meta.pop("shape"))
  values = {}
  for name, count in meta.items():
    file = entry / f"{name}.values"
    found, needed = file.stat().st_size if file.is_file() else -1, count * int(np.prod(shape))
    if found != needed:
      raise refuse("cache", f"hold {needed:,} bytes in {file.name}", f"{found:,} in {entry}",
                   "delete that folder, it is written again")  # fmt: skip
    values[name] = np.memmap(file, np.uint8, mode="r").reshape(count, -1)
  return values, shape


def _check_shape(split: str, shape: tuple[int, ...], first: tuple[int, ...], source) -> None:
  if shape != first:
    raise refuse("path", f"hold pictures of one shape, {first} as in the training split",
                 f"{shape} in the {split} split of {source.name}", "scale them")  # fmt: skip


class _Rows:
  """The rows of a split, by number."""

  def __init__(self, split: ImageSplit):
    self._split = split

  def __len__(self) -> int:
    return len(self._split)

  def __call__(self, number: int, epoch: int = 0) -> Batch:
    """The arrays [T] of a row; an empty row behind the last one."""
    del epoch  # every epoch has the same pictures
    filled = number < len(self)
    targets = np.zeros(self._split.values.shape[1], np.int32)
    if filled:
      targets[:] = self._split[number]
    tokens = np.concatenate([np.zeros(1, np.int32), targets[:-1]])
    weights = np.full(len(targets), filled, np.float32)
    return dict(tokens=tokens, targets=targets, weights=weights)


class ImageBatches(ShuffledRows):
  """Endless training batches; every epoch has all pictures once, in an order of its own."""

  def __init__(
    self, images: ImageSet, config: DataConfig, *, process_index: int = 0, process_count: int = 1
  ):
    rows = _Rows(images.splits["train"])
    config = dataclasses.replace(config, sequence_length=images.dims)
    super().__init__(
      len(rows), rows, config, corpus=images.fingerprint,
      process_index=process_index, process_count=process_count,
    )  # fmt: skip


class ImageEvaluation(OrderedRows):
  """One pass over a split in order, with the interface of `pipeline.EvaluationBatches`."""

  def __init__(self, images: ImageSet, config: DataConfig, **options):
    config = dataclasses.replace(config, sequence_length=images.dims)
    super().__init__(images.splits, _Rows, config, **options)
