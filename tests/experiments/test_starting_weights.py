"""Runs that start from the weights of another run, steps counted in epochs, and RAT's recipes."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo import zoo
from attnzoo.experiments.configs import rat_fineweb, rat_sft, rat_small
from attnzoo.experiments.data import EvaluationBatches, TrainBatches, load_corpus
from attnzoo.experiments.training import (
  checkpoints,
  config,
  loop,
  optimizers,
  reports,
  runs,
  summary,
)
from attnzoo_testing import small_runs
from attnzoo_testing.small_runs import changed


@pytest.fixture(scope="module", autouse=True)
def _one_device(tmp_path_factory):
  with small_runs.one_device(tmp_path_factory.mktemp("compiled")):
    yield


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
  """(experiment, outcome, workdir) of one step on text."""
  folder = tmp_path_factory.mktemp("pretrained")
  experiment = small_runs.experiment(small_runs.write_text(folder / "text.txt"), steps=1)
  return experiment, loop.train(experiment, folder / "run"), folder / "run"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
  """40 examples, 8 of them held out."""
  folder = tmp_path_factory.mktemp("pairs")
  for name, numbers in (("train", range(32)), ("held", range(32, 40))):
    lines = [json.dumps(dict(prompt=f"{n} plus 1?", answer=f" {n + 1}")) + "\n" for n in numbers]
    (folder / f"{name}.jsonl").write_text("".join(lines))
  return dict(source="sft", path=str(folder / "train.jsonl"),
              validation_path=str(folder / "held.jsonl"))  # fmt: skip


@pytest.mark.slow
def test_fine_tuning_starts_from_the_weights_and_learns_the_answers(
  pretrained, pairs, tmp_path, capsys
):
  experiment, outcome, source = pretrained
  still = changed(
    experiment,
    data=pairs,
    train=dict(epochs=1.5, init_from=str(source), log_every=1),
    optimizer=dict(learning_rate=1e-12, warmup_fraction=0.1),
  )
  tuned = loop.train(still, tmp_path / "still")
  assert int(tuned.state.step) == 12  # 32 examples, 4 a step, one and a half times
  assert "Starts from the weights" in capsys.readouterr().out
  for name, value in tuned.state.params.items():
    np.testing.assert_allclose(value, outcome.state.params[name], atol=1e-6)
  learning = changed(
    still, train=dict(epochs=3.0), optimizer=dict(learning_rate=1e-2, warmup_fraction=0.0)
  )
  learned = loop.train(learning, tmp_path / "learned")
  assert learned.evaluation.loss < 0.6 * tuned.evaluation.loss
  summary.finish(learned)
  assert "32 plus 1?" in capsys.readouterr().out  # the sample answers the first held-out prompt
  tokenizer = learned.run.corpus.tokenizer
  assert runs.opening(learning.data, tokenizer) == []  # as the prompts of the rows have it
  opened = dataclasses.replace(learning.data, sft_open=True)
  assert runs.opening(opened, tokenizer) == runs.opening(experiment.data, tokenizer) == [256]
  again = loop.train(learning, tmp_path / "learned")  # is complete, and does not start anew
  assert again.run.first_step == 24
  assert again.evaluation == learned.evaluation


@pytest.mark.slow
def test_other_models_and_empty_folders_are_refused(pretrained, tmp_path):
  experiment, _, source = pretrained
  start = dict(init_from=str(source))
  with pytest.raises(ValueError, match="train.init_from must .*features 32 there, 64 here"):
    loop.train(changed(experiment, model=dict(features=64), train=start), tmp_path)
  with pytest.raises(ValueError, match="train.init_from must .*must hold a checkpoint"):
    loop.train(changed(experiment, train=dict(init_from=str(tmp_path / "no"))), tmp_path)
  (tmp_path / "no" / "checkpoints" / "3").mkdir(parents=True)
  with pytest.raises(ValueError, match="train.init_from must .*config.json"):
    loop.train(changed(experiment, train=dict(init_from=str(tmp_path / "no"))), tmp_path)
  shutil.copytree(source, tmp_path / "other")
  record = json.loads((source / "config.json").read_text())
  record["tokenizer"]["fingerprint"] = "another"
  (tmp_path / "other" / "config.json").write_text(json.dumps(record))
  with pytest.raises(ValueError, match="tokenizer must be the checkpoint's"):
    loop.train(changed(experiment, train=dict(init_from=str(tmp_path / "other"))), tmp_path)
  assert not (tmp_path / reports.METRICS_FILE).exists()


def test_rows_that_know_no_documents(tmp_path):
  """The end id of a row is an input without a target; bytes are those of the counted targets."""
  texts = [f"document {i} " + "x" * (i % 7) for i in range(30)]
  path = tmp_path / "texts.jsonl"
  path.write_text("".join(json.dumps(dict(text=text)) + "\n" for text in texts))
  experiment = small_runs.experiment(path, data=dict(split_documents=False, predict_first=False))
  data = dataclasses.replace(experiment.data, validation_path=str(path))
  corpus = load_corpus(data)
  batches = TrainBatches(corpus, data)
  batch = next(batches)
  batches.close()
  np.testing.assert_array_equal(batch["weights"] == 0, batch["tokens"] == 256)
  assert (batch["weights"] == 0).any()
  assert "segment_ids" not in batch
  held = EvaluationBatches(corpus, data)
  counted = np.concatenate([rows["targets"][rows["weights"] > 0] for rows in held])
  assert held.targets == len(counted) == sum(map(len, texts))  # first one out, end id in
  assert held.target_bytes == sum(len(text) - 1 for text in texts)


def test_the_released_recipe():
  """Learning rate of the published formula, and sizes, for all five models."""
  presets = [name for name in zoo.list_models() if name.startswith("rat") and name.endswith("xl")]
  assert len(presets) == 5
  for preset in presets:
    experiment = config.from_config_dict(rat_fineweb.get_config(preset))
    assert config.from_config_dict(rat_sft.get_config(preset)).model.features == 2048
  assert experiment.data.batch_size * experiment.data.sequence_length == 2_097_152
  steps, low, peak = experiment.train.steps, 1e-6, 8e-4
  rate, warm = optimizers.learning_rate(experiment.optimizer, steps), int(0.05 * steps)
  for step in (0, 100, warm - 1, warm, warm + 1, 20_000, steps - 1):
    expected = peak * (step + 1) / warm
    if step >= warm:
      expected = low + (peak - low) * (1 + np.cos(np.pi * (step - warm) / (steps - warm))) / 2
    np.testing.assert_allclose(rate(jnp.asarray(step)), expected, atol=1e-6 * peak)  # float32
  for preset in ("rat-tiny", "rat-swa-tiny"):
    assert config.from_config_dict(rat_sft.get_config(preset)).data.tokenizer == "bytes"
    assert config.from_config_dict(rat_small.get_config(preset)).data.source == "stdlib"


def test_chunks_of_rat_are_part_of_the_model(tmp_path):
  tiny = zoo.get_config("rat-tiny")
  raw = [
    config.to_json_dict(config.Experiment(model=dataclasses.replace(tiny, **changes)))["model"]
    for changes in ({}, dict(chunk_size=32), dict(attention_implementation="xla", train_length=9))
  ]
  checkpoints.check_same_model(raw[0], raw[2], tmp_path)
  with pytest.raises(ValueError, match="chunk_size 16 there, 32 here"):
    checkpoints.check_same_model(raw[0], raw[1], tmp_path)
