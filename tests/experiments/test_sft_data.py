"""Prompts with answers: layout, shortening, packing, resumption, hosts, and errors."""

import itertools
import json

import numpy as np
import pytest

from attnzoo.experiments.data import DataConfig, DataError, evaluation_batches, load_data
from attnzoo.experiments.data import train_batches as make_batches
from attnzoo.experiments.data.sft import packed
from attnzoo_testing.tiny_tokenizer import train_json

END = 256
PAIRS = [(f"Question {i}: " + "why? " * (i % 4) + "\nAnswer:", " because" * (1 + i % 3))
         for i in range(23)]  # fmt: skip


def write(path, pairs=PAIRS, names=("prompt", "answer")):
  path.write_text("".join(json.dumps(dict(zip(names, p, strict=True))) + "\n" for p in pairs))
  return str(path)


@pytest.fixture
def config(tmp_path):
  paths = dict(
    path=write(tmp_path / "train.jsonl"), validation_path=write(tmp_path / "held.jsonl", PAIRS[:5])
  )
  return DataConfig(source="sft", **paths, sequence_length=64, batch_size=4, seed=3)


def options(config, **changes):
  return DataConfig(**{**vars(config), **changes})


def take(config, count, position=None, **process):
  batches = make_batches(load_data(config), config, **process)
  if position is not None:
    batches.set_state(position)
  found = list(itertools.islice(batches, count))
  state = batches.get_state()
  batches.close()
  return found, state


def examples_of(batches):
  """(inputs, learned targets) of every example in the batches, as bytes."""
  found = []
  for batch in batches:
    alone = (batch["tokens"] != END).astype(int)  # without packing there are no segments
    arrays = (*(batch[name] for name in ("tokens", "targets", "weights")),
              batch.get("segment_ids", alone))  # fmt: skip
    for tokens, targets, weights, segments in zip(*arrays, strict=True):
      for segment in range(1, segments.max() + 1):
        at = segments == segment
        assert (np.diff(np.flatnonzero(at)) == 1).all()
        np.testing.assert_array_equal(tokens[at][1:], targets[at][:-1])
        learned = targets[at][weights[at] == 1]
        assert learned[-1] == END
        found.append((bytes(tokens[at].astype(np.uint8)), bytes(learned[:-1].astype(np.uint8))))
      assert (weights[segments == 0] == 0).all()
      assert (tokens[segments == 0] == END).all()
  return found


def expected_examples(pairs):
  return sorted(((p + a).encode(), a.encode()) for p, a in pairs)


@pytest.mark.parametrize("pack", [False, True])
def test_an_epoch_has_every_example_once_and_learns_its_answer(config, pack):
  config = options(config, sft_pack=pack, sequence_length=96, batch_size=1)
  batches = make_batches(load_data(config), config)
  rows = round(batches.steps_per_epoch)
  assert rows == 23 if not pack else rows < 20
  first, second = (list(itertools.islice(batches, rows)) for _ in range(2))
  assert batches.epoch == 2
  batches.close()
  for epoch in (first, second):
    assert sorted(examples_of(epoch)) == expected_examples(PAIRS)
  order = [[batch["tokens"].tobytes() for batch in epoch] for epoch in (first, second)]
  assert order[0] != order[1]
  expected = dict(tokens="int32", targets="int32", weights="float32")
  expected |= dict(segment_ids="int32") if pack else {}
  assert {name: x.dtype.name for name, x in first[0].items()} == expected
  assert {x.shape for x in first[0].values()} == {(1, 96)}


def test_one_example_by_hand(config, tmp_path):
  path = write(tmp_path / "one.jsonl", [("ab", "xyz")])
  config = options(config, path=path, validation_path=path, sequence_length=8, batch_size=1)
  (batch,), _ = take(config, 1)
  a, b, x, y, z = b"abxyz"
  assert batch["tokens"].tolist() == [[a, b, x, y, z, END, END, END]]
  assert batch["targets"].tolist() == [[b, x, y, z, END, END, END, END]]
  assert batch["weights"].tolist() == [[0, 1, 1, 1, 1, 0, 0, 0]]
  (batch,), _ = take(options(config, sft_pack=True), 1)
  assert batch["segment_ids"].tolist() == [[1, 1, 1, 1, 1, 0, 0, 0]]
  (batch,), _ = take(options(config, sft_open=True), 1)
  assert batch["tokens"].tolist() == [[END, a, b, x, y, z, END, END]]
  assert batch["weights"].tolist() == [[0, 0, 1, 1, 1, 1, 0, 0]]


@pytest.mark.parametrize(
  ("prompt", "answer", "inputs", "learned"),
  [
    ("abcdef", "xy", b"abcefxy", b"xy"),  # 8 tokens, room for 7: 3 of the front, 4 of the tail
    ("abcdefghijkl", "xy", b"abcklxy", b"xy"),
    ("ab", "qrstuvwxyz", b"abqwxyz", b"qwxyz"),
    ("abcde", "xy", b"abcdexy", b"xy"),  # fits as it is
  ],
)
def test_long_examples_lose_their_middle(config, tmp_path, prompt, answer, inputs, learned):
  path = write(tmp_path / "long.jsonl", [(prompt, answer)])
  for pack in (False, True):
    changes = dict(path=path, validation_path=path, sequence_length=8, batch_size=1, sft_pack=pack)
    found, _ = take(options(config, **changes), 1)
    assert examples_of(found) == [(inputs, learned)]
  split = load_data(options(config, **changes)).splits["train"]
  assert bytes(split.prompt(0, 8)) == inputs[: len(inputs) - len(learned)]


