"""The figures of an evaluation, for a model that takes all tokens to be equally likely."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from attnzoo.experiments.data import DataConfig, evaluation_batches, load_data
from attnzoo.experiments.training import state
from attnzoo.experiments.training.config import MeshConfig
from attnzoo.experiments.training.evaluation import evaluate
from attnzoo_testing.tiny_tokenizer import train_json


def uniform(data, config, **options):
  def sums(params, batch):
    weight = batch["weights"].sum()
    return types.SimpleNamespace(loss=np.log(data.vocab_size) * weight, correct=0, weight=weight)

  mesh = state.make_mesh(MeshConfig(), jax.devices()[:1])
  return evaluate(sums, {}, data, config, mesh, **options)


@pytest.mark.parametrize("tokenizer", ["bytes", "json"])
def test_perplexity_of_words(tmp_path, tokenizer):
  """Of WikiText the ends of lines are words, too; in memory, written to the cache, and from it."""
  text = " = a title = \n\n some <unk> words , 3 @,@ 000 of them . \n"
  for part in ("train", "valid", "test"):
    (tmp_path / f"wiki.{part}.tokens").write_text(text * 3)
  if tokenizer == "json":
    tokenizer = str(train_json(tmp_path / "tokenizer.json"))
  config = DataConfig(path=str(tmp_path), tokenizer=tokenizer, sequence_length=16, batch_size=2)
  for cache in (None, tmp_path / "cache", tmp_path / "cache"):
    data = load_data(config, cache)
    batches = evaluation_batches(data, config, split="test", overlap=4)
    assert batches.target_words == 3 * (4 + 10 + 3)
    found = uniform(data, config, split="test", overlap=4)
    expected = np.exp(batches.targets * np.log(data.vocab_size) / batches.target_words)
    assert found.word_perplexity == pytest.approx(expected, rel=1e-4)
    assert f"{found.word_perplexity:.2f} perplexity of a word" in found.describe()
    assert found.metrics()["validation_word_perplexity"] == found.word_perplexity
  assert uniform(data, config, max_tokens=5).word_perplexity is None
  later = dataclasses.replace(config, predict_first=False)
  assert evaluation_batches(data, later).target_words is None


def test_bits_per_dim():
  config = DataConfig(source="digits", sequence_length=0, batch_size=16)
  found = uniform(load_data(config), config)
  assert found.bits_per_dim == pytest.approx(np.log2(17))
  assert found.describe() == "loss 2.8332  4.0875 bits per dim  accuracy 0.0%"
  assert found.bits_per_byte is None
  assert found.metrics()["validation_bits_per_dim"] == found.bits_per_dim
