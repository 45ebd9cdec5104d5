"""Checkpoints of a run, kept by Orbax: state, position in the data, configuration, tokenizer."""

import json
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy

from attnzoo.experiments.training.state import Params, TrainState

CONFIG_FILE = "config.json"
FOLDER = "checkpoints"
DAMAGED = "damaged"


class Restored(NamedTuple):
  state: TrainState  # without opt_state where only weights were saved
  record: dict[str, Any]  # data position (None: weights only) and whatever else the run wants back


class Checkpoints:
  """Saves in the background, keeps the newest and the best, restores the newest that is whole."""

  def __init__(
    self,
    workdir: str | pathlib.Path,
    *,
    keep_last: int = 2,
    keep_best: int = 1,
    read_only: bool = False,
  ):
    def goodness(metrics):
      return -metrics.get("badness", metrics.get("validation_loss"))  # older runs have the latter

    policies = [preservation_policy.LatestN(keep_last)]
    if keep_best:
      policies.append(
        preservation_policy.BestN(
          get_metric_fn=goodness, n=keep_best, keep_checkpoints_without_metrics=False
        )
      )
    verbosity = logging.get_verbosity()
    if read_only:  # the library warns of what was asked for
      logging.set_verbosity(min(verbosity, logging.ERROR))
    options = ocp.CheckpointManagerOptions(
      preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
      best_fn=goodness,
      best_mode="max",
      read_only=read_only,
      create=not read_only,
    )
    self._folder, self._read_only = folder(workdir), read_only
    try:
      self._manager = ocp.CheckpointManager(self._folder, options=options)
    except ValueError:  # the library reads all metrics when it starts
      damaged = _with_damaged_metrics(self._folder)
      if not damaged:
        raise
      if read_only:
        raise ValueError(
          f"workdir: {self._folder} must hold checkpoints that can be read; the metrics of steps"
          f" {damaged} cannot (train on to have them moved away, or move them)"
        ) from None
      _move_away(self._folder, damaged)
      self._manager = ocp.CheckpointManager(self._folder, options=options)
    logging.set_verbosity(verbosity)

  @property
  def steps(self) -> list[int]:
    return sorted(self._manager.all_steps())

  def best_step(self) -> int | None:
    """Step of the best evaluation, or the newest where none was evaluated."""
    best = self._manager.best_step()
    return self._manager.latest_step() if best is None else best

  def save(
    self, step: int, state: TrainState, record: dict[str, Any], badness: float | None
  ) -> None:
    """Starts saving; returns before the files are written. A step that is there is left alone.

    `badness`: the less the better, such as the validation loss; None: was not evaluated.
    `state.opt_state` may be None, with None as `record["data"]`: weights alone.
    """
    if step in self._manager.all_steps():
      return
    metrics = None if badness is None else {"badness": float(badness)}
    parts = {name: part for name, part in state._asdict().items() if part is not None}
    args = ocp.args.Composite(state=ocp.args.StandardSave(parts), record=ocp.args.JsonSave(record))
    self._manager.save(step, args=args, metrics=metrics, force=True)

  def restore(self, like: TrainState) -> Restored | None:
    """The newest checkpoint that can be read; None without any.

    `like` has the shapes, dtypes and shardings to restore to. Newer checkpoints that are damaged
    are passed over with a warning and moved to the folder `damaged` of the workdir, as they would
    be in the way of the run.

    Raises:
      ValueError: there are checkpoints, but none of them can be read; all are left where they are.
    """
    failures = {}
    for step in self.steps[::-1]:
      try:
        restored = self._read(step, like)
      except Exception as error:  # whatever a damaged file raises, an older one may be whole
        failures[step] = f"{type(error).__name__}: {_shortened(error)}"
        logging.warning("The checkpoint of step %d cannot be read: %s", step, failures[step])
        continue
      if failures:
        _move_away(self._folder, list(failures))
        self._manager.reload()
      return restored
    if failures:
      listed = "; ".join(f"step {step}: {reason}" for step, reason in failures.items())
      raise ValueError(
        f"restore: {self._folder} must hold a checkpoint that can be read; {listed} (restore them"
        " from a copy, or move the folder away to start anew)"
      )
    return None

  def restore_params(self, like: Params, step: int) -> Params:
    """The weights of one checkpoint, without the rest of the training state.

    Raises:
      ValueError: they cannot be read.
    """
    try:
      return self._read_parts(step, {"params": like})["params"]
    except Exception as error:  # whatever a damaged file raises
      others = [other for other in self.steps if other != step]
      raise ValueError(
        f"restore: the checkpoint of step {step} in {self._folder} cannot be read;"
        f" {type(error).__name__}: {_shortened(error)} (other steps there: {others})"
      ) from error

  def _read(self, step: int, like: TrainState) -> Restored:
    record = self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))
    record = record["record"]
    if record["data"] is None:
      parts = self._read_parts(step, {"step": like.step, "params": like.params})
      return Restored(TrainState(**parts, opt_state=None), record)
    args = ocp.args.Composite(state=ocp.args.StandardRestore(like._asdict()))
    return Restored(TrainState(**self._manager.restore(step, args=args)["state"]), record)

  def _read_parts(self, step: int, like: dict[str, Any]) -> dict[str, Any]:
    args = ocp.args.PyTreeRestore(
      item=like,
      restore_args=ocp.checkpoint_utils.construct_restore_args(like),
      partial_restore=True,
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
      return reader.restore(self._folder / str(step) / "state", args=args)

  def wait(self) -> None:
    self._manager.wait_until_finished()

  def close(self) -> None:
    self._manager.close()


def folder(workdir: str | pathlib.Path) -> pathlib.Path:
  return pathlib.Path(workdir).expanduser().resolve() / FOLDER


def has_checkpoints(workdir: str | pathlib.Path) -> bool:
  steps = folder(workdir)
  return steps.is_dir() and any(path.name.isdigit() for path in steps.iterdir())


def write_config(workdir: str | pathlib.Path, record: dict[str, Any]) -> None:
  """Stores what identifies the run beside its checkpoints."""
  file = pathlib.Path(workdir).expanduser() / CONFIG_FILE
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
    record = json.loads(file.read_text())
    if not {"model", "data"} <= set(record["experiment"]) or "tokenizer" not in record:
      raise KeyError("a field is missing")
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(
      f"workdir: {file} must be the record of a run; got {error!r} (restore it from a copy)"
    ) from error
  return record


def stored_record(workdir: str | pathlib.Path, model: dict[str, Any]) -> dict[str, Any] | None:
  """The record of the run in `workdir` if it has checkpoints, else None. Writes nothing.

  Args:
    model: the configuration to go on with; fields that change how a model is computed but not what
      is stored are free.

  Raises:
    ValueError: the checkpoints are of another model (the message names both) or the record is
      damaged. FileNotFoundError: checkpoints without a record.
  """
  if not has_checkpoints(workdir):
    return None
  record = read_config(workdir)
  check_same_model(record["experiment"]["model"], model, pathlib.Path(workdir))
  return record


# Fields of a model that change how it is computed, but not what it computes and what is stored, and
# those of its first weights.
_FREE_FIELDS = {"dtype", "remat", "loss_chunk", "implementation", "attention_implementation"}
_FREE_FIELDS |= {"train_length", "init_stddev"}
_CHUNK_IS_FREE = (
  "transnormer",
  "based",
  "mqar",
  "softplus",
)  # RAT's chunks are part of what it computes


def check_same_model(old: dict, new: dict, workdir: pathlib.Path) -> None:
  """Raises ValueError where the configurations differ in more than free fields."""
  free = _FREE_FIELDS | ({"chunk_size"} if new.get("family") in _CHUNK_IS_FREE else set())
  different = {
    name: (old.get(name), new.get(name))
    for name in sorted(set(old) | set(new))
    if name not in free and old.get(name) != new.get(name)
  }
  if different:
    listed = ", ".join(f"{name} {a!r} there, {b!r} here" for name, (a, b) in different.items())
    raise ValueError(
      f"workdir: {workdir} must hold checkpoints of {describe(new)}; it holds {describe(old)}:"
      f" {listed} (choose another --workdir)"
    )


def describe(model: dict) -> str:
  layers = model.get("num_layers", len(model.get("mixers", ())))
  return f"{model.get('family')} ({layers} layers of width {model.get('features')})"


def abstract_like(state: TrainState, shardings: TrainState) -> TrainState:
  """Shapes, dtypes and shardings of a state, for `Checkpoints.restore`."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=s), state, shardings
  )


def _shortened(error: Exception) -> str:
  """The first line of what may be pages."""
  return str(error).strip().partition("\n")[0][:200]


def _with_damaged_metrics(steps: pathlib.Path) -> list[int]:
  damaged = []
  for file in steps.glob("[0-9]*/metrics/metrics"):
    try:
      json.loads(file.read_text())
    except ValueError:
      damaged.append(int(file.parts[-3]))
  return sorted(damaged)


def _move_away(steps: pathlib.Path, damaged: list[int]) -> None:
  """Moves damaged checkpoints to where they neither count as newest nor block their step."""
  if jax.process_index() == 0:
    for step in damaged:
      target = steps.parent / DAMAGED / str(step)
      while target.exists():
        target = target.with_name(target.name + "_")
      target.parent.mkdir(exist_ok=True)
      (steps / str(step)).rename(target)
      logging.warning("The checkpoint of step %d cannot be read, it was moved to %s", step, target)
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices("attnzoo: damaged checkpoints moved")
