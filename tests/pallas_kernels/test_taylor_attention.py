"""Taylor attention: the definition, the portable path and the step. Kernels have own files."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo.pallas_kernels import taylor_attention, taylor_attention_step
from attnzoo.pallas_kernels.taylor_attention import cases, features, xla
from attnzoo_testing.goldens import golden
from attnzoo_testing.gradients import cotangents, results_and_gradients
from attnzoo_testing.marks import slow_but, thinned
from attnzoo_testing.numerics import relative_error
from attnzoo_testing.oracle import Oracle

CHUNK = 16
ORACLE = Oracle(taylor_attention, cases, ("output", "final_state"))
XLA = dict(implementation="xla", chunk_size=CHUNK)


# --- The published implementations (DESIGN: rung 1) -----------------------------------------------


def full_to_packed(full, dim):
  """The official [1, x / dim^(1/4), x_i x_j / sqrt(2 dim)] features as plain packed products."""
  i, j = features.pairs(dim)
  second = full[..., 1 + dim :].reshape(*full.shape[:-1], dim, dim)[..., i, j] * (2 * dim) ** 0.5
  return np.concatenate([full[..., :1], full[..., 1 : 1 + dim] * dim**0.25, second], -1)


@pytest.mark.parametrize("dim", [8, 16])
def test_golden_features(dim):
  arrays = golden("based_feature_map")
  key = arrays[f"in/d{dim}/k"]
  packed = full_to_packed(arrays[f"out/d{dim}/phi_k_full"].astype(np.float64), dim)
  np.testing.assert_allclose(features.key_features(key), packed, rtol=2e-6)
  with jax.enable_x64(True):
    query, key = (arrays[f"in/d{dim}/{name}"].astype(np.float64) for name in "qk")
    dot = features.query_features(query) @ features.key_features(key).swapaxes(-1, -2)
  np.testing.assert_allclose(dot, arrays[f"out64/d{dim}/dot"], rtol=1e-13)


def golden_inputs():
  arrays = golden("based_linear_attention")
  return arrays, {name: np.swapaxes(arrays[f"out64/{name[0]}"], 1, 2)
                  for name in ("query", "key", "value")}  # fmt: skip


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize(
  ("normalize", "truth"),
  [(True, "fla_naive_parallel"), (False, "fla_naive_parallel_unnormalised"), (False, "tk_o")],
)
def test_golden_outputs(implementation, normalize, truth):
  """flash-linear-attention's naive form (its epsilon of 1e-6 apart) and ThunderKittens' test."""
  arrays, inputs = golden_inputs()
  with jax.enable_x64(True):
    output, _ = taylor_attention(
      **inputs, normalize=normalize, implementation=implementation,
      chunk_size=7 if implementation == "xla" else None,
    )  # fmt: skip
  truth_array = np.swapaxes(arrays[f"out64/{truth}"], 1, 2)
  np.testing.assert_allclose(output, truth_array, rtol=3e-6 if normalize else 1e-11, atol=1e-11)


def test_golden_states():
  """The final state is the official cache: state of the values, and of the normaliser."""
  arrays, inputs = golden_inputs()
  with jax.enable_x64(True):
    _, state = taylor_attention(**inputs, implementation="xla", chunk_size=7)
  values = full_to_packed(arrays["out/state_final/0/kv_state"][:, :, 0].astype(np.float64), 16)
  total = full_to_packed(arrays["out/state_final/0/k_state"][:, :, 0].astype(np.float64), 16)
  truth = np.concatenate([values, total], 2).swapaxes(2, 3)  # [B, H, P, V + 1]
  assert relative_error(state, truth)[0] < 2e-6  # the golden file has it in float32


# --- The portable path against the definition (rung 2) --------------------------------------------


@pytest.mark.parametrize(
  ("name", "chunk_size"),
  slow_but(
    [*((n, CHUNK) for n in ORACLE.ci), ("packed_and_padded", None), ("chunks_plus_one", None)],
    ("packed_and_padded", CHUNK),
  ),
)
def test_xla_float32(name, chunk_size):
  ORACLE.compare(name, implementation="xla", chunk_size=chunk_size)


@pytest.mark.parametrize(
  ("name", "chunk_size"),
  thinned(
    [*((name, 7) for name in ORACLE.ci), ("packed_and_padded", 1)],
    [("decayed", 7)],
    [("packed_and_padded", 1)],
  ),
)
def test_xla_float64(name, chunk_size):
  ORACLE.compare_wide(name, implementation="xla", chunk_size=chunk_size)


# --- Other ways to the same result (rungs 7 and 8) ------------------------------------------------


@jax.jit
def run(inputs):
  return taylor_attention(**inputs, **XLA)


def case_inputs(name):
  return cases.make_inputs(ORACLE.ci[name])


def close(got, truth, length):
  assert relative_error(got, truth)[0] <= length * np.finfo(np.float32).eps


def test_step_by_step_is_parallel():
  inputs = case_inputs("decayed")
  output, final_state = run(inputs)
  tokens = tuple(np.moveaxis(inputs[n], 1, 0) for n in ("query", "key", "value"))

  def token(state, qkv):
    output, state = taylor_attention_step(*qkv, inputs["log_decay"], state)
    return state, output

  state, stepped = jax.lax.scan(token, inputs["initial_state"], tokens)
  close(np.moveaxis(stepped, 0, 1), output, output.shape[1])
  close(state, final_state, output.shape[1])


def test_step_without_the_division():
  inputs = case_inputs("one_token")
  output, _ = taylor_attention(**inputs, normalize=False, **XLA)
  tokens = (inputs[n][:, 0] for n in ("query", "key", "value"))
  stepped, _ = taylor_attention_step(*tokens, None, inputs["initial_state"], normalize=False)
  close(stepped, output[:, 0], 64)


def part(inputs, start, stop, **replaced):
  whole = ("log_decay", "initial_state")
  return {n: x if n in whole else x[:, start:stop] for n, x in inputs.items()} | replaced


@pytest.mark.parametrize("split", thinned([1, 16, 50, 89], [50], [89]))
def test_two_calls_with_the_state_passed_are_one(split):
  inputs = case_inputs("decayed")
  output, final_state = run(inputs)
  first, state = run(part(inputs, 0, split))
  second, state = run(part(inputs, split, None, initial_state=state))
  close(np.concatenate([first, second], 1), output, 100)
  close(state, final_state, 100)


def test_packed_documents_are_separate_documents():
  inputs = case_inputs("packed")
  # Documents of 1, 60 and 89 tokens in three orders; the id 0 comes back as another document.
  ids = np.stack([np.repeat((0, 1, 0), n) for n in ((60, 1, 89), (1, 89, 60), (89, 60, 1))])
  output, final_state = run(inputs | dict(segment_ids=ids.astype(np.int32)))
  del inputs["segment_ids"]
  for row in range(3):
    one = {n: x[row : row + 1] if x.ndim == 4 else x for n, x in inputs.items()}
    starts = [0, *(np.flatnonzero(np.diff(ids[row])) + 1), ids.shape[1]]
    state = one["initial_state"]
    for start, stop in zip(starts[:-1], starts[1:], strict=True):
      alone, last = run(part(one, start, stop, initial_state=state))
      close(alone, output[row : row + 1, start:stop], 150)
      state = np.zeros_like(state)
    close(last, final_state[row : row + 1], 150)


@pytest.mark.slow
def test_padded_rows_are_short_rows():
  inputs = case_inputs("padded")
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
  inputs = case_inputs("packed_and_padded")
  spoiled = dict(inputs)
  pad = np.arange(inputs["query"].shape[1]) >= inputs["lengths"][:, None]
  for name in ("query", "key", "value"):
    spoiled[name] = np.where(pad[..., None, None], np.float32(3.0), inputs[name])
  for clean, dirty in zip(run(inputs), run(spoiled), strict=True):
    np.testing.assert_array_equal(clean, dirty)


# --- Transformations (rung 9; devices: test_taylor_sharding.py) -----------------------------------


def loss(inputs):
  output, state = taylor_attention(**inputs, **XLA)
  return jnp.sum(output**2) + jnp.sum(jnp.sin(state))


@pytest.mark.slow
def test_vmap_is_a_loop():
  inputs = case_inputs("below_one_chunk")
  stacked = {n: np.stack([x, 2 * x, -x] if n != "initial_state" else [x, 2 * x, 3 * x])
             for n, x in inputs.items()}  # fmt: skip
  gradient = jax.jit(jax.vmap(jax.grad(loss)))(stacked)
  for index in range(3):
    alone = jax.jit(jax.grad(loss))({n: x[index] for n, x in stacked.items()})
    for name in stacked:
      close(gradient[name][index], alone[name], 64)


@pytest.mark.slow
def test_remat_and_scan_over_layers_change_nothing():
  inputs = case_inputs("below_one_chunk")
  query, key, value = inputs["query"], inputs["key"], inputs["value"]

  def layer(x, scale):
    return x + taylor_attention(scale * query, key, x, **XLA)[0], None

  def looped(value, scales):
    for scale in scales:
      value = layer(value, scale)[0]
    return jnp.sum(value**2)

  def scanned(value, scales):
    return jnp.sum(jax.lax.scan(jax.checkpoint(layer), value, scales)[0] ** 2)

  scales = np.array([0.5, 1.0, 2.0], np.float32)
  plain = jax.jit(jax.value_and_grad(looped, (0, 1)))(value, scales)
  other = jax.jit(jax.value_and_grad(scanned, (0, 1)))(value, scales)
  for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(other), strict=True):
    close(b, a, 64)


def test_two_runs_are_bitwise_equal():
  inputs, cotangent, _, _ = ORACLE.expected("packed_and_padded")
  function = functools.partial(taylor_attention, **XLA)
  runs = [results_and_gradients(function, inputs, cotangent, ORACLE.names) for _ in range(2)]
  for name, array in runs[0].items():
    np.testing.assert_array_equal(array, runs[1][name])


@pytest.mark.parametrize("scale", [1e-20, 1e4])
def test_extreme_inputs_stay_finite(scale):
  """Scores up to 1e9, weights up to 1e18; at 1e-20 all weights are 1 and the output is the mean."""
  inputs = case_inputs("chunks_plus_one")
  del inputs["initial_state"]
  inputs |= dict(query=inputs["query"] * np.float32(scale), key=inputs["key"] * np.float32(scale))
  function = functools.partial(taylor_attention, **XLA)
  got = results_and_gradients(function, inputs, cotangents(function, inputs), ORACLE.names)
  for name, array in got.items():
    assert np.all(np.isfinite(array)), name
  if scale < 1:
    mean = np.cumsum(inputs["value"], 1) / np.arange(1, 130)[:, None, None]
    close(got["output"], mean, 130)


def test_weights_average_in_bfloat16():
  """Where all values are alike the output is that value, whatever the rounding of the weights."""
  inputs = {n: jnp.asarray(x, jnp.bfloat16) for n, x in case_inputs("chunks_plus_one").items()}
  inputs["value"] = jnp.full_like(inputs["value"], 3.0)
  output, _ = taylor_attention(inputs["query"], inputs["key"], inputs["value"], **XLA)
  assert relative_error(output, np.full(output.shape, 3.0))[1] <= float(jnp.finfo("bfloat16").eps)


def test_features_of_one_chunk_at_a_time():
  """No array of the compiled program, forward and backward, has all features of all tokens."""
  length, heads, dim = 4096, 2, 16

  def gradient(query, key, value):
    return jax.grad(lambda *x: jnp.sum(taylor_attention(*x, implementation="xla")[0]), (0, 1, 2))(
      query, key, value
    )

  narrow = jax.ShapeDtypeStruct((1, length, heads, dim), jnp.float32)
  wide = jax.ShapeDtypeStruct((1, length, heads, 64), jnp.float32)
  compiled = jax.jit(gradient).lower(narrow, narrow, wide).compile()
  all_features = 4 * length * heads * features.feature_count(dim)
  states = all_features * 65 // xla.DEFAULT_CHUNK  # one [P, V + 1] per chunk is kept
  activations = 4 * length * heads * (2 * dim + 64) * 4
  assert compiled.memory_analysis().temp_size_in_bytes < states + activations + all_features // 2


# --- Bad arguments --------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(key=np.zeros((1, 13, 3, 4), np.float32)), "key must have shape"),
    (dict(initial_state=np.zeros((1, 3, 45, 24), np.float32)), r"P = 1 \+ F \+ F"),
    (dict(log_decay=np.ones(3, np.float32)), "log_decay must be <= 0"),
    (dict(chunk_size=0), "chunk_size must be at least 1"),
    (dict(implementation="cuda"), "implementation must be None or one of"),
    (dict(lengths=np.zeros(2, np.int32)), "lengths must have shape"),
  ],
)
def test_bad_arguments(change, message):
  with pytest.raises(
    ValueError, match=f"taylor_attention: .*{message}|taylor_attention: {message}"
  ):
    taylor_attention(**(case_inputs("below_one_chunk") | change))


@pytest.mark.parametrize("implementation", ["tpu", "triton"])
def test_kernels_of_another_platform_are_refused(implementation):
  with pytest.raises(NotImplementedError, match="xla"):
    taylor_attention(**case_inputs("below_one_chunk"), implementation=implementation)
