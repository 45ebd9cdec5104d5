"""Training one point of the sweep: all learning rates and seeds at once, in one program."""

import contextlib
import functools
import itertools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from attnzoo import zoo
from attnzoo.experiments.data import ExampleSet, train_batches
from attnzoo.experiments.recall.tasks import Task
from attnzoo.experiments.training import recall, reports, state
from attnzoo.experiments.training.optimizers import make_optimizer


class Trained(NamedTuple):
  """One model of a point at the end of its training."""

  learning_rate: float
  seed: int
  recall: recall.Recall
  loss: float  # of the last batch, nats per query
  curve: tuple[tuple[int, float], ...]  # (step, recall)


class _Program(NamedTuple):
  """The functions for all models of a point; a leading axis of states counts the models."""

  fresh: Callable[[], state.TrainState]
  step: Callable[..., tuple[state.TrainState, state.Metrics]]
  predict: Callable


def train_point(
  model: Any,
  task: Task,
  examples: ExampleSet,
  *,
  seeds: int = 1,
  devices: list | None = None,
  progress: bool = True,
) -> list[Trained]:
  """Trains a model of the zoo with every learning rate of the task and so many seeds.

  Ends early when one of the models recalls more than `task.enough`. Models whose loss is no longer
  finite count as having learned nothing.

  Args:
    devices: the models are divided among the first so many that it comes out even.
  """
  runs = list(itertools.product(task.learning_rates, range(seeds)))
  experiment = task.experiment(model, max(task.learning_rates))
  mesh = _mesh(len(runs), jax.devices() if devices is None else devices)
  rates = jnp.asarray([rate / max(task.learning_rates) for rate, _ in runs], jnp.float32)
  program = _compile(experiment, [task.train.seed + seed for _, seed in runs], mesh)
  blocks = examples.splits["validation"]
  current, curves, steps = program.fresh(), [[] for _ in runs], task.train.steps
  batches = train_batches(examples, task.data)
  line = reports.Progress(0, steps, len(runs) * batches.tokens_per_step, 0.0, None, active=progress)
  with contextlib.closing(batches), contextlib.closing(line):
    for step in range(1, steps + 1):
      current, metrics = program.step(current, next(batches), rates)
      if step == 1:
        jax.block_until_ready(current)
        line.start()
      if step % task.train.log_every == 0 or step == steps:
        line.show(step, _lowest(metrics.loss))
      every = task.train.eval_every or steps
      if step % every and step < steps:
        continue
      began = time.monotonic()
      batch_size = task.data.batch_size
      right = recall.right_answers(program.predict, current.params, blocks, batch_size)  # [M, N, n]
      found = [recall.summarize(blocks, [r[i] for r in right]) for i in range(len(runs))]
      for curve, one in zip(curves, found, strict=True):
        curve.append((step, one.accuracy))
      line.pause(time.monotonic() - began)
      line.say(f"step {step}/{steps}  recall {_describe(runs, found)}")
      if max(one.accuracy for one in found) > task.enough:
        break
  losses = np.asarray(metrics.loss)
  return [
    Trained(rate, task.train.seed + seed, one, float(loss), tuple(curve))
    for (rate, seed), one, loss, curve in zip(runs, found, losses, curves, strict=True)
  ]


def _compile(experiment, seeds: list[int], mesh: Mesh) -> _Program:
  """The functions of a point; `mesh` divides its models, whose seeds these are."""
  parts, _ = state.abstract_state(experiment)
  parts = parts._replace(constants=state.constants(experiment))
  optimizer = make_optimizer(experiment.optimizer, experiment.train.steps)
  # Models have nothing to say to each other, so there is nothing to check between devices.
  divided = functools.partial(jax.shard_map, mesh=mesh, out_specs=P("models"), check_vma=False)

  def make(seed):
    rngs = nnx.Rngs(jax.random.key(seed))
    _, params = state.take_apart(zoo.build(experiment.model, rngs))
    return state.TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

  step = jax.vmap(state.make_train_step(experiment, parts), (0, None, 0))
  step = divided(step, in_specs=(P("models"), P(), P("models")))
  predict = jax.vmap(recall.make_predict(parts), (0, None, None))
  predict = divided(predict, in_specs=(P("models"), P(), P()))
  fresh = jax.jit(jax.vmap(make), out_shardings=NamedSharding(mesh, P("models")))
  return _Program(
    lambda: fresh(jnp.asarray(seeds)), jax.jit(step, donate_argnums=0), jax.jit(predict)
  )


def _mesh(models: int, devices: list) -> Mesh:
  """As many devices as divide the models evenly, in a mesh with the axis "models"."""
  count = max(n for n in range(1, len(devices) + 1) if models % n == 0)
  return Mesh(np.array(devices[:count]), ("models",))


def _lowest(losses) -> float:
  finite = [float(loss) for loss in np.asarray(losses) if math.isfinite(loss)]
  return min(finite, default=math.nan)


def _describe(runs: list[tuple[float, int]], found: list[recall.Recall]) -> str:
  """`0.912 at 0.01, 0.950 at 0.03`: the best seed at each rate."""
  best: dict[float, float] = {}
  for (rate, _), one in zip(runs, found, strict=True):
    best[rate] = max(best.get(rate, 0.0), one.accuracy)
  return ", ".join(f"{accuracy:.3f} at {rate:g}" for rate, accuracy in best.items())
