"""The TPU kernels of Taylor attention: interpreted on the CPU, compiled for absent TPUs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from attnzoo.pallas_kernels import taylor_attention
from attnzoo.pallas_kernels.cases import tagged
from attnzoo.pallas_kernels.taylor_attention import tpu_chunks, tpu_features, tpu_tuning, tpu_vjp
from attnzoo.pallas_kernels.taylor_attention.cases import (
  CASES,
  make_inputs,
  static_options,
)
from attnzoo.pallas_kernels.taylor_attention.features import key_features
from attnzoo_testing.gradients import results_and_gradients
from attnzoo_testing.marks import slow_but, some_faults
from attnzoo_testing.numerics import assert_as_exact

NAMES = ("output", "state")
BY_NAME = {case.name: case for case in CASES}


@pytest.fixture(autouse=True)
def one_chunk_per_step(monkeypatch):
  monkeypatch.setattr(tpu_tuning, "MAX_ROWS", 1)


def run(inputs, cotangents, decay, **options):
  """Output, final state and the gradient of every float input but the decay (a test of its own)."""
  options |= {} if decay is None else dict(log_decay=decay)
  return results_and_gradients(
    functools.partial(taylor_attention, **options), inputs, cotangents, NAMES
  )


def problem(inputs, dtype, normalize=True):
  """(inputs, decay, cotangents, truth): the recurrence in float64 says what is right."""
  inputs = dict(inputs)
  decay = inputs.pop("log_decay", None)
  rng = np.random.default_rng(1)
  batch, _, heads, dim = inputs["query"].shape
  value_shape = inputs["value"].shape
  state_shape = batch, heads, 1 + dim + dim * (dim + 1) // 2, value_shape[3] + 1
  cotangents = (
    np.asarray(rng.standard_normal(value_shape), dtype),
    rng.standard_normal(state_shape).astype(np.float32),
  )
  with jax.enable_x64():
    exact = {k: x if x.dtype.kind in "iu" else np.asarray(x, np.float64) for k, x in inputs.items()}
    exact_decay = None if decay is None else np.asarray(decay, np.float64)
    exact_cotangents = tuple(np.asarray(c, np.float64) for c in cotangents)
    options = dict(implementation="reference", normalize=normalize)
    truth = run(exact, exact_cotangents, exact_decay, **options)
  return inputs, decay, cotangents, truth


def compare(inputs, dtype, interpret=True, chunk_size=32, **options):
  """Kernel and portable path against the recurrence in float64."""
  inputs, decay, cotangents, truth = problem(inputs, dtype, **options)
  options |= dict(chunk_size=chunk_size)
  portable = run(inputs, cotangents, decay, implementation="xla", **options)
  kernel = dict(implementation="tpu", interpret=interpret)
  got = run(inputs, cotangents, decay, **kernel, **options)
  return assert_as_exact(got, portable, truth, dtype)


@pytest.mark.parametrize(
  "name", slow_but([case.name for case in tagged(CASES, "ci")], "below_one_chunk")
)
def test_float32_against_float64(name, monkeypatch):
  if name == "packed_and_padded":  # loops over chunks, heads in several lane tiles, padding blocks
    monkeypatch.setattr(tpu_tuning, "MAX_ROWS", 128)
    for module in (tpu_chunks, tpu_vjp.tpu_backward):
      monkeypatch.setattr(module, "LANES", 16)
  compare(make_inputs(BY_NAME[name]), np.float32, **static_options(BY_NAME[name]))


def shortened(inputs, rows, length):
  """The first sequences of a case, cut off."""
  inputs = {k: x if k == "log_decay" else x[:rows] for k, x in inputs.items()}
  cut = {k: x[:, :length] for k, x in inputs.items() if x.ndim > 1 and k != "initial_state"}
  if "lengths" in inputs:
    cut["lengths"] = np.minimum(inputs["lengths"], length)
    cut["lengths"][-1] = length // 2
  return inputs | cut


@pytest.mark.slow
@pytest.mark.parametrize("name", ["odd_features", "packed_and_padded"])
def test_bfloat16_against_float64(name):
  inputs = shortened(make_inputs(BY_NAME[name], jnp.bfloat16), rows=2, length=70)
  compare(inputs, jnp.bfloat16, chunk_size=48)


@pytest.mark.slow
@pytest.mark.parametrize("races", [False, True])
def test_tpu_memory_model(races, monkeypatch):
  """The interpreter that knows TPU memories: unset scratch is NaN, parallel axes are shuffled."""
  monkeypatch.setattr(tpu_tuning, "MAX_ROWS", 64)
  for module in (tpu_chunks, tpu_vjp.tpu_backward):
    monkeypatch.setattr(module, "LANES", 16)
  case = BY_NAME["packed_and_padded" if races else "below_one_chunk"]
  inputs = shortened(make_inputs(case), rows=2, length=70)
  compare(inputs, np.float32, interpret=pltpu.InterpretParams(detect_races=races), chunk_size=16)


def normal(*shape):
  return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def test_last_group_of_heads_is_not_full(monkeypatch):
  """Groups of 2 heads; of the second group only one exists, and the rest is never read."""
  monkeypatch.setattr(tpu_tuning, "LANES", 16)
  assert tpu_tuning.choose_group(3, tpu_features.Rows(8, 8, 8), 8) == (2, 1)
  inputs = dict(query=normal(1, 20, 3, 8), key=normal(1, 20, 3, 8)[::-1], value=normal(1, 20, 3, 8))
  compare(inputs, np.float32, chunk_size=16)


def test_heads_as_rows_of_the_batch(monkeypatch):
  """What large states fall back to."""
  monkeypatch.setattr(tpu_tuning, "MAX_GROUP", 1)
  inputs = {k: x[:3, :40] if x.ndim > 1 else x for k, x in make_inputs(BY_NAME["packed"]).items()}
  inputs |= dict(lengths=np.array([40, 3, 0], np.int32), log_decay=np.float32([-0.1, -1.0]))
  compare(inputs, np.float32)


def test_poisoned_padding_does_not_leak():
  """NaN in the padding rows, of the cotangent too, changes nothing, and padding has gradient 0."""
  inputs = make_inputs(BY_NAME["packed_and_padded"])
  past = np.arange(inputs["query"].shape[1]) >= inputs["lengths"][:, None]  # [B, T]
  assert past.any()
  poisoned = dict(inputs)
  for name in ("query", "key", "value"):
    poisoned[name] = np.where(past[..., None, None], np.nan, inputs[name])
  options = dict(implementation="tpu", chunk_size=64, interpret=True)

  @jax.jit
  def gradients(inputs, d_output):
    rest = {k: x for k, x in inputs.items() if k not in ("query", "key", "value")}
    f = functools.partial(taylor_attention, **rest, **options)
    out, vjp = jax.vjp(f, *(inputs[k] for k in ("query", "key", "value")))
    return out, vjp((d_output, jnp.ones_like(out[1])))

  d_output = np.ones_like(inputs["value"])
  clean = gradients(inputs, d_output)
  dirty = gradients(poisoned, np.where(past[..., None, None], np.nan, d_output))
  jax.tree.map(np.testing.assert_array_equal, clean, dirty)
  for array in (clean[0][0], *clean[1]):
    assert not np.any(np.asarray(array)[past])


@pytest.mark.parametrize("head_dim", [1, 5, 8, 16, 20])
def test_features(head_dim):
  """The kernels' rows are the packed features by number, and their products are the polynomial."""
  dim = -(-head_dim // 8) * 8
  rows = tpu_features.Rows(dim, head_dim, 16)
  q, k = normal(head_dim, 6), normal(head_dim, 7)
  padded_q, padded_k = (jnp.pad(x, ((0, dim - head_dim), (0, 0))) for x in (q, k))
  psi_q = jax.jit(lambda x: tpu_features.query_features(x, rows))(padded_q)
  psi_k = jax.jit(lambda x: tpu_features.key_features(x, rows))(padded_k)
  numbers = tpu_features.row_numbers(rows)
  used = numbers >= 0
  packed = np.asarray(key_features(jnp.asarray(k.T))).T  # [P, 7]
  assert sorted(numbers[used]) == list(range(packed.shape[0]))
  np.testing.assert_allclose(np.asarray(psi_k)[used], packed[numbers[used]], rtol=1e-6)
  s = q.T.astype(np.float64) @ k / np.sqrt(head_dim)
  np.testing.assert_allclose(psi_q.T @ psi_k, 1 + s + s**2 / 2, rtol=1e-4, atol=1e-5)


# Faults that a kernel of this kind is likely to have: each must make the comparison fail.


def _wrong_mask(monkeypatch):
  right = tpu_chunks.iota
  monkeypatch.setattr(tpu_chunks, "iota", lambda shape, axis: right(shape, axis) + (axis == 1))


def _no_scale(monkeypatch):
  monkeypatch.setattr(tpu_features.Rows, "scale", property(lambda self: 1.0))


def _pairs_counted_once(monkeypatch):
  monkeypatch.setattr(
    tpu_features, "_coefficients", lambda rows: [0.5 / rows.head_dim] * (rows.dim // 2)
  )


def _half_group_counted_twice(monkeypatch):
  monkeypatch.setattr(tpu_features, "_half_coefficient", lambda x, rows: 1 / rows.head_dim)


def _state_not_reset(monkeypatch):
  right = tpu_chunks.make_chunk

  def wrong(*args):
    return right(*args)._replace(sees=None, carries=None)

  for name in ("tpu", "tpu_backward"):
    monkeypatch.setattr(getattr(tpu_vjp, name), "make_chunk", wrong)


def _normaliser_decays(monkeypatch):
  right = tpu_chunks.state_factors

  def wrong(*args):
    up, down, carry = right(*args)
    return (*(jnp.broadcast_to(x[:1], x.shape) for x in (up, down)), carry[:, :1])

  for name in ("tpu", "tpu_backward"):
    monkeypatch.setattr(getattr(tpu_vjp, name), "state_factors", wrong)


def _query_and_key_gradients_swapped(monkeypatch):
  right = tpu_vjp.tpu_backward.backward

  def wrong(*args):
    dq, dk, *rest = right(*args)
    return dk, dq, *rest

  monkeypatch.setattr(tpu_vjp.tpu_backward, "backward", wrong)


FAULTS = (
  _wrong_mask, _no_scale, _pairs_counted_once, _half_group_counted_twice, _state_not_reset,
  _normaliser_decays, _query_and_key_gradients_swapped,
)  # fmt: skip


@pytest.fixture(scope="module")
def small():
  """A problem in 3 chunks: (inputs, decay, cotangents, truth), and what the portable path makes."""
  names = ("query", "key", "value")
  inputs = {name: normal(place, 40, 1, 8)[:1] for place, name in enumerate(names, 1)}
  inputs |= dict(log_decay=np.float32([-0.2]), segment_ids=np.arange(40)[None] // 24)
  inputs, decay, cotangents, truth = problem(inputs, np.float32)
  portable = run(inputs, cotangents, decay, implementation="xla", chunk_size=16)
  return (inputs, decay, cotangents, truth), portable


def attempt(small, gradients):
  (inputs, decay, cotangents, truth), portable = small
  options = dict(implementation="tpu", interpret=True, chunk_size=16)
  if gradients:
    got = run(inputs, cotangents, decay, **options)
  else:
    truth = {name: truth[name] for name in NAMES}
    call = jax.jit(lambda inputs: taylor_attention(**inputs, log_decay=decay, **options))
    got = dict(zip(NAMES, call(inputs), strict=True))
  assert_as_exact(got, portable, truth, np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("gradients", [False, True])
def test_no_fault(small, gradients):
  attempt(small, gradients)


@pytest.mark.parametrize("fault", some_faults(FAULTS), ids=lambda fault: fault.__name__.strip("_"))
def test_fault_is_found(fault, small, monkeypatch):
  fault(monkeypatch)
  with pytest.raises(AssertionError, match="error"):
    attempt(small, gradients="gradients" in fault.__name__)


@pytest.mark.slow
def test_decay_gradient_is_free_unless_asked_for():
  """Nothing of its portable computation is left in a compiled gradient of q, k and v."""
  q, k, v = normal(1, 33, 1, 8), normal(1, 34, 1, 8)[:, :33], normal(1, 33, 1, 16)
  log_decay = jnp.asarray([-0.1])

  def loss(q, k, v, log_decay, implementation):
    options = dict(implementation=implementation, chunk_size=16)
    if implementation == "tpu":
      options["interpret"] = True
    return jnp.sum(taylor_attention(q, k, v, log_decay, **options)[0] ** 2)

  def portable_work(argnums):
    compiled = jax.jit(jax.grad(loss, argnums), static_argnums=4).lower(q, k, v, log_decay, "tpu")
    return compiled.compile().as_text().count("bhcv,bhdv->bhcd")

  assert portable_work((0, 1, 2)) == 0
  assert portable_work(3) > 0
  grads = [jax.grad(loss, 3)(q, k, v, log_decay, which) for which in ("tpu", "xla")]
  np.testing.assert_allclose(*grads, rtol=1e-5)


def test_float16_is_refused():
  x = jnp.zeros((1, 4, 1, 8), jnp.float16)
  with pytest.raises(NotImplementedError, match="query must be float32 or bfloat16"):
    taylor_attention(x, x, x, implementation="tpu", interpret=True)
