"""Passkey retrieval of a trained model: a few steps on the task in short rows, then longer ones."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from attnzoo.experiments.data import DataConfig
from attnzoo.experiments.data.passkey import as_examples, draw_passkeys, draw_up_to, write_pairs
from attnzoo.experiments.training import config, recall, state

_HELD_OUT = 64  # rows that the loss of the tuned model is of


class Task(NamedTuple):
  """What is asked, and how much it is practised."""

  steps: int  # 0: not at all, and nothing is asked
  digits: int
  trials: int  # texts asked about at each length


def tuning(
  experiment: config.Experiment, source: pathlib.Path, task: Task, folder: pathlib.Path
) -> config.Experiment:
  """The run that goes on from the weights in `source`, on texts of up to its rows' length.

  Several short texts share a row, as segments. Writes the texts into `folder`: so many that each is
  read about once, and some held out, drawn with another seed.
  """
  seed, length = experiment.train.seed, experiment.data.sequence_length
  rows = experiment.data.batch_size
  folder.mkdir(parents=True, exist_ok=True)
  paths = []
  for number, count in enumerate((task.steps * rows, _HELD_OUT)):
    paths.append(folder / f"{length}-{task.digits}-{count}-{seed}-{number}.jsonl")
    if not paths[-1].exists():
      draft = paths[-1].with_suffix(".draft")
      write_pairs(draft, draw_up_to(length, count * length, task.digits, seed=3 * seed + number))
      draft.replace(paths[-1])
  return dataclasses.replace(
    experiment,
    data=DataConfig(
      source="sft", path=str(paths[0]), validation_path=str(paths[1]), sft_open=True,
      sft_pack=True, sequence_length=length, batch_size=rows, seed=seed,
    ),
    optimizer=dataclasses.replace(experiment.optimizer, warmup_fraction=0.05),
    train=dataclasses.replace(experiment.train, steps=task.steps, init_from=str(source)),
  )  # fmt: skip


def retrieval(
  parts: state.Parts,
  params: state.Params,
  task: Task,
  lengths: Sequence[int],
  *,
  seed: int,
  tokens: int,
) -> list[dict[str, Any]]:
  """Shares of keys said right by greedy decoding, and of digits right after the right ones.

  Args:
    lengths: of the texts; the same texts for every model.
    tokens: read at once, or one text where that is longer.
  """
  predict, found = jax.jit(recall.make_predict(parts)), []
  for length in lengths:
    passkeys = draw_passkeys(length, task.trials, task.digits, seed=3 * seed + 2)
    (right,) = recall.right_answers(
      predict, params, [as_examples(passkeys)], max(1, tokens // length)
    )
    # The first wrong digit decides: up to it greedy decoding has read what is read here.
    keys, digits = right.all(axis=1).mean(), right.mean()
    found.append(dict(length=length, keys=float(keys), digits=float(digits)))
  return found
