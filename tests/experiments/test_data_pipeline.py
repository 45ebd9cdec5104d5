"""Batches: coverage, segments, exact resumption, hosts, the cache, and errors."""

import itertools
import json
import time

import numpy as np
import pytest

from attnzoo.experiments.data import (
  ByteTokenizer,
  DataConfig,
  DataError,
  EvaluationBatches,
  TrainBatches,
  bits_per_byte,
  load_corpus,
)
from attnzoo_testing.tiny_tokenizer import train_json

DOCUMENTS = [(f"{i}. " * (1 + i * 7 % 11)).encode() for i in range(1, 60)]
END = 256


@pytest.fixture
def config(tmp_path):
  for name, part in dict(train=DOCUMENTS, held=DOCUMENTS[:30]).items():
    lines = [json.dumps({"text": text.decode()}) + "\n" for text in part]
    (tmp_path / f"{name}.jsonl").write_text("".join(lines))
  paths = dict(path=str(tmp_path / "train.jsonl"), validation_path=str(tmp_path / "held.jsonl"))
  return DataConfig(**paths, sequence_length=16, batch_size=4, seed=3)


@pytest.fixture
def corpus(config):
  return load_corpus(config)


def options(config, **changes):
  return DataConfig(**{**vars(config), **changes})


def take(batches, count):
  return list(itertools.islice(batches, count))


def assert_same(got, expected):
  assert len(got) == len(expected)
  for one, other in zip(got, expected, strict=True):
    assert one.keys() == other.keys()
    for name in one:
      np.testing.assert_array_equal(one[name], other[name])
      assert one[name].dtype == other[name].dtype


def test_stream_is_documents_between_end_ids(corpus):
  expected = b"".join(b"\0" + text for text in DOCUMENTS) + b"\0"
  stream = np.where(corpus.train.tokens == END, 0, corpus.train.tokens)
  assert stream.astype(np.uint8).tobytes() == expected
  assert corpus.train.documents == len(DOCUMENTS)
  assert corpus.train.text_bytes == sum(map(len, DOCUMENTS))
  assert "59 documents" in corpus.describe()


def test_training_batches_have_the_stated_form(corpus, config):
  batches = TrainBatches(corpus, config)
  for batch in take(batches, 20):
    assert {name: (a.shape, a.dtype.name) for name, a in batch.items()} == dict(
      tokens=((4, 16), "int32"), targets=((4, 16), "int32"),
      weights=((4, 16), "float32"), segment_ids=((4, 16), "int32"))  # fmt: skip
    np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    assert (batch["weights"] == 1).all()
    # A new segment begins exactly where the end id is the input.
    segments = batch["segment_ids"]
    assert (segments[:, 0] == 1).all()
    np.testing.assert_array_equal(np.diff(segments), batch["tokens"][:, 1:] == END)
  batches.close()


def windows_of(corpus, batches, count):
  """Start of each row in the stream, found by its contents."""
  rows = [row for batch in take(batches, count) for row in
          np.concatenate([batch["tokens"], batch["targets"][:, -1:]], axis=1)]  # fmt: skip
  views = np.lib.stride_tricks.sliding_window_view(corpus.train.tokens, 17)
  found = [np.flatnonzero((views == row).all(1)) for row in rows]
  assert all(len(places) for places in found)
  return found


