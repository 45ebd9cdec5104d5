"""Multi-query associative recall: the examples, their batches, what a model recalls of them, and
training on them through the ordinary loop."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo import zoo
from attnzoo.experiments.data import DataConfig, DataError, evaluation_batches, load_data
from attnzoo.experiments.data import train_batches as batches_of
from attnzoo.experiments.data.examples import NO_TARGET, ExampleBlock
from attnzoo.experiments.data.mqar import (
  Segment,
  distances,
  draw_examples,
  parse_segments,
  segment_seeds,
)
from attnzoo.experiments.training import config, loop, recall, runs, state, summary
from attnzoo_testing import small_runs
from attnzoo_testing.goldens import golden

# Of each golden case: vocabulary, segment, power, seed.
GOLDEN = (
  (8192, Segment(64, 4, 4), 0.01, 7),
  (8192, Segment(256, 32, 3), 0.01, 8),
  (32, Segment(16, 4, 4), 0.5, 9),
)


@pytest.mark.parametrize("case", range(len(GOLDEN)))
@pytest.mark.parametrize("fillers", ["zero", "rand"])
def test_examples_are_the_published_ones(case, fillers):
  arrays = golden("based_mqar_data")
  vocab_size, segment, power, seed = GOLDEN[case]
  stream = np.random.RandomState(7) if fillers == "rand" else None
  tokens, labels = draw_examples(segment, vocab_size, seed=seed, power=power, fillers=stream)
  np.testing.assert_array_equal(tokens, arrays[f"out/{case}/{fillers}/inputs"])
  np.testing.assert_array_equal(labels, arrays[f"out/{case}/{fillers}/labels"])


def test_seeds_of_the_segments_are_the_published_ones():
  arrays = golden("based_mqar_data")
  train, test = segment_seeds(123, 5, 7)
  assert train == arrays["out/train_seeds"].tolist()
  assert test == arrays["out/test_seeds"].tolist()


@pytest.mark.parametrize("power", [0.01, 1.0])
def test_what_an_example_is(power):
  segment = Segment(32, 5, 200)
  tokens, labels = draw_examples(segment, 40, seed=3, power=power, fillers=np.random.RandomState(0))
  assert tokens.dtype == labels.dtype == np.int32
  asked = []
  for row, label in zip(tokens, labels, strict=True):
    keys, values = row[0:10:2], row[1:10:2]
    assert len({*keys}) == len({*values}) == 5
    assert 1 <= keys.min() <= keys.max() < 20 <= values.min() <= values.max() < 40
    places = np.flatnonzero(label != NO_TARGET)
    assert len(places) == 5
    assert places.min() >= 10
    assert not (places % 2).any()
    value_of = dict(zip(keys, values, strict=True))
    assert [value_of[row[place]] for place in places] == label[places].tolist()
    asked += places.tolist()
  assert (tokens.min(), tokens.max()) == (0, 39)  # random ids, too
  late = np.mean(np.array(asked) >= 21)  # 5.5 of 11 places
  assert (late < 0.4) == (power < 1), "small powers ask early"
  block = ExampleBlock("", tokens, labels)
  places, targets = block.targets_of()
  for i, j in itertools.product(range(20), range(5)):
    key_at = places[i, j] - distances(block)[i, j]
    assert key_at in range(0, 10, 2)
    assert tokens[i, key_at] == tokens[i, places[i, j]]
    assert tokens[i, key_at + 1] == targets[i, j]


@pytest.mark.parametrize(
  ("segment", "options", "message"),
  [
    (Segment(64, 17, 1), {}, r"pairs must lie in 1\.\.16, a quarter of the length; got 17"),
    (Segment(64, 0, 1), {}, "pairs must lie in"),
    (Segment(63, 4, 1), {}, "length must be even; got 63"),
    (Segment(64, 4, 0), {}, "examples must be at least 1; got 0"),
    (Segment(64, 4, 1), dict(vocab_size=64), "mqar_vocab_size must be above the length 64; got 64"),
    (Segment(64, 4, 1), dict(power=0), r"mqar_power must lie in \(0, 1\]; got 0"),
  ],
)
def test_sizes_that_do_not_go_together(segment, options, message):
  with pytest.raises(DataError, match=message):
    draw_examples(segment, **(dict(vocab_size=100, seed=0) | options))


@pytest.mark.parametrize("text", ["", "64:4", "64:4:x", "64:4:10,", "64:4:-1"])
def test_segments_that_cannot_be_read(text):
  with pytest.raises(DataError, match="mqar_test must be length:pairs:examples"):
    parse_segments(text, "mqar_test")


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(sequence_length=64), "sequence_length must be 0 for source 'mqar'; got 64"),
    (dict(path="somewhere"), "path must be empty for source 'mqar'"),
    (dict(mqar_order="random"), "mqar_order must be one of"),
  ],
)
def test_configurations_that_cannot_be(options, message):
  with pytest.raises(DataError, match=message):
    DataConfig(**(dict(source="mqar", sequence_length=0) | options))


DATA = DataConfig(
  source="mqar",
  mqar_train="16:2:10,16:4:7,32:4:6",
  mqar_test="16:2:9,32:8:5",
  mqar_vocab_size=64,
  sequence_length=0,
  batch_size=4,
  seed=5,
)


@pytest.fixture(scope="module")
def examples():
  return load_data(DATA)


def of_block(batch):
  """(length, targets of the first row) of a batch."""
  return batch["tokens"].shape[1], int((batch["weights"][0] > 0).sum())


def test_training_batches(examples):
  batches = batches_of(examples, DATA)
  epoch = list(itertools.islice(batches, 7))
  # Segment after segment, the last batch of each with empty rows.
  assert [of_block(b) for b in epoch] == [(16, 2)] * 3 + [(16, 4)] * 2 + [(32, 4)] * 2
  assert [int((b["weights"].sum(1) > 0).sum()) for b in epoch] == [4, 4, 2, 4, 3, 4, 2]
  for batch in epoch:
    assert batch["tokens"].shape[0] == 4
    assert batch["targets"].shape == batch["places"].shape == batch["weights"].shape == (4, 4)
    sums = batch["weights"].sum(1)
    np.testing.assert_allclose(sums, np.round(sums))
  first = examples.splits["train"][0]
  rows = np.concatenate([b["tokens"] for b in epoch[:3]])
  np.testing.assert_array_equal(rows[:10], first.tokens)
  labels = np.full_like(first.labels[:4], NO_TARGET)
  np.put_along_axis(labels, epoch[0]["places"][:, :2], epoch[0]["targets"][:, :2], axis=1)
  np.testing.assert_array_equal(labels, first.labels[:4])
  np.testing.assert_array_equal(next(batches)["tokens"], epoch[0]["tokens"])
  assert batches.tokens_per_step == 4 * (5 * 16 + 2 * 32) / 7
  assert batches.position == 8
  resumed = batches_of(examples, DATA)
  resumed.set_state(batches.get_state())
  np.testing.assert_array_equal(next(resumed)["tokens"], next(batches)["tokens"])
  other = batches_of(examples, dataclasses.replace(DATA, batch_size=8))
  with pytest.raises(DataError, match="set_state must get a state of these data"):
    other.set_state(batches.get_state())


def test_mixed_batches_and_hosts(examples):
  mixed = dataclasses.replace(DATA, mqar_order="mixed")
  key = lambda batch: batch["tokens"].tobytes()  # noqa: E731
  straight = {key(b) for b in itertools.islice(batches_of(examples, DATA), 7)}
  batches = batches_of(examples, mixed)
  epochs = [list(itertools.islice(batches, 7)) for _ in range(2)]
  for epoch in epochs:
    assert {key(b) for b in epoch} == straight
  assert [key(b) for b in epochs[0]] != [key(b) for b in epochs[1]]
  parts = [batches_of(examples, mixed, process_index=i, process_count=2) for i in range(2)]
  for whole in epochs[0]:
    halves = [next(part) for part in parts]
    for name in whole:
      np.testing.assert_array_equal(np.concatenate([h[name] for h in halves]), whole[name])


def test_evaluation_batches(examples):
  batches = evaluation_batches(examples, DATA)
  assert len(batches) == len(list(batches)) == 3 + 2
  assert sum(b["weights"].sum() for b in batches) == pytest.approx(9 + 5)
  assert batches.targets == 9 * 2 + 5 * 8
  part = evaluation_batches(examples, DATA, max_tokens=150)  # about half of 9 x 16 + 5 x 32
  assert sum(b["weights"].sum() for b in part) == pytest.approx(5 + 3)
  with pytest.raises(DataError, match="split must be one of"):
    evaluation_batches(examples, DATA, split="test")
  with pytest.raises(DataError, match="overlap must be 0"):
    evaluation_batches(examples, DATA, overlap=3)


def test_recall_by_segment_and_distance(examples):
  """An oracle that looks back at most 16 tokens, and a model axis with one that knows nothing."""
  blocks = examples.splits["validation"]
  answers = {}
  for block in blocks:
    places, targets = block.targets_of()
    near = np.where(distances(block) <= 16, targets, 0)
    for row, at, answer in zip(block.tokens, places, near, strict=True):
      answers[row.tobytes()] = dict(zip(at.tolist(), answer.tolist(), strict=True))

  def predict(params, tokens, places):
    found = [
      [answers.get(row.tobytes(), {}).get(place, -1) for place in at]
      for row, at in zip(tokens, places.tolist(), strict=True)
    ]
    return np.stack([np.array(found), np.full(places.shape, -1)])

  right = recall.right_answers(predict, None, blocks, 4)
  assert [r.shape for r in right] == [(2, 9, 2), (2, 5, 8)]
  found = recall.summarize(blocks, [r[0] for r in right])
  shares = [float((distances(block) <= 16).mean()) for block in blocks]
  assert [s.accuracy for s in found.segments] == pytest.approx(shares)
  assert found.accuracy == pytest.approx((9 * shares[0] + 5 * shares[1]) / 14)
  assert [(s.length, s.pairs, s.examples) for s in found.segments] == [(16, 2, 9), (32, 8, 5)]
  for segment in found.segments:
    assert sum(count for _, count, _ in segment.by_distance) == segment.examples * segment.pairs
    assert all(accuracy == (edge <= 16) for edge, _, accuracy in segment.by_distance)
  assert {edge for edge, _, _ in found.segments[1].by_distance} >= {16, 32}
  assert recall.summarize(blocks, [r[1] for r in right]).accuracy == 0
  assert found.describe().splitlines()[0].split()[:3] == ["segment", "examples", "recall"]


@pytest.fixture(scope="module", autouse=True)
def _one_device(tmp_path_factory):
  with small_runs.one_device(tmp_path_factory.mktemp("compiled")):
    yield


# Every length is a program to compile.
ONE_LENGTH = dataclasses.replace(DATA, mqar_train="16:2:10,16:4:7", mqar_test="16:2:9,16:4:5")


def experiment(**train) -> config.Experiment:
  sizes = dict(features=8, feature_dim=4, vocab_size=64, loss_chunk=3)
  schedule = dict(steps=6, log_every=1, eval_every=3, checkpoint_every=3)
  return config.Experiment(
    model=zoo.get_config("mqar-tiny", **sizes),
    data=ONE_LENGTH,
    optimizer=config.OptimizerConfig(learning_rate=0.05, warmup_steps=0, decayed="everything"),
    train=config.TrainConfig(**(schedule | train)),
  )


@pytest.fixture(scope="module")
def fresh():
  """(parts, state) of an untrained model."""
  return state.initial_state(experiment(), state.make_mesh(config.MeshConfig()))[:2]


def test_loss_at_places_is_the_loss_of_these_positions(examples, fresh):
  parts, current = fresh
  block = examples.splits["train"][1]
  places, targets = block.targets_of()
  weights = (block.labels != NO_TARGET).astype(np.float32)
  everywhere = np.where(weights > 0, block.labels, 0)

  @jax.jit
  def both(params):
    model = state.merge(parts, params)
    at_places = model.loss(block.tokens, targets, places=places)
    return at_places, model.loss(block.tokens, everywhere, weights)

  got, expected = both(current.params)
  for name, one, other in zip(got._fields, got, expected, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-6, err_msg=name)
  assert float(got.weight) == targets.size


def test_a_rate_of_its_own_is_that_rate(examples, fresh):
  """The third argument of the step gives what another learning rate in the configuration gives."""
  parts, first = fresh
  batch = next(batches_of(examples, DATA))
  slow = small_runs.changed(experiment(), optimizer=dict(learning_rate=0.05 / 8))
  results = []
  for base, arguments in ((experiment(), (jnp.float32(1 / 8),)), (slow, ())):
    current, step = first, jax.jit(state.make_train_step(base, parts))
    for _ in range(2):
      current, _ = step(current, batch, *arguments)
    results.append(current.params)
  for name, value in results[0].items():
    np.testing.assert_allclose(value, results[1][name], rtol=1e-5, atol=1e-7, err_msg=name)


@pytest.mark.slow
def test_training_resuming_and_evaluation(tmp_path, capsys):
  straight = loop.train(experiment(), tmp_path / "straight")
  summary.finish(straight)
  result = json.loads((tmp_path / "straight" / "result.json").read_text())
  # Counted in the loop by weights, and afterwards answer by answer.
  assert result["recall"]["accuracy"] == pytest.approx(straight.evaluation.accuracy, abs=1e-6)
  assert result["accuracy"] == straight.evaluation.accuracy
  assert [s["pairs"] for s in result["recall"]["segments"]] == [2, 4]
  printed = capsys.readouterr().out
  for words in ("data mqar, vocabulary 64", "train: 7 examples of 16 tokens, 4 pairs", "recall"):
    assert words in printed
  assert (tmp_path / "straight" / "curves.png").read_bytes()[:4] == b"\x89PNG"
  loop.train(experiment(steps=3), tmp_path / "resumed")
  other = dataclasses.replace(experiment(), data=dataclasses.replace(ONE_LENGTH, seed=6))
  with pytest.raises(ValueError, match="must be gone on with on its own data"):
    loop.train(other, tmp_path / "resumed")
  resumed = loop.train(experiment(), tmp_path / "resumed")
  assert resumed.run.first_step == 3
  assert resumed.run.batches.get_state() == straight.run.batches.get_state()
  loaded = runs.load(tmp_path / "resumed", "last")
  assert loaded.experiment == experiment()
  found = recall.measure(loaded.parts, loaded.params, load_data(ONE_LENGTH), ONE_LENGTH)
  assert found.accuracy == pytest.approx(resumed.evaluation.accuracy, abs=1e-6)
