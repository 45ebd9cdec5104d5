"""Training from a configuration to a finished workdir."""

import contextlib
import dataclasses
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh

from attnzoo.experiments.coding.prediction import from_the_data
from attnzoo.experiments.data import (
  Data,
  NoteSet,
  TrainBatches,
  check_tokenizer,
  describe_tokenizer,
  load_data,
  train_batches,
)
from attnzoo.experiments.training import (
  checkpoints,
  config,
  honesty,
  hosts,
  reports,
  runs,
  state,
)
from attnzoo.experiments.training.batches import place_batch
from attnzoo.experiments.training.evaluation import Evaluation, evaluate, make_step
from attnzoo.zoo import models

_NORM = jax.jit(optax.tree.norm)


class NonFiniteLoss(FloatingPointError):
  """The loss, the gradient or the weights are NaN or infinite."""


class Run(NamedTuple):
  """What stays the same from step to step."""

  experiment: config.Experiment
  workdir: pathlib.Path
  corpus: Data
  mesh: Mesh
  parts: state.Parts
  eval_step: Callable
  batches: TrainBatches  # or examples with the same interface
  saved: checkpoints.Checkpoints
  first_step: int
  last_step: int


class Outcome(NamedTuple):
  """How a run ended."""

  run: Run
  state: state.TrainState
  evaluation: Evaluation | None  # of all validation text; None if a SIGTERM stopped the run early
  honest: Evaluation | None = None  # where that one lets the future through: without it


def train(
  experiment: config.Experiment, workdir: str | pathlib.Path, *, extend: int = 0
) -> Outcome:
  """Trains, or goes on with what is in `workdir`.

  A run that is complete already goes on for `extend` more steps at the final learning rate.

  Raises:
    ValueError, FileNotFoundError: anything wrong with the configuration, the data or the workdir,
      before any training.
    NonFiniteLoss: names the step and the checkpoint to go back to.
  """
  workdir = pathlib.Path(workdir).expanduser()
  mesh = state.make_mesh(experiment.mesh)
  state.check_divides(experiment, mesh)
  model = config.to_json_dict(experiment)["model"]
  stored, source = checkpoints.stored_record(workdir, model), ""
  if stored is None and experiment.train.init_from:
    source = experiment.train.init_from
    stored = runs.starting_record(source, model)
  corpus = load_data(experiment.data, cache=workdir / "corpus")
  check_vocabulary(experiment, corpus)
  if stored and stored["tokenizer"] and corpus.tokenizer is not None:
    check_tokenizer(stored["tokenizer"], corpus.tokenizer)
  block, blocks = state.data_part(mesh)
  batches = train_batches(corpus, experiment.data, process_index=block, process_count=blocks)
  experiment = _with_steps(experiment, batches)
  keep = dict(keep_last=experiment.train.keep_last, keep_best=experiment.train.keep_best)
  with (
    contextlib.closing(batches),
    contextlib.closing(checkpoints.Checkpoints(workdir, **keep)) as saved,
    in_mesh(mesh),
  ):
    parts, current, shardings = state.initial_state(experiment, mesh)
    like = checkpoints.abstract_like(current, shardings)
    restored = saved.restore(like)
    if restored is not None:
      current = _resumed(current, restored, batches, workdir)
    elif source:
      current = current._replace(params=runs.starting_weights(source, like.params))
    elif isinstance(corpus, NoteSet):
      current = current._replace(params=from_the_data(current.params, corpus))
    else:
      current = _after_a_look(experiment, parts, current, batches, mesh)
    if hosts.is_first():
      checkpoints.write_config(workdir, run_record(experiment, corpus))
    first_step, last_step = int(current.step), experiment.train.steps
    if first_step >= last_step:
      last_step = first_step + extend
    eval_step = make_step(parts, corpus)
    run = Run(experiment, workdir, corpus, mesh, parts, eval_step, batches, saved,
              first_step, last_step)  # fmt: skip
    return _run(run, current)


def _after_a_look(
  experiment: config.Experiment,
  parts: state.Parts,
  fresh: state.TrainState,
  batches: TrainBatches,
  mesh: Mesh,
) -> state.TrainState:
  """The fresh state with centroids from the first batch, where models of its family start so."""
  start = getattr(models.module_of(models.family_of(experiment.model)), "start_centroids", None)
  if start is None:
    return fresh
  position = batches.get_state()
  tokens = place_batch(next(batches), mesh)["tokens"]
  batches.set_state(position)  # the first step has this batch
  model = state.merge(parts, fresh.params)
  start(model, tokens, jax.random.key(experiment.train.seed))
  _, params = state.take_apart(model)
  places = jax.tree.map(lambda value: value.sharding, fresh.params)
  return fresh._replace(params=jax.device_put(params, places))


