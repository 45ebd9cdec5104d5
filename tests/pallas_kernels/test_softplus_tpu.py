"""The TPU kernels of softplus attention, interpreted on a CPU against the float64 definition."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from attnzoo.pallas_kernels.softplus_attention import (
  LSSA,
  LSSAR,
  VARIANTS,
  api,
  cases,
  softplus_attention,
  tpu_backward,
  tpu_tiles,
  tpu_tuning,
  tpu_vjp,
)
from attnzoo.pallas_kernels.tpu_sizes import round_up
from attnzoo_testing.marks import slow_but, some_faults, thinned
from attnzoo_testing.oracle import Oracle
from attnzoo_testing.problem import Problem

ORACLE = Oracle(cases.operator, cases, cases.RESULTS)
KERNEL = dict(implementation="tpu", interpret=True)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  """Several blocks, panels and, from 65 keys on, spans in short sequences."""
  monkeypatch.setattr(tpu_tiles, "LANES", 16)
  monkeypatch.setattr(tpu_tuning, "PANEL", 16)
  monkeypatch.setattr(tpu_tuning, "ROWS", 32)
  monkeypatch.setattr(tpu_tuning, "span_of", lambda total, *_: min(total, 64))


CI = ("one_token", "lssa", "lssar", "grouped", "packed_and_padded")


@pytest.mark.parametrize("name", slow_but(CI, "packed_and_padded"))
def test_float32_against_float64(name):
  """One and several spans of keys; documents and a state; two heads in a lane tile, grouped."""
  ORACLE.compare(name, **KERNEL)


def only_output(**arguments):
  return softplus_attention(**arguments)[:1]


def tokens(length=50, heads=2, groups=1, dim=8, dtype=np.float32, batch=1, seed=0):
  rng = np.random.default_rng(seed)
  normal = lambda heads: rng.standard_normal((batch, length, heads, dim)).astype(dtype)  # noqa: E731
  return dict(query=normal(heads), key=normal(groups), value=normal(groups))


def compare(inputs, **options):
  """Output and gradients: at most twice the error of the portable path in the same dtype."""
  Problem(functools.partial(only_output, **options), inputs).check(**KERNEL)


NEAR_ONE = dict(eps_first=1e-3, eps_second=0.05, power=3.0)  # an epsilon that matters
OTHERS = dict(
  power_3=VARIANTS["lssar_p3"],
  power_1=dataclasses.replace(LSSAR, power=1.0),
  power_of_no_integer=dataclasses.replace(LSSAR, power=2.5),
  epsilons_added=dataclasses.replace(LSSAR, epsilon="add", **NEAR_ONE),
  clamped_second=dataclasses.replace(LSSAR, epsilon="clamp", eps_second=500.0, power=3.0),
  clamped_first=dataclasses.replace(
    LSSAR, epsilon="clamp", eps_first=30.0, eps_second=1e-6, power=3.0
  ),
  lssa_clamped=dataclasses.replace(LSSA, epsilon="clamp", eps_first=30.0),
  total_count=dataclasses.replace(LSSAR, count="total", power=3.0),
  large_scale=dataclasses.replace(LSSAR, scale=200.0),  # beyond what float32 has powers of 2 for
)


@pytest.mark.parametrize("name", slow_but(OTHERS, "clamped_second"))
def test_variants(name):
  compare(tokens(), variant=OTHERS[name])


@pytest.mark.parametrize(
  ("name", "length"),
  thinned([("lssa", 50), ("lssar_p15", 50), ("lssar_p15", 100), ("lssar_p3", 100)],
          [("lssar_p15", 100)], [("lssa", 50)]),
)  # fmt: skip
def test_bfloat16_against_float64(name, length):
  """With one span of keys and with two."""
  compare(tokens(length, groups=2, dtype=jnp.bfloat16), variant=VARIANTS[name])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_scores_beyond_powers_of_two(dtype):
  compare(tokens(dtype=dtype), variant=OTHERS["large_scale"])


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 3])
def test_odd_heads_and_dims(groups):
  """A head per lane tile, key and value of different widths; grouped: three heads share a key."""
  inputs = tokens(40, heads=3, groups=groups, dim=20)
  inputs["value"] = inputs["value"][..., :11]
  compare(inputs, variant=LSSAR)


def test_flat_rows_are_zero():
  """Rows in which all keys are equal have output and gradients 0, from the fourth token on."""
  inputs = tokens(40, heads=1)
  inputs["key"] = np.broadcast_to(inputs["key"][:, :1], inputs["key"].shape).copy()

  @jax.jit
  def run(query):
    arrays = dict(inputs, query=query)
    output, pull = jax.vjp(lambda q: only_output(**dict(arrays, query=q), **KERNEL)[0], query)
    return output, *pull(jnp.ones_like(output))

  output, d_query = run(inputs["query"])
  np.testing.assert_array_equal(output[:, 3:], 0)
  np.testing.assert_array_equal(d_query[:, 3:], 0)
  assert np.abs(output[:, :3]).min() > 0


@pytest.mark.slow
def test_one_key_that_stands_out():
  """Where one weight is all there is, its gradient is a difference of equal numbers."""
  inputs = tokens(60, heads=1, dim=16, dtype=jnp.bfloat16)
  inputs["key"][:, 1::7] = inputs["key"][:, :1]  # repeated: each stands out for its own queries
  inputs["query"][:, 30:] = inputs["key"][:, 9:39]
  compare(inputs, variant=LSSAR)


@pytest.mark.slow
def test_transformations():
  """vmap, scan and remat of the kernels are those of the portable path."""
  inputs = tokens(40, batch=3)
  segments = np.sort(np.random.default_rng(1).integers(0, 3, (3, 40)), 1)

  def loss(implementation, arrays, segment_ids=None):
    one = lambda a, s: only_output(**a, segment_ids=s, **implementation)[0]  # noqa: E731
    rows = jax.tree.map(lambda x: x[:, None], arrays)
    several = jax.vmap(one)(rows, None if segment_ids is None else segment_ids[:, None])

    @jax.checkpoint
    def body(query, _):
      return one(dict(arrays, query=query), segment_ids), None

    repeated, _ = jax.lax.scan(body, arrays["query"], length=2)
    return jnp.sum(several**2) + jnp.sum(repeated**3)

  for ids in (None, segments):
    results = [
      jax.jit(jax.value_and_grad(functools.partial(loss, how)))(inputs, segment_ids=ids)
      for how in (KERNEL, dict(implementation="xla"))
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4), *results)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lssar", "one_token"])
def test_tpu_memory_model(name):
  """The interpreter that knows TPU memories: unset scratch is NaN, parallel axes are shuffled."""
  ORACLE.compare(name, implementation="tpu", interpret=pltpu.InterpretParams())


@pytest.mark.parametrize("eps", [1e-12, 0.0])
def test_unit_vectors_as_a_tpu_makes_them(eps):
  """Values and gradients; a vector of zeros stays one."""
  x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 3, 8)), jnp.float32)
  x = x.at[0, 0, 0].set(0)
  weights = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)
  portable, flat = (
    (f(x, eps), jax.grad(lambda x, f=f: jnp.sum(f(x, eps) * weights))(x))
    for f in (api.unit, api.unit_flat)
  )
  for one, other in zip(portable, flat, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(flat[0][0, 0, 0], 0)


def test_blocks_cover_the_sequence():
  """Padding of the queries, and key spans of whole tiles, for every length and dtype."""
  for dtype in (jnp.float32, jnp.bfloat16):
    for length in (1, 15, 16, 33, 64, 65, 700, 5000):
      arrays = {n: jax.ShapeDtypeStruct((1, length, 2, 8), dtype) for n in ("q", "k")}
      sequence = tpu_vjp.Tokens(arrays["k"], arrays["k"], None, length)
      plan, front = tpu_vjp.make_plan(arrays["q"], sequence, LSSAR, True)
      assert front == 0
      assert length <= plan.length <= max(length + length // 8, round_up(length, 16))
      assert plan.length % plan.rows == plan.rows % plan.panel == plan.span % plan.rows == 0
      assert plan.length <= plan.total < plan.length + plan.span


def test_what_is_refused():
  x = jnp.zeros((1, 4, 1, 8))
  for change in (dict(score="exp"), dict(unit=False), dict(normalization="none"),
                 dict(score_bias=True), dict(offset=-1.0)):  # fmt: skip
    with pytest.raises(NotImplementedError, match="variant must be LSSA or LSSAR"):
      softplus_attention(x, x, x, variant=dataclasses.replace(LSSAR, **change), **KERNEL)
  half = x.astype(jnp.float16)
  with pytest.raises(NotImplementedError, match="value must be float32 or bfloat16"):
    softplus_attention(half, half, half, **KERNEL)
  with pytest.raises(NotImplementedError, match='implementation="tpu" compiles only for a TPU'):
    softplus_attention(x, x, x, implementation="tpu")


# --- Faults that kernels of this kind are likely to have: the comparison must see each ------------


def next_key_seen(patch):
  def wrong(plan, start):
    sight = right(plan, start)
    shape = sight.mask.shape
    ahead = tpu_tiles.iota(shape, 0) - tpu_tiles.iota(shape, 1)
    return sight._replace(mask=ahead <= start + 1)

  right = tpu_tiles._causal
  patch.setattr(tpu_tiles, "_causal", wrong)


def older_tiles_dropped(patch):
  right = tpu_vjp._documents

  def wrong(*args):
    documents, tables = right(*args)
    return documents, tables._replace(blocks=tables.blocks.at[0].set(tables.blocks[1]))

  patch.setattr(tpu_vjp, "_documents", wrong)


def own_tile_dropped(patch):
  def wrong(plan, start):
    sight = right(plan, start)
    return sight._replace(mask=sight.mask & (start > 0))

  right = tpu_tiles._causal
  patch.setattr(tpu_tiles, "_causal", wrong)


def documents_see_each_other(patch):
  right = tpu_vjp._documents

  def wrong(plan, tokens, *rest):
    return right(plan, tokens._replace(documents=0 * tokens.documents), *rest)

  patch.setattr(tpu_vjp, "_documents", wrong)


def _after_share(patch, change):
  right = tpu_backward._share

  def wrong(plan, r):
    right(plan, r)
    change(plan, r)

  patch.setattr(tpu_backward, "_share", wrong)


def gradient_through_the_mean_missing(patch):
  def change(plan, r):
    for head in range(plan.fold):
      r.shared[2 * head + 1, :] = jnp.zeros((plan.rows,))

  _after_share(patch, change)


def mean_gradient_not_subtracted(patch):
  def change(plan, r):
    for head in range(plan.fold):
      r.shared[2 * head, :] = jnp.zeros((plan.rows,))

  _after_share(patch, change)


def delta_of_the_other_head(patch):
  def change(plan, r):
    r.shared[0, :], r.shared[2, :] = r.shared[2, :], r.shared[0, :]

  _after_share(patch, change)


def power_one_too_high(patch):
  right = tpu_tiles.powers
  patch.setattr(tpu_tiles, "powers", lambda x, p: right(x, p + 1))


FAULTS = {
  next_key_seen: "output",
  older_tiles_dropped: "output",
  own_tile_dropped: "output",
  gradient_through_the_mean_missing: "d_query",
  mean_gradient_not_subtracted: "d_query",
  delta_of_the_other_head: "d_query",
  power_one_too_high: "d_value",
}


@functools.cache
def small():
  """Three blocks."""
  return Problem(only_output, tokens(80, groups=2))


def test_no_fault():
  small().check(**KERNEL)


@pytest.mark.parametrize(
  "fault",
  some_faults(FAULTS, next_key_seen, gradient_through_the_mean_missing),
  ids=lambda fault: fault.__name__,
)
def test_fault_is_found(fault, monkeypatch):
  problem = small()  # before the fault is planted
  fault(monkeypatch)
  with pytest.raises(AssertionError, match=rf"{FAULTS[fault]}: error"):
    problem.check(FAULTS[fault], **KERNEL)


@pytest.mark.slow
def test_documents_that_see_each_other_are_found(monkeypatch):
  ORACLE.expected("packed_and_padded")
  documents_see_each_other(monkeypatch)
  with pytest.raises(AssertionError, match="output: error"):
    ORACLE.compare("packed_and_padded", **KERNEL)
