"""Reading and writing published checkpoints: PyTorch pickles, safetensors, plain mappings.

A model's zoo module lists its published tensors as `Slot`s; `load_slots` and `dump_slots` move the
numbers between that list and the model, and report everything that does not fit in one error.
"""

import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .torch_pickle import read_torch_file


class Slot(NamedTuple):
  """Where one published tensor lives in the model."""

  name: str
  shape: tuple[int, ...]
  path: tuple  # of the variable in the model's state
  index: tuple[int, ...]  # of the tensor within the (stacked) variable
  to_ours: Callable[[np.ndarray], np.ndarray]
  to_theirs: Callable[[np.ndarray], np.ndarray]


def read_tensors(source: str | os.PathLike | Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Name -> array from a mapping, a .safetensors or .bin file, or a folder of either.

  In a folder an index (`*.index.json`) names the shards; without one every weight file is read.

  Raises:
    FileNotFoundError: no such file, no weights in the folder, or a shard of the index is missing.
    ValueError: a file that is not what its name says.
  """
  if isinstance(source, Mapping):
    return {name: np.asarray(tensor) for name, tensor in source.items()}
  path = pathlib.Path(source)
  if not path.exists():
    raise FileNotFoundError(f"import_weights: source must exist; got {path} (no such file)")
  tensors = {}
  for file in _weight_files(path):
    tensors.update(_read_file(file))
  return tensors


def write_safetensors(path: str | os.PathLike, tensors: Mapping[str, np.ndarray]) -> None:
  """Writes one .safetensors file; the folder must exist."""
  from safetensors.flax import save_file

  arrays = {name: jnp.asarray(tensor) for name, tensor in tensors.items()}
  save_file(arrays, str(path), metadata={"format": "pt"})


def load_slots(
  model: nnx.Module, slots: Iterable[Slot], tensors: Mapping[str, np.ndarray], what: str
) -> None:
  """Overwrites the model's parameters with published tensors, in place.

  Raises:
    ValueError: lists every missing, surplus and misshapen tensor; the model is then unchanged.
  """
  slots = list(slots)
  names = {slot.name for slot in slots}
  missing = sorted(names - set(tensors))
  surplus = sorted(set(tensors) - names)
  misshapen = [
    f"{slot.name} has {tensors[slot.name].shape}, expected {slot.shape}"
    for slot in slots
    if slot.name in tensors and tensors[slot.name].shape != slot.shape
  ]
  problems = {"missing": missing, "surplus": surplus, "misshapen": misshapen}
  if any(problems.values()):
    listed = "; ".join(f"{kind}: {', '.join(items)}" for kind, items in problems.items() if items)
    raise ValueError(f"import_weights: the tensors must be those of {what}; {listed}")
  params = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
  values = {path: np.array(variable.get_value()) for path, variable in params.items()}
  for slot in slots:
    values[slot.path][slot.index] = slot.to_ours(tensors[slot.name].astype(np.float32))
  for path, variable in params.items():
    variable.set_value(jnp.asarray(values[path], variable.get_value().dtype))
  nnx.update(model, nnx.from_flat_state(params.items()))


def dump_slots(
  model: nnx.Module, slots: Iterable[Slot], dtype: str | None
) -> dict[str, np.ndarray]:
  """The published tensors of a model, in `dtype` (None: that of the parameters)."""
  params = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
  values = {path: jax.device_get(variable.get_value()) for path, variable in params.items()}
  tensors = {slot.name: slot.to_theirs(values[slot.path][slot.index]) for slot in slots}
  if dtype is not None:
    tensors = {name: tensor.astype(jnp.dtype(dtype)) for name, tensor in tensors.items()}
  return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def _weight_files(path: pathlib.Path) -> list[pathlib.Path]:
  if path.is_file() and not path.name.endswith(".index.json"):
    return [path]
  folder = path if path.is_dir() else path.parent
  indices = [path] if path.is_file() else sorted(folder.glob("*.index.json"))
  if indices:
    shards = sorted(set(json.loads(indices[0].read_text())["weight_map"].values()))
    if absent := [shard for shard in shards if not (folder / shard).exists()]:
      raise FileNotFoundError(
        f"import_weights: every shard of {indices[0].name} must be in {folder}; missing"
        f" {', '.join(absent)} (download them)"
      )
    return [folder / shard for shard in shards]
  for pattern in ("*.safetensors", "*.bin"):
    if files := sorted(folder.glob(pattern)):
      return files
  raise FileNotFoundError(
    f"import_weights: source must hold .safetensors or .bin files; got {folder} (none there)"
  )


def _read_file(file: pathlib.Path) -> dict[str, np.ndarray]:
  if file.suffix == ".safetensors":
    from safetensors import SafetensorError
    from safetensors.flax import load_file

    try:
      return {name: np.asarray(tensor) for name, tensor in load_file(str(file)).items()}
    except SafetensorError as error:
      raise ValueError(
        f"import_weights: {file} must be a safetensors file; {error} (is the download complete?)"
      ) from error
  return read_torch_file(file)
