"""Sampling and evaluation against plain computations with the whole sequence's logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnzoo import zoo
from attnzoo.experiments import generation
from attnzoo.experiments.data import ByteTokenizer
from attnzoo.experiments.generate import _stream
from attnzoo.experiments.generation import Sampling, generate, sample

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def model():
  return zoo.create("transnormer-tiny", rngs=nnx.Rngs(0), features=32, heads=2, num_layers=2,
                    glu_dim=48, init_stddev=0.2)  # fmt: skip


def drawn(model, prompts, count, **options):
  """[B, count] tokens."""
  return np.stack(list(generate(model, prompts, max_new_tokens=count, **options)), 1)


def greedy(model, prompt, count):
  """The definition: the whole sequence again for every token."""
  ids = list(prompt)
  forward = jax.jit(lambda tokens: model(tokens)[0])
  width = len(prompt) + count
  for _ in range(count):
    padded = jnp.asarray([ids + [0] * (width - len(ids))])  # causal: what follows is not seen
    ids.append(int(jnp.argmax(forward(padded)[0, len(ids) - 1])))
  return ids[len(prompt) :]


PROMPTS = [[104, 101], list(range(60, 99)), [256], list(range(97, 110))]


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [None, 16], ids=["at once", "in pieces"])
def test_greedy_is_the_argmax_of_the_whole_sequence(model, chunk, monkeypatch):
  if chunk:
    monkeypatch.setattr(generation, "_PREFILL_CHUNK", chunk)
  tokens = drawn(model, PROMPTS, 7, sampling=GREEDY)
  for row, prompt in zip(tokens.tolist(), PROMPTS, strict=True):
    assert row == greedy(model, prompt, 7)
  np.testing.assert_array_equal(drawn(model, PROMPTS, 7, sampling=Sampling(top_k=1)), tokens)


def test_an_empty_prompt_starts_from_the_end_id(model):
  empty = drawn(model, [[]], 5, sampling=GREEDY, end_id=256)
  np.testing.assert_array_equal(empty, drawn(model, [[256]], 5, sampling=GREEDY, end_id=256))


def test_seeds(model):
  first, again, other = (drawn(model, [[1], [1]], 12, seed=seed) for seed in (3, 3, 4))
  np.testing.assert_array_equal(first, again)
  assert not np.array_equal(first, other)
  assert not np.array_equal(first[0], first[1]), "rows are drawn alike"


def test_the_end_id_stops(model):
  free = drawn(model, PROMPTS, 9, seed=1)
  end = int(free[1, 3])
  stopped = drawn(model, PROMPTS, 9, seed=1, end_id=end)
  for row, other in zip(free.tolist(), stopped.tolist(), strict=True):
    if end in row:
      first = row.index(end)
      assert set(other[first:]) == {end}
      row, other = row[:first], other[:first]
    assert row[: len(other)] == other
  alone = drawn(model, [PROMPTS[1]], 50, sampling=GREEDY, end_id=greedy(model, PROMPTS[1], 1)[0])
  assert alone.shape == (1, 1)


def test_the_state_does_not_grow(model):
  sizes = [sum(x.nbytes for x in jax.tree.leaves(model.init_state(1, n))) for n in (10, 10**6)]
  assert sizes[0] == sizes[1]


LOGITS = jnp.log(jnp.asarray([0.4, 0.05, 0.3, 0.05, 0.15, 0.05]))


@pytest.mark.parametrize(
  ("sampling", "kept"),
  [
    (Sampling(), [0, 1, 2, 3, 4, 5]),
    (Sampling(top_k=2), [0, 2]),
    (Sampling(top_k=99), [0, 1, 2, 3, 4, 5]),
    (Sampling(top_p=0.6), [0, 2]),  # 0.4 alone does not reach it
    (Sampling(top_p=0.39), [0]),
    (Sampling(top_p=0.8), [0, 2, 4]),
    (Sampling(top_k=3, top_p=0.8), [0, 2]),  # of the 0.85 that is left, 0.7 is 82 %
    (Sampling(top_k=4), [0, 1, 2, 4]),  # of three equal ones the first
    (Sampling(top_p=0.86), [0, 1, 2, 4]),
    (Sampling(temperature=2.0), [0, 1, 2, 3, 4, 5]),
    (Sampling(temperature=0.5, top_k=3), [0, 2, 4]),
  ],
  ids=str,
)
def test_how_often_tokens_are_drawn(sampling, kept):
  count = 40_000
  tokens = sample(jnp.broadcast_to(LOGITS, (count, 6)), jax.random.key(0), sampling)
  expected = np.zeros(6)
  expected[kept] = np.exp(np.asarray(LOGITS, np.float64))[kept] ** (1 / sampling.temperature)
  expected /= expected.sum()
  found = np.bincount(np.asarray(tokens), minlength=6) / count
  assert set(np.flatnonzero(found)) == set(kept)
  deviation = np.sqrt(expected * (1 - expected) / count)
  assert np.all(np.abs(found - expected) <= 5 * deviation)


def test_the_nucleus_drops_what_is_behind_more_than_its_mass():
  """At exactly the mass a token stays, the top one always; each row has a nucleus of its own."""
  rows = jnp.asarray([[-200.0, 0, 0, -200], [0, -200, -200, 0]])
  for top_p, kept in ((0.5, ({1, 2}, {0, 3})), (0.49, ({1}, {0})), (1e-9, ({1}, {0}))):
    keys = jax.random.split(jax.random.key(0), 200)
    found = jax.vmap(lambda key, p=top_p: sample(rows, key, Sampling(top_p=p)))(keys)
    assert tuple(set(column.tolist()) for column in found.T) == kept


def test_refusals(model):
  for prompts, options, message in (
    ([], {}, "prompts must hold at least one row"),
    ([[1], []], {}, r"prompts\[1\] must not be empty without end_id"),
    ([[257]], {}, r"must hold ids in \[0, 257\); got 257..257"),
    ([[-1, 5]], {}, r"got -1..5"),
  ):
    with pytest.raises(ValueError, match=message):
      next(generate(model, prompts, max_new_tokens=1, **options))
  for options in (dict(temperature=-1), dict(top_k=-1), dict(top_p=0), dict(top_p=1.1)):
    with pytest.raises(ValueError, match=f"Sampling: {next(iter(options))} must"):
      Sampling(**options)


def test_characters_are_printed_whole(monkeypatch):
  printed = []
  monkeypatch.setattr("builtins.print", lambda text, **_: printed.append(text))
  _stream("é", list("añ€😀z".encode()), ByteTokenizer())
  assert [text for text in printed if text] == ["é", "a", "ñ", "€", "😀", "z"]
