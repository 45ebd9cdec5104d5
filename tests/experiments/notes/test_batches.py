"""Batches of notes: every note once an epoch, in few lengths, on any number of hosts."""

import collections
import dataclasses

import numpy as np
import pytest

from attnzoo.experiments.data import DataConfig, DataError, evaluation_batches, train_batches
from attnzoo.experiments.data.notes.batches import bucket_lengths
from attnzoo.experiments.data.notes.sets import NoteSet, NoteSplit
from attnzoo.experiments.data.notes.vocabulary import Vocabulary

CONFIG = DataConfig(source="icd10", batch_size=4, sequence_length=200, seed=3)


def make_split(lengths, labels=3, seed=0):
  """Note i starts with the token i + 2, by which tests know it again."""
  draw = np.random.default_rng(seed)
  ids = [np.r_[i + 2, draw.integers(1, 400, max(0, n - 1))][:n] for i, n in enumerate(lengths)]
  starts = np.cumsum([0, *lengths])
  targets = draw.integers(0, 2, (len(lengths), labels)).astype(np.uint8)
  texts = tuple(f"note {i}" for i in range(len(lengths)))
  return NoteSplit(np.concatenate(ids).astype(np.int32), starts, targets, texts)


LENGTHS = dict(
  train=np.random.default_rng(1).integers(1, 150, 301).tolist(),
  validation=[5, 90, 1, 17, 33, 64],
  test=[7] * 4,
)
NOTES = NoteSet(
  name="notes",
  splits={name: make_split(lengths) for name, lengths in LENGTHS.items()},
  labels=("a", "b", "c"),
  label_names=("A", "B", "C"),
  vocabulary=Vocabulary(tuple(f"{i:03d}" for i in range(400))),
  rules="minimal",
  fingerprint="f",
)


def filled(batch):
  """The numbers of the notes of a batch, after a look at what is in its rows."""
  assert {x.dtype.name for x in batch.values()} == {"int32", "float32"}
  rows, width = batch["tokens"].shape
  assert batch["targets"].shape == (rows, 3)
  assert batch["weights"].shape == (rows, 1)
  numbers = []
  for tokens, targets, weight in zip(
    *map(batch.get, ("tokens", "targets", "weights")), strict=True
  ):
    if not weight:
      assert not tokens.any()
      assert not targets.any()
      continue
    numbers.append(int(tokens[0]) - 2)
  return numbers


def epoch_of(batches):
  return [next(batches) for _ in range(batches.steps_per_epoch)]


def test_an_epoch_has_every_note_once():
  batches = train_batches(NOTES, CONFIG)
  split = NOTES.splits["train"]
  assert batches.steps_per_epoch == 76
  orders = []
  for epoch in range(2):
    found = epoch_of(batches)
    assert batches.epoch == epoch + 1
    order = [filled(batch) for batch in found]
    orders.append(order)
    assert sorted(sum(order, [])) == list(range(301))
    for batch, numbers in zip(found, order, strict=True):
      width = batch["tokens"].shape[1]
      assert width in bucket_lengths(NOTES, CONFIG)
      for row, number in enumerate(numbers):
        note = split.note(number)
        np.testing.assert_array_equal(batch["tokens"][row, : len(note)], note)
        assert not batch["tokens"][row, len(note) :].any()
        np.testing.assert_array_equal(batch["targets"][row], split.targets[number])
  assert orders[0] != orders[1]


def test_notes_of_like_length_come_together():
  batches = train_batches(NOTES, CONFIG)
  found = epoch_of(batches)
  widths = collections.Counter(batch["tokens"].shape[1] for batch in found)
  assert set(widths) == {48, 80, 112, 160}
  assert batches.tokens_per_step == 4 * np.mean([batch["tokens"].shape[1] for batch in found])
  spreads = [np.ptp(NOTES.splits["train"].lengths[filled(batch)]) for batch in found]
  assert np.mean(spreads) < 10  # of 149
  order = [batch["tokens"].shape[1] for batch in found]
  assert order != sorted(order)


