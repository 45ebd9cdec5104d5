"""Loading what a run has learned, for evaluation and generation."""

import pathlib
from typing import Any, NamedTuple

import jax

from attnzoo.experiments.training import checkpoints, config, state


class LoadedRun(NamedTuple):
  """A trained model and the record of how it came to be."""

  experiment: config.Experiment
  parts: state.Parts
  params: state.Params
  step: int
  tokenizer: dict[str, Any] | None  # as `describe_tokenizer` gives it


def load(workdir: str | pathlib.Path, step: str = "best") -> LoadedRun:
  """The parameters of one checkpoint of a run, on one device.

  Args:
    workdir: folder of the run.
    step: "best" (lowest validation loss), "last", or a number.

  Raises:
    FileNotFoundError: no run in the folder. ValueError: no such checkpoint, or a damaged one.
  """
  record = checkpoints.read_config(workdir)
  experiment = config.from_config_dict(record["experiment"])
  saved = checkpoints.Checkpoints(workdir)
  try:
    wanted = _step_number(saved, step, workdir)
    mesh = state.make_mesh(config.MeshConfig(), jax.devices()[:1])
    parts, fresh, shardings = state.initial_state(experiment, mesh)
    restored = saved.restore(checkpoints.abstract_like(fresh, shardings), wanted)
  finally:
    saved.close()
  return LoadedRun(experiment, parts, restored.state.params, wanted, record["tokenizer"])


def _step_number(saved: checkpoints.Checkpoints, step: str, workdir) -> int:
  if not saved.steps:
    raise ValueError(f"workdir: must hold a checkpoint; got {workdir} with none (train first)")
  if step == "best":
    return saved.best_step()
  if step == "last":
    return saved.steps[-1]
  if not step.isdigit() or int(step) not in saved.steps:
    raise ValueError(f"step: must be 'best', 'last' or one of {saved.steps}; got {step!r} (--step)")
  return int(step)
