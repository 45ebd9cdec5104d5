"""Evaluates a trained run on a split of its data (or of other data).

python -m attnzoo.experiments.evaluate --workdir=runs/stdlib_small
python -m attnzoo.experiments.evaluate --workdir=runs/stdlib_small --overlap=128 --split=train
"""

import dataclasses
import json
import pathlib

import jax
from absl import flags

from attnzoo.experiments import command_line
from attnzoo.experiments.coding import report
from attnzoo.experiments.data import ExampleSet, NoteSet, check_tokenizer, load_data
from attnzoo.experiments.training import config, honesty, loop, recall, runs, state
from attnzoo.experiments.training.evaluation import evaluate, make_step

_WORKDIR = flags.DEFINE_string("workdir", "runs/stdlib_small", "Folder of the run.")
_STEP = flags.DEFINE_string("step", "best", "Checkpoint: best, last or the number of a step.")
_MODEL_FIELDS = flags.DEFINE_string(
  "model_fields",
  "{}",
  'Fields of the model to run it with, as JSON: {"variant": "softmax_rw_p15"}.',
)
_SPLIT = flags.DEFINE_string("split", "validation", "train, validation or test.")
_DATA_PATH = flags.DEFINE_string("data_path", "", "Other text to evaluate on (file or folder).")
_TOKENIZER = flags.DEFINE_string("tokenizer", "", "Where the run's tokenizer.json is now.")
_LENGTH = flags.DEFINE_integer("sequence_length", 0, "Tokens per row; 0 = as trained.")
_OVERLAP = flags.DEFINE_integer(
  "overlap", 0, "Tokens of context that rows repeat, uncounted; more is slower and better."
)
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 0, "Stop after so many targets; 0 = all.")
_JSON = flags.DEFINE_string("json", "", "Also write the result to this file.")


def main(_) -> None:
  fields = command_line.json_object("model_fields", _MODEL_FIELDS.value)
  run = runs.load(_WORKDIR.value, _STEP.value, fields)
  data = run.experiment.data
  if _DATA_PATH.value:
    known = data.source in ("sft", "mimic3")  # prompts with answers and notes are no text
    source = data.source if known else "auto"
    data = dataclasses.replace(data, source=source, path=_DATA_PATH.value, validation_path="")
  if _TOKENIZER.value:
    data = dataclasses.replace(data, tokenizer=_TOKENIZER.value)
  if _LENGTH.value:
    data = dataclasses.replace(data, sequence_length=_LENGTH.value)
  corpus = load_data(data, cache=pathlib.Path(_WORKDIR.value).expanduser() / "corpus")
  if corpus.tokenizer is not None and run.tokenizer is not None:
    check_tokenizer(run.tokenizer, corpus.tokenizer)
  loop.check_vocabulary(run.experiment, corpus)
  mesh = state.make_mesh(config.MeshConfig(), jax.devices()[:1])

  def measure(step):
    return evaluate(
      step,
      run.params,
      corpus,
      data,
      mesh,
      split=_SPLIT.value,
      max_tokens=_MAX_TOKENS.value,
      overlap=_OVERLAP.value,
    )

  step = make_step(run.parts, corpus)
  result = measure(step)
  record = dict(step=run.step, split=_SPLIT.value, **result.to_json())
  what = f"step {run.step}, {_SPLIT.value} of {corpus.name}"
  if honesty.leaks(run.experiment.model):
    found = measure(make_step(honesty.honest_parts(run.experiment), corpus))
    print(f"{what}, {honesty.HONEST}: {found.describe()}")
    print(f"{what}, {honesty.LEAKY}: {result.describe()} (no likelihood: sees later tokens)")
    record |= {honesty.HONEST: found.to_json(), honesty.LEAKY: result.to_json()}
  else:
    print(f"{what}: {result.describe()}")
  if isinstance(corpus, NoteSet):
    tried = report.try_model("this model", step, run.params, corpus, data, mesh, split=_SPLIT.value)
    print(report.table([tried.system], _SPLIT.value))
    for name, value in tried.recall.items():
      print(f"recall of codes that are said in {name}  {value:.4f}")
    record |= report.to_json([tried.system], tried.recall)
  if isinstance(corpus, ExampleSet):
    found = recall.measure(run.parts, run.params, corpus, data, split=_SPLIT.value)
    print(f"recall, and by distance of the query from its key\n{found.describe()}")
    record["recall"] = found.to_json()
  if _JSON.value:
    with open(_JSON.value, "w") as file:
      json.dump(record, file, indent=2)


if __name__ == "__main__":
  command_line.run(main)
