"""Checkpoints of a run, kept by Orbax: state, position in the data, configuration, tokenizer."""

import json
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint.checkpoint_managers import preservation_policy

from attnzoo.experiments.training.state import TrainState

CONFIG_FILE = "config.json"
FOLDER = "checkpoints"


class Restored(NamedTuple):
  state: TrainState
  record: dict[str, Any]  # data position and whatever else the run wants back


class Checkpoints:
  """Saves in the background, keeps the newest and the best, restores the newest that is whole."""

  def __init__(self, workdir: str | pathlib.Path, *, keep_last: int = 2, keep_best: int = 1):
    policies = [preservation_policy.LatestN(keep_last)]
    if keep_best:
      policies.append(
        preservation_policy.BestN(
          get_metric_fn=lambda metrics: -metrics["validation_loss"],
          n=keep_best,
          keep_checkpoints_without_metrics=False,
        )
      )
    options = ocp.CheckpointManagerOptions(
      preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
      best_fn=lambda metrics: -metrics["validation_loss"],
      best_mode="max",
    )
    self._manager = ocp.CheckpointManager(folder(workdir), options=options)

  @property
  def steps(self) -> list[int]:
    return sorted(self._manager.all_steps())

  def best_step(self) -> int | None:
    """Step of the lowest validation loss, or the newest where none was evaluated."""
    best = self._manager.best_step()
    return self._manager.latest_step() if best is None else best

  def save(
    self, step: int, state: TrainState, record: dict[str, Any], validation_loss: float | None
  ) -> None:
    """Starts saving; returns before the files are written. A step that is there is left alone."""
    if step in self._manager.all_steps():
      return
    metrics = None if validation_loss is None else {"validation_loss": float(validation_loss)}
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(state._asdict()), record=ocp.args.JsonSave(record)
    )
    self._manager.save(step, args=args, metrics=metrics, force=True)

  def restore(self, like: TrainState, step: int | None = None) -> Restored | None:
    """The state of `step`, or of the newest checkpoint that can be read; None without any.

    `like` has the shapes, dtypes and shardings to restore to. A newest checkpoint that is corrupt
    is passed over with a warning.

    Raises:
      ValueError: no such step, or checkpoints that are there but none of them can be read.
    """
    if step is not None and step not in self.steps:
      raise ValueError(f"restore: step must be one of {self.steps}; got {step} (see the workdir)")
    candidates = self.steps[::-1] if step is None else [step]
    failures = []
    for candidate in candidates:
      args = ocp.args.Composite(
        state=ocp.args.StandardRestore(like._asdict()), record=ocp.args.JsonRestore()
      )
      try:
        restored = self._manager.restore(candidate, args=args)
        return Restored(TrainState(**restored["state"]), restored["record"])
      except Exception as error:  # whatever a damaged file raises, an older one may be whole
        failures.append(f"step {candidate}: {type(error).__name__}: {str(error)[:200]}")
        logging.warning("Checkpoint of step %d cannot be read: %s", candidate, failures[-1])
    if failures:
      raise ValueError(
        "restore: no checkpoint can be read; " + "; ".join(failures) + " (move them away to start"
        " anew)"
      )
    return None

  def wait(self) -> None:
    self._manager.wait_until_finished()

  def close(self) -> None:
    self._manager.close()


def folder(workdir: str | pathlib.Path) -> pathlib.Path:
  return pathlib.Path(workdir).expanduser().resolve() / FOLDER


def write_config(workdir: str | pathlib.Path, record: dict[str, Any]) -> None:
  """Stores what identifies the run beside its checkpoints, or checks it against what is there.

  Raises:
    ValueError: the workdir belongs to another model; the message names both.
  """
  file = pathlib.Path(workdir).expanduser() / CONFIG_FILE
  if file.exists():
    check_same_model(read_config(workdir), record, file.parent)
  file.parent.mkdir(parents=True, exist_ok=True)
  draft = file.with_suffix(".draft")
  draft.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
  draft.replace(file)


def read_config(workdir: str | pathlib.Path) -> dict[str, Any]:
  """What `write_config` stored.

  Raises:
    FileNotFoundError: there is no run in this folder.
    ValueError: the file is damaged.
  """
  file = pathlib.Path(workdir).expanduser() / CONFIG_FILE
  if not file.exists():
    raise FileNotFoundError(
      f"workdir: must hold a run with a {CONFIG_FILE}; got {file.parent} (train first, or check"
      " --workdir)"
    )
  try:
    return json.loads(file.read_text())
  except json.JSONDecodeError as error:
    raise ValueError(f"workdir: {file} must be JSON; {error} (restore it from a copy)") from error


# Fields of a model that change how it is computed but not what is stored.
_FREE_FIELDS = {"dtype", "remat", "loss_chunk", "implementation", "chunk_size"}


def check_same_model(stored: dict, wanted: dict, workdir: pathlib.Path) -> None:
  old, new = stored["experiment"]["model"], wanted["experiment"]["model"]
  different = {
    name: (old.get(name), new.get(name))
    for name in sorted(set(old) | set(new))
    if name not in _FREE_FIELDS and old.get(name) != new.get(name)
  }
  if different:
    listed = ", ".join(f"{name} {a!r} there, {b!r} here" for name, (a, b) in different.items())
    raise ValueError(
      f"workdir: {workdir} must hold checkpoints of {describe(new)}; it holds {describe(old)}:"
      f" {listed} (choose another --workdir)"
    )


def describe(model: dict) -> str:
  return f"{model['family']} ({model['num_layers']} layers of width {model['features']})"


def abstract_like(state: TrainState, shardings: TrainState) -> TrainState:
  """Shapes, dtypes and shardings of a state, for `Checkpoints.restore`."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=s), state, shardings
  )
