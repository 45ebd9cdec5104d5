"""Training of one model on short rows, and its loss on rows that are longer and longer."""

import pathlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Int

from attnzoo.experiments.data import DataConfig, load_data
from attnzoo.experiments.lengths.settings import PIECES, Settings
from attnzoo.experiments.training import by_position, config, loop, state, stored
from attnzoo.zoo import models

Rows = tuple[Int[np.ndarray, "N T"], Int[np.ndarray, "N T"]]  # tokens, targets


def stored_or(file: pathlib.Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
  """The record in the file, or a new one, which is then stored there."""
  record = stored.read(file)
  if record is None:
    record = make()
    stored.write(file, record)
  return record


def held_out(experiment: config.Experiment, settings: Settings) -> Rows:
  """Rows of the longest length, each inside one held-out text."""
  data = load_data(experiment.data, cache=settings.workdir / "corpus")
  longest = settings.length * settings.times
  return by_position.whole_rows(data, experiment.data, longest, settings.rows)


def trained(experiment: config.Experiment, folder: pathlib.Path) -> loop.Outcome:
  """Trains, or goes on with what is in the folder.

  Raises:
    InterruptedError: a signal stopped it.
  """
  outcome = loop.train(experiment, folder)
  if outcome.evaluation is None:
    raise InterruptedError("stopped by a signal; the same command goes on from there")
  return outcome


def train_and_measure(
  experiment: config.Experiment, folder: pathlib.Path, rows: Rows, *, shortest: int
) -> tuple[dict[str, Any], loop.Outcome]:
  """Trains a model and measures it from `shortest` tokens on; (record, the trained model)."""
  began = time.monotonic()
  outcome = trained(experiment, folder)
  middle = time.monotonic()
  losses = losses_by_length(
    outcome.run.parts, outcome.state.params, experiment.data, rows, shortest=shortest
  )
  record = dict(
    length=experiment.data.sequence_length,
    piece=experiment.data.sequence_length // PIECES,
    **losses,
    rows=len(rows[0]),
    steps=int(outcome.state.step),
    batch_size=experiment.data.batch_size,
    parameters=models.parameter_count(experiment.model),
    validation=outcome.evaluation._asdict(),
    train_seconds=middle - began,
    measure_seconds=time.monotonic() - middle,
    experiment=config.to_json_dict(experiment),
  )
  return record, outcome


def losses_by_length(
  parts: state.Parts, params: state.Params, data: DataConfig, rows: Rows, *, shortest: int
) -> dict[str, list]:
  """Losses in nats per token of the last n tokens of each row, n = `shortest`, twice that, ...

  Returns:
    by_length: (n, mean over the last quarter of a training length), the same tokens for every n;
    by_window: (n, mean over all n tokens);
    by_position: of the longest rows, a number for every 1 / PIECES of the training length.
  """
  tokens, targets = rows
  piece = data.sequence_length // PIECES
  by_length, by_window, count = [], [], shortest
  while count <= tokens.shape[1]:
    losses = by_position.loss_by_position(
      parts,
      params,
      tokens[:, -count:],
      targets[:, -count:],
      piece=piece,
      batch_size=max(1, data.batch_size * data.sequence_length // count),
    )
    by_length.append((count, float(losses[-(PIECES // 4) :].mean())))
    by_window.append((count, float(losses.mean())))
    count *= 2
  return dict(by_length=by_length, by_window=by_window, by_position=losses.tolist())
