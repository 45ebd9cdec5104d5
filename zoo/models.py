"""Models by name."""

import dataclasses
import difflib
from types import ModuleType

from flax import nnx

from ..layers import DecoderLM, LabelClassifier
from . import based, mqar, rat, routing, routing_port, softplus, transicd, transnormer

# Every module here has PRESETS (name -> frozen config), build(config, rngs) and parameter_count.
MODULES: tuple[ModuleType, ...] = (
  transnormer,
  based,
  mqar,
  rat,
  softplus,
  routing,
  routing_port,
  transicd,
)


def list_models() -> list[str]:
  """Names of all presets."""
  return [name for module in MODULES for name in module.PRESETS]


def get_config(name: str, **overrides):
  """The frozen configuration of preset `name`, with some fields replaced.

  Raises:
    ValueError: unknown name or field (the nearest one is suggested), or a field's bad value.
  """
  for module in MODULES:
    if name in module.PRESETS:
      config = module.PRESETS[name]
      fields = [field.name for field in dataclasses.fields(config)]
      for key in overrides:
        if key not in fields:
          raise ValueError(_unknown("get_config", f"field of {name}", key, fields))
      return dataclasses.replace(config, **overrides)
  raise ValueError(_unknown("get_config", "model", name, list_models()))


def family_of(config) -> str:
  """Name of the zoo module that a configuration belongs to, such as "transnormer"."""
  for module in MODULES:
    if isinstance(config, _class_of(module)):
      return module.__name__.rpartition(".")[2]
  raise TypeError(f"zoo: config must be a configuration of the zoo; got {type(config).__name__}")


def module_of(family: str) -> ModuleType:
  """The zoo module of a family."""
  modules = {module.__name__.rpartition(".")[2]: module for module in MODULES}
  if family not in modules:
    raise ValueError(_unknown("zoo", "family", family, list(modules)))
  return modules[family]


def config_class(family: str) -> type:
  """The configuration class of a family."""
  return _class_of(module_of(family))


def build(config, rngs: nnx.Rngs) -> DecoderLM | LabelClassifier:
  """The model of a configuration, with fresh weights."""
  return module_of(family_of(config)).build(config, rngs)


def create(name: str, *, rngs: nnx.Rngs, **overrides) -> DecoderLM | LabelClassifier:
  """`build(get_config(name, **overrides), rngs)`."""
  return build(get_config(name, **overrides), rngs)


def parameter_count(config) -> int:
  """Number of trained weights, from the configuration alone."""
  return module_of(family_of(config)).parameter_count(config)


def nearest(got: str, known: list[str]) -> str:
  """`did you mean 'x'?`, or the list of all names where none is near."""
  near = difflib.get_close_matches(got, known, n=1, cutoff=0.4)
  return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"


def _class_of(module: ModuleType) -> type:
  return type(next(iter(module.PRESETS.values())))


def _unknown(function: str, what: str, got: str, known: list[str]) -> str:
  return f"{function}: name must be a known {what}; got {got!r} ({nearest(got, known)})"
