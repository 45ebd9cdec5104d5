"""The chunked cross-entropy against a plain softmax in float64, and the memory that it saves."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo.layers import chunked_cross_entropy

BATCH, LENGTH, WIDTH, VOCABULARY = 2, 13, 5, 17


def inputs(weighted):
  rng = np.random.default_rng(0)
  hidden = rng.standard_normal((BATCH, LENGTH, WIDTH))
  head = rng.standard_normal((VOCABULARY, WIDTH))
  targets = rng.integers(0, VOCABULARY, (BATCH, LENGTH))
  weights = rng.uniform(0, 2, (BATCH, LENGTH)) if weighted else np.ones((BATCH, LENGTH))
  return hidden, head, targets, weights


def truth(hidden, head, targets, weights, z):
  """Sums, and the gradient of loss + z * z_loss, from the definition in float64."""
  logits = hidden @ head.T
  peak = logits.max(-1, keepdims=True)
  normaliser = np.log(np.exp(logits - peak).sum(-1)) + peak[..., 0]
  chosen = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
  probabilities = np.exp(logits - normaliser[..., None])
  d_logits = probabilities - np.eye(VOCABULARY)[targets]
  d_logits += 2 * z * normaliser[..., None] * probabilities
  d_logits *= weights[..., None]
  sums = (
    (weights * (normaliser - chosen)).sum(),
    (weights * normaliser**2).sum(),
    (weights * (logits.argmax(-1) == targets)).sum(),
    weights.sum(),
  )
  return sums, d_logits @ head, np.einsum("btv,btd->vd", d_logits, hidden)


@pytest.mark.parametrize("chunk", [1, 4, 13, 256])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_sums_and_gradients(chunk, weighted):
  hidden, head, targets, weights = inputs(weighted)
  z = 0.3
  expected, d_hidden, d_head = truth(hidden, head, targets, weights, z)
  hidden, head = (jnp.asarray(x, jnp.float32) for x in (hidden, head))
  given = jnp.asarray(weights, jnp.float32) if weighted else None

  def total(hidden, head):
    sums = chunked_cross_entropy(hidden, head, jnp.asarray(targets), given, chunk_size=chunk)
    return sums.loss + z * sums.z_loss, sums

  gradients, sums = jax.jit(jax.grad(total, (0, 1), has_aux=True))(hidden, head)
  np.testing.assert_allclose(sums, expected, rtol=1e-6)
  np.testing.assert_allclose(gradients[0], d_hidden, atol=3e-6 * np.abs(d_hidden).max())
  np.testing.assert_allclose(gradients[1], d_head, atol=3e-6 * np.abs(d_head).max())


def test_padding_has_no_part():
  """Targets outside the vocabulary, or far logits, at weight 0 change nothing."""
  hidden, head, targets, _ = inputs(False)
  weights = np.ones((BATCH, LENGTH), np.float32)
  weights[:, 9:] = 0
  targets[:, 9:] = -100
  cut = chunked_cross_entropy(
    jnp.asarray(hidden[:, :9]), jnp.asarray(head), jnp.asarray(targets[:, :9]), chunk_size=4
  )
  padded = chunked_cross_entropy(
    jnp.asarray(hidden), jnp.asarray(head), jnp.asarray(targets), jnp.asarray(weights), chunk_size=4
  )
  np.testing.assert_allclose(padded, cut, rtol=1e-6)


def test_large_logits_stay_finite():
  hidden = jnp.full((1, 3, 1), 1e4)
  head = jnp.asarray([[1.0], [-1.0]])
  sums = chunked_cross_entropy(hidden, head, jnp.asarray([[0, 1, 1]]))
  np.testing.assert_allclose(sums.loss, 4e4)
  assert sums.correct == 1


def largest_logits(text, vocabulary):
  """Most elements of any array of the compiled program that has a vocabulary axis."""
  shapes = [tuple(map(int, s.split(","))) for s in re.findall(r"\w+\[([\d,]+)\]", text)]
  return max(int(np.prod(shape)) for shape in shapes if vocabulary in shape and len(shape) > 2)


def test_logits_of_a_long_batch_never_exist():
  batch, length, width, vocabulary, chunk = 2, 4096, 8, 1021, 128
  hidden = jax.ShapeDtypeStruct((batch, length, width), jnp.float32)
  head = jax.ShapeDtypeStruct((vocabulary, width), jnp.float32)
  targets = jax.ShapeDtypeStruct((batch, length), jnp.int32)

  def compiled(chunk_size):
    loss = lambda *a: chunked_cross_entropy(*a, chunk_size=chunk_size).loss  # noqa: E731
    return jax.jit(jax.grad(loss, (0, 1))).lower(hidden, head, targets).compile()

  small, whole = compiled(chunk), compiled(length)
  assert largest_logits(small.as_text(), vocabulary) == batch * chunk * vocabulary
  assert largest_logits(whole.as_text(), vocabulary) == batch * length * vocabulary
  temporary = [c.memory_analysis().temp_size_in_bytes for c in (small, whole)]
  assert temporary[0] < temporary[1] / 8


def test_shapes_that_do_not_fit():
  hidden, head, targets, _ = inputs(False)
  with pytest.raises(ValueError, match=r"targets must have shape \(2, 13\); got \(2, 12\)"):
    chunked_cross_entropy(jnp.asarray(hidden), jnp.asarray(head), jnp.asarray(targets[:, :12]))