def test_four_lengths_within_the_limit():
  assert bucket_lengths(NOTES, CONFIG) == (48, 80, 112, 160)
  limit = dataclasses.replace(CONFIG, sequence_length=149)
  assert bucket_lengths(NOTES, limit) == (48, 80, 112, 149)
  with pytest.raises(DataError, match="sequence_length must be at least 149"):
    bucket_lengths(NOTES, dataclasses.replace(CONFIG, sequence_length=148))
  only_short = dataclasses.replace(NOTES, splits={"train": make_split([1, 2])})
  assert bucket_lengths(only_short, CONFIG) == (16,)


def test_hosts_share_a_batch():
  whole = train_batches(NOTES, CONFIG)
  hosts = [train_batches(NOTES, CONFIG, process_index=i, process_count=2) for i in range(2)]
  for batch in epoch_of(whole):
    parts = [next(host) for host in hosts]
    for name, values in batch.items():
      np.testing.assert_array_equal(values, np.concatenate([part[name] for part in parts]))


def test_position_is_saved_and_restored():
  batches = train_batches(NOTES, CONFIG)
  for _ in range(80):  # into the second epoch
    next(batches)
  other = train_batches(NOTES, CONFIG)
  other.set_state(batches.get_state())
  assert other.position == 80
  np.testing.assert_array_equal(next(other)["tokens"], next(batches)["tokens"])
  for change in (dict(seed=4), dict(batch_size=8), dict(drop_remainder=True)):
    with pytest.raises(DataError, match="set_state must get a state of these data"):
      train_batches(NOTES, dataclasses.replace(CONFIG, **change)).set_state(batches.get_state())
  batches.close()


def test_remainder_is_filled_up_or_dropped():
  dropping = dataclasses.replace(CONFIG, drop_remainder=True)
  notes = [n for batch in epoch_of(train_batches(NOTES, dropping)) for n in filled(batch)]
  assert len(notes) == 300
  (left_out,) = set(range(301)) - set(notes)
  assert NOTES.splits["train"].lengths[left_out] == 1
  evaluation = evaluation_batches(NOTES, dropping)
  assert [filled(batch) for batch in evaluation] == [[1, 3, 4, 5]]  # 1 and 5 tokens are left out
  with pytest.raises(DataError, match="batch_size must leave notes in each split"):
    evaluation_batches(NOTES, dataclasses.replace(dropping, batch_size=8))


def test_evaluation_is_one_pass_in_order():
  evaluation = evaluation_batches(NOTES, CONFIG)
  assert len(evaluation) == 2
  assert evaluation.targets == 18
  for _ in range(2):
    found = list(evaluation)
    assert [filled(batch) for batch in found] == [[0, 1, 2, 3], [4, 5]]
    assert [batch["tokens"].shape for batch in found] == [(4, 112), (4, 80)]
  np.testing.assert_array_equal(evaluation.numbers, np.arange(6))
  hosts = [evaluation_batches(NOTES, CONFIG, process_index=i, process_count=2) for i in range(2)]
  assert [[filled(batch) for batch in host] for host in hosts] == [[[0, 1], [4, 5]], [[2, 3], []]]


@pytest.mark.parametrize(("most", "expected"), [(1, 1), (5, 1), (6, 2), (95, 2), (96, 3), (999, 6)])
def test_evaluation_takes_whole_notes(most, expected):
  evaluation = evaluation_batches(NOTES, CONFIG, max_tokens=most)
  assert sum((filled(batch) for batch in evaluation), []) == list(range(expected))


def test_unsuitable_calls():
  with pytest.raises(DataError, match="split must be one of"):
    evaluation_batches(NOTES, CONFIG, split="dev")
  with pytest.raises(DataError, match="max_tokens must be at least 1"):
    evaluation_batches(NOTES, CONFIG, max_tokens=0)
  with pytest.raises(DataError, match="overlap must be 0"):
    evaluation_batches(NOTES, CONFIG, overlap=1)
  with pytest.raises(DataError, match="batch_size must be a multiple of the 3 hosts"):
    train_batches(NOTES, CONFIG, process_count=3)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(texts=("a",)), "one row of targets and one text each"),
    (dict(starts=np.array([0, 7, 14, 21, 27])), "starts must go from 0 to the 28 tokens"),
    (dict(seen=np.zeros((4, 2), bool)), "seen must have the shape of the targets"),
  ],
)
def test_split_checks_its_parts(change, message):
  with pytest.raises(DataError, match=message):
    dataclasses.replace(NOTES.splits["test"], **change)
