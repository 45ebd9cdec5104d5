"""What a run leaves behind at its end: the table of results, a sample, the curves."""

import json
import math
import pathlib

import numpy as np

from attnzoo.experiments import baselines
from attnzoo.experiments.coding import report
from attnzoo.experiments.data import (
  DataConfig,
  DataError,
  ExampleSet,
  ImageSet,
  NoteSet,
  PairSet,
  read_text,
)
from attnzoo.experiments.generation import Sampling, generate
from attnzoo.experiments.image_grid import write_grid
from attnzoo.experiments.training import honesty, recall, reports, runs, state
from attnzoo.experiments.training.evaluation import Evaluation
from attnzoo.experiments.training.loop import Outcome, Run

BASELINES_FILE = "baselines.json"
RESULT_FILE = "result.json"
SAMPLES_FILE = "samples.png"
SAMPLES = 32


def finish(outcome: Outcome) -> None:
  """Prints and draws; after a SIGTERM only what is quick."""
  run = outcome.run
  if outcome.evaluation is None:
    print(f"Stopped at step {int(outcome.state.step)}; the same command goes on from there.")
    reports.draw_curves(run.workdir)
    return
  evaluation = outcome.evaluation
  if isinstance(run.corpus, NoteSet):
    _finish_notes(outcome, run.corpus)
    return
  marks = {}
  if run.experiment.train.baselines:
    try:
      marks = _baselines(run)
    except DataError as error:  # token files have no text; the run is complete all the same
      print(f"no baselines: {error}")
  print(_table(evaluation, outcome.honest, marks))
  record = dict(step=int(outcome.state.step), **evaluation.to_json(), baselines=marks)
  if outcome.honest is not None:
    record |= {honesty.LEAKY: evaluation.to_json(), honesty.HONEST: outcome.honest.to_json()}
  # Parts of the parameters lie with other processes: those have no part in this.
  here = all(x.is_fully_addressable for x in outcome.state.params.values())
  if isinstance(run.corpus, ExampleSet) and here:
    found = recall.measure(run.parts, outcome.state.params, run.corpus, run.experiment.data)
    print(f"\nrecall, and by distance of the query from its key\n{found.describe()}\n")
    record["recall"] = found.to_json()
  (run.workdir / RESULT_FILE).write_text(json.dumps(record, indent=2) + "\n")
  per_byte, loss = evaluation.bits_per_byte, evaluation.loss
  to_target_bits = loss / math.log(2) / per_byte if per_byte else 1.0
  curves = reports.draw_curves(run.workdir, {n: v * to_target_bits for n, v in marks.items()})
  if run.experiment.train.sample_tokens and run.corpus.tokenizer is not None and here:
    print(f"\nsample:\n{_sample(outcome)}\n")
  if run.experiment.train.sample_tokens and isinstance(run.corpus, ImageSet) and here:
    print(f"samples {_draw(outcome, run.corpus)}")
  print(f"curves {curves}\nmetrics {run.workdir / reports.METRICS_FILE}")
  print(f"checkpoints {run.workdir / 'checkpoints'}")


def _finish_notes(outcome: Outcome, notes: NoteSet) -> None:
  """The last model and the best one on the test split, beside what is no neural network."""
  run, evaluation = outcome.run, outcome.evaluation
  params = {f"this model, step {int(outcome.state.step)}": outcome.state.params}
  best = runs.load(run.workdir, "best")
  if best.step != int(outcome.state.step):
    params[f"this model, best on validation (step {best.step})"] = best.params
  tried = [
    report.try_model(name, run.eval_step, weights, notes, run.experiment.data, run.mesh)
    for name, weights in params.items()
  ]
  systems = [one.system for one in tried]
  if run.experiment.train.baselines:
    systems = report.try_baselines(notes, run.workdir / BASELINES_FILE) + systems
  print(f"\n{report.table(systems)}")
  for name, value in tried[-1].recall.items():
    print(f"recall of codes that are said in {name}  {value:.4f}")
  record = dict(step=int(outcome.state.step), **evaluation.to_json())
  record |= report.to_json(systems, tried[-1].recall)
  (run.workdir / RESULT_FILE).write_text(json.dumps(record, indent=2) + "\n")
  files = report.write_codes(run.workdir, tried[-1].system.tuned)
  print("\n" + "\n".join(f"codes {file}" for file in files))
  print(f"curves {reports.draw_curves(run.workdir)}\nmetrics {run.workdir / reports.METRICS_FILE}")
  print(f"checkpoints {run.workdir / 'checkpoints'}")


def _table(evaluation: Evaluation, honest: Evaluation | None, marks: dict[str, float]) -> str:
  found = {"this model": evaluation}
  if honest is not None:
    found = {f"this model, {honesty.HONEST}": honest, f"... {honesty.LEAKY}": evaluation}
  if evaluation.bits_per_byte is None:
    return "\n".join(f"{name}, validation  {one.describe()}" for name, one in found.items())
  figures = marks | {name: one.bits_per_byte for name, one in found.items()}
  width = max(map(len, figures))
  rows = [f"  {name:<{width}}  {value:6.3f}" for name, value in figures.items()]
  return "\n".join(["", "bits per byte of the validation text", *rows])


def _baselines(run: Run) -> dict[str, float]:
  """What compressors and n-gram models reach; computed once per workdir and corpus."""
  file = run.workdir / BASELINES_FILE
  try:
    stored = json.loads(file.read_text()) if file.exists() else {}
  except ValueError:  # written by a run that was killed
    stored = {}
  if stored.get("corpus") != run.corpus.fingerprint:
    stored = dict(corpus=run.corpus.fingerprint, figures=_compute_baselines(run.experiment.data))
    file.write_text(json.dumps(stored, indent=2) + "\n")
  return stored["figures"]


def _compute_baselines(data: DataConfig) -> dict[str, float]:
  return baselines.baselines(read_text(data, "train"), read_text(data, "validation"))


def _sample(outcome: Outcome) -> str:
  """Text from nothing, or the answer to the first held-out prompt after that prompt."""
  run = outcome.run
  tokenizer = run.corpus.tokenizer
  length, answering = run.experiment.data.sequence_length, isinstance(run.corpus, PairSet)
  prompt = run.corpus.splits["validation"].prompt(0, length) if answering else []
  model = state.merge(run.parts, outcome.state.params)
  tokens = generate(
    model,
    [prompt],
    max_new_tokens=run.experiment.train.sample_tokens,
    sampling=Sampling(temperature=0.8, top_p=0.95),
    end_id=tokenizer.end_id,
  )
  return tokenizer.decode([*prompt, *(int(token[0]) for token in tokens)])


def _draw(outcome: Outcome, images: ImageSet) -> pathlib.Path:
  """Pictures from nothing, above as many of the training split."""
  run = outcome.run
  model = state.merge(run.parts, outcome.state.params)
  drawn = generate(model, [[0]] * SAMPLES, max_new_tokens=images.dims, sampling=Sampling())
  pictures = images.as_images(np.stack([np.asarray(token) for token in drawn], axis=1))
  real = images.as_images(images.splits["train"][np.arange(SAMPLES)])
  both = np.concatenate([pictures, real])
  return write_grid(run.workdir / SAMPLES_FILE, both, levels=images.vocab_size, columns=8)
