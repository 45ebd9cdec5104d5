"""Lightning attention: the definition, the portable path and the step. Kernels have own files."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo.pallas_kernels import lightning_attention, lightning_attention_step
from attnzoo.pallas_kernels.cases import tagged
from attnzoo.pallas_kernels.lightning_attention import api, xla
from attnzoo.pallas_kernels.lightning_attention.cases import CASES, make_inputs
from attnzoo_testing.goldens import golden
from attnzoo_testing.gradients import cotangents, results_and_gradients
from attnzoo_testing.numerics import assert_as_exact, relative_error

NAMES = ("output", "final_state")
CI = {case.name: case for case in tagged(CASES, "ci")}
CHUNK = 16
REFERENCE = functools.partial(lightning_attention, implementation="reference")


def chunked(chunk_size=CHUNK):
  return functools.partial(lightning_attention, implementation="xla", chunk_size=chunk_size)


def widen(inputs):
  return {n: x.astype(np.float64) if x.dtype == np.float32 else x for n, x in inputs.items()}


@functools.cache
def expected(name):
  """(inputs, cotangents, results of the definition in float32, the truth in float64) of a case."""
  inputs = make_inputs(CI[name])
  cotangent = cotangents(REFERENCE, inputs)
  narrow = results_and_gradients(REFERENCE, inputs, cotangent, NAMES)
  with jax.enable_x64(True):
    truth = results_and_gradients(REFERENCE, widen(inputs), cotangent, NAMES)
  return inputs, cotangent, narrow, truth


def compare(name, function):
  """In float32 at most 2 x the error of the definition itself + 4 eps, gradients included."""
  inputs, cotangent, narrow, truth = expected(name)
  got = results_and_gradients(function, inputs, cotangent, NAMES)
  return assert_as_exact(got, narrow, truth, np.float32)


def assert_same_to_rounding(got, truth, length):
  """Equal up to a sum of `length` roundings of float64."""
  for name, array in truth.items():
    limit = length * np.finfo(np.float64).eps
    assert relative_error(got[name], array)[0] <= limit, name


# --- The published implementation (DESIGN: rung 1) ------------------------------------------------


def golden_case(name, dtype=np.float64):
  """(inputs, cotangents, truth) in our layout and names; golden files have the heads before T."""
  arrays = golden(f"transnormer_op_{name}")

  def swap(key):
    return np.swapaxes(arrays[key], 1, 2).astype(dtype)

  inputs = dict(query=swap("in/q"), key=swap("in/k"), value=swap("in/v"))
  truth = {f"d_{full}": np.swapaxes(arrays[f"grad/{short}_f64"], 1, 2)
           for full, short in (("query", "q"), ("key", "k"), ("value", "v"))}  # fmt: skip
  truth["output"] = np.swapaxes(arrays["out/o_f64"], 1, 2)
  if "in/s" in arrays:
    inputs["log_decay"] = -arrays["in/s"].reshape(-1).astype(np.promote_types(dtype, np.float32))
  if "out/final_state_f64" in arrays:
    truth["final_state"] = arrays["out/final_state_f64"]
  batch, _, heads, key_dim = inputs["query"].shape
  state = np.zeros((batch, heads, key_dim, inputs["value"].shape[3]))
  if "in/initial_state" in arrays:
    inputs["initial_state"] = arrays["in/initial_state"].astype(dtype)
    truth["d_initial_state"] = arrays["grad/initial_state_f64"]
  return inputs, (swap("in/do"), arrays.get("in/d_final_state", state)), truth


@pytest.mark.parametrize("function", [REFERENCE, chunked()], ids=["reference", "xla"])
@pytest.mark.parametrize("name", ["decay", "ragged", "nodecay", "state"])
def test_golden_float64(name, function):
  with jax.enable_x64(True):
    inputs, cotangent, truth = golden_case(name)
    got = results_and_gradients(function, inputs, cotangent, NAMES)
  assert_same_to_rounding(got, truth, inputs["query"].shape[1])


def test_golden_states_between_calls():
  """The state after p tokens is the one the golden file has before position p."""
  arrays = golden("transnormer_op_state")
  with jax.enable_x64(True):
    inputs, _, _ = golden_case("state")
    for position in (17, 64):
      before = {n: x[:, :position] if n in ("query", "key", "value") else x
                for n, x in inputs.items()}  # fmt: skip
      _, state = REFERENCE(**before)
      truth = arrays[f"out/state_before_pos_{position}_f64"]
      assert_same_to_rounding({"state": state}, {"state": truth}, position)


def test_golden_bfloat16():
  """Errors below those of the released kernels on the same bfloat16 inputs."""
  arrays = golden("transnormer_op_bf16")
  inputs, cotangent, truth = golden_case("bf16", jnp.bfloat16)
  got = results_and_gradients(chunked(64), inputs, cotangent, NAMES)
  for full, short in (("d_query", "grad/q"), ("d_key", "grad/k"), ("d_value", "grad/v")):
    released = np.swapaxes(arrays[f"{short}_triton_bf16"], 1, 2)
    assert relative_error(got[full], truth[full])[1] < relative_error(released, truth[full])[1]
  released = np.swapaxes(arrays["out/o_torch_bf16"], 1, 2)
  error = relative_error(got["output"], truth["output"])
  assert error[0] < relative_error(released, truth["output"])[0]


# --- The portable path against the definition (rung 2) --------------------------------------------


@pytest.mark.parametrize(
  ("name", "chunk_size"),
  [(name, CHUNK) for name in CI] + [("packed_and_padded", None), ("chunks_plus_one", None)],
)
def test_xla_float32(name, chunk_size):
  compare(name, chunked(chunk_size))


@pytest.mark.parametrize(
  ("name", "chunk_size"), [(name, 7) for name in CI] + [("packed_and_padded", 1)]
)
def test_xla_float64(name, chunk_size):
  """In float64 nothing but rounding is left, so no mistake can hide in a tolerance."""
  inputs, cotangent, _, truth = expected(name)
  with jax.enable_x64(True):
    got = results_and_gradients(chunked(chunk_size), widen(inputs), cotangent, NAMES)
  assert_same_to_rounding(got, truth, max(64, inputs["query"].shape[1]))


# --- Other ways to the same result (rungs 7 and 8) ------------------------------------------------


@jax.jit
def run(inputs):
  return chunked()(**inputs)


def close(got, truth, length):
  limit = length * np.finfo(np.float32).eps
  assert relative_error(got, truth)[0] <= limit


def test_step_by_step_is_parallel():
  inputs = make_inputs(CI["wide_key"])
  output, final_state = run(inputs)
  tokens = tuple(np.moveaxis(inputs[n], 1, 0) for n in ("query", "key", "value"))

  def token(state, qkv):
    output, state = lightning_attention_step(*qkv, inputs["log_decay"], state)
    return state, output

  state, stepped = jax.lax.scan(token, inputs["initial_state"], tokens)
  close(np.moveaxis(stepped, 0, 1), output, output.shape[1])
  close(state, final_state, output.shape[1])


def part(inputs, start, stop, **replaced):
  cut = {n: x[:, start:stop] for n, x in inputs.items() if n not in ("log_decay", "initial_state")}
  kept = {n: x for n, x in inputs.items() if n in ("log_decay", "initial_state")}
  return cut | kept | replaced


@pytest.mark.parametrize("split", [1, 16, 50, 99])
def test_two_calls_with_the_state_passed_are_one(split):
  inputs = make_inputs(CI["wide_key"])
  output, final_state = run(inputs)
  first, state = run(part(inputs, 0, split))
  second, state = run(part(inputs, split, None, initial_state=state))
  close(np.concatenate([first, second], 1), output, 100)
  close(state, final_state, 100)


def test_packed_documents_are_separate_documents():
  inputs = make_inputs(CI["packed"])
  # Documents of 1, 60 and 89 tokens in three orders; the id 0 comes back as another document.
  ids = np.stack([np.repeat((0, 1, 0), n) for n in ((60, 1, 89), (1, 89, 60), (89, 60, 1))])
  output, final_state = run(inputs | dict(segment_ids=ids.astype(np.int32)))
  del inputs["segment_ids"]
  for row in range(3):
    one = {n: x[row : row + 1] if x.ndim == 4 else x for n, x in inputs.items()}
    starts = [0, *(np.flatnonzero(np.diff(ids[row])) + 1), ids.shape[1]]
    assert len(starts) == 4
    state = one["initial_state"]
    for start, stop in zip(starts[:-1], starts[1:], strict=True):
      alone, last = run(part(one, start, stop, initial_state=state))
      close(alone, output[row : row + 1, start:stop], 150)
      state = np.zeros_like(state)
    close(last, final_state[row : row + 1], 150)


def test_padded_rows_are_short_rows():
  inputs = make_inputs(CI["padded"])
  output, final_state = run(inputs)
  lengths = inputs.pop("lengths")
  assert 0 in lengths
  for row, length in enumerate(lengths):
    one = {n: x[row : row + 1] if x.ndim == 4 else x for n, x in inputs.items()}
    assert not np.any(output[row, length:])
    if length == 0:
      np.testing.assert_array_equal(final_state[row], one["initial_state"][0])
      continue
    alone, state = run(part(one, 0, length))
    close(alone, output[row : row + 1, :length], 130)
    close(state, final_state[row : row + 1], 130)


def test_padding_values_do_not_matter():
  inputs = make_inputs(CI["packed_and_padded"])
  spoiled = dict(inputs)
  pad = np.arange(inputs["query"].shape[1]) >= inputs["lengths"][:, None]
  for name in ("query", "key", "value"):
    spoiled[name] = np.where(pad[..., None, None], np.float32(3.0), inputs[name])
  for clean, dirty in zip(run(inputs), run(spoiled), strict=True):
    np.testing.assert_array_equal(clean, dirty)


# --- Transformations (rung 9; devices: test_lightning_sharding.py) --------------------------------


def loss(inputs):
  output, state = chunked()(**inputs)
  return jnp.sum(output**2) + jnp.sum(jnp.sin(state))


def test_vmap_is_a_loop():
  inputs = make_inputs(CI["below_one_chunk"])
  rates = inputs.pop("log_decay")
  stacked = {n: np.stack([x, 2 * x, -x]) for n, x in inputs.items()}
  gradient = jax.jit(jax.vmap(jax.grad(lambda x: loss(x | dict(log_decay=rates)))))(stacked)
  for index in range(3):
    one = {n: x[index] for n, x in stacked.items()} | dict(log_decay=rates)
    alone = jax.jit(jax.grad(loss))(one)
    for name in stacked:
      close(gradient[name][index], alone[name], 64)


def test_remat_and_scan_over_layers_change_nothing():
  inputs = make_inputs(CI["below_one_chunk"])
  query, key, value = inputs["query"], inputs["key"], inputs["value"][..., :8]
  rates = np.stack([inputs["log_decay"], inputs["log_decay"] / 2, inputs["log_decay"] / 4])

  def layer(x, rate):
    return x + chunked(4)(query, key, x, rate)[0], None

  def looped(value, rates):
    for rate in rates:
      value = layer(value, rate)[0]
    return jnp.sum(value**2)

  def scanned(value, rates):
    return jnp.sum(jax.lax.scan(jax.checkpoint(layer), value, rates)[0] ** 2)

  plain = jax.jit(jax.value_and_grad(looped, (0, 1)))(value, rates)
  other = jax.jit(jax.value_and_grad(scanned, (0, 1)))(value, rates)
  for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(other), strict=True):
    close(b, a, 64)


def test_two_runs_are_bitwise_equal():
  inputs, cotangent, _, _ = expected("packed_and_padded")
  runs = [results_and_gradients(chunked(), inputs, cotangent, NAMES) for _ in range(2)]
  for name, array in runs[0].items():
    np.testing.assert_array_equal(array, runs[1][name])


@pytest.mark.parametrize("scale", [1e-30, 1e10])
def test_extreme_inputs_stay_finite(scale):
  """Products of q, k, v reach 1e30; a rate of 1000 per token leaves nothing but the diagonal."""
  inputs = make_inputs(CI["chunks_plus_one"])
  inputs = {n: x * np.float32(scale) if x.ndim == 4 else x for n, x in inputs.items()}
  inputs["log_decay"] = np.array([-1000.0, -1e-7], np.float32)
  got = results_and_gradients(chunked(), inputs, cotangents(chunked(), inputs), NAMES)
  for name, array in got.items():
    assert np.all(np.isfinite(array)), name


# --- Seeded faults: the comparison of the tests above must see each -------------------------------


def patched_weights(change):
  """`chunk_weights` with `change(weights, log_decay, chunk)` applied to what it gives."""
  original = xla.chunk_weights

  def factory(log_decay, chunk, *rest):
    weights = original(log_decay, chunk, *rest)
    return lambda index: change(weights(index), log_decay[:, None, None], chunk)

  return factory


def wrong_decay_sign(patch):
  original = xla.chunk_weights
  patch.setattr(xla, "chunk_weights", lambda rate, *rest: original(-rate, *rest))


def off_by_one_mask(patch):
  def change(w, rate, chunk):
    return w._replace(mask=w.mask * jnp.tri(chunk, k=-1))

  patch.setattr(xla, "chunk_weights", patched_weights(change))


def decayed_diagonal(patch):
  def change(w, rate, chunk):
    return w._replace(mask=w.mask * jnp.exp(rate * jnp.eye(chunk)))

  patch.setattr(xla, "chunk_weights", patched_weights(change))


def state_not_reset(patch):
  def change(w, rate, chunk):
    up = jnp.broadcast_to(jnp.exp(rate * (jnp.arange(chunk)[:, None] + 1)), w.up.shape)
    return w._replace(up=up, carry=jnp.exp(rate * w.count))

  patch.setattr(xla, "chunk_weights", patched_weights(change))


def documents_ignored(patch):
  patch.setattr(api, "run_index", jnp.zeros_like)


def last_partial_chunk_dropped(patch):
  def change(w, rate, chunk):
    return w._replace(real=w.real * (w.count == chunk))

  patch.setattr(xla, "chunk_weights", patched_weights(change))


def full_chunk_in_the_tail(patch):
  def change(w, rate, chunk):
    short = chunk - w.count
    return w._replace(
      down=w.down * jnp.exp(rate * short), carry=jnp.exp(rate * chunk) * (w.carry > 0)
    )

  patch.setattr(xla, "chunk_weights", patched_weights(change))


def patched_backward(patch, change):
  original = xla.lightning_attention_xla.bwd
  patch.setattr(xla.lightning_attention_xla, "bwd", functools.partial(change, original))


def query_and_key_gradients_swapped(patch):
  def change(original, *args):
    dq, dk, *rest = original(*args)
    return (dk, dq, *rest)

  patched_backward(patch, change)


def final_state_cotangent_ignored(patch):
  def change(original, chunk, residuals, cotangent):
    return original(chunk, residuals, (cotangent[0], jnp.zeros_like(cotangent[1])))

  patched_backward(patch, change)


FAULTS = {
  wrong_decay_sign: "chunks_plus_one",
  off_by_one_mask: "below_one_chunk",
  decayed_diagonal: "below_one_chunk",
  state_not_reset: "packed",
  documents_ignored: "packed",
  last_partial_chunk_dropped: "chunks_plus_one",
  full_chunk_in_the_tail: "chunks_plus_one",
  query_and_key_gradients_swapped: "below_one_chunk",
  final_state_cotangent_ignored: "below_one_chunk",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_seeded_fault_is_seen(fault, monkeypatch):
  name = FAULTS[fault]
  expected(name)  # the truth is computed before the fault is planted
  fault(monkeypatch)
  with pytest.raises(AssertionError, match=r"error .* above"):
    compare(name, chunked())
