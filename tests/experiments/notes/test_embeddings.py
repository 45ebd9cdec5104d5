"""Vectors of words: random, from files, trained."""

import importlib.util
import pickle
import random

import numpy as np
import pytest

from attnzoo.experiments.data import DataError
from attnzoo.experiments.data.notes import embeddings
from attnzoo.experiments.data.notes.embeddings import (
  random_vectors,
  read_vectors,
  train_cbow,
  write_vectors,
)
from attnzoo.experiments.data.notes.vocabulary import PAD, UNK, Vocabulary

# Without wheels for the newest Python.
models = pytest.importorskip("gensim.models")

WORDS = ("chest", "deni", "evid", "pain")
VOCABULARY = Vocabulary(WORDS)


def lengths(rows: np.ndarray) -> np.ndarray:
  return np.linalg.norm(rows, axis=1)


def test_random_vectors():
  rows = random_vectors(50, 16, seed=3)
  assert rows.dtype == np.float32
  np.testing.assert_array_equal(rows[PAD], 0)
  np.testing.assert_allclose(lengths(rows)[1:], 1, atol=2e-6)
  np.testing.assert_array_equal(rows, random_vectors(50, 16, seed=3))
  assert not np.array_equal(rows, random_vectors(50, 16, seed=4))


def test_text_goes_out_and_comes_in(tmp_path):
  path = tmp_path / "vocab.embed"
  rows = random_vectors(len(VOCABULARY), 7, seed=1)
  write_vectors(path, VOCABULARY, rows)
  assert [line.split()[0] for line in path.read_text().splitlines()] == ["PAD", "UNK", *WORDS]
  read, missing = read_vectors(path, VOCABULARY)
  np.testing.assert_array_equal(read, rows)
  assert missing == 0
  larger = Vocabulary((*WORDS, "zoster"))
  read, missing = read_vectors(path, larger, seed=5)
  np.testing.assert_array_equal(read[:-1], rows)
  assert missing == 1
  assert lengths(read)[-1] == pytest.approx(1, abs=2e-6)
  with pytest.raises(DataError, match="vectors must have a row for each of 7 ids"):
    write_vectors(path, larger, rows)


@pytest.mark.parametrize("form", ["text.txt", "binary.bin", "words.kv", "apart.kv", "model"])
def test_files_that_gensim_wrote(form, tmp_path):
  """Not of length 1, in another order, with a word more: gensim's writers are the reference."""
  words = [*WORDS[::-1], "other"]
  rows = np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32)
  keyed = models.KeyedVectors(6)
  keyed.add_vectors(words, rows)
  path = tmp_path / form
  if form == "model":
    model = models.Word2Vec([words], vector_size=6, min_count=0, workers=1)
    model.save(str(path))
    rows = model.wv[words]
  elif form.endswith(".kv"):
    keyed.save(str(path), separately=["vectors"] if form == "apart.kv" else None)
  else:
    keyed.save_word2vec_format(str(path), binary=form.endswith(".bin"))
  assert (tmp_path / "apart.kv.vectors.npy").exists() == (form == "apart.kv")
  read, missing = read_vectors(path, VOCABULARY, seed=2)
  assert missing == 0
  expected = rows[:4][::-1] / lengths(rows[:4][::-1])[:, None]
  np.testing.assert_allclose(read[2:], expected, rtol=2e-6, atol=1e-7)
  np.testing.assert_array_equal(read[PAD], 0)
  assert lengths(read)[UNK] == pytest.approx(1, abs=2e-6)
  assert read.dtype == np.float32


class _Harmful:
  def __reduce__(self):
    return print, ("this ran",)


def test_what_cannot_be_read(tmp_path, capsys):
  harmful, broken, other = (tmp_path / name for name in ("harmful.kv", "broken", "other"))
  harmful.write_bytes(pickle.dumps(_Harmful()))
  with pytest.raises(DataError, match="KeyedVectors or Word2Vec that gensim 4 saved"):
    read_vectors(harmful, VOCABULARY)
  assert "this ran" not in capsys.readouterr().out
  broken.write_text("pain 1 2 3\ndeni 1 2\n")
  with pytest.raises(DataError, match="something else in line 2"):
    read_vectors(broken, VOCABULARY)
  broken.with_suffix(".bin").write_bytes(b"3 4\npain 12")
  with pytest.raises(DataError, match="be whole in word2vec's binary format"):
    read_vectors(broken.with_suffix(".bin"), VOCABULARY)
  other.write_text("fish 1 2\nbird 3 4\n")
  with pytest.raises(DataError, match="have words of the notes"):
    read_vectors(other, VOCABULARY)
  with pytest.raises(DataError, match="embedding must name an existing file"):
    read_vectors(tmp_path / "none", VOCABULARY)


def sentences() -> list[list[str]]:
  """Words of two kinds, which never meet."""
  generator = random.Random(0)
  kinds = ("chest pain angina heart".split(), "fractur femur bone hip".split())
  return [generator.choices(kinds[n % 2], k=12) + ["x"] for n in range(400)]


def test_cbow_is_gensims():
  texts = sentences()
  words = tuple(sorted({word for text in texts for word in text} - {"x"}))
  vocabulary = Vocabulary((*words, "zoster"))
  rows = train_cbow(texts, vocabulary, size=8, epochs=3, seed=4)
  model = models.Word2Vec(
    texts, vector_size=8, window=5, negative=5, min_count=0, sample=1e-3, sg=0, epochs=3,
    seed=4, workers=1,
  )  # fmt: skip
  np.testing.assert_allclose(rows[2:-1], model.wv.get_normed_vectors()[
    [model.wv.key_to_index[word] for word in words]], atol=1e-6)  # fmt: skip
  np.testing.assert_allclose(lengths(rows), [0] + [1] * (len(rows) - 1), atol=2e-6)
  again = train_cbow(texts, vocabulary, size=8, epochs=3, seed=4)
  np.testing.assert_array_equal(rows, again)
  assert not np.array_equal(rows[UNK], train_cbow(texts, vocabulary, size=8, epochs=1, seed=5)[UNK])


def test_cbow_without_its_package(monkeypatch):
  monkeypatch.setattr(embeddings, "find_spec", lambda name: None)
  assert importlib.util.find_spec("gensim") is not None
  with pytest.raises(DataError, match=r"without `gensim` \(pip install 'attnzoo\[notes\]'"):
    train_cbow([["pain"]], VOCABULARY)
