"""Sampling from a language model's recurrent state: memory does not grow with the text."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from attnzoo.layers import DecoderLM

# Prompts are read in pieces of this many tokens, so that a long one needs no more memory.
_PREFILL_CHUNK = 1024
_PREFILL_MULTIPLE = 64


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How a token is drawn: temperature 0 takes the likeliest, top_k 0 and top_p 1 keep all.

  First the logits are divided by the temperature, then top_k keeps the k likeliest tokens, and of
  these, their probabilities summing to 1 again, top_p drops those behind more than its mass.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0

  def __post_init__(self):
    for name, good, rule in (
      ("temperature", self.temperature >= 0, "be at least 0"),
      ("top_k", self.top_k >= 0, "be at least 0"),
      ("top_p", 0 < self.top_p <= 1, "lie in (0, 1]"),
    ):
      if not good:
        raise ValueError(
          f"Sampling: {name} must {rule}; got {getattr(self, name)} (0 temperature is greedy)"
        )


def sample(logits: Float[Array, "B V"], key: jax.Array, sampling: Sampling) -> Int[Array, " B"]:
  """One token per row. Of equally likely tokens the one with the lower id comes first."""
  if sampling.temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  logits = logits.astype(jnp.float32) / sampling.temperature
  size = logits.shape[-1]
  kept = min(sampling.top_k or size, size)
  if kept == size and sampling.top_p == 1:
    return jax.random.categorical(key, logits).astype(jnp.int32)
  ordered, tokens = jax.lax.top_k(logits, kept)  # [B, k], the likeliest first
  probabilities = jax.nn.softmax(ordered, axis=-1)
  before = jnp.cumsum(probabilities, axis=-1) - probabilities  # mass of the likelier tokens
  dropped = (before > sampling.top_p) & (jnp.arange(kept) > 0)
  place = jax.random.categorical(key, jnp.where(dropped, -jnp.inf, ordered))
  return jnp.take_along_axis(tokens, place[:, None], axis=1)[:, 0].astype(jnp.int32)


def generate(
  model: DecoderLM,
  prompts: Sequence[Sequence[int]],
  *,
  max_new_tokens: int,
  sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
  seed: int = 0,
  end_id: int | None = None,
) -> Iterator[Int[np.ndarray, " B"]]:
  """Yields the next token of every prompt, again and again, until `max_new_tokens` or all ended.

  Args:
    model: any language model of the zoo.
    prompts: token ids, at least one row; rows may differ in length. An empty row starts from
      `end_id`, as a document does.
    max_new_tokens: at most so many per row.
    sampling: how tokens are drawn.
    seed: the same seed draws the same text on the same platform.
    end_id: a row that drew it goes on yielding it.

  Raises:
    ValueError: no prompts, ids outside the vocabulary, or an empty prompt without `end_id`.
  """
  rows = [list(row) for row in prompts]
  _check_prompts(rows, model.vocab_size, end_id)
  rows = [row or [end_id] for row in rows]
  graph, variables = nnx.split(model)
  longest = max(map(len, rows)) + max_new_tokens
  state = model.init_state(len(rows), longest)

  @jax.jit
  def read(variables, tokens, lengths, state):
    model = nnx.merge(graph, variables)
    hidden, state = model.hidden(tokens, lengths=lengths, state=state)
    last = jnp.maximum(lengths - 1, 0)[:, None, None]
    return model.logits(jnp.take_along_axis(hidden, last, axis=1)[:, 0]), state

  @jax.jit
  def draw(logits, key, count, ended):
    token = sample(logits, jax.random.fold_in(key, count), sampling)
    if end_id is None:
      return token, ended
    token = jnp.where(ended, end_id, token)
    return token, token == end_id

  @jax.jit(donate_argnums=2)
  def step(variables, token, state):
    return nnx.merge(graph, variables).step(token, state)

  logits, state = _prefill(read, variables, rows, state)
  key, ended = jax.random.key(seed), jnp.zeros((len(rows),), bool)
  for count in range(max_new_tokens):
    token, ended = draw(logits, key, count, ended)
    yield np.asarray(token)
    if bool(jnp.all(ended)):
      return
    if count + 1 < max_new_tokens:
      logits, state = step(variables, token, state)


def _prefill(read, variables, rows, state):
  """Reads right-padded prompts piece by piece; returns each row's logits after its last token."""
  lengths = np.array([len(row) for row in rows], np.int32)
  width = int(lengths.max())
  chunk = min(_PREFILL_CHUNK, width + -width % _PREFILL_MULTIPLE)
  tokens = np.zeros((len(rows), width + -width % chunk), np.int32)
  for row, ids in enumerate(rows):
    tokens[row, : len(ids)] = ids
  logits = None
  for start in range(0, tokens.shape[1], chunk):
    here = np.clip(lengths - start, 0, chunk)
    part, state = read(variables, tokens[:, start : start + chunk], here, state)
    ends_here = (here > 0)[:, None]
    logits = part if logits is None else jnp.where(ends_here, part, logits)
  return logits, state


def _check_prompts(rows: list[list[int]], vocab_size: int, end_id: int | None) -> None:
  if not rows:
    raise ValueError("generate: prompts must hold at least one row; got none (give an empty one)")
  for number, row in enumerate(rows):
    if not row and end_id is None:
      raise ValueError(
        f"generate: prompts[{number}] must not be empty without end_id; got [] (start with a token)"
      )
    if row and not 0 <= min(row) <= max(row) < vocab_size:
      raise ValueError(
        f"generate: prompts[{number}] must hold ids in [0, {vocab_size}); got"
        f" {min(row)}..{max(row)} (was another tokenizer used?)"
      )
