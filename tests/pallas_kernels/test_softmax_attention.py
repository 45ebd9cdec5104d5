"""Full attention: definition, portable path, TPU kernel in its interpreter, cache, step, mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo.pallas_kernels import (
  CacheState,
  empty_cache,
  sharded_softmax_attention,
  sliding_window_attention,
  softmax_attention,
  softmax_attention_step,
)
from attnzoo.pallas_kernels.softmax_attention import api, cache, cases
from attnzoo_testing.gradients import results_and_gradients
from attnzoo_testing.numerics import assert_as_exact, relative_error
from attnzoo_testing.oracle import Oracle

ORACLE = Oracle(cases.operator, cases, ("output", "final_key", "final_value"))


def test_definition_is_that_of_jax():
  inputs = cases.make_inputs(ORACLE.ci["no_state"])
  output, state = softmax_attention(**inputs, implementation="reference")
  close(output, jax.nn.dot_product_attention(*inputs.values(), is_causal=True))
  np.testing.assert_array_equal(state.key, inputs["key"])
  np.testing.assert_array_equal(state.count, [70])


def test_window_over_everything_is_no_window():
  inputs = cases.make_inputs(ORACLE.ci["no_state"])
  windowed, _ = sliding_window_attention(**inputs, left=69, implementation="xla")
  close(softmax_attention(**inputs, implementation="xla")[0], windowed)


@pytest.mark.parametrize("name", ORACLE.ci)
def test_xla_float32(name):
  ORACLE.compare(name, implementation="xla")


@pytest.mark.parametrize("name", ["no_state", "packed_and_padded"])
def test_xla_float64(name):
  ORACLE.compare_wide(name, implementation="xla")


@pytest.mark.parametrize("name", ["no_state", "packed_and_padded"])
def test_tpu_interpreted(name):
  ORACLE.compare(name, implementation="tpu", interpret=True)


def close(got, truth):
  assert relative_error(got, truth)[1] <= 32 * np.finfo(np.float32).eps


def inputs_and_cache(slots=60):
  """Two rows of 20 tokens, and a cache of which 7 and 6 slots are filled."""
  inputs = cases.make_inputs(ORACLE.ci["grouped"])
  tokens = {name: inputs[name][:, :20] for name in ("query", "key", "value")}
  stored = CacheState(*(inputs[n] for n in ("stored_key", "stored_value", "count")))
  pad = [(0, 0), (0, max(0, slots - stored.key.shape[1])), (0, 0), (0, 0)]
  key, value = (np.pad(x, pad)[:, :slots] for x in stored[:2])
  return tokens, CacheState(*map(jnp.asarray, (key, value, stored.count)))


@jax.jit
def run(inputs, state=None):
  return softmax_attention(**inputs, initial_state=state, implementation="xla")


def same_cache(got, truth):
  np.testing.assert_array_equal(got.count, truth.count)
  filled = (np.arange(truth.key.shape[1]) < np.asarray(truth.count)[:, None])[..., None, None]
  for a, b in ((got.key, truth.key), (got.value, truth.value)):
    np.testing.assert_array_equal(np.where(filled, a, 0), np.where(filled, b, 0))


def stepped(inputs, state):
  def token(state, qkv):
    output, state = softmax_attention_step(*qkv, state)
    return state, output

  steps = tuple(np.moveaxis(inputs[n], 1, 0) for n in ("query", "key", "value"))
  state, output = jax.jit(functools.partial(jax.lax.scan, token))(state, steps)
  return np.moveaxis(output, 0, 1), state


def test_steps_and_two_calls_are_one_call():
  inputs, stored = inputs_and_cache()
  output, final = run(inputs, stored)
  got, state = stepped(inputs, stored)
  close(got, output)
  same_cache(state, final)
  first, state = run({n: x[:, :10] for n, x in inputs.items()}, stored)
  second, state = run({n: x[:, 10:] for n, x in inputs.items()}, state)
  close(np.concatenate([first, second], 1), output)
  same_cache(state, final)


def test_steps_from_an_empty_cache():
  inputs, _ = inputs_and_cache()
  batch, length, heads, dim = inputs["key"].shape
  empty = empty_cache(batch, length, heads, dim, inputs["value"].shape[3], jnp.float32)
  got, state = stepped(inputs, empty)
  output, final = run(inputs)
  close(got, output)
  same_cache(state, final)


def test_a_full_cache_does_not_forget_in_silence():
  inputs, stored = inputs_and_cache(slots=20)  # 13 and 14 of the 20 tokens fit
  got, state = stepped(inputs, stored)
  whole, after = run(inputs, stored)
  assert state.count.tolist() == after.count.tolist() == [27, 26]
  # The one after the last that fits still sees all; the next would lack a key.
  assert not np.any(np.isnan(got[0, :14]))
  assert np.all(np.isnan(got[0, 14:]))
  assert not np.any(np.isnan(whole))  # a call has all keys at hand
  assert np.all(np.isnan(run(inputs, after)[0]))


def test_packed_documents_are_separate_documents():
  inputs, stored = inputs_and_cache()
  ids = np.tile(np.repeat([0, 1, 0], [6, 1, 13]).astype(np.int32), (2, 1))
  output, final = run(inputs | dict(segment_ids=ids), stored)
  state = stored
  for start, stop in ((0, 6), (6, 7), (7, 20)):
    alone, last = run({n: x[:, start:stop] for n, x in inputs.items()}, state)
    close(alone, output[:, start:stop])
    state = None
  same_cache(last, CacheState(final.key[:, :13], final.value[:, :13], final.count))


def test_sharded_is_unsharded():
  mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  inputs, cotangent, narrow, truth = ORACLE.expected("packed_and_padded")

  def sharded(*, stored_key, stored_value, count, **arrays):
    state = CacheState(stored_key, stored_value, count)
    output, state = sharded_softmax_attention(**arrays, initial_state=state, mesh=mesh)
    return output, state.key, state.value

  got = results_and_gradients(sharded, inputs, cotangent, ORACLE.names)
  assert_as_exact(got, narrow, truth, np.float32)
  with pytest.raises(NotImplementedError, match="sequence_axis must be None; got 'data'"):
    sharded_softmax_attention(
      *(inputs[n] for n in ("query", "key", "value")), mesh=mesh, sequence_axis="data"
    )


def documents_leak(patch):
  patch.setattr(api, "run_index", jnp.zeros_like)


def cache_shifted(patch):
  original = api.cache_after

  def change(*args):
    state = original(*args)
    return state._replace(key=jnp.roll(state.key, 1, 1), value=jnp.roll(state.value, 1, 1))

  patch.setattr(api, "cache_after", change)


def empty_slots_seen(patch):
  patch.setattr(cache, "slot_numbers", lambda count, n: jnp.zeros((*count.shape, n), jnp.int32))


FAULTS = {
  documents_leak: "packed_and_padded",
  cache_shifted: "grouped",
  empty_slots_seen: "grouped",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_seeded_fault_is_seen(fault, monkeypatch):
  ORACLE.expected(FAULTS[fault])
  fault(monkeypatch)
  with pytest.raises(AssertionError, match=r"error .* above"):
    ORACLE.compare(FAULTS[fault], implementation="xla")


def test_errors():
  x = jnp.zeros((1, 4, 2, 8))
  small = empty_cache(1, 3, 2, 8, 8, jnp.float32)
  with pytest.raises(ValueError, match=r"initial_state must have a slot for each of the 4 tokens"):
    softmax_attention(x, x, x, initial_state=small)
  with pytest.raises(NotImplementedError, match='"cudnn" takes bfloat16 or float16'):
    softmax_attention(x, x, x, implementation="cudnn")
