"""The record of one experiment, validated before any work starts.

A file in `experiments/configs` builds an `Experiment` and hands it to the command line as an
`ml_collections.ConfigDict`; flags like `--config.train.steps=100` change it there, and
`from_config_dict` turns it back into frozen, checked dataclasses.
"""

import dataclasses
import json
import types
import typing
from typing import Any

import ml_collections
from ml_collections import config_dict

from attnzoo.experiments.data import NOTE_SOURCES, DataConfig
from attnzoo.zoo import models

SCHEDULES = ("cosine", "linear", "warmup_stable_decay", "constant", "inverse_sqrt")
DECAYED = ("matrices", "weights", "all_but_biases", "everything")
OPTIMIZERS = ("adamw", "muon", "adafactor")
CRITERIA = ("loss", "micro_f1", "macro_f1", "micro_auc", "p_at_5")  # to choose checkpoints by

_LARGEST_L2 = 1e-3  # what AdamW takes as weight decay would drown the gradient as part of the loss


def _fail(owner: str, name: str, rule: str, got: Any, hint: str):
  raise ValueError(f"{owner}: {name} must {rule}; got {got!r} ({hint})")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """Gradient steps."""

  name: str = "adamw"  # "adafactor", or "muon": orthogonal steps for matrices, AdamW for the rest
  learning_rate: float = 6e-4  # peak
  final_fraction: float = 0.1  # of the peak, at the last step
  schedule: str = "cosine"
  warmup_steps: int = 100
  warmup_fraction: float = 0.0  # of the steps; above 0 it takes the place of warmup_steps
  decay_fraction: float = 0.2  # of the steps, for "warmup_stable_decay"
  hold_steps: int = 10_000  # at the peak, warm-up included, for "inverse_sqrt"
  weight_decay: float = 0.1
  decayed: str = "matrices"  # or one of DECAYED (not for muon); weights: without embedding and head
  beta1: float = 0.9
  beta2: float = 0.95
  clip_norm: float = 1.0  # of the whole gradient; 0 = no clipping
  z_loss: float = 0.0  # weight of log(sum of exp(logits))^2

  def __post_init__(self):
    if self.name not in OPTIMIZERS:
      _fail("OptimizerConfig", "name", f"be one of {OPTIMIZERS}", self.name, "see optimizers.py")
    if self.schedule not in SCHEDULES:
      _fail("OptimizerConfig", "schedule", f"be one of {SCHEDULES}", self.schedule, "after warm-up")
    if self.learning_rate <= 0:
      _fail("OptimizerConfig", "learning_rate", "be positive", self.learning_rate, "try 6e-4")
    if self.decayed not in DECAYED:
      _fail("OptimizerConfig", "decayed", f"be one of {DECAYED}", self.decayed, "by weight_decay")
    if self.decayed != "matrices" and self.name == "muon":
      _fail("OptimizerConfig", "decayed", "be 'matrices' for muon", self.decayed, "or adamw")
    if self.name == "adafactor" and self.weight_decay > _LARGEST_L2:
      _fail("OptimizerConfig", "weight_decay", f"be at most {_LARGEST_L2} for adafactor",
            self.weight_decay, "part of the loss there; 0, or 2e-5 as published")  # fmt: skip
    if self.hold_steps < 1:
      _fail("OptimizerConfig", "hold_steps", "be at least 1", self.hold_steps, "a count")
    if not 0 <= self.warmup_fraction < 1:
      got = self.warmup_fraction
      _fail("OptimizerConfig", "warmup_fraction", "lie in 0..1, below 1", got, "0.05 is 5 %")
    for name in ("warmup_steps", "weight_decay", "clip_norm", "z_loss", "final_fraction"):
      if getattr(self, name) < 0:
        _fail("OptimizerConfig", name, "be at least 0", getattr(self, name), "0 turns it off")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """Length of the run and what is written when."""

  steps: int = 1000
  epochs: float = 0.0  # passes over the training data; above 0 they decide the steps
  init_from: str = ""  # workdir of a run or of imported weights: its best weights are the first
  grad_accumulation: int = 1  # parts that a batch is worked on in, one after the other
  seed: int = 0  # of the initial weights; the order of the data has its own
  log_every: int = 10  # steps
  eval_every: int = 200  # steps; 0 = at the end only
  eval_tokens: int = 0  # of the validation text while training; 0 = all, as at the end
  sample_tokens: int = 200  # printed at the end
  checkpoint_every: int = 200  # steps
  keep_last: int = 2  # newest checkpoints kept
  keep_best: int = 1  # kept beside them, by `best_by`
  best_by: str = ""  # one of CRITERIA; empty: micro F1 of notes, loss of all else
  patience: int = 0  # stop after so many evaluations without a better one; 0 = never
  baselines: bool = False  # print what xz and n-gram models reach on the validation text

  def __post_init__(self):
    for name in ("steps", "grad_accumulation", "log_every", "checkpoint_every", "keep_last"):
      if getattr(self, name) < 1:
        _fail("TrainConfig", name, "be at least 1", getattr(self, name), "a count")
    if self.best_by not in ("", *CRITERIA):
      _fail("TrainConfig", "best_by", f"be one of {CRITERIA}", self.best_by, "or empty")
    for name in ("epochs", "eval_every", "eval_tokens", "keep_best", "sample_tokens", "patience"):
      if getattr(self, name) < 0:
        _fail("TrainConfig", name, "be at least 0", getattr(self, name), "0 turns it off")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each axis; their product is the number of devices used. 0 on `data`: the rest."""

  data: int = 0  # batch; parameters are split over it too
  seq: int = 1  # length
  model: int = 1  # heads, feed-forward width, vocabulary

  def __post_init__(self):
    if self.data < 0 or self.seq < 1 or self.model < 1:
      got = (self.data, self.seq, self.model)
      _fail("MeshConfig", "data, seq, model", "be at least 0, 1, 1", got, "0 = all that is left")


@dataclasses.dataclass(frozen=True)
class Experiment:
  """Everything that decides a run. `model` is a configuration of the zoo."""

  model: Any
  data: DataConfig = DataConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  train: TrainConfig = TrainConfig()
  mesh: MeshConfig = MeshConfig()

  def __post_init__(self):
    notes = self.data.source in NOTE_SOURCES
    if notes != hasattr(self.model, "labels"):
      rule = "be one of notes" if hasattr(self.model, "labels") else "be of text or pictures"
      _fail("Experiment", "data.source", f"{rule} for {type(self.model).__name__}",
            self.data.source, f"notes: {NOTE_SOURCES}")  # fmt: skip
    if not notes and self.train.best_by not in ("", "loss"):
      _fail("Experiment", "train.best_by", "be 'loss' or empty for text and pictures",
            self.train.best_by, "the others are figures of notes")  # fmt: skip
    if notes and self.mesh.seq > 1:
      _fail("Experiment", "mesh.seq", "be 1 for notes", self.mesh.seq, "use mesh.data and model")
    if self.data.batch_size % self.train.grad_accumulation:
      _fail(
        "Experiment",
        "data.batch_size",
        f"be a multiple of train.grad_accumulation ({self.train.grad_accumulation})",
        self.data.batch_size,
        "every part has equally many rows",
      )


def to_config_dict(experiment: Experiment) -> ml_collections.ConfigDict:
  """A locked ConfigDict with every field, for the command line."""
  raw = {part.name: _fields(getattr(experiment, part.name)) for part in _parts()}
  raw["model"]["family"] = models.family_of(experiment.model)
  return ml_collections.ConfigDict(raw).lock()


def from_config_dict(config: ml_collections.ConfigDict | dict) -> Experiment:
  """The checked record of what files and flags say.

  Raises:
    ValueError: an unknown field (the nearest one is suggested) or a bad value.
  """
  raw = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
  known = [part.name for part in _parts()]
  for name in raw:
    if name not in known:
      hint = models.nearest(name, known)
      raise ValueError(f"config: {name} must be a part of an experiment; got it ({hint})")
  parts = {name: dict(raw.get(name, {})) for name in known}
  if "family" not in parts["model"]:
    raise ValueError("config: model.family must name a family of the zoo; got none (transnormer)")
  family = parts["model"].pop("family")
  kinds = dict(
    model=models.config_class(family),
    data=DataConfig,
    optimizer=OptimizerConfig,
    train=TrainConfig,
    mesh=MeshConfig,
  )
  return Experiment(**{name: _make(kinds[name], name, values) for name, values in parts.items()})


def to_json_dict(experiment: Experiment) -> dict[str, Any]:
  """Plain nested dictionaries: what a checkpoint stores. `from_config_dict` reads it back."""
  raw = {part.name: dataclasses.asdict(getattr(experiment, part.name)) for part in _parts()}
  raw["model"]["family"] = models.family_of(experiment.model)
  return json.loads(json.dumps(raw))  # tuples become lists, as they will when it is read


def _parts():
  return dataclasses.fields(Experiment)


def _fields(record) -> dict[str, Any]:
  """Field -> value; None becomes a placeholder of the field's type, so that flags can set it."""
  values = {}
  for field in dataclasses.fields(record):
    value = getattr(record, field.name)
    values[field.name] = config_dict.placeholder(_plain_type(field)) if value is None else value
  return values


def _plain_type(field: dataclasses.Field) -> type:
  if isinstance(field.type, types.UnionType):
    return next(kind for kind in typing.get_args(field.type) if kind is not types.NoneType)
  return field.type


def _make(kind: type, part: str, values: dict[str, Any]):
  known = [field.name for field in dataclasses.fields(kind)]
  for name in values:
    if name not in known:
      hint = models.nearest(name, known)
      raise ValueError(f"config: {part}.{name} must be a field of {kind.__name__}; got it ({hint})")
  return kind(**values)
