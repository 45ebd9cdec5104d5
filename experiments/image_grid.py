"""Pictures side by side in one PNG file."""

import math
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

_SMALLEST_SIDE = 64  # pixels of a picture in the file; smaller ones are shown larger
_GAP = 2
_BETWEEN = 255  # white


def grid(
  images: np.ndarray, *, levels: int = 256, columns: int | None = None
) -> UInt8[np.ndarray, "Y X C"]:
  """Pictures [N, H, W, C] of values 0..levels-1 in one, row by row, the largest value white.

  Pixels of small pictures become squares. Without `columns` the grid is as square as can be.

  Raises:
    ValueError: no pictures, another shape, or values that are no levels.
  """
  images = np.asarray(images)
  if images.ndim != 4 or not images.size or images.shape[3] not in (1, 3):
    raise ValueError(
      f"grid: images must be [N, H, W, C] with 1 or 3 channels; got {list(images.shape)} (reshape)"
    )
  if not np.issubdtype(images.dtype, np.integer) or not 0 <= images.min() <= images.max() < levels:
    raise ValueError(
      f"grid: images must hold whole numbers in [0, {levels}); got {images.dtype},"
      f" {images.min()}..{images.max()} (levels says how many there are)"
    )
  if levels < 2 or (columns is not None and columns < 1):
    raise ValueError(f"grid: levels and columns must be counts; got {levels}, {columns}")
  count, height, width, channels = images.shape
  columns = min(columns or math.ceil(math.sqrt(count)), count)
  rows = -(-count // columns)
  shade = (images.astype(np.int64) * 255 + (levels - 1) // 2) // (levels - 1)
  zoom = max(1, _SMALLEST_SIDE // max(height, width))
  shade = shade.astype(np.uint8).repeat(zoom, axis=1).repeat(zoom, axis=2)
  height, width = height * zoom, width * zoom
  down, right = height + _GAP, width + _GAP
  result = np.full((rows * down - _GAP, columns * right - _GAP, channels), _BETWEEN, np.uint8)
  for number, picture in enumerate(shade):
    y, x = number // columns * down, number % columns * right
    result[y : y + height, x : x + width] = picture
  return result


def write_grid(
  path: str | Path, images: np.ndarray, *, levels: int = 256, columns: int | None = None
) -> Path:
  """Writes `grid` of the pictures as a PNG file."""
  from PIL import Image

  pixels = grid(images, levels=levels, columns=columns)
  Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(path, format="PNG")
  return Path(path)