def _with_steps(experiment: config.Experiment, batches: TrainBatches) -> config.Experiment:
  """The experiment with the steps that its epochs come to."""
  train = experiment.train
  if not train.epochs:
    return experiment
  steps = max(1, math.ceil(train.epochs * batches.steps_per_epoch))
  return dataclasses.replace(experiment, train=dataclasses.replace(train, steps=steps))


def _resumed(fresh: state.TrainState, restored, batches: TrainBatches, workdir) -> state.TrainState:
  """The restored state, the data at its position; imported weights start a run of their own."""
  position = restored.record["data"]
  if position is None:
    return fresh._replace(params=restored.state.params)
  try:
    batches.set_state(position.encode())
  except ValueError as error:
    raise ValueError(
      f"workdir: {workdir} must be gone on with on its own data; {error} (or choose another"
      " --workdir)"
    ) from error
  return restored.state


def _run(run: Run, current: state.TrainState) -> Outcome:
  metrics = reports.MetricsWriter(run.workdir, active=hosts.is_first())
  metrics.truncate_after(run.first_step)
  progress = _progress(run)
  _say_what_starts(run)
  try:
    with hosts.failing_together(), hosts.sigterm() as stop:
      current, evaluation = _steps(run, current, metrics, progress, stop)
      if evaluation is not None and run.experiment.train.eval_tokens:
        evaluation = _evaluate(run, current, max_tokens=0)  # at the end of everything
      found = None
      if evaluation is not None and honesty.leaks(run.experiment.model):
        parts = honesty.honest_parts(run.experiment)
        other = run._replace(eval_step=make_step(parts, run.corpus))
        found = _evaluate(other, current, max_tokens=0)
  finally:
    progress.close()
    metrics.close()
    run.saved.wait()
  return Outcome(run, current, evaluation, found)


def _steps(run: Run, current: state.TrainState, metrics, progress, stop: Callable[[int], bool]):
  """Steps until the last one or a SIGTERM; returns (state, last evaluation or None)."""
  train = run.experiment.train
  step_function = jax.jit(state.make_train_step(run.experiment, run.parts), donate_argnums=0)
  if run.first_step == run.last_step:
    return current, _evaluate(run, current, train.eval_tokens)
  pending = None  # (step, metrics) that were not looked at yet, so that one step is under way
  for step in range(run.first_step + 1, run.last_step + 1):
    current, result = step_function(current, place_batch(next(run.batches), run.mesh))
    if pending is not None:
      _check_finite(run, *pending)
    pending = (step, result)
    if step == run.first_step + 1:
      jax.block_until_ready(current)
      progress.start()
    last, stopping = step == run.last_step, stop(step)
    log = last or stopping or step % train.log_every == 0
    assess = last or (train.eval_every and step % train.eval_every == 0 and not stopping)
    save = last or stopping or step % train.checkpoint_every == 0
    worse = False
    if log or assess or save:
      values = _check_finite(run, *pending)
    if log:
      metrics.write(step, {**values, **progress.show(step, values["loss"])})
    began = time.monotonic()
    evaluation = _evaluate(run, current, train.eval_tokens) if assess else None
    if evaluation is not None:
      metrics.write(step, evaluation.metrics())
      what = honesty.LEAKY if honesty.leaks(run.experiment.model) else "validation"
      progress.say(f"step {step}/{run.last_step}  {what}  {evaluation.describe()}")
      worse = stalled(reports.read_metrics(run.workdir), evaluation, train)
      save |= worse
    if save:
      _check_worth_saving(run, step, current, evaluation)
      badness = None if evaluation is None else evaluation.badness(train.best_by)
      run.saved.save(step, current, {"data": run.batches.get_state().decode()}, badness)
    progress.pause(time.monotonic() - began)
    if worse and not last:
      progress.say(f"no better for {train.patience} evaluations: stops at step {step}")
      return current, evaluation
    if stopping and not last:
      return current, None
  return current, evaluation


def stalled(
  metrics: list[dict[str, float]], evaluation: Evaluation, train: config.TrainConfig
) -> bool:
  """Whether the last `train.patience` evaluations were no better than the best one before."""
  found = [evaluation.badness_of(values, train.best_by) for values in metrics]
  found = [badness for badness in found if badness is not None]
  recent = found[-train.patience :]
  earlier = found[: -train.patience]
  return bool(train.patience and earlier) and min(recent) >= min(earlier)


