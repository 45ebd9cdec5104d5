"""Reading and writing published checkpoints: PyTorch pickles, safetensors, plain mappings.

A model's zoo module lists its published tensors as `Slot`s; `load_slots` and `dump_slots` move the
numbers between that list and the model, and report everything that does not fit in one error.
"""

import difflib
import json
import math
import os
import pathlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..layers.stacking import layer_places
from ..layers.variables import SAVED
from .safetensors_file import read_safetensors
from .torch_pickle import read_torch_file

Conversion = Callable[[np.ndarray], np.ndarray]


class Slot(NamedTuple):
  """Where one published tensor, or some rows of it, lives in the model.

  A tensor that several variables share has a slot for each, in the order of its rows.
  """

  name: str
  shape: tuple[int, ...]
  path: tuple  # of the variable in the model's state
  index: tuple[int, ...]  # of the tensor within the (stacked) variable
  to_ours: Conversion
  to_theirs: Conversion
  rows: slice = slice(None)  # of the published tensor


def read_tensors(source: str | os.PathLike | Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Name -> array from a mapping, a .safetensors, .bin or .pth file, or a folder of the first two.

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


def find_preset(name: str, family: ModuleType) -> Any:
  """The configuration of a preset of a zoo module, if checkpoints of it can be imported."""
  unpublished = getattr(family, "NO_IMPORT", {})
  if name in unpublished:
    raise ValueError(f"import_weights: {name!r} cannot be imported: {unpublished[name]}")
  if name not in family.PRESETS:
    near = difflib.get_close_matches(name, family.PRESETS, n=1, cutoff=0.0)
    raise ValueError(
      f"import_weights: config must be a preset; got {name!r} (did you mean {near[0]!r}?)"
    )
  return family.PRESETS[name]


def read_config_json(
  source: str | os.PathLike | Mapping, required: Sequence[str] = ()
) -> tuple[pathlib.Path, dict[str, Any]]:
  """(path, contents) of the `config.json` beside a checkpoint, which must have some fields."""
  if isinstance(source, Mapping):
    raise ValueError(
      "import_weights: config must be given for a mapping of arrays; got None (the name of a"
      " preset, or a configuration)"
    )
  path = pathlib.Path(source)
  if not path.exists():
    raise FileNotFoundError(f"import_weights: source must exist; got {path} (no such file)")
  file = (path if path.is_dir() else path.parent) / "config.json"
  if not file.exists():
    raise FileNotFoundError(
      f"import_weights: {file} must exist when no config is given (pass a preset name as config)"
    )
  try:
    raw = dict(json.loads(file.read_text()))
  except (ValueError, TypeError) as error:
    raise ValueError(
      f"import_weights: {file} must be a JSON object; {error} (download it again)"
    ) from error
  if absent := [name for name in required if name not in raw]:
    raise ValueError(f"import_weights: {file} must have the fields {', '.join(absent)}")
  return file, raw


def check_config_json(
  file: pathlib.Path, raw: Mapping[str, Any], only: Mapping[str, tuple], reason: str
) -> None:
  """Raises ValueError for a field of `config.json` that has none of the values it must have."""
  for name, good in only.items():
    if name in raw and raw[name] not in good:
      raise ValueError(
        f"import_weights: {name} of {file} must be {good[0]}; got {raw[name]!r} ({reason})"
      )


def activation_in(
  file: pathlib.Path, raw: Mapping[str, Any], known: Mapping[str, str], default: str, reason: str
) -> str:
  """Our name of the `activation_function` in `config.json`; ValueError for an unknown one."""
  name = raw.get("activation_function", default)
  if name not in known:
    raise ValueError(
      f"import_weights: activation_function of {file} must be one of {list(known)}; got"
      f" {name!r} ({reason})"
    )
  return known[name]


def without_head_copy(
  tensors: Mapping[str, np.ndarray], embedding: str, head: str = "lm_head.weight"
) -> dict[str, np.ndarray]:
  """Drops the tensor called `head`, which must be the one called `embedding`."""
  tensors = dict(tensors)
  copy, table = tensors.pop(head, None), tensors.get(embedding)
  if copy is not None and table is not None and not np.array_equal(copy, table):
    raise ValueError(
      f"import_weights: {head} must equal {embedding}; it differs (the model ties them)"
    )
  return tensors


def into_heads(heads: int, parts: int | None = None) -> tuple[Conversion, Conversion]:
  """(to ours, to theirs) of a projection to heads.

  Published [parts heads K, D], part after part and head after head; ours [parts, D, heads, K], or
  without the first axis where `parts` is None.
  """
  lead = () if parts is None else (parts,)
  return (
    lambda w: np.moveaxis(w.reshape(*lead, heads, -1, w.shape[-1]), -1, -3),
    lambda w: np.moveaxis(w, -3, -1).reshape(-1, w.shape[-3]),
  )


def from_heads(heads: int) -> tuple[Conversion, Conversion]:
  """(to ours, to theirs) of the projection back: published [D, heads V], ours [heads, V, D]."""
  return (
    lambda w: w.T.reshape(heads, -1, w.shape[0]),
    lambda w: w.reshape(-1, w.shape[-1]).T,
  )


def layer_paths(structures: Sequence[Hashable]) -> list[tuple[tuple[str | int, ...], int]]:
  """(path of the stacked block, index in it) of each layer; equal structures are stacked."""
  return [(("groups", place.group, place.block), place.index) for place in layer_places(structures)]


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
    f"{name} has {tensors[name].shape}, expected {shape}"
    for name, shape in {slot.name: slot.shape for slot in slots}.items()
    if name in tensors and tensors[name].shape != shape
  ]
  problems = {"missing": missing, "surplus": surplus, "misshapen": misshapen}
  if any(problems.values()):
    listed = "; ".join(f"{kind}: {', '.join(items)}" for kind, items in problems.items() if items)
    raise ValueError(f"import_weights: the tensors must be those of {what}; {listed}")
  graph, template, _ = nnx.split(nnx.eval_shape(build), SAVED, ...)
  constants = jax.jit(lambda: nnx.split(build(), SAVED, ...)[2])()
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
  count = math.prod(like.shape[: len(slots[0].index)])
  if len({slot.index for slot in slots}) != count:
    raise RuntimeError(f"{slots[0].path} has {count} parts, but {len(slots)} published tensors")
  for slot in slots:
    value[slot.index] = slot.to_ours(tensors[slot.name][slot.rows]).astype(like.dtype)
  return jnp.asarray(value)


