"""Sliding-window attention: the definition, the portable path, the state and the step."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo.pallas_kernels import (
  WindowState,
  empty_window,
  left_keys,
  sliding_window_attention,
  sliding_window_attention_step,
)
from attnzoo.pallas_kernels.sliding_window_attention import api, cases, window, xla
from attnzoo_testing.goldens import golden
from attnzoo_testing.gradients import cotangents, results_and_gradients
from attnzoo_testing.marks import slow_but, some_faults, thinned
from attnzoo_testing.numerics import relative_error
from attnzoo_testing.oracle import Oracle

CHUNK = 16
ORACLE = Oracle(cases.operator, cases, ("output", "final_key", "final_value"))
XLA = dict(implementation="xla", chunk_size=CHUNK)


# --- The window -----------------------------------------------------------------------------------


def test_left_keys():
  """The released BASED halves `window_size`; its golden file says 9 keys for a window of 16."""
  assert [left_keys(w, "half") for w in (16, 128, 129, 256, 1, 0)] == [8, 64, 64, 128, 0, 0]
  assert (left_keys(64, "left"), left_keys(64, "total"), left_keys(1, "total")) == (64, 63, 0)
  with pytest.raises(ValueError, match=r"left_keys: convention must be one of .*; got 'full'"):
    left_keys(64, "full")
  with pytest.raises(ValueError, match=r"left_keys: window_size must be at least 1; got 0"):
    left_keys(0, "total")


def rotated(x, cos, sin):
  """NeoX halves over the whole head; x [B, T, H, K]."""
  first, second = jnp.split(x, 2, axis=-1)
  cos, sin = cos[:, None], sin[:, None]  # [T, 1, K / 2]
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def golden_mixer(arrays, implementation):
  """The released mixer as a function of (input, Wqkv, out_proj); also gives the state."""
  heads, left = 4, left_keys(16, "half")
  cos, sin = arrays["out64/rotary_cos"], arrays["out64/rotary_sin"]

  def run(x, w_in, w_out):
    batch, length, dim = x.shape
    parts = jnp.moveaxis((x @ w_in.T).reshape(batch, length, 3, heads, -1), 2, 0)
    query, key = (rotated(part, cos[:length], sin[:length]) for part in parts[:2])
    output, state = sliding_window_attention(
      query, key, parts[2], left=left, implementation=implementation,
      chunk_size=7 if implementation == "xla" else None,
    )  # fmt: skip
    return output.reshape(batch, length, dim) @ w_out.T, state

  return run


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_golden_outputs_and_gradients(implementation):
  arrays = golden("based_sliding_attention")
  inputs = [arrays[n].astype(np.float64) for n in ("in/x", "param/Wqkv.weight",
                                                   "param/out_proj.weight")]  # fmt: skip
  with jax.enable_x64(True):
    run = golden_mixer(arrays, implementation)

    @jax.jit
    def both(inputs, cotangent):
      y, pull = jax.vjp(lambda *args: run(*args)[0], *inputs)
      return y, pull(cotangent)

    y, gradients = both(inputs, jnp.asarray(arrays["in/cotangent"], jnp.float64))
  np.testing.assert_allclose(y, arrays["out64/y"], rtol=0, atol=1e-13)
  names = ("grad64_in/x", "grad64/Wqkv.weight", "grad64/out_proj.weight")
  for name, gradient in zip(names, gradients, strict=True):
    assert relative_error(gradient, arrays[name])[0] < 1e-13, name


def test_golden_cache():
  """The ring holds what the official, never trimmed cache [B, T, 2, H, K] ends with."""
  arrays = golden("based_sliding_attention")
  run = jax.jit(golden_mixer(arrays, "xla"))
  for length, name in ((25, "out/state_after_prefill/0"), (40, "out/state_final/0")):
    x = arrays["in/x"][:, :length]
    _, state = run(x, arrays["param/Wqkv.weight"], arrays["param/out_proj.weight"])
    assert state.count.tolist() == [length, length]
    last = np.arange(length - 8, length)
    for got, truth in ((state.key, 0), (state.value, 1)):  # both in float32, sums of 64 products
      error = relative_error(got[:, last % 8], arrays[name][:, last, truth])
      assert error[1] < 64 * np.finfo(np.float32).eps


# --- The portable path against the definition -----------------------------------------------------


@pytest.mark.parametrize("name", slow_but(ORACLE.ci, "packed_and_padded"))
def test_xla_float32(name):
  ORACLE.compare(name, **XLA)


@pytest.mark.parametrize(
  "name",
  slow_but(["own_key_only", "grouped", "window_over_chunks", "packed_and_padded"], "grouped"),
)
def test_xla_float64(name):
  ORACLE.compare_wide(name, implementation="xla", chunk_size=7)


def test_default_chunk_bfloat16():
  """bfloat16 in and out, float32 between: as exact as rounding the operands allows."""
  inputs = cases.make_inputs(ORACLE.ci["packed_and_padded"], jnp.bfloat16)
  options = ORACLE.options("packed_and_padded")
  with jax.enable_x64(True):
    wide = {n: x.astype(np.float64) if x.dtype == jnp.bfloat16 else x for n, x in inputs.items()}
    reference = functools.partial(cases.operator, **options, implementation="reference")
    truth, _, _ = jax.jit(lambda x: reference(**x))(wide)
  rounded = relative_error(np.asarray(truth).astype(jnp.bfloat16), truth)[0]
  xla_path = functools.partial(cases.operator, **options, implementation="xla")
  output, key, value = jax.jit(lambda x: xla_path(**x))(inputs)
  assert output.dtype == key.dtype == value.dtype == jnp.bfloat16
  # Three roundings: operands' products are exact, weights and output are rounded.
  assert relative_error(output, truth)[0] < 3 * rounded


# --- State, step, documents, padding --------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="left")
def run(inputs, state=None, *, left=12):
  return sliding_window_attention(**inputs, left=left, initial_state=state, **XLA)


def tokens(name="packed_and_padded", **kept):
  """Query, key and value of a case as they are, and its other arrays by request."""
  inputs = cases.make_inputs(ORACLE.ci[name])
  arrays = {n: inputs[n] for n in ("query", "key", "value")}
  stored = WindowState(inputs["stored_key"], inputs["stored_value"], inputs["count"])
  return arrays | {n: inputs[n] for n in kept if kept[n]}, stored


def close(got, truth):
  limit = 32 * np.finfo(np.float32).eps
  assert relative_error(got, truth)[1] <= limit


def same_state(got, truth):
  """Equal in every slot that holds a token."""
  np.testing.assert_array_equal(got.count, truth.count)
  filled = window.filled_slots(truth)[..., None, None]
  np.testing.assert_array_equal(jnp.where(filled, got.key, 0), jnp.where(filled, truth.key, 0))
  np.testing.assert_array_equal(jnp.where(filled, got.value, 0), jnp.where(filled, truth.value, 0))


def cut(inputs, start, stop):
  return {n: x[:, start:stop] for n, x in inputs.items()}


@pytest.mark.parametrize("left", slow_but([0, 1, 12], 12))
@pytest.mark.parametrize("with_state", [False, True])
def test_step_by_step_is_parallel(left, with_state):
  inputs, stored = tokens()
  batch, _, heads, dim = inputs["key"].shape
  state = empty_window(batch, left, heads, dim, dim, jnp.float32)
  if with_state:
    state = WindowState(stored.key[:, :left], stored.value[:, :left], stored.count)
  output, final = run(inputs, state if with_state else None, left=left)

  def token(state, qkv):
    output, state = sliding_window_attention_step(*qkv, state, left=left)
    return state, output

  steps = tuple(np.moveaxis(inputs[n], 1, 0) for n in ("query", "key", "value"))
  state, stepped = jax.jit(functools.partial(jax.lax.scan, token))(state, steps)
  close(np.moveaxis(stepped, 0, 1), output)
  same_state(state, final)


@pytest.mark.parametrize("split", thinned([1, 5, 12, 79], [12], [79]))
def test_two_calls_with_the_state_passed_are_one(split):
  inputs, stored = tokens()
  output, final = run(inputs, stored)
  first, state = run(cut(inputs, 0, split), stored)
  second, state = run(cut(inputs, split, None), state)
  close(np.concatenate([first, second], 1), output)
  same_state(state, final)


def test_packed_documents_are_separate_documents():
  inputs, stored = tokens("packed")
  # Documents of 30, 1 and 59 tokens; the id 0 comes back as another document.
  edges = [0, 30, 31, 90]
  ids = np.tile(np.repeat([0, 1, 0], np.diff(edges)).astype(np.int32), (3, 1))
  output, final = run(inputs | dict(segment_ids=ids), stored)
  state = stored
  for start, stop in zip(edges[:-1], edges[1:], strict=True):
    alone, last = run(cut(inputs, start, stop), state)
    close(alone, output[:, start:stop])
    state = None
  same_state(final, last)


def test_padded_rows_are_short_rows():
  inputs, stored = tokens()
  lengths = np.asarray([33, 0, 5, 33], np.int32)
  output, final = run(inputs | dict(lengths=lengths), stored)
  for row, length in enumerate(lengths):
    one, state = jax.tree.map(lambda x, row=row: x[row : row + 1], (inputs, stored))
    assert not np.any(output[row, length:])
    if length:
      alone, state = run(cut(one, 0, length), state)
      close(alone, output[row : row + 1, :length])
    same_state(jax.tree.map(lambda x, row=row: x[row : row + 1], final), state)


def test_padding_and_empty_slots_do_not_matter():
  inputs, stored = tokens("packed_and_padded", segment_ids=True, lengths=True)
  pad = (np.arange(80) >= inputs["lengths"][:, None])[..., None, None]
  spoiled = inputs | {n: np.where(pad, np.float32(3), inputs[n]) for n in ("query", "key", "value")}
  filled = np.asarray(window.filled_slots(stored))[..., None, None]
  other = stored._replace(
    key=np.where(filled, stored.key, 9), value=np.where(filled, stored.value, 9)
  )
  assert not filled.all()
  clean, dirty = run(inputs, stored), run(spoiled, other)
  np.testing.assert_array_equal(clean[0], dirty[0])
  same_state(clean[1], dirty[1])


# --- Transformations and extremes -----------------------------------------------------------------


def loss(inputs):
  output, state = sliding_window_attention(**inputs, left=4, implementation="xla", chunk_size=5)
  return jnp.sum(output**2) + jnp.sum(jnp.sin(state.key)) + jnp.sum(state.value**3)


def test_vmap_and_remat_are_a_loop():
  inputs = cut(tokens("below_one_chunk")[0], 0, None)
  stacked = {n: np.stack([x, x / 2, -x]) for n, x in inputs.items()}
  gradient = jax.jit(jax.vmap(jax.grad(jax.checkpoint(loss))))(stacked)
  for index in range(3):
    alone = jax.jit(jax.grad(loss))({n: x[index] for n, x in stacked.items()})
    for name in stacked:
      close(gradient[name][index], alone[name])


def test_two_runs_are_bitwise_equal():
  inputs, _ = tokens("below_one_chunk")
  gradient = jax.jit(jax.value_and_grad(loss))
  jax.tree.map(np.testing.assert_array_equal, gradient(inputs), gradient(inputs))


@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_extreme_logits_stay_finite(scale):
  """Scores of +-1e4 and above put all weight on one key; scores of 0 are a plain mean."""
  inputs = cases.make_inputs(ORACLE.ci["chunks_plus_one"])
  function = functools.partial(cases.operator, left=8, scale=scale, **XLA)
  got = results_and_gradients(function, inputs, cotangents(function, inputs), ORACLE.names)
  for name, array in got.items():
    assert np.all(np.isfinite(array)), name
  mean = np.mean(inputs["value"][:, 30:39], axis=1)
  if scale == 0:
    close(got["output"][:, 38], mean)


def test_work_is_linear():
  """Neither the program nor its gradient holds anything of T x T, or a window per token."""
  inputs = {
    n: jax.ShapeDtypeStruct((1, 4096, 2, 8), jnp.float32) for n in ("query", "key", "value")
  }
  text = jax.jit(jax.grad(lambda x: jnp.sum(run(x, left=64)[0] ** 2))).lower(inputs).as_text()
  shapes = set(re.findall(r"tensor<([\dx]+)xf32>", text))
  largest = max(math.prod(map(int, shape.split("x"))) for shape in shapes)
  assert 4096 * 2 * 8 <= largest <= (4096 + 64) * 2 * 8


# --- Seeded faults: the comparison of the tests above must see each -------------------------------


def patched(patch, change):
  """`window_attention_xla` called with what `change` makes of (query, ..., left, scale, chunk)."""
  original = api.window_attention_xla
  patch.setattr(api, "window_attention_xla", lambda *args: original(*change(*args)))


def window_one_short(patch):
  patched(patch, lambda *a: (*a[:4], a[4] - 1, *a[5:]))


def window_one_long(patch):
  patched(patch, lambda *a: (*a[:4], a[4] + 1, *a[5:]))


def scale_missing(patch):
  patched(patch, lambda *a: (*a[:5], 1.0, a[6]))


def documents_leak(patch):
  patch.setattr(api, "run_index", jnp.zeros_like)


def state_not_reset(patch):
  original = window.final_document
  patch.setattr(window, "final_document", lambda tokens, _, *rest: original(tokens, None, *rest))


def empty_slots_seen(patch):
  original = api.oldest_first

  def change(state):
    history = original(state)
    return history._replace(documents=jnp.zeros_like(history.documents))

  patch.setattr(api, "oldest_first", change)


def read_slot_shifted(patch):
  original = api.oldest_first
  patch.setattr(api, "oldest_first", lambda s: original(s._replace(count=s.count + 1)))


def written_slot_shifted(patch):
  original = api.window_after

  def change(*args):
    state = original(*args)
    return state._replace(key=jnp.roll(state.key, 1, 1), value=jnp.roll(state.value, 1, 1))

  patch.setattr(api, "window_after", change)


def last_partial_chunk_dropped(patch):
  original = xla.join_chunks

  def change(x, length):
    return original(x, length).at[:, length - length % CHUNK :].set(0)

  patch.setattr(xla, "join_chunks", change)


def heads_grouped_otherwise(patch):
  original = xla.cut_chunk

  def change(*args):
    x = original(*args)  # [B, H, C, K], heads 0 0 0 1 1 1 become 0 1 0 1 0 1
    return x.reshape(x.shape[0], 2, -1, *x.shape[2:]).swapaxes(1, 2).reshape(x.shape)

  patch.setattr(xla, "cut_chunk", change)


def patched_backward(patch, change):
  original = xla.window_attention_xla.bwd
  patch.setattr(xla.window_attention_xla, "bwd", lambda *args: change(*original(*args)))


def gradients_of_key_and_value_swapped(patch):
  patched_backward(patch, lambda dq, dk, dv, rest: (dq, dv, dk, rest))


def gradient_of_stored_keys_lost(patch):
  patched_backward(patch, lambda dq, dk, dv, rest: (dq, dk.at[:, :3].set(0), dv, rest))


FAULTS = {
  window_one_short: "chunks_plus_one",
  window_one_long: "window_over_chunks",
  scale_missing: "chunks_plus_one",
  documents_leak: "packed",
  state_not_reset: "packed",
  empty_slots_seen: "grouped",
  read_slot_shifted: "chunks_plus_one",
  written_slot_shifted: "chunks_plus_one",
  last_partial_chunk_dropped: "chunks_plus_one",
  heads_grouped_otherwise: "grouped",
  gradients_of_key_and_value_swapped: "chunks_plus_one",
  gradient_of_stored_keys_lost: "below_one_chunk",
}


@pytest.mark.parametrize("fault", some_faults(FAULTS), ids=lambda fault: fault.__name__)
def test_seeded_fault_is_seen(fault, monkeypatch):
  name = FAULTS[fault]
  ORACLE.expected(name)  # the truth is computed before the fault is planted
  fault(monkeypatch)
  with pytest.raises(AssertionError, match=r"error .* above"):
    ORACLE.compare(name, **XLA)