def _evaluate(run: Run, current: state.TrainState, max_tokens: int) -> Evaluation:
  return evaluate(
    run.eval_step,
    current.params,
    run.corpus,
    run.experiment.data,
    run.mesh,
    max_tokens=max_tokens,
  )


def _check_finite(run: Run, step: int, metrics: state.Metrics) -> dict[str, float]:
  found = {**metrics._asdict(), **metrics.extra}
  values = {name: float(value) for name, value in found.items() if name != "extra"}
  if not all(map(math.isfinite, values.values())):
    got = f"loss {values['loss']}, gradient norm {values['grad_norm']}"
    raise _non_finite(run, step, "loss and gradient", got)
  return values


def _check_worth_saving(run: Run, step: int, current: state.TrainState, evaluation) -> None:
  """The update may have broken weights whose loss was still finite."""
  norm = float(_NORM(current.params))
  loss = 0.0 if evaluation is None else evaluation.loss
  if not math.isfinite(norm) or not math.isfinite(loss):
    got = f"norm of the weights {norm}, validation loss {loss}"
    raise _non_finite(run, step, "weights and validation loss", got)


def _non_finite(run: Run, step: int, what: str, got: str) -> NonFiniteLoss:
  run.saved.wait()
  kept = run.saved.steps
  where = f"the checkpoint of step {kept[-1]} is kept" if kept else "no checkpoint was written yet"
  return NonFiniteLoss(
    f"train: {what} must be finite; got {got} at step {step} ({where}; lower"
    " optimizer.learning_rate or optimizer.clip_norm)"
  )


def _say_what_starts(run: Run) -> None:
  if not hosts.is_first():
    return
  experiment = run.experiment
  count = models.parameter_count(experiment.model)
  rows, kind = experiment.data.batch_size, jax.devices()[0].device_kind
  length = run.batches.tokens_per_step / rows
  print(f"model  {models.family_of(experiment.model)}, {count:,} parameters")
  print(run.corpus.describe())
  devices = f"{run.mesh.size} x {kind}, mesh {dict(run.mesh.shape)}"
  print(f"batch  {rows} x {length:.4g} tokens on {devices}")
  if run.first_step >= experiment.train.steps:
    more = run.last_step - run.first_step
    after = f"{more} more at the final learning rate" if more else "nothing left to train"
    print(f"This run is complete after {run.first_step} steps: {after}.")
  elif not run.first_step and experiment.train.init_from:
    print(f"Starts from the weights in {experiment.train.init_from}.")
  elif run.first_step:
    print(f"Goes on from the checkpoint of step {run.first_step}.")


def _progress(run: Run) -> reports.Progress:
  return reports.Progress(
    run.first_step,
    run.last_step,
    tokens_per_step=run.batches.tokens_per_step,
    flops_per_token=6 * models.parameter_count(run.experiment.model),
    peak_flops=reports.peak_flops(jax.devices()[0].device_kind, run.mesh.size),
    active=hosts.is_first(),
  )


def run_record(experiment: config.Experiment, corpus: Data) -> dict[str, Any]:
  """What identifies a run: stored in the workdir, checked when it goes on."""
  tokenizer = None if corpus.tokenizer is None else describe_tokenizer(corpus.tokenizer)
  return dict(experiment=config.to_json_dict(experiment), tokenizer=tokenizer)


def check_vocabulary(experiment: config.Experiment, corpus: Data) -> None:
  """Raises ValueError where the data has ids that the model has not, or other labels."""
  if isinstance(corpus, NoteSet) and len(corpus.labels) != experiment.model.labels:
    count = len(corpus.labels)
    raise ValueError(
      f"train: model.labels must be the data's {count}; got {experiment.model.labels} (set"
      f" --config.model.labels={count})"
    )
  if corpus.vocab_size > experiment.model.vocab_size:
    raise ValueError(
      f"train: model.vocab_size must be at least the data's {corpus.vocab_size}; got"
      f" {experiment.model.vocab_size} (set --config.model.vocab_size={corpus.vocab_size})"
    )


def in_mesh(mesh: Mesh) -> contextlib.AbstractContextManager:
  """The mesh in force for everything traced inside; nothing for a single device."""
  return jax.set_mesh(mesh) if mesh.size > 1 else contextlib.nullcontext()
