"""The TPU kernels of code_attention, interpreted on a CPU against the float64 definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from attnzoo.pallas_kernels.code_attention import (
  cases,
  code_attention,
  tpu,
  tpu_backward,
  tpu_tiles,
  tpu_tuning,
  tpu_vjp,
)
from attnzoo.pallas_kernels.tpu_sizes import SMALL_VMEM
from attnzoo_testing.marks import slow_but
from attnzoo_testing.oracle import Oracle
from attnzoo_testing.problem import Problem

ORACLE = Oracle(cases.operator, cases, cases.RESULTS)
KERNEL = dict(implementation="tpu", interpret=True)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  """Several tiles, panels and blocks of labels in small problems."""
  monkeypatch.setattr(tpu_tuning, "LANES", 16)
  monkeypatch.setattr(tpu_tuning, "TILE", 32)
  monkeypatch.setattr(tpu_tuning, "BLOCKS", (32, 32))
  monkeypatch.setattr(tpu_tuning, "PANEL", 16)
  monkeypatch.setattr(tpu_tuning, "FEW", 64)


def problem(case="layer_small", labels=50, dim=16, dtype=np.float32, scale=-0.7) -> Problem:
  """A case with keys and values of one width, and scores that fall as products grow."""
  found = ORACLE.ci[case]
  sizes = dict(found.sizes, labels=labels, key_dim=dim, value_dim=dim)
  inputs = cases.make_inputs(cases.Case(case, (), sizes, found.options), dtype)
  mask = inputs.pop("mask")
  call = functools.partial(cases.operator, mask=mask, scale=scale)
  return Problem(call, inputs)


def plan_of(labels, batch, length, key_dim, value_dim, dtype=jnp.float32):
  shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, dtype)  # noqa: E731
  arrays = shape(labels, key_dim), shape(batch, length, key_dim), shape(batch, length, value_dim)
  return tpu_vjp.make_plan(*arrays, 1.0, True)


# Two others below, with little VMEM and with two cores; "strips" are the portable path's.
USUAL = [name for name in ORACLE.ci if name not in ("scattered", "many_labels", "strips")]


@pytest.mark.parametrize("name", slow_but(USUAL, "layer_small", "sharp"))
def test_float32_against_float64(name):
  ORACLE.compare(name, **KERNEL)


def test_bfloat16_against_float64():
  """Weights of which one is nearly all: gradients are differences of like numbers."""
  problem("sharp", 30, dtype=jnp.bfloat16, scale=1.0).check(**KERNEL)


def test_little_vmem(monkeypatch):
  """Labels that come back for every span; each document and span has a share of d_query."""
  monkeypatch.setattr(tpu_tuning, "vmem_bytes", lambda: 60_000)
  plan = plan_of(300, 2, 130, 16, 8)
  assert min(plan.blocks, plan.spans) > 1
  assert not plan.resident
  ORACLE.compare("many_labels", **KERNEL)


def test_tpu_memory_model(monkeypatch):
  """The interpreter that knows TPU memories: unset scratch is NaN, parallel axes are shuffled.

  As on a chip with two cores, each with a share of d_query.
  """
  monkeypatch.setattr(tpu_tuning, "_cores", lambda batch: 2)
  options = pltpu.InterpretParams(detect_races=True)  # raises where it finds one
  ORACLE.compare("scattered", implementation="tpu", interpret=options)


def test_what_is_not_real_is_not_read():
  """NaN behind the mask reaches nothing; a document without tokens has zeros and no gradient."""
  inputs = cases.make_inputs(ORACLE.ci["scattered"])
  mask = inputs.pop("mask")

  @jax.jit
  def run(inputs):
    function = lambda inputs: code_attention(**inputs, mask=mask, **KERNEL)  # noqa: E731
    output, pull = jax.vjp(function, inputs)
    return dict(pull(jnp.cos(jnp.arange(output.size)).reshape(output.shape))[0], output=output)

  poisoned = {n: np.where(mask[..., None], inputs[n], np.nan) for n in ("key", "value")}
  results = run(inputs), run(dict(inputs, **poisoned))
  jax.tree.map(np.testing.assert_array_equal, *results)
  for name in ("output", "key", "value"):
    assert not results[0][name][1].any()
    assert results[0][name][2].any()


def test_scores_without_a_factor():
  """scale 0: the mean of the real tokens."""
  inputs = cases.make_inputs(ORACLE.ci["one_label"])
  got = code_attention(**inputs, scale=0.0, **KERNEL)[0, 0]
  np.testing.assert_allclose(got, inputs["value"][0].mean(0), rtol=1e-5, atol=1e-6)


def test_transformations():
  """vmap, scan and remat of the kernels are those of the portable path; without a mask."""
  inputs = cases.make_inputs(cases._case("any", (), 2, 40, 5, 8, 8))

  def loss(arrays, **how):
    one = lambda query: code_attention(**dict(arrays, query=query), **how)  # noqa: E731
    several = jax.vmap(one)(jnp.stack([arrays["query"], 2 * arrays["query"]]))

    @jax.checkpoint
    def body(query, _):
      return query + one(query)[0], None

    repeated, _ = jax.lax.scan(body, arrays["query"], length=2)
    return jnp.sum(several**2) + jnp.sum(repeated**3)

  results = [
    jax.jit(jax.value_and_grad(functools.partial(loss, **how)))(inputs)
    for how in (KERNEL, dict(implementation="xla"))
  ]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4), *results)


def test_blocks_cover_labels_and_tokens(monkeypatch):
  monkeypatch.undo()  # real sizes
  for dtype in (jnp.float32, jnp.bfloat16):
    for labels in (1, 50, 129, 8922):
      for length in (1, 127, 1000, 2500, 40000):
        plan = plan_of(labels, 3, length, 100, 72, dtype)
        assert labels <= plan.padded_labels < labels + 128 * plan.blocks
        assert plan.block % plan.panel == plan.panel % 128 == plan.tile % 128 == 0
        assert length <= plan.padded_length < length + max(plan.span, plan.tile)
        assert tpu_tuning.vmem_estimate(plan) <= SMALL_VMEM


def test_tables():
  """What each tile has, and which span is loaded where none is needed."""
  plan = plan_of(5, 3, 200, 8, 8)
  assert (plan.tile, plan.span, plan.spans) == (32, 64, 4)
  real = np.zeros((3, plan.padded_length), bool)
  real[0, :40] = True
  real[2, 130:192] = True
  tables = tpu_tiles.describe(plan, jnp.asarray(real))
  empty, mixed, whole = range(3)
  states = [whole, mixed, *[empty] * 6, *[empty] * 8, *[empty] * 4, mixed, whole, empty, empty]
  assert tables.states.tolist() == states
  assert tables.spans.tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 2, 2, 2, 2]


def test_what_is_refused():
  x = jnp.zeros((1, 4, 8))
  half = x.astype(jnp.float16)
  with pytest.raises(NotImplementedError, match="value must be float32 or bfloat16"):
    code_attention(half[0], half, half, **KERNEL)
  with pytest.raises(NotImplementedError, match='implementation="tpu" compiles only for a TPU'):
    code_attention(x[0], x, x, implementation="tpu")
  wide = jnp.zeros((1, 4, 2**20))
  with pytest.raises(NotImplementedError, match="query must be narrow enough"):
    code_attention(wide[0], wide, x, **KERNEL)


# --- Faults that kernels of this kind are likely to have: the comparison must see each ------------


def mask_ignored(patch):
  patch.setattr(tpu_tiles.Tile, "only", lambda self, x, other: x)


def rows_behind_the_end_used(patch):
  patch.setattr(tpu_tiles.Tile, "rows", lambda self, ref: ref[self.here, :])


def last_partial_tile_dropped(patch):
  right = tpu_vjp.tiles_of.describe

  def wrong(plan, real):
    tables = right(plan, real)
    whole = tables.states == tpu_tiles.WHOLE
    return tables._replace(states=jnp.where(whole, tables.states, tpu_tiles.EMPTY))

  patch.setattr(tpu_tiles, "describe", wrong)


def scale_missing(patch):
  right = tpu_backward.backward
  patch.setattr(tpu_backward, "backward", lambda plan, *x: right(plan._replace(scale=-1.0), *x))


def sums_not_rescaled(patch):
  right = tpu.grown

  def wrong(plan, difference):
    return jnp.ones_like(difference) if difference.shape[0] == 1 else right(plan, difference)

  patch.setattr(tpu, "grown", wrong)


def labels_behind_the_last_used(patch):
  def wrong(plan, block, pairs):
    for source, target in pairs:
      target[...] = source[...]

  patch.setattr(tpu_tiles, "copy_labels", wrong)


def mean_gradient_not_subtracted(patch):
  right = tpu_vjp._delta
  patch.setattr(tpu_vjp, "_delta", lambda *args: 0 * right(*args))


def keys_and_values_swapped(patch):
  right = tpu_backward.backward

  def wrong(*args):
    d_query, d_key, d_value = right(*args)
    return d_query, d_value, d_key

  patch.setattr(tpu_backward, "backward", wrong)


FAULTS = {
  mask_ignored: "output",
  rows_behind_the_end_used: "output",
  last_partial_tile_dropped: "output",
  sums_not_rescaled: "output",
  scale_missing: "d_value",
  labels_behind_the_last_used: "d_key",
  mean_gradient_not_subtracted: "d_query",
  keys_and_values_swapped: "d_key",
}


@functools.cache
def small() -> Problem:
  """Three documents of three tiles and two blocks of labels, the last of which end early."""
  return problem()


def test_no_fault():
  small().check(**KERNEL)


@pytest.mark.parametrize(
  "fault",
  slow_but(FAULTS, sums_not_rescaled, labels_behind_the_last_used),
  ids=lambda fault: fault.__name__,
)
def test_fault_is_found(fault, monkeypatch):
  prepared = small()  # before the fault is planted
  fault(monkeypatch)
  with pytest.raises(AssertionError, match=rf"{FAULTS[fault]}: error"):
    prepared.check("output" if FAULTS[fault] == "output" else "gradients", **KERNEL)
