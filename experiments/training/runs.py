"""Loading what a run has learned, for evaluation and generation."""

import contextlib
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import SingleDeviceSharding

from attnzoo.experiments.data import DataConfig, Tokenizer, check_tokenizer, load_tokenizer
from attnzoo.experiments.training import checkpoints, config, state


class LoadedRun(NamedTuple):
  """A trained model and the record of how it came to be."""

  experiment: config.Experiment
  parts: state.Parts
  params: state.Params
  step: int
  tokenizer: dict[str, Any] | None  # as `describe_tokenizer` gives it


def load(
  workdir: str | pathlib.Path, step: str = "best", model_fields: Mapping[str, Any] | None = None
) -> LoadedRun:
  """The parameters of one checkpoint of a run, on one device; the rest of it is not read.

  Args:
    workdir: folder of the run. Nothing is written to it.
    step: "best" (lowest validation loss), "last", or a number.
    model_fields: fields of the model's configuration to replace by others that have the same
      parameters, such as {"variant": "softmax_rw_p15"}.

  Raises:
    FileNotFoundError: no run in the folder. ValueError: no such checkpoint, a damaged one, or
      fields with which the model has other parameters.
  """
  record = checkpoints.read_config(workdir)
  experiment = config.from_config_dict(record["experiment"])
  if model_fields:
    experiment = _with_fields(experiment, model_fields)
  if not checkpoints.folder(workdir).is_dir():
    raise _no_checkpoint(workdir)
  with contextlib.closing(checkpoints.Checkpoints(workdir, read_only=True)) as saved:
    wanted = _step_number(saved, step, workdir)
    device = SingleDeviceSharding(jax.devices()[0])
    parts, shapes = state.abstract_state(experiment)
    like = {
      name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device)
      for name, x in shapes.params.items()
    }
    params = saved.restore_params(like, wanted)
  parts = parts._replace(constants=state.constants(experiment))
  return LoadedRun(experiment, parts, params, wanted, record["tokenizer"])


def _with_fields(trained: config.Experiment, fields: Mapping[str, Any]) -> config.Experiment:
  raw = config.to_json_dict(trained)
  experiment = config.from_config_dict(raw | dict(model=raw["model"] | fields))
  old, new = (
    {name: x.shape for name, x in state.abstract_state(e)[1].params.items()}
    for e in (trained, experiment)
  )
  if different := sorted(name for name in {*old, *new} if old.get(name) != new.get(name)):
    raise ValueError(
      f"model_fields: must leave the model's parameters as they are; got {dict(fields)}, with which"
      f" {different[0]} is {new.get(different[0])} and not {old.get(different[0])} (train with it)"
    )
  return experiment


def starting_record(workdir: str, model: dict[str, Any]) -> dict[str, Any]:
  """The record of a run that another one of the model `model` starts from (`train.init_from`).

  Raises:
    ValueError: there is none, it has no checkpoint, or it is of another model.
  """
  try:
    record = checkpoints.stored_record(workdir, model)
    if record is None:
      raise _no_checkpoint(workdir)
    return record
  except (ValueError, OSError) as error:
    raise ValueError(
      f"train.init_from must name the workdir of a run or of imported weights; {error}"
    ) from error


def starting_weights(workdir: str, like: state.Params) -> state.Params:
  """The best weights of that run, in the shapes, dtypes and shardings of `like`."""
  with contextlib.closing(checkpoints.Checkpoints(workdir, read_only=True)) as saved:
    return saved.restore_params(like, saved.best_step())


def the_tokenizer(run: LoadedRun, path: str = "") -> Tokenizer:
  """The tokenizer that the run was trained with, from `path` or where it was then.

  Raises:
    ValueError: it is not there or another one, or the run was trained on ids of unknown meaning.
  """
  data = run.experiment.data
  if run.tokenizer is None and not path:
    raise ValueError(
      "--tokenizer must be given for a run on token files; got '' (the tokenizer.json they were"
      " made with)"
    )
  tokenizer = load_tokenizer(path or data.tokenizer, data.end_token)
  if run.tokenizer is not None:
    check_tokenizer(run.tokenizer, tokenizer)
  elif tokenizer.vocab_size > run.experiment.model.vocab_size:
    raise ValueError(
      f"--tokenizer must have at most the model's {run.experiment.model.vocab_size} ids; got"
      f" {tokenizer.vocab_size} in {path} (the tokenizer.json the token files were made with)"
    )
  return tokenizer


def opening(data: DataConfig, tokenizer: Tokenizer) -> list[int]:
  """What stood before every document or prompt in training, and so comes before one now."""
  return [] if data.source == "sft" and not data.sft_open else [tokenizer.end_id]


def _no_checkpoint(workdir) -> ValueError:
  return ValueError(f"workdir: must hold a checkpoint; got {workdir} with none (train first)")


def _step_number(saved: checkpoints.Checkpoints, step: str, workdir) -> int:
  if not saved.steps:
    raise _no_checkpoint(workdir)
  if step == "best":
    return saved.best_step()
  if step == "last":
    return saved.steps[-1]
  if not step.isdigit() or int(step) not in saved.steps:
    raise ValueError(f"step: must be 'best', 'last' or one of {saved.steps}; got {step!r} (--step)")
  return int(step)