def test_an_epoch_takes_each_window_once_and_epochs_differ(tmp_path):
  """On a text without repetitions, so that a window's place is known from its contents."""
  numbers = np.random.default_rng(0).integers(256, size=16 * 41 + 7).astype(np.uint8)
  (tmp_path / "a.txt").write_bytes(numbers.tobytes())
  config = DataConfig(path=str(tmp_path / "a.txt"), validation_path=str(tmp_path / "a.txt"),
                      sequence_length=16, batch_size=4)  # fmt: skip
  corpus = load_corpus(config)
  batches = TrainBatches(corpus, config)
  assert batches.steps_per_epoch == 10
  epochs = []
  for epoch in range(3):
    assert batches.epoch == epoch
    starts = np.array([int(places[0]) for places in windows_of(corpus, batches, 10)])
    ordered = np.sort(starts)
    assert (np.diff(ordered) == 16).all()
    assert len(starts) == 40
    assert starts.tolist() != ordered.tolist()  # shuffled
    epochs.append((int(ordered[0]), (starts // 16).tolist()))
  assert len({first for first, _ in epochs}) > 1  # other cuts
  assert epochs[0][1] != epochs[1][1]  # another order
  again = TrainBatches(corpus, config)
  other = TrainBatches(corpus, options(config, seed=1))
  first, second = windows_of(corpus, again, 1), windows_of(corpus, other, 1)
  assert [int(p[0]) // 16 for p in first] == epochs[0][1][:4]
  assert not all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
  for iterator in (batches, again, other):
    iterator.close()


@pytest.mark.parametrize("position", [0, 1, 7, 45])
def test_resume_in_the_middle_of_an_epoch_is_exact_for_any_workers(corpus, config, position):
  reference = TrainBatches(corpus, options(config, workers=0))
  take(reference, position)
  state = reference.get_state()
  assert json.loads(state)["position"] == position
  expected = take(reference, 30)
  for workers in (0, 1, 3):
    batches = TrainBatches(corpus, options(config, workers=workers, prefetch=4))
    take(batches, 3)  # has read ahead before the state is set
    batches.set_state(state)
    assert batches.get_state() == state
    assert_same(take(batches, 30), expected)
    assert batches.position == position + 30
    batches.close()
  reference.close()


def test_hosts_share_the_global_batch_and_states_fit_any_number_of_them(corpus, config):
  whole = TrainBatches(corpus, config)
  take(whole, 5)
  state = whole.get_state()
  expected = take(whole, 20)
  for hosts in (2, 4):
    parts = []
    for host in range(hosts):
      batches = TrainBatches(corpus, config, process_index=host, process_count=hosts)
      batches.set_state(state)
      parts.append(take(batches, 20))
      batches.close()
    for step, batch in enumerate(expected):
      for host in range(hosts):
        block = slice(4 // hosts * host, 4 // hosts * (host + 1))
        assert_same([parts[host][step]], [{k: v[block] for k, v in batch.items()}])
  whole.close()


@pytest.mark.parametrize(
  "changes", [dict(seed=4), dict(sequence_length=15), dict(batch_size=2), dict(path="held.jsonl")]
)
def test_a_state_of_other_batches_is_refused(corpus, config, changes, tmp_path):
  batches = TrainBatches(corpus, config)
  if "path" in changes:
    changes = dict(path=str(tmp_path / changes["path"]))
  changed = options(config, **changes)
  other = TrainBatches(load_corpus(changed), changed)
  key = "corpus" if "path" in changes else next(iter(changes))
  with pytest.raises(DataError, match=f"set_state must get a state of these data .*{key}"):
    other.set_state(batches.get_state())
  batches.close()
  other.close()


@pytest.mark.parametrize("overlap", [0, 5, 15])
@pytest.mark.parametrize("max_tokens", [None, 1, 64, 65, 200])
def test_evaluation_covers_each_target_once_in_order(corpus, config, overlap, max_tokens):
  stream = corpus.validation.tokens
  batches = EvaluationBatches(corpus, config, max_tokens=max_tokens, overlap=overlap)
  seen = list(batches)
  assert len(seen) == len(batches)
  assert {batch["tokens"].shape for batch in seen} == {(4, 16)}
  counted = np.concatenate([batch["targets"][batch["weights"] > 0] for batch in seen])
  inputs = np.concatenate([batch["tokens"][batch["weights"] > 0] for batch in seen])
  targets = min(len(stream) - 1, max_tokens or len(stream))
  assert batches.targets == targets
  np.testing.assert_array_equal(counted, stream[1 : targets + 1])
  np.testing.assert_array_equal(inputs, stream[:targets])
  assert batches.target_bytes == np.count_nonzero(counted != END)
  for batch in seen:
    padding = batch["segment_ids"] == 0
    assert (batch["weights"][padding] == 0).all()
    if overlap == 0:
      assert (batch["weights"] == ~padding).all()
  assert (seen[-1]["weights"] > 0).any()
  assert_same(list(batches), seen)


def test_evaluation_rows_are_divided_over_hosts(corpus, config):
  whole = list(EvaluationBatches(corpus, config))
  parts = [list(EvaluationBatches(corpus, config, process_index=host, process_count=2))
           for host in range(2)]  # fmt: skip
  joined = [{name: np.concatenate([a[name], b[name]]) for name in a}
            for a, b in zip(*parts, strict=True)]  # fmt: skip
  assert_same(joined, whole)


def test_bits_per_byte_of_a_uniform_model_is_eight(corpus, config):
  batches = EvaluationBatches(corpus, config)
  nats = sum(batch["weights"][batch["targets"] < END].sum() for batch in batches) * np.log(256)
  assert bits_per_byte(float(nats), batches.target_bytes) == pytest.approx(8)


def test_token_files_have_bytes_only_with_their_tokenizer(tmp_path, config, corpus):
  ids = np.asarray(corpus.validation.tokens)
  ids.astype("<u2").tofile(tmp_path / "ids.bin")
  sizes = dict(path=str(tmp_path / "ids.bin"), validation_path="", token_dtype="uint16",
               validation_fraction=0.5)  # fmt: skip
  known = options(config, **sizes, token_vocab_size=257, token_end_id=END)
  batches = EvaluationBatches(load_corpus(known), known)
  held = ids[len(ids) // 2 :]
  assert batches.target_bytes == np.count_nonzero(held[1:] != END)
  unknown = options(config, **sizes, token_vocab_size=300)
  batches = EvaluationBatches(load_corpus(unknown), unknown)
  assert batches.target_bytes is None
  assert all((batch["segment_ids"] <= 1).all() for batch in batches)
  assert batches.targets == len(held) - 1
  other_end = options(config, **sizes, token_vocab_size=257, token_end_id=3)
  with pytest.raises(DataError, match="tokenizer must end documents with id 3 .* got id 256"):
    load_corpus(other_end)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda c, o: TrainBatches(c, options(o, sequence_length=10**6)),
     "sequence_length must be below the .* tokens of the train split; got 1000000"),
    (lambda c, o: TrainBatches(c, o, process_count=3), "a multiple of the 3 hosts; got 4"),
    (lambda c, o: TrainBatches(c, o, process_index=2, process_count=2), r"lie in 0..1; got 2"),
    (lambda c, o: EvaluationBatches(c, o, split="test"), "split must be one of .* got 'test'"),
    (lambda c, o: EvaluationBatches(c, o, overlap=16), "overlap must lie in 0..15; got 16"),
    (lambda c, o: EvaluationBatches(c, o, max_tokens=0), "max_tokens must be at least 1; got 0"),
  ],
)  # fmt: skip
def test_errors(corpus, config, call, message):
  with pytest.raises(DataError, match=message):
    call(corpus, config)


def test_no_work_is_done_token_by_token(tmp_path):
  """The pipeline shares the cores with training; it runs near 10M tokens/s on one of them."""
  (tmp_path / "a.txt").write_bytes(b"some words in a line\n" * 50_000)
  config = DataConfig(path=str(tmp_path / "a.txt"), workers=0)
  batches = TrainBatches(load_corpus(config), config)
  next(batches)
  start = time.process_time()
  take(batches, 50)
  assert 50 * 16 * 512 / (time.process_time() - start) > 200_000
  batches.close()


def test_shortest_usable_text(tmp_path):
  (tmp_path / "a.txt").write_text("0123456789abcdef")
  config = DataConfig(path=str(tmp_path / "a.txt"), validation_path=str(tmp_path / "a.txt"),
                      sequence_length=17, batch_size=2)  # fmt: skip
  batches = TrainBatches(load_corpus(config), config)  # 16 bytes and two end ids: one window
  for batch in take(batches, 3):
    assert batch["targets"][0].tolist() == [*b"0123456789abcdef", END]
  batches.close()


class TestCache:
  @pytest.fixture
  def tokenised(self, config, tmp_path):
    return options(config, tokenizer=str(train_json(tmp_path / "tokenizer.json")))

  def test_second_start_maps_what_the_first_wrote(self, tokenised, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    memory = load_corpus(tokenised)
    load_corpus(tokenised, cache)
    (entry,) = cache.iterdir()
    from attnzoo.experiments.data import JsonTokenizer

    monkeypatch.setattr(JsonTokenizer, "encode_documents", None)  # must not be called again
    mapped = load_corpus(tokenised, cache)
    assert mapped.fingerprint == memory.fingerprint
    assert entry.name == memory.fingerprint[:32]
    assert isinstance(mapped.train.tokens, np.memmap)
    for split in ("train", "validation"):
      np.testing.assert_array_equal(mapped.splits[split].tokens, memory.splits[split].tokens)
      assert mapped.splits[split].documents == memory.splits[split].documents
    np.testing.assert_array_equal(mapped.validation.token_bytes, memory.validation.token_bytes)

  def test_changed_text_and_changed_tokenizer_have_their_own_entries(self, tokenised, tmp_path):
    cache = tmp_path / "cache"
    named = options(tokenised, cache=str(cache))
    load_corpus(named)
    with (tmp_path / "train.jsonl").open("a") as file:
      file.write('{"text": "one more"}\n')
    longer = load_corpus(named)
    assert longer.train.documents == len(DOCUMENTS) + 1
    train_json(tmp_path / "tokenizer.json", vocabulary=280)
    load_corpus(named)
    assert len(list(cache.iterdir())) == 3

  def test_a_failed_write_leaves_nothing(self, tokenised, tmp_path):
    with (tmp_path / "held.jsonl").open("a") as file:
      file.write("{\n")
    with pytest.raises(DataError, match="held.jsonl, line 31"):
      load_corpus(tokenised, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []

  def test_a_damaged_entry_is_refused(self, tokenised, tmp_path):
    cache = tmp_path / "cache"
    load_corpus(tokenised, cache)
    (entry,) = cache.iterdir()
    with (entry / "train.tokens").open("ab") as file:
      file.write(b"\0")
    with pytest.raises(DataError, match="cache must hold .*delete that folder"):
      load_corpus(tokenised, cache)

  def test_small_byte_corpora_have_no_entry(self, config, tmp_path, monkeypatch):
    load_corpus(config, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    from attnzoo.experiments.data import corpus

    memory = load_corpus(config)
    monkeypatch.setattr(corpus, "_SMALL_BYTES", 0)
    mapped = load_corpus(config, tmp_path / "cache")
    assert isinstance(mapped.tokenizer, ByteTokenizer)
    np.testing.assert_array_equal(mapped.train.tokens, memory.train.tokens)
    np.testing.assert_array_equal(mapped.validation.token_bytes, memory.validation.token_bytes)
