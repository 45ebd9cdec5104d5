"""Texts with passkeys, and the program that reads rows far longer than those of training."""

import json

import numpy as np
import pytest
from matplotlib import image

from attnzoo import zoo
from attnzoo.experiments.configs import softplus_fineweb, softplus_small
from attnzoo.experiments.data import DataConfig, DataError, load_data, passkey, train_batches
from attnzoo.experiments.data.examples import NO_TARGET
from attnzoo.experiments.lengths import extrapolation_report
from attnzoo.experiments.training import config, loop, optimizers
from attnzoo_testing import small_runs
from attnzoo_testing.programs import Programs


@pytest.mark.parametrize(("length", "digits"), [(47, 5), (128, 2), (1000, 10)])
def test_passkeys_stand_once_at_their_depth(length, digits):
  keys = passkey.draw_passkeys(length, 50, digits, seed=3)
  room = length - passkey.shortest(digits) + 1
  doubled = passkey.FILLER * (length // len(passkey.FILLER) + 2)
  assert passkey.shortest(digits) <= length
  for prompt, answer, depth in zip(keys.prompts, keys.answers, keys.depths, strict=True):
    assert len(set(answer)) == len(answer) == digits
    assert len(prompt) + digits + 2 == length
    assert prompt.count(answer) == 1
    assert prompt[depth:].startswith(passkey.KEY.format(answer))
    assert prompt.endswith(passkey.QUESTION)
    rest = prompt.replace(passkey.KEY.format(answer), "", 1).removesuffix(passkey.QUESTION)
    assert len(rest) == room
    assert rest in doubled
  again = passkey.draw_passkeys(length, 50, digits, seed=3)
  assert again.prompts == keys.prompts
  assert passkey.draw_passkeys(length, 50, digits, seed=4).prompts != keys.prompts
  if room > 40:
    assert keys.depths.min() < room / 5
    assert keys.depths.max() > 4 * room / 5


def test_only_the_digits_are_asked_for():
  block = passkey.as_examples(passkey.draw_passkeys(90, 7, 4, seed=0))
  assert block.tokens.shape == block.labels.shape == (7, 90)
  places, answers = block.targets_of()
  np.testing.assert_array_equal(places, np.tile(np.arange(84, 88), (7, 1)))
  np.testing.assert_array_equal(answers, block.tokens[:, 85:89])
  assert ((answers >= ord("0")) & (answers <= ord("9"))).all()
  assert (block.labels[:, :84] == NO_TARGET).all()


def test_texts_to_practise_with_become_rows_of_prompts_with_answers(tmp_path):
  groups = passkey.draw_up_to(64, 64 * 40, 3, seed=5)
  lengths = np.array([group.length for group in groups for _ in group.prompts])
  assert lengths.min() == passkey.shortest(3)
  assert 60 < lengths.max() <= 64
  assert 64 * 40 <= lengths.sum() < 64 * 41
  passkey.write_pairs(tmp_path / "pairs.jsonl", groups)
  data = DataConfig(source="sft", path=str(tmp_path / "pairs.jsonl"), sft_open=True,
                    validation_path=str(tmp_path / "pairs.jsonl"), sequence_length=64)  # fmt: skip
  split = load_data(data).splits["train"]
  tokens, learned = split.sequence(0, 64, 256)
  block = passkey.as_examples(groups[0])
  np.testing.assert_array_equal(tokens, block.tokens[0])
  asked = np.flatnonzero(block.labels[0] != NO_TARGET) + 1
  np.testing.assert_array_equal(np.flatnonzero(learned), [*asked, asked[-1] + 1])  # and the end


@pytest.mark.parametrize(
  ("length", "count", "digits", "message"),
  [
    (46, 1, 5, "passkey length must be at least 47 for 5 digits; got 46"),
    (128, 0, 5, "passkey count must be at least 1"),
    (128, 1, 11, "passkey digits must be at most 10"),
  ],
)
def test_passkeys_that_cannot_be(length, count, digits, message):
  with pytest.raises(DataError, match=message):
    passkey.draw_passkeys(length, count, digits, seed=0)


def _record(series: str, switched: dict) -> dict:
  losses = dict(
    by_length=[[128, 1.5], [256, 1.75]], by_window=[[128, 2.0], [256, 1.9]], by_position=[2.0]
  )
  found = [dict(length=128, keys=0.75, digits=0.8), dict(length=256, keys=0.5, digits=0.6)]
  task = dict(steps=9, digits=3, trials=5, train_seconds=1.0, measure_seconds=1.0)
  return dict(
    series=series, length=128, rows=7, steps=3, batch_size=2, parameters=1234, train_seconds=9.0,
    measure_seconds=1.0, switched={name: losses for name in switched}, **losses,
    passkey=dict(task, found=found, switched={name: found for name in switched}),
  )  # fmt: skip


def test_table():
  records = [_record("softmax", {"softmax, p = 15 switched on": 0}), _record("lssar-p15", {})]
  env = dict(device="cpu", platform="cpu", processor="p", versions=dict(jax="1"), commit=None,
             date="2026")  # fmt: skip
  text = extrapolation_report.markdown(records, env)
  assert "| attention | 128 (1x) | 256 (2x) | change |\n" in text
  assert "| lssar-p15 | 1.500 | 1.750 | +0.250 |\n" in text
  assert "| lssar-p15 | 2.000 | 1.900 | -0.100 | 3.19 | 3.19 | 3.23 | 3.32 |" in text
  assert "switched on | 2.000 | 1.900 | -0.100 | - | - | - | 7.02 |" in text
  assert "| softmax | 75% (80%) | 50% (60%) | 64% | 0% | 0% | 0% |" in text
  assert "24 s in all" in text
  assert "keys 75%, 50%" in extrapolation_report.line(records[0])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  compiled = dict(
    JAX_COMPILATION_CACHE_DIR=str(tmp_path_factory.mktemp("compiled")),
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="0",
    JAX_DISABLE_MOST_OPTIMIZATIONS="1",  # compiling is what takes the time
  )
  programs = Programs(tmp_path_factory.mktemp("programs"), **compiled)
  yield programs.run
  programs.close()


@pytest.mark.slow
def test_program(run, tmp_path):
  text = small_runs.write_text(tmp_path / "text.txt")
  flags = (
    "length_extrapolation", "--models=softmax,lssar-p15", "--steps=2", "--length=48", "--times=2",
    "--batch_size=2", "--rows=4", "--passkey_steps=2", "--passkey_digits=2", "--passkey_trials=3",
    f"--data_path={text}", f"--workdir={tmp_path / 'run'}",
    '--model_fields={"features": 16, "num_layers": 1}',
  )  # fmt: skip
  first = run(*flags)
  assert first.code == 0, first.err
  record = json.loads((tmp_path / "run" / "length_extrapolation.json").read_text())
  softmax, lssar = record["models"]
  assert [n for n, _ in lssar["by_length"]] == [n for n, _ in lssar["by_window"]] == [48, 96]
  (again,) = softmax["switched"].values()
  assert again["by_length"] != softmax["by_length"]  # the same weights, read otherwise
  np.testing.assert_allclose(np.array(again["by_window"]), softmax["by_window"], rtol=0.1)
  assert lssar["switched"] == {}
  assert [x["length"] for x in softmax["passkey"]["found"]] == [48, 96]
  assert len(softmax["passkey"]["switched"]) == 1
  table = (tmp_path / "run" / "length_extrapolation.md").read_text()
  assert "3.19 | 4.17 | 5.45 | 6.28 |" in table
  assert "## Passkey retrieval" in table
  assert image.imread(tmp_path / "run" / "length_extrapolation.png").ndim == 3
  assert "step 2/2" in first.err
  points = tmp_path / "run" / "points"
  assert len(list(points.iterdir())) == 4
  (asked,) = points.glob("lssar-p15-*-passkey-*.json")
  asked.unlink()
  second = run(*flags)
  assert second.code == 0, second.err
  assert "step 2/2" not in second.err  # nothing is trained again
  assert len(list(points.iterdir())) == 4
  repeated = (tmp_path / "run" / "length_extrapolation.md").read_text()
  assert repeated.splitlines()[3:] == table.splitlines()[3:]


@pytest.mark.slow
@pytest.mark.parametrize(
  ("flag", "message"),
  [
    ("--models=lssar-p16", "did you mean 'lssar-p15'"),
    ("--times=3", "--times must be a power of 2"),
    ("--length=40", "--length must be at least 41 for keys of 2 digits"),
    ("--passkey_digits=11", "--passkey_digits"),
  ],
)
def test_errors(run, tmp_path, flag, message):
  result = run("length_extrapolation", flag, f"--workdir={tmp_path / 'no'}")
  assert result.code == 2
  assert message in result.err
  assert not (tmp_path / "no").exists()


def test_the_recipe_of_the_paper_at_a_size_of_a_few_thousand_weights(tmp_path):
  with small_runs.one_device(tmp_path / "compiled"):
    for preset in [name for name in zoo.list_models() if name.startswith("softplus")]:
      recipe = softplus_small if preset.endswith("tiny") else softplus_fineweb
      record = config.from_config_dict(recipe.get_config(preset))
    record = config.from_config_dict(softplus_fineweb.get_config())
    assert record.model == zoo.get_config("softplus-124m")
    tokens = record.train.steps * record.data.batch_size * record.data.sequence_length
    assert round(tokens / 1e9, 2) == 9.89
    rate = optimizers.learning_rate(record.optimizer, record.train.steps)
    steps = np.array([0, 255, 256, 16_816, 17_841, 18_864])
    expected = 1.8e-3 * np.array([1 / 256, 1, 1, 1, 0.5, 0])
    np.testing.assert_allclose([rate(step) for step in steps], expected, rtol=0.02, atol=2e-6)
    rng = np.random.default_rng(0)
    for name, count in (("train", 4000), ("val", 500)):
      rng.integers(0, 97, count).astype(np.uint16).tofile(tmp_path / f"{name}.bin")
    small = small_runs.changed(
      record,
      model=dict(vocab_size=97, features=32, num_layers=1, heads=2, loss_chunk=16),
      data=dict(path=str(tmp_path), token_vocab_size=97, token_end_id=96, sequence_length=16,
                batch_size=16),
      optimizer=dict(warmup_steps=1),
      train=dict(steps=3, eval_tokens=0, log_every=1),
    )  # fmt: skip
    outcome = loop.train(small, tmp_path / "run")
  assert int(outcome.state.step) == 3
  assert np.isfinite(outcome.evaluation.loss)
  assert "segment_ids" not in next(train_batches(outcome.run.corpus, small.data))
