"""Tokenizers: round trips, bytes accounting, streams that never print half a character."""

import numpy as np
import pytest

from attnzoo.experiments.configs import routing_small
from attnzoo.experiments.data import (
  ByteTokenizer,
  DataConfig,
  DataError,
  check_tokenizer,
  describe_tokenizer,
  load_corpus,
  load_tokenizer,
  tokenizer_training,
)
from attnzoo.experiments.data import tokenizers as ours
from attnzoo.experiments.training import config
from attnzoo_testing.tiny_tokenizer import train_json

TEXT = "naïve façade – 日本語 🙂🙂 <|endoftext|> plain words, plain words\n"


@pytest.fixture
def bpe(tmp_path):
  return load_tokenizer(str(train_json(tmp_path / "tokenizer.json")))


def test_bytes_round_trip():
  tokenizer = load_tokenizer("bytes")
  ids = tokenizer.encode(TEXT)
  assert ids.dtype == np.int32
  assert ids.tolist() == list(TEXT.encode())
  assert tokenizer.decode(ids) == TEXT
  assert (tokenizer.vocab_size, tokenizer.end_id) == (257, 256)
  assert tokenizer.decode([0xC3, 0x28, 256, 0xE2, 256, 0x41]) == "\ufffd(\ufffdA"
  with pytest.raises(DataError, match="ids must be at most 256 .* got 257"):
    tokenizer.decode([257])


def test_json_round_trip(bpe):
  ids = bpe.encode(TEXT)
  assert bpe.decode(ids) == TEXT
  assert bpe.decode([*ids, bpe.end_id]) == TEXT
  assert ids.max() < bpe.vocab_size == 300
  # The end token spelled in a text is text.
  assert bpe.end_id not in ids
  assert len(bpe.encode("plain words")) < len("plain words")


def streamed(tokenizer, ids):
  decoder = tokenizer.decoder()
  return [decoder.push(int(token)) for token in ids] + [decoder.finish()]


@pytest.mark.parametrize("kind", ["bytes", "json"])
def test_stream_prints_whole_characters_as_soon_as_they_are_there(kind, bpe):
  tokenizer = ByteTokenizer() if kind == "bytes" else bpe
  ids = tokenizer.encode(TEXT)
  parts = streamed(tokenizer, ids)
  assert "".join(parts) == TEXT
  for i in range(1, len(ids) + 1):
    printed, known = "".join(parts[:i]), tokenizer.decode(ids[:i])
    if known.endswith("\ufffd"):  # in the middle of a character
      assert known.startswith(printed)
      assert "\ufffd" not in printed
    else:
      assert printed == known


@pytest.mark.parametrize("kind", ["bytes", "json"])
def test_stream_of_invalid_text_goes_on(kind, bpe):
  tokenizer = ByteTokenizer() if kind == "bytes" else bpe
  half = tokenizer.encode("🙂")[:2]
  assert "".join(streamed(tokenizer, half)) == "\ufffd"
  ids = [*half, tokenizer.end_id, *tokenizer.encode("next")]
  assert "".join(streamed(tokenizer, ids)) == "\ufffdnext"
  continuation = tokenizer.encode("🙂")[-1]
  parts = streamed(tokenizer, [continuation] * 20 + list(tokenizer.encode("plain words")))
  assert "".join(parts[:20]).count("\ufffd") >= 8
  assert "".join(parts).endswith("plain words")


def test_stream_with_words_that_bring_their_space(tmp_path):
  tokenizer = load_tokenizer(str(train_json(tmp_path / "t.json", byte_level=False)))
  text = "plain words and more plain words"
  assert "".join(streamed(tokenizer, tokenizer.encode(text))) == text


