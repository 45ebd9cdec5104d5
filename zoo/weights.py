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

from .safetensors_file import read_safetensors
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
  Arrays of files are mapped: they take no memory of their own until they are used.

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


def load_slots[Model: nnx.Module](
  build: Callable[[], Model],
  slots: Iterable[Slot],
  tensors: Mapping[str, np.ndarray],
  what: str,
) -> Model:
  """The model of `build` with published tensors as its parameters.

  Fresh weights are never drawn. Needs memory for the parameters in their own dtype, once, and while
  it works for the largest one (all layers of one kind of matrix) a second time.

  Raises:
    ValueError: lists every missing, surplus and misshapen tensor.
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
  graph, template, _ = nnx.split(nnx.eval_shape(build), nnx.Param, ...)
  constants = jax.jit(lambda: nnx.split(build(), nnx.Param, ...)[2])()
  sources: dict[tuple, list[Slot]] = {}
  for slot in slots:
    sources.setdefault(slot.path, []).append(slot)
  flat = [
    (path, variable.replace(_filled(variable.get_value(), sources[path], tensors)))
    for path, variable in nnx.to_flat_state(template)
  ]
  return nnx.merge(graph, nnx.from_flat_state(flat), constants)


def _filled(
  like: jax.ShapeDtypeStruct, slots: list[Slot], tensors: Mapping[str, np.ndarray]
) -> jax.Array:
  """One parameter, put together from the published tensors that it stacks."""
  value = np.empty(like.shape, like.dtype)
  depth = 1 if slots[0].index == () else like.shape[0]
  if len({slot.index for slot in slots}) != depth:
    raise RuntimeError(f"{slots[0].path} has {depth} layers, but {len(slots)} published tensors")
  for slot in slots:
    value[slot.index] = slot.to_ours(tensors[slot.name]).astype(like.dtype)
  return jnp.asarray(value)


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
    try:
      shards = sorted(set(json.loads(indices[0].read_text())["weight_map"].values()))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
      raise ValueError(
        f"import_weights: {indices[0]} must map names to shards; {error!r} (download it again)"
      ) from error
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
  return read_safetensors(file) if file.suffix == ".safetensors" else read_torch_file(file)