def write_exported(
  path: str | os.PathLike | None, tensors: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
  """The tensors themselves, after they were written to `path` if there is one."""
  if path is not None:
    if pathlib.Path(path).suffix != ".safetensors":
      raise ValueError(f"export_weights: path must end in .safetensors; got {path} (one file)")
    write_safetensors(path, tensors)
  return tensors


def dump_slots(
  model: nnx.Module, slots: Iterable[Slot], dtype: str | None
) -> dict[str, np.ndarray]:
  """The published tensors of a model, in `dtype` (None: that of the parameters)."""
  params = dict(nnx.to_flat_state(nnx.state(model, SAVED)))
  values = {path: jax.device_get(variable.get_value()) for path, variable in params.items()}
  parts: dict[str, list[np.ndarray]] = {}
  for slot in slots:
    parts.setdefault(slot.name, []).append(slot.to_theirs(values[slot.path][slot.index]))
  tensors = {name: np.concatenate(rows) if rows[1:] else rows[0] for name, rows in parts.items()}
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
    f"import_weights: source must hold .safetensors or .bin files; got {folder} (none there; of"
    " .pth files, each a model of its own, name one)"
  )


def _read_file(file: pathlib.Path) -> dict[str, np.ndarray]:
  return read_safetensors(file) if file.suffix == ".safetensors" else read_torch_file(file)