@pytest.mark.parametrize("byte_level", [True, False])
def test_bytes_of_tokens_sum_up_to_the_text(tmp_path, byte_level):
  """Also where the tokenizer drops characters it does not know (Metaspace, no byte fallback)."""
  name = train_json(tmp_path / "t.json", byte_level=byte_level)
  held = tmp_path / "held.txt"
  held.write_text(TEXT * 3)
  corpus = load_corpus(DataConfig(path=str(held), validation_path=str(held), tokenizer=str(name)))
  sizes = corpus.validation.token_bytes
  assert sizes.sum() == corpus.validation.text_bytes == len(TEXT.encode()) * 3
  assert len(sizes) == len(corpus.validation.tokens)
  if byte_level:  # every prefix that ends with a character accounts for exactly its bytes
    upto = np.cumsum(sizes)
    for count in range(2, len(sizes) - 1):
      text = corpus.tokenizer.decode(corpus.validation.tokens[1:count])
      if not text.endswith("\ufffd"):
        assert upto[count - 1] == len(text.encode())


def test_long_documents_are_encoded_in_pieces_that_join_again(bpe, monkeypatch):
  monkeypatch.setattr(ours, "_PIECE_BYTES", 37)
  monkeypatch.setattr(ours, "_BATCH_BYTES", 100)
  documents = [(TEXT * 9).encode(), b"short", ("日" * 100).encode()]
  pieces = list(bpe.encode_documents(documents, measure=True))
  texts, current = [], []
  for piece in pieces:
    current.extend(piece.ids)
    if piece.last:
      texts.append(bpe.decode(current).encode())
      current = []
  assert texts == documents
  assert len(pieces) > 10
  assert sum(piece.size for piece in pieces) == sum(map(len, documents))


def test_end_token_by_name_and_by_config(tmp_path):
  usual = load_tokenizer(str(train_json(tmp_path / "a.json", end="</s>")))
  assert usual.decode([usual.end_id]) == ""
  path = str(train_json(tmp_path / "b.json", end="<stop>"))
  with pytest.raises(DataError, match="end_token must be given, as .*b.json has none of the usual"):
    load_tokenizer(path)
  assert load_tokenizer(path, "<stop>").end_id == 0
  with pytest.raises(DataError, match="end_token must be a token of .*b.json; got '</s>'"):
    load_tokenizer(path, "</s>")


def test_a_checkpoint_of_another_tokenizer_is_refused(tmp_path, bpe):
  stored = describe_tokenizer(bpe)
  check_tokenizer(stored, bpe)
  other = load_tokenizer(str(train_json(tmp_path / "other.json", vocabulary=290)))
  for wrong in (other, ByteTokenizer()):
    with pytest.raises(DataError, match="tokenizer must be the checkpoint's .*tokenizer.json"):
      check_tokenizer(stored, wrong)


def test_unreadable_tokenizer_is_refused(tmp_path):
  (tmp_path / "t.json").write_text("{}")
  with pytest.raises(DataError, match="readable tokenizer.json; got .*t.json"):
    load_tokenizer(str(tmp_path / "t.json"))


def test_make_tokenizer_reads_the_training_split_alone(tmp_path):
  """What only held-out documents say gets no ids of its own, and still is encoded."""
  train, held_out = tmp_path / "train.txt", tmp_path / "validation.txt"
  train.write_text("attention attends " * 50)
  held_out.write_text("zebra zebra " * 50)
  data = DataConfig(path=str(train), validation_path=str(held_out))
  made = tokenizer_training.train_tokenizer(data, vocab_size=280)
  words = made.get_vocab()
  assert len(words) <= 280
  assert "attention" in words
  assert not any("ze" in word for word in words)
  made.save(str(tmp_path / "tokenizer.json"))
  tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
  assert tokenizer.decode(tokenizer.encode("zebra " + TEXT)) == "zebra " + TEXT
  assert tokenizer.end_id == words[tokenizer_training.END]


def test_shipped_tokenizer():
  setup = config.from_config_dict(routing_small.get_config())
  tokenizer = load_tokenizer(setup.data.tokenizer)
  assert tokenizer.vocab_size == setup.model.vocab_size == 1024
  code = "def attend(self, query):\n    return self.mixer(query)\n"
  ids = tokenizer.encode(code)
  assert len(ids) < len(code) / 2
  assert tokenizer.decode(ids) == code
