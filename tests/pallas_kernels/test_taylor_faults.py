"""Taylor attention with faults planted into it: the comparison of its tests must see each."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo.pallas_kernels import taylor_attention
from attnzoo.pallas_kernels.taylor_attention import api, cases, features, xla
from attnzoo_testing.marks import some_faults
from attnzoo_testing.oracle import Oracle

ORACLE = Oracle(taylor_attention, cases, ("output", "final_state"))


def patched_weights(change):
  """`chunk_weights` with `change(weights)` applied to what it gives."""
  original = xla.chunk_weights

  def factory(*args):
    weights = original(*args)
    return lambda index: change(weights(index))

  return factory


def off_by_one_mask(patch):
  def change(w):
    return w._replace(mask=w.mask * jnp.tri(w.mask.shape[-1], k=-1))

  patch.setattr(xla, "chunk_weights", patched_weights(change))


def wrong_decay_sign(patch):
  original = xla.chunk_weights
  patch.setattr(xla, "chunk_weights", lambda rate, *rest: original(-rate, *rest))


def state_not_reset(patch):
  def change(w):
    return w._replace(up=jnp.ones_like(w.up), carry=jnp.ones_like(w.carry))

  patch.setattr(xla, "chunk_weights", patched_weights(change))


def documents_ignored(patch):
  patch.setattr(api, "run_index", jnp.zeros_like)


def last_partial_chunk_dropped(patch):
  def change(w):
    return w._replace(down=w.down * (w.count == w.mask.shape[-1]))

  patch.setattr(xla, "chunk_weights", patched_weights(change))


def missing_scale(patch):
  original = features.query_coefficients
  patch.setattr(features, "query_coefficients", lambda dim: original(dim) * dim**0.5)


def off_diagonal_counted_once(patch):
  original = features.query_coefficients
  patch.setattr(features, "query_coefficients", lambda dim: np.minimum(original(dim), 0.5 / dim))


def normaliser_decays(patch):
  original = xla._two_weights

  def change(*args):
    weights = original(*args)
    return lambda index: (weights(index)[0],) * 2

  patch.setattr(xla, "_two_weights", change)


def patched_backward(patch, change):
  original = xla.taylor_attention_xla.bwd
  patch.setattr(xla.taylor_attention_xla, "bwd", functools.partial(change, original))


def query_and_key_gradients_swapped(patch):
  def change(original, *args):
    dq, dk, *rest = original(*args)
    return (dk, dq, *rest)

  patched_backward(patch, change)


def final_state_cotangent_ignored(patch):
  def change(original, normalize, chunk, residuals, cotangent):
    return original(normalize, chunk, residuals, (cotangent[0], jnp.zeros_like(cotangent[1])))

  patched_backward(patch, change)


def normaliser_has_no_gradient(patch):
  original = xla._numerator_cotangent

  def change(*args):
    d_numerator, d_total = original(*args)
    return d_numerator, jnp.zeros_like(d_total)

  patch.setattr(xla, "_numerator_cotangent", change)


FAULTS = {
  off_by_one_mask: "below_one_chunk",
  wrong_decay_sign: "decayed",
  state_not_reset: "packed",
  documents_ignored: "packed",
  last_partial_chunk_dropped: "chunks_plus_one",
  missing_scale: "chunks_plus_one",
  off_diagonal_counted_once: "chunks_plus_one",
  normaliser_decays: "decayed",
  query_and_key_gradients_swapped: "below_one_chunk",
  final_state_cotangent_ignored: "below_one_chunk",
  normaliser_has_no_gradient: "below_one_chunk",
}


@pytest.mark.parametrize("fault", some_faults(FAULTS), ids=lambda fault: fault.__name__)
def test_seeded_fault_is_seen(fault, monkeypatch):
  name = FAULTS[fault]
  ORACLE.expected(name)  # the truth is computed before the fault is planted
  fault(monkeypatch)
  with pytest.raises(AssertionError, match=r"error .* above"):
    ORACLE.compare(name, implementation="xla", chunk_size=16)
