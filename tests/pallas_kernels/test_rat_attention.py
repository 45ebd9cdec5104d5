"""RAT attention: the definition, the portable path and the step. Kernels have own files."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo.pallas_kernels.rat_attention import (
  attend,
  cases,
  empty_state,
  rat_attention,
  rat_attention_step,
  recurrence,
  xla,
)
from attnzoo_testing import goldens
from attnzoo_testing.gradients import results_and_gradients
from attnzoo_testing.marks import slow_but, some_faults, thinned
from attnzoo_testing.numerics import relative_error
from attnzoo_testing.oracle import Oracle

ORACLE = Oracle(cases.operator, cases, cases.RESULTS)


# --- The published layer (DESIGN: rung 1) ---------------------------------------------------------


def golden_layer(name):
  """(operator arguments, chunk_size, the layer's remaining arithmetic, its output in float64)."""
  arrays = goldens.golden(name)
  config = goldens.golden_config(name)
  config, prefix = (config["rat"], "rat.") if "rat" in config else (config, "")
  get = lambda key: arrays[key.replace("/", f"/{prefix}", 1)].astype(np.float64)  # noqa: E731
  heads, groups = config["num_head"], config["ngroups"]
  x = get("in/x")
  normed = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * get("param/input_norm.weight")
  width, dim = x.shape[-1], x.shape[-1] // heads
  sizes = np.cumsum([width, width, width, groups * dim])
  parts = np.split(normed @ get("param/in_proj.weight").T, sizes, axis=-1)
  z, v, g, q, k = (part.reshape(*x.shape[:2], -1, dim) for part in parts)
  bias = get("param/gate_bias").reshape(heads, dim)
  arguments = dict(query=q, key=k, value=v, gate_logits=g, gate_bias=bias, output_logits=z)
  finish = lambda out: x + np.asarray(out).reshape(x.shape) @ get("param/out_proj.weight").T  # noqa: E731
  return arguments, config["chunk_size"], finish, get("out64/y"), get("out/step_y")


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("name", ["rat_layer_a", "rat_layer_b"])
def test_golden(name, implementation):
  """To 1e-6: the released code's rotary tables are float32 in its float64 run too."""
  arguments, chunk_size, finish, truth, _ = golden_layer(name)
  with jax.enable_x64(True):
    output, _ = rat_attention(**arguments, chunk_size=chunk_size, implementation=implementation)
  assert relative_error(finish(output), truth)[1] < 1e-6


@pytest.mark.parametrize("name", ["rat_layer_a", "rat_layer_b"])
def test_golden_steps_from_an_empty_cache(name):
  """Decoding from nothing, which the released code gets wrong; the golden file has it mended."""
  arguments, chunk_size, finish, truth, stepped = golden_layer(name)
  assert stepped.shape == truth.shape
  arrays = {n: np.float32(x) for n, x in arguments.items()}
  bias = arrays.pop("gate_bias")
  batch, length, heads, dim = arrays["value"].shape
  state = empty_state(batch, -(-length // chunk_size), heads, dim)
  step = jax.jit(functools.partial(rat_attention_step, chunk_size=chunk_size))
  outputs = []
  for t in range(length):
    token = {n: x[:, t] for n, x in arrays.items()}
    output, state = step(**token, gate_bias=bias, state=state)
    outputs.append(output)
  assert relative_error(finish(np.stack(outputs, 1)), stepped)[1] < 1e-5


# --- The portable path against the definition (rung 2) --------------------------------------------


@pytest.mark.parametrize("name", slow_but(ORACLE.ci, "packed_and_padded"))
def test_xla_float32(name):
  ORACLE.compare(name, implementation="xla")


@pytest.mark.parametrize("name", thinned(ORACLE.ci, ["partial_chunk"], ["packed_and_padded"]))
def test_xla_float64(name, monkeypatch):
  monkeypatch.setattr(attend, "ROWS", 16)  # several blocks and tiles, the last ones partial
  monkeypatch.setattr(attend, "TILE", 5)
  ORACLE.compare_wide(name, implementation="xla")


@pytest.mark.parametrize("chunk_size", thinned(range(1, 14), [3], [1, 5, 13]))
def test_every_chunk_size(chunk_size):
  """From softmax attention over gated keys (1) to a recurrent network (T), forward."""
  inputs = cases.make_inputs(ORACLE.ci["partial_chunk"])
  inputs = {n: x[:, :13] if x.ndim == 4 else x for n, x in inputs.items()}
  with jax.enable_x64(True):
    wide = {n: x.astype(np.float64) for n, x in inputs.items()}
    truth = rat_attention(**wide, chunk_size=chunk_size, implementation="reference")
    got = rat_attention(**wide, chunk_size=chunk_size, implementation="xla")
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(truth), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("period", [None, 4, 20, 100])
def test_recurrence_is_its_loop(period):
  rng = np.random.default_rng(0)
  decay, x, dy = (rng.uniform(0, 1, (2, 300, 3)) for _ in range(3))
  if period:
    decay[:, ::period] = 0
  y, total = np.zeros_like(x), np.zeros_like(x[:, 0])
  for t in range(300):
    y[:, t] = total = decay[:, t] * total + x[:, t]
  lam, total = np.zeros_like(x), np.zeros_like(x[:, 0])
  for t in reversed(range(300)):
    total = dy[:, t] + (decay[:, t + 1] * total if t < 299 else 0)
    lam[:, t] = total
  before = np.pad(y[:, :-1], ((0, 0), (1, 0), (0, 0)))
  with jax.enable_x64(True):
    function = functools.partial(recurrence.linear_recurrence, period=period)
    got, pull = jax.vjp(function, decay, x)
    d_decay, dx = pull(dy)
  for a, b in ((got, y), (dx, lam), (d_decay, lam * before)):
    np.testing.assert_allclose(a, b, rtol=1e-12)


# --- Other ways to the same result (rungs 7 and 8) ------------------------------------------------


def case_inputs(name):
  return cases.make_inputs(ORACLE.ci[name])


def run(inputs, chunk_size=4, **options):
  function = functools.partial(rat_attention, chunk_size=chunk_size, implementation="xla")
  return jax.jit(function)(**inputs, **options)


def close(got, truth, length=64):
  assert relative_error(got, truth)[0] <= length * np.finfo(np.float32).eps


def part(inputs, start, stop):
  return {n: x if n == "gate_bias" else x[:, start:stop] for n, x in inputs.items()}


@pytest.mark.parametrize("split", thinned([1, 4, 6, 20, 44], [6], [44]))
def test_two_calls_with_the_state_passed_are_one(split):
  inputs = case_inputs("partial_chunk")
  output, final = run(inputs)
  empty = empty_state(1, 12, 4, 8)
  first, state = run(part(inputs, 0, split), initial_state=empty)
  second, state = run(part(inputs, split, None), initial_state=state)
  close(np.concatenate([first, second], 1), output)
  close(state.running_key, final.running_key)
  close(state.key[:, : final.key.shape[1]], final.key)
  assert state.position == final.position == 45


def test_steps_after_a_prompt_of_any_length_are_parallel():
  inputs = part(case_inputs("partial_chunk"), 0, 18)
  output, _ = run(inputs)
  step = jax.jit(functools.partial(rat_attention_step, chunk_size=4))
  for prompt in (0, 1, 3, 4, 5, 17):
    state = empty_state(1, 5, 4, 8)
    if prompt:
      _, state = run(part(inputs, 0, prompt), initial_state=state)
    for t in range(prompt, 18):
      token = {n: x if n == "gate_bias" else x[:, t] for n, x in inputs.items()}
      stepped, state = step(**token, state=state)
      close(stepped, output[:, t])


@pytest.mark.slow
def test_packed_documents_are_separate_documents():
  inputs = {n: x for n, x in case_inputs("packed").items() if "stored" not in n}
  for name in ("running_key", "running_value", "position"):
    del inputs[name]
  ids = np.stack([np.repeat((0, 1, 0), n) for n in ((40, 1, 49), (1, 49, 40), (49, 40, 1))])
  output, final = run(inputs | dict(segment_ids=ids.astype(np.int32)))
  del inputs["segment_ids"]
  for row in range(3):
    one = {n: x if n == "gate_bias" else x[row : row + 1] for n, x in inputs.items()}
    starts = [0, *(np.flatnonzero(np.diff(ids[row])) + 1), ids.shape[1]]
    for start, stop in zip(starts[:-1], starts[1:], strict=True):
      alone, last = run(part(one, start, stop))
      close(alone, output[row : row + 1, start:stop])
    close(last.running_value, final.running_value[row : row + 1])
    filled = int(last.position[0]) // 4
    close(last.key[:, :filled], final.key[row : row + 1, :filled])


def test_padded_rows_are_short_rows():
  inputs = case_inputs("whole_chunks")
  lengths = np.array([21, 0], np.int32)
  output, final = run(inputs, lengths=lengths)
  one = {n: x if n == "gate_bias" else x[:1] for n, x in inputs.items()}
  alone, state = run(part(one, 0, 21))
  close(alone, output[:1, :21])
  assert not np.any(output[0, 21:])
  assert not np.any(output[1])
  close(state.running_key, final.running_key[:1])
  assert final.position.tolist() == [21, 0]
  assert not np.any(final.running_key[1])


def test_the_future_does_not_change_the_past():
  inputs = case_inputs("partial_chunk")
  output, _ = run(inputs)
  later = {n: x if n == "gate_bias" else np.concatenate([x[:, :23], -x[:, 23:]], 1)
           for n, x in inputs.items()}  # fmt: skip
  changed, _ = run(later)
  np.testing.assert_array_equal(output[:, :23], changed[:, :23])
  assert np.all(np.any(output[:, 23:] != changed[:, 23:], axis=(0, 2, 3)))


# --- Transformations (rung 9) ---------------------------------------------------------------------


@pytest.mark.slow
def test_vmap_is_a_loop():
  inputs = case_inputs("below_one_chunk")
  stacked = {n: np.stack([x, 2 * x, -x]) for n, x in inputs.items()}
  loss = lambda x: jnp.sum(rat_attention(**x, chunk_size=3, implementation="xla")[0] ** 2)  # noqa: E731
  gradient = jax.jit(jax.vmap(jax.grad(loss)))(stacked)
  for index in range(3):
    alone = jax.jit(jax.grad(loss))({n: x[index] for n, x in stacked.items()})
    for name in stacked:
      close(gradient[name][index], alone[name])


@pytest.mark.slow
def test_two_runs_are_bitwise_equal():
  inputs, cotangent, _, _ = ORACLE.expected("packed_and_padded")
  options = dict(ORACLE.options("packed_and_padded"), implementation="xla")
  function = functools.partial(cases.operator, **options)
  runs = [results_and_gradients(function, inputs, cotangent, ORACLE.names) for _ in range(2)]
  for name, array in runs[0].items():
    np.testing.assert_array_equal(array, runs[1][name])


def test_no_array_of_tokens_times_chunks():
  """Peak memory of forward and backward grows like T, not like T^2 / L."""

  def temporary(length):
    groups = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
    tokens = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
    bias = jax.ShapeDtypeStruct((1, 8), jnp.float32)
    loss = lambda *x: jnp.sum(rat_attention(*x, chunk_size=4)[0])  # noqa: E731
    gradient = jax.jit(jax.grad(loss, (0, 1, 2, 3)))
    compiled = gradient.lower(groups, groups, tokens, tokens, bias).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporary(16384) < 4.5 * temporary(4096)


# --- Bad arguments --------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(chunk_size=0), "chunk_size must be at least 1"),
    (dict(gate_bias=np.zeros((2, 4), np.float32)), "gate_bias must have shape"),
    (dict(query=np.zeros((1, 7, 3, 8), np.float32), key=np.zeros((1, 7, 3, 8), np.float32)),
     "multiple of the 3"),
    (dict(gate_logits=np.zeros((1, 7, 2, 4), np.float32)), "gate_logits must have shape"),
    (dict(initial_state=empty_state(2, 3, 2, 8)), "initial_state.key must have shape"),
    (dict(implementation="cudnn"), "implementation must be None or one of"),
  ],
)  # fmt: skip
def test_bad_arguments(change, message):
  arguments = case_inputs("below_one_chunk") | dict(chunk_size=4) | change
  with pytest.raises(ValueError, match=f"rat_attention: .*{message}"):
    rat_attention(**arguments)


def test_odd_head_dim_has_no_rotation():
  inputs = case_inputs("odd_chunk_no_rotary")
  with pytest.raises(ValueError, match="even head_dim for rotary positions; got 7"):
    rat_attention(**inputs, chunk_size=3)


# --- Seeded faults: the comparison of the tests above must see each -------------------------------


def own_summary_seen(patch):
  original = xla.find_places
  patch.setattr(xla, "find_places", lambda *args: (p := original(*args))._replace(own=p.own + 1))


def documents_ignored(patch):
  original = xla.find_places
  patch.setattr(xla, "find_places", lambda _, *args: original(None, *args))


def recurrence_not_restarted(patch):
  original = xla.linear_recurrence

  def change(decay, x, period):
    return original(jnp.where(decay == 0, 0.5, decay), x, None)

  patch.setattr(xla, "linear_recurrence", change)


def token_positions_rotated(patch):
  original = xla.rotary_tables

  def change(positions, *args):
    return original(jnp.arange(positions.shape[1])[:, None], *args)

  patch.setattr(xla, "rotary_tables", change)


def groups_repeated_not_tiled(patch):
  patch.setattr(jnp, "tile", lambda x, reps: jnp.repeat(x, reps[2], axis=2))


def last_chunk_dropped(patch):
  original = attend._bounds
  patch.setattr(attend, "_bounds", lambda *args: (original(*args)[0], original(*args)[1] - 1))


def query_and_summary_gradients_mixed(patch):
  original = attend.attend.bwd

  def change(*args):
    dq, dk, dv, *rest = original(*args)
    return (dq, dv, dk, *rest)

  patch.setattr(attend.attend, "bwd", change)


def decay_not_shifted_backwards(patch):
  def change(period, residuals, dy):
    decay, y = residuals
    return recurrence._backward(None, (jnp.roll(decay, 1, 1), y), dy)

  patch.setattr(recurrence.linear_recurrence, "bwd", change)


FAULTS = {
  own_summary_seen: "partial_chunk",
  documents_ignored: "packed",
  recurrence_not_restarted: "partial_chunk",
  token_positions_rotated: "partial_chunk",
  groups_repeated_not_tiled: "partial_chunk",
  last_chunk_dropped: "partial_chunk",
  query_and_summary_gradients_mixed: "partial_chunk",
  decay_not_shifted_backwards: "partial_chunk",
}


@pytest.mark.parametrize("fault", some_faults(FAULTS), ids=lambda fault: fault.__name__)
def test_seeded_fault_is_seen(fault, monkeypatch):
  name = FAULTS[fault]
  ORACLE.expected(name)  # the truth is computed before the fault is planted
  fault(monkeypatch)
  with pytest.raises(AssertionError, match=r"error .* above"):
    ORACLE.compare(name, implementation="xla")