def test_packing_leaves_little_room():
  sizes = np.random.default_rng(0).integers(1, 400, 500).tolist()
  rows = packed(sizes, 512)
  assert sorted(itertools.chain(*rows)) == list(range(500))
  filled = [sum(sizes[i] for i in row) for row in rows]
  assert max(filled) <= 512
  assert len(rows) <= 1.05 * sum(sizes) / 512 + 1


@pytest.mark.parametrize("pack", [False, True])
def test_position_and_hosts(config, pack):
  config = options(config, sft_pack=pack)
  whole, _ = take(config, 12)
  _, state = take(config, 5)
  assert json.loads(state)["position"] == 5
  for hosts in (1, 2):
    parts = [
      take(options(config, workers=host), 7, state, process_index=host, process_count=hosts)[0]
      for host in range(hosts)
    ]
    for step, expected in enumerate(whole[5:]):
      for name, rows in expected.items():
        got = np.concatenate([part[step][name] for part in parts])
        np.testing.assert_array_equal(got, rows)
  with pytest.raises(DataError, match="set_state must get a state of these data .*packed"):
    take(options(config, sft_pack=not pack), 1, state)


def test_evaluation_takes_the_split_in_order(config):
  data = load_data(config)
  whole = list(evaluation_batches(data, config))
  assert [batch["tokens"].shape for batch in whole] == [(4, 64)] * 2
  assert examples_of(whole) == [((p + a).encode(), a.encode()) for p, a in PAIRS[:5]]
  (first,) = evaluation_batches(data, config, max_tokens=2 * 64)
  assert len(examples_of([first])) == 2
  parts = [evaluation_batches(data, config, process_index=i, process_count=2) for i in range(2)]
  for batch, *halves in zip(whole, *parts, strict=True):
    for name, rows in batch.items():
      np.testing.assert_array_equal(np.concatenate([half[name] for half in halves]), rows)


def test_held_out_prompts_keep_their_answers_together(config, tmp_path):
  pairs = [(prompt, answer + end) for prompt, answer in PAIRS for end in ("!", "?")]
  config = options(config, path=write(tmp_path / "all.jsonl", pairs), validation_path="",
                   validation_fraction=0.3, sequence_length=96)  # fmt: skip
  data = load_data(config)
  held = examples_of(evaluation_batches(data, config))
  assert 0 < len(held) < len(pairs)
  assert len(held) % 2 == 0
  trained = examples_of(evaluation_batches(data, config, split="train"))
  assert sorted(held + trained) == expected_examples(pairs)
  assert f"train: {len(trained)} prompts with answers" in data.describe()


def test_tokenizer_and_other_field_names(config, tmp_path):
  """The boundary of prompt and answer is exact, whatever the tokenizer would join."""
  path = write(tmp_path / "named.jsonl", names=("question", "reply"))
  tokenizer = str(train_json(tmp_path / "tokenizer.json"))
  config = options(config, path=path, validation_path=path, tokenizer=tokenizer,
                   prompt_field="question", answer_field="reply")  # fmt: skip
  data = load_data(config)
  for number, (prompt, answer) in enumerate(PAIRS):
    tokens, learned = data.splits["train"].sequence(number, 1000, data.end_id)
    assert tokens[~learned].tolist() == data.tokenizer.encode(prompt).tolist()
    assert tokens[learned].tolist() == [*data.tokenizer.encode(answer).tolist(), data.end_id]
    assert data.splits["train"].prompt(number, 1000) == tokens[~learned].tolist()


@pytest.mark.parametrize(
  ("lines", "message"),
  [
    ('{"prompt": "a"}', r"answer_field must name a string field .*'answer' at .*line 2, which has"),
    ('{"answer": "a", "prompt": 3}', "prompt_field must name a string field .*line 2"),
    ('{"prompt": "a", "answer": " "}', "answer_field must name .* an empty 'answer' at .*line 2"),
    ('{"prompt": "", "answer": "b"}', "prompt_field must name .* an empty 'prompt' at .*line 2"),
    ('{"prompt": "a", ', "path must hold one JSON object per line.*line 2"),
    ("[1]", "prompt_field must name a string field .*which has list"),
  ],
)
def test_bad_lines_are_named(config, tmp_path, lines, message):
  with (tmp_path / "held.jsonl").open("w") as file:
    file.write('{"prompt": "a", "answer": "b"}\n' + lines + "\n")
  with pytest.raises(DataError, match=message):
    load_data(config)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(path="nowhere.jsonl"), "path must name an existing file or folder; got nowhere.jsonl"),
    (dict(validation_path="no.jsonl"), "validation_path must name an existing file"),
    (dict(path=""), "path must be given for source 'sft'"),
    (dict(sequence_length=3), "sequence_length must be at least 4 for source 'sft'"),
    (dict(answer_field="prompt"), "answer_field must differ from prompt_field"),
  ],
)
def test_errors(config, changes, message):
  with pytest.raises(DataError, match=message):
    load_data(options(config, **changes))


def test_more_errors(config, tmp_path):
  (tmp_path / "empty").mkdir()
  with pytest.raises(DataError, match="path must hold .jsonl files"):
    load_data(options(config, path=str(tmp_path / "empty")))
  one = options(config, path=write(tmp_path / "one.jsonl", PAIRS[:1]), validation_path="")
  with pytest.raises(DataError, match="path must leave a non-empty (train|validation) split"):
    load_data(one)
  data = load_data(config)
  with pytest.raises(DataError, match="overlap must be 0"):
    evaluation_batches(data, config, overlap=3)
  with pytest.raises(DataError, match="split must be one of"):
    evaluation_batches(data, config, split="test")
