"""Golden files of the published implementations; tests that need one skip where it is absent."""

import json
import os
import pathlib

import numpy as np
import pytest

FOLDER = pathlib.Path(
  os.environ.get("ATTNZOO_GOLDENS", pathlib.Path(__file__).parents[3] / "shared" / "goldens")
)


def golden(name: str) -> dict[str, np.ndarray]:
  """All arrays of `<name>.npz`; skips the test where the golden files are not at hand."""
  with _load(name) as arrays:
    return {key: arrays[key] for key in arrays.files if key != "meta"}


def golden_config(name: str) -> dict:
  """The configuration that `<name>.npz` was made with."""
  with _load(name) as arrays:
    return json.loads(str(arrays["meta"]))["config"]


def _load(name):
  path = FOLDER / f"{name}.npz"
  if not path.exists():
    pytest.skip(f"golden file {path.name} is not here (set ATTNZOO_GOLDENS to its folder)")
  return np.load(path)
