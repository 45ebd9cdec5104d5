"""The TPU kernels of routed attention, interpreted on a CPU against the float64 definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from attnzoo.pallas_kernels import Routing, routed_attention
from attnzoo.pallas_kernels.routed_attention import (
  tpu,
  tpu_backward,
  tpu_members,
  tpu_rows,
  tpu_tiles,
  tpu_tuning,
  tpu_vjp,
)
from attnzoo.pallas_kernels.routed_attention.attend import Extras
from attnzoo.pallas_kernels.routed_attention.members import gather_own, top_members
from attnzoo.pallas_kernels.routed_attention.state import Tokens
from attnzoo_testing.marks import slow_but, some_faults, thinned
from attnzoo_testing.problem import Problem

KERNEL = dict(implementation="tpu", interpret=True)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  """Several tiles and lane tiles in small problems, two heads in one up to 8 channels."""
  monkeypatch.setattr(tpu_rows, "LANES", 16)
  monkeypatch.setattr(tpu_rows, "UNROLL", 4)
  monkeypatch.setattr(tpu_rows, "ADDED", 8)
  monkeypatch.setattr(tpu_rows, "STATIC", 16)
  monkeypatch.setattr(tpu_tuning, "PANEL", 32)
  monkeypatch.setattr(tpu_tuning, "SMALL", 32)


def problem(
  *, length=40, heads=2, dim=8, value_dim=None, clusters=3, shared=True, other_keys=False,
  limit=None, short=None, zeros=False, dtype=np.float32, **options,
):  # fmt: skip
  """(differentiated arrays, function of them, Routing's options): ties in the scores everywhere.

  shared: one array is queries and keys; other_keys: two with the same members. limit: R of the
  relative tables. short: real tokens of the first row.
  """
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.standard_normal(shape).astype(dtype)  # noqa: E731
  batch = 1 if short is None else 2
  value_dim = value_dim or dim
  arrays = dict(
    query=normal(batch, length, heads, dim), value=normal(batch, length, heads, value_dim)
  )
  if other_keys or not shared:
    arrays["key"] = normal(batch, length, heads, dim)
  if zeros:
    arrays["value"][:, ::5] = 0
  if limit is not None:
    arrays["relative_keys"] = normal(2 * limit + 1, dim)
    arrays["relative_values"] = normal(2 * limit + 1, value_dim)
  scores = [
    np.round(rng.standard_normal((batch, length, heads, clusters)), 1).astype(np.float32) + 0.0
    for _ in range(1 if shared else 2)
  ]
  fixed = dict(
    options=Routing(**(dict(window_size=20, membership="official") | options)),
    key_scores=None if shared else scores[1],
    lengths=None if short is None else jnp.array([short, length]),
  )

  def call(key=None, query=None, **rest):
    key = query if key is None else key
    return routed_attention(query, key, scores=scores[0], **rest, **fixed)[:1]

  return arrays, call


def compare(arrays, call, **how):
  """Output and gradients: at most twice the error of the portable path in the same dtype."""
  Problem(call, arrays).check(**KERNEL | how)


CASES = dict(
  shared=dict(),
  relative=dict(limit=40, heads=1, window_size=30, scale=0.5),
  unshared_both_ways=dict(shared=False, causal=False, heads=1, dim=20, value_dim=17),
  unshared=dict(shared=False, zeros=True, zero_values_seen=False, value_dim=5),
  unshared_by_rank=dict(shared=False, mask="rank", own_pair="last_resort", limit=6, dim=10),
  other_keys=dict(other_keys=True, own_pair="last_resort", scale=0.3, combine_eps=1e-5),
  padded=dict(short=13, zeros=True, zero_values_seen=False, heads=3),
  tiles=dict(length=100, window_size=90, clusters=2, heads=1, dim=17),
  tiles_relative=dict(length=70, window_size=60, clusters=2, limit=50, short=50),
  tiles_unshared=dict(length=70, window_size=60, clusters=2, shared=False),
  one_token=dict(length=1, window_size=1, clusters=1, heads=1),
)


@pytest.mark.parametrize("name", slow_but(CASES, "unshared", "tiles"))
def test_float32_against_float64(name):
  compare(*problem(**CASES[name]))


@pytest.mark.parametrize(
  "name", thinned(["shared", "relative", "unshared"], ["shared"], ["relative"])
)
def test_bfloat16_against_float64(name):
  compare(*problem(**CASES[name] | dict(dtype=jnp.bfloat16)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiles_unshared"])
def test_tpu_memory_model(name):
  """The interpreter that knows TPU memories: unset scratch is NaN, parallel axes are shuffled."""
  compare(*problem(**CASES[name]), interpret=pltpu.InterpretParams())


@pytest.mark.slow
def test_transformations():
  """vmap, scan and remat of the kernels are those of the portable path."""
  arrays, call = problem(limit=5)

  def loss(arrays, **how):
    one = lambda scale: call(**dict(arrays, query=scale * arrays["query"]), **how)[0]  # noqa: E731
    several = jax.vmap(one)(jnp.array([0.5, 1.0]))

    @jax.checkpoint
    def body(query, _):
      return call(**dict(arrays, query=query), **how)[0], None

    repeated, _ = jax.lax.scan(body, arrays["query"], length=2)
    return jnp.sum(several**2) + jnp.sum(repeated**3)

  results = [
    jax.jit(jax.value_and_grad(functools.partial(loss, **how)))(arrays)
    for how in (KERNEL, dict(implementation="xla"))
  ]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4), *results)


@pytest.mark.parametrize("kernel", [True, False])
def test_members_and_counts(kernel, monkeypatch):
  """Those of the portable path, but for slots without a member; counts are those of the slots."""
  if not kernel:
    monkeypatch.setattr(tpu_members, "heads_inside", lambda shape: 0)
  rng = np.random.default_rng(0)
  scores = np.round(rng.standard_normal((2, 90, 2, 3)), 1).astype(np.float32)  # with -0
  scores[0, 7:80] = -np.inf
  members, count = tpu_members.members_and_counts(jnp.asarray(scores), 20, 32, 90, interpret=True)
  scores = np.where(scores == 0, 0, scores)
  expected = np.asarray(top_members(jnp.asarray(scores), 20))
  finite = np.isfinite(gather_own(jnp.asarray(scores), expected))
  expected = np.sort(np.where(finite, expected, 90), -1)
  np.testing.assert_array_equal(members[..., :20], expected)
  np.testing.assert_array_equal(members[..., 20:], 90)
  for row in np.ndindex(2, 2):
    found = np.bincount(np.asarray(members)[row].ravel(), minlength=91)[:90]
    np.testing.assert_array_equal(count[row], found)
  assert (members[0] == 90).sum() == 2 * 3 * (32 - 17)


def test_what_is_refused():
  x, official = jnp.zeros((1, 4, 1, 8)), Routing(2, "official")
  call = functools.partial(routed_attention, scores=jnp.zeros((1, 4, 1, 2)), options=official)
  memory = dict.fromkeys(("memory_key", "memory_value"), jnp.zeros((1, 2, 1, 8)))
  with pytest.raises(NotImplementedError, match="memory_key must be None"):
    call(x, x, x, **memory, **KERNEL)
  half = x.astype(jnp.float16)
  with pytest.raises(NotImplementedError, match="value must be float32 or bfloat16"):
    call(half, half, half, **KERNEL)
  with pytest.raises(NotImplementedError, match='implementation="tpu" compiles only for a TPU'):
    call(x, x, x, implementation="tpu")
  long, scores = (jax.ShapeDtypeStruct((1, 2**17, 1, dim), jnp.float32) for dim in (8, 2))
  reason = tpu_vjp.fits(
    long, Tokens(long, long, scores, None), scores, official, Extras(None, None)
  )
  assert "query must be short enough" in reason


# --- Faults that kernels of this kind are likely to have: the comparison must see each ------------


def later_slots_seen(patch):
  right = tpu_tiles.Tile
  patch.setattr(tpu_tiles, "Tile", lambda *args: right(*args[:3], False))


def weights_not_reversed(patch):
  patch.setattr(tpu_rows, "reversed_in_eights", lambda x: x)


def table_in_the_other_heads_lanes(patch):
  def wrong(plan, c, parts):
    return parts[0] + tpu_rows.reversed_in_eights(parts[1])

  patch.setattr(tpu_tiles, "with_table", wrong)


def last_cluster_wins(patch):
  right = tpu.scatter_add

  def wrong(members, head, pairs):
    for source, target in pairs:

      def turn(n, _, source=source, target=target):
        row = pl_row(source, n)
        target[:, pl_ds(members[head, n]), :] = row

      jax.lax.fori_loop(0, source.shape[1], turn, None)

  pl_ds = lambda at: tpu_rows.pl.ds(at, 1)  # noqa: E731
  pl_row = lambda ref, n: ref[:, pl_ds(n), :]  # noqa: E731
  assert right is tpu_rows.scatter_add
  patch.setattr(tpu, "scatter_add", wrong)


def counted_by_score_alone(patch):
  right = tpu_members.members_and_counts

  def wrong(scores, window, slots, absent, interpret):
    members, _ = right(scores, window, slots, absent, interpret)
    least = jax.lax.top_k(scores.transpose(0, 2, 3, 1), window)[0][..., -1]
    return members, jnp.sum(scores.transpose(0, 2, 3, 1) >= least[..., None], 2, dtype=jnp.float32)

  patch.setattr(tpu_vjp, "members_and_counts", wrong)


def cotangent_not_divided(patch):
  patch.setattr(tpu_tiles, "columns", lambda rows, width: jnp.ones((tpu_rows.LANES,) * 2))


def mean_gradient_not_subtracted(patch):
  patch.setattr(tpu_backward, "_mean", lambda sums, inverse: jnp.zeros_like(inverse))


def value_table_not_in_the_gradient_of_weights(patch):
  patch.setattr(tpu_backward, "skew", lambda x, width: jnp.zeros((x.shape[0], width)))


FAULTS = {
  later_slots_seen: "output",
  weights_not_reversed: "output",
  table_in_the_other_heads_lanes: "output",
  last_cluster_wins: "output",
  counted_by_score_alone: "output",
  cotangent_not_divided: "d_value",
  mean_gradient_not_subtracted: "d_query",
  value_table_not_in_the_gradient_of_weights: "d_query",
}


@functools.cache
def small():
  arrays, call = problem(limit=12)
  return Problem(call, arrays)


def test_no_fault():
  small().check(**KERNEL)


@pytest.mark.parametrize(
  "fault",
  some_faults(FAULTS, last_cluster_wins, mean_gradient_not_subtracted),
  ids=lambda fault: fault.__name__,
)
def test_fault_is_found(fault, monkeypatch):
  prepared = small()  # before the fault is planted
  fault(monkeypatch)
  with pytest.raises(AssertionError, match=rf"{FAULTS[fault]}: error"):
    prepared.check(FAULTS[fault], **KERNEL)
