"""The sweep of recall against state size: its rows, its training, and the program itself."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from matplotlib import image

from attnzoo import zoo
from attnzoo.experiments.data import load_data, train_batches
from attnzoo.experiments.recall import points, published, tasks, training
from attnzoo.experiments.training import config, state
from attnzoo_testing import small_runs
from attnzoo_testing.programs import Programs


def test_published_sizes_are_those_of_the_models():
  """Bytes read off the figure against what the configurations hold."""
  rows = {name: row.sizes["paper"].values() for name, row in points.SERIES.items()}
  figure = {name: [size for size, _ in row] for name, row in published.FIGURE_2.items()}
  for model in rows["based"]:
    assert points.state_bytes(model, 1024) in figure["BASED"]
  assert [points.state_bytes(model, 1024) for model in rows["sliding"]] == figure["sliding window"]
  assert points.state_bytes(zoo.get_config("mqar-attention-64"), 1024) in figure["full attention"]


def test_state_of_a_model_that_does_not_count_it_itself():
  """Everything its decoder remembers: here float32 [K, V] of each head of each layer."""
  model = zoo.get_config("transnormer-tiny", features=32, num_layers=2, heads=2, glu_dim=48)
  assert points.state_bytes(model, 64) >= 4 * 2 * 2 * 16 * 16
  assert points.state_bytes(model, 64) == points.state_bytes(model, 128)


def test_every_point_is_an_experiment():
  for name, task in tasks.TASKS.items():
    found = points.points(name, list(points.SERIES))
    assert len({(point.series, point.size) for point in found}) == len(found)
    for point in found:
      experiment = task.experiment(point.model)
      assert config.from_config_dict(config.to_config_dict(experiment)) == experiment
      assert experiment.optimizer.learning_rate in task.learning_rates
      assert point.model.vocab_size == task.data.mqar_vocab_size


TINY = tasks.SMALL._replace(
  data=dataclasses.replace(
    tasks.SMALL.data, mqar_train="16:2:64", mqar_test="16:2:8", mqar_vocab_size=32, batch_size=8
  ),
  train=dataclasses.replace(tasks.SMALL.train, steps=4, log_every=4, eval_every=2),
  learning_rates=(0.03, 0.01),
)
MODEL = zoo.get_config("mqar-tiny", features=8, feature_dim=4, vocab_size=32)


@pytest.mark.slow
def test_models_trained_together_are_those_trained_alone(capsys):
  """Two rates and two seeds on two devices, against the ordinary step at one of them."""
  examples = load_data(TINY.data)
  found = training.train_point(
    MODEL, TINY, examples, seeds=2, devices=jax.devices()[:2], progress=False
  )
  runs = [(model.learning_rate, model.seed) for model in found]
  assert runs == [(0.03, 123), (0.03, 124), (0.01, 123), (0.01, 124)]
  assert [[step for step, _ in model.curve] for model in found] == [[2, 4]] * 4
  alone, (rate, seed) = found[3], runs[3]
  experiment = small_runs.changed(TINY.experiment(MODEL, rate), train=dict(seed=seed))
  mesh = state.make_mesh(config.MeshConfig(), jax.devices()[:1])
  parts, current, _ = state.initial_state(experiment, mesh)
  step, batches = (
    jax.jit(state.make_train_step(experiment, parts)),
    train_batches(examples, TINY.data),
  )
  for _ in range(4):
    current, metrics = step(current, next(batches))
  np.testing.assert_allclose(alone.loss, float(metrics.loss), rtol=1e-5)
  assert len({model.loss for model in found}) == 4
  assert capsys.readouterr().err == ""


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
  folder = tmp_path_factory.mktemp("programs")
  cache = dict(
    JAX_COMPILATION_CACHE_DIR=str(folder / "compiled"),
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="0",
  )
  server = Programs(folder, **cache)
  yield server
  server.close()


SWEEP = (
  "--steps=4",
  "--train=32:2:64,32:4:64",
  "--test=32:2:10,32:8:6",
  "--only=width 16|width 32$",
)


@pytest.mark.slow
def test_sweep(programs, tmp_path):
  flags = [f"--workdir={tmp_path}", "--seeds=2", "--learning_rates=0.02", *SWEEP]
  finished = programs.run("recall_sweep", *flags)
  assert finished.code == 0, finished.err
  assert all(line.startswith("step ") for line in finished.err.splitlines()), finished.err
  assert "step 4/4  loss" in finished.err
  for words in ("1/2  BASED", "2/2  full attention", "train: 64 examples of 32 tokens, 4 pairs"):
    assert words in finished.out
  result = json.loads((tmp_path / "recall.json").read_text())
  sizes = {point["series"]: point["bytes"] for point in result["points"]}
  assert sizes == dict(based=4 * 17 * 15, attention=4 * 2 * 32 * 32)
  for point in result["points"]:
    assert [model["seed"] for model in point["models"]] == [123, 124]
    best = max(model["accuracy"] for model in point["models"])
    assert point["best"]["recall"]["accuracy"] == best
    assert [s["examples"] for s in point["best"]["recall"]["segments"]] == [10, 6]
    assert all(math.isfinite(model["loss"]) for model in point["models"])
  table = (tmp_path / "recall.md").read_text()
  assert table in finished.out
  assert f"| BASED (convolution, Taylor) | width 16, f 4 | {sizes['based']:,} |" in table
  assert "| BASED | 39,780 | 0.892 |" in table
  pixels = image.imread(tmp_path / "recall.png")[..., :3]
  for line in ((31, 119, 180), (214, 39, 40), (255, 127, 14)):  # BASED, attention, windows
    assert np.abs(pixels - np.array(line) / 255).max(-1).min() < 0.05
  # Again: everything is stored. Then one point is gone, and only that is trained.
  files = sorted((tmp_path / "points").glob("*.json"))
  assert [file.name.rpartition("-")[0] for file in files] == ["attention-width-32",
                                                              "based-width-16-f-4"]  # fmt: skip
  stamps = [file.stat().st_mtime_ns for file in files]
  again = programs.run("recall_sweep", *flags)
  assert (again.code, again.err) == (0, "")
  assert [file.stat().st_mtime_ns for file in files] == stamps
  files[1].write_text("{")  # as a killed process might leave it
  third = programs.run("recall_sweep", *flags)
  assert third.err.count("step 4/4  loss") == 1
  assert files[0].stat().st_mtime_ns == stamps[0]
  repeated = json.loads((tmp_path / "recall.json").read_text())["points"]
  assert [p["models"] for p in repeated] == [p["models"] for p in result["points"]]


@pytest.mark.slow
@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ("--series=basde", "--series must be among based, sliding"),
    ("--only=nothing", "--only must leave a point; got 'nothing' (there are: based, width 16"),
    ("--only=(", "--only must be a regular expression"),
    ("--task=medium", "small|paper"),
    ("--learning_rates=0.01,fast", "--learning_rates must be positive numbers; got 'fast'"),
    ("--seeds=0", "seeds"),
    ("--train=64:4", "mqar_train must be length:pairs:examples"),
    ("--test=64:20:10", "pairs must lie in 1..16"),
    ("--train=512:4:10", "mqar_vocab_size must be above the length 512; got 256"),
    ("more", "unexpected arguments more"),
  ],
)
def test_one_line_for_what_is_wrong(programs, arguments, message, tmp_path):
  finished = programs.run("recall_sweep", *arguments.split(), f"--workdir={tmp_path / 'new'}")
  assert finished.code == 2, finished
  assert finished.err.startswith("error: ")
  assert finished.err.count("\n") == 1
  assert message in finished.err
  assert not (tmp_path / "new").exists()
