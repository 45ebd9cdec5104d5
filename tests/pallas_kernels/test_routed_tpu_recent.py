"""The TPU kernels of membership "causal_recent": numerics, seeded faults, compiled programs."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from attnzoo.pallas_kernels import Routing, routed_attention
from attnzoo.pallas_kernels.cases import Case
from attnzoo.pallas_kernels.routed_attention import api, cases, tpu_recent
from attnzoo.pallas_kernels.routed_attention.attend import Extras
from attnzoo.pallas_kernels.routed_attention.state import Tokens
from attnzoo_testing.marks import slow_but
from attnzoo_testing.mixers import close
from attnzoo_testing.problem import Problem
from attnzoo_testing.tpu_aot import check_schedules, compile_for_tpu, kernels, needs_libtpu

KERNEL, XLA = dict(implementation="tpu", interpret=True), dict(implementation="xla")


@pytest.fixture
def small_blocks(monkeypatch):
  """Several tiles and blocks in small problems."""
  monkeypatch.setattr(tpu_recent, "LANES", 8)


def problem(*, length=45, window=7, dim=8, value_dim=12, packed=False, dtype=np.float32):
  """(differentiated arrays, function of them): few centroids, ties in the scores everywhere."""
  rng = np.random.default_rng(0)
  shape = 2, length, 2
  dims = dict(query=dim, key=dim, value=value_dim)
  arrays = {n: rng.standard_normal((*shape, size)).astype(dtype) for n, size in dims.items()}
  scores = [
    np.round(rng.standard_normal((*shape, 3)), 1).astype(np.float32) + 0.0 for _ in range(2)
  ]
  fixed = dict(scores=scores[0], key_scores=scores[1], options=Routing(window, scale=0.3))
  if packed:
    third = length // 3
    ids = np.repeat([0, 1, 0], [third, third // 2, length - third - third // 2])
    fixed |= dict(segment_ids=ids[None].repeat(2, 0), lengths=np.array([length, length - 9]))
  return arrays, lambda **arrays: routed_attention(**arrays, **fixed)[:1]


def compare(arrays, call, **how):
  """Output and gradients: at most twice the error of the portable path in the same dtype."""
  Problem(call, arrays).check(**KERNEL | how)


CASES = dict(
  plain=dict(),
  packed=dict(packed=True),
  one_key=dict(window=1),
  whole_row=dict(window=60, length=40),
  one_token=dict(length=1),
)


@pytest.mark.parametrize("name", slow_but(CASES, "packed", "one_token"))
def test_float32_against_float64(name, small_blocks):
  compare(*problem(**CASES[name]))


def test_bfloat16_against_float64(small_blocks):
  compare(*problem(packed=True, dtype=jnp.bfloat16))


@pytest.mark.slow
def test_real_blocks():
  compare(*problem(length=300, window=140))


@pytest.mark.slow
def test_tpu_memory_model(small_blocks):
  """The interpreter that knows TPU memories: unset scratch is NaN, parallel axes are shuffled."""
  compare(*problem(packed=True), interpret=pltpu.InterpretParams())


def test_pieces_are_the_whole(small_blocks):
  """From a state there are more keys than queries."""
  rng = np.random.default_rng(0)
  arrays = dict(zip(("query", "key", "value"), rng.standard_normal((3, 2, 30, 2, 8)), strict=True))
  scores = dict(zip(("scores", "key_scores"), rng.standard_normal((2, 2, 30, 2, 3)), strict=True))
  arrays = {n: x.astype(np.float32) for n, x in (arrays | scores).items()}
  call = functools.partial(routed_attention, options=Routing(4), **KERNEL)
  start, state = call(**{n: x[:, :11] for n, x in arrays.items()})
  end, _ = call(**{n: x[:, 11:] for n, x in arrays.items()}, initial_state=state)
  whole, _ = routed_attention(**arrays, options=Routing(4), implementation="reference")
  close(np.concatenate([start, end], axis=1), whole, 2e-6)


@pytest.mark.slow
def test_transformations(small_blocks):
  """vmap, scan and remat of the kernels are those of the portable path."""
  rng = np.random.default_rng(0)
  query, key, value = rng.standard_normal((3, 3, 2, 30, 2, 8)).astype(np.float32)
  scores = rng.standard_normal((2, 3, 2, 30, 2, 4)).astype(np.float32)

  def attend(query, key, value, scores, others, how):
    return routed_attention(
      query, key, value, scores, key_scores=others, options=Routing(6), **how
    )[0]

  def results(how):
    one = lambda *arrays: jnp.sum(attend(*arrays, how) ** 2)  # noqa: E731
    several = jax.vmap(jax.value_and_grad(one, (0, 1, 2)))(query, key, value, *scores)

    @jax.checkpoint
    def body(x, _):
      return attend(x, key[0], value[0], *scores[:, 0], how), None

    loss = lambda x: jnp.sum(jax.lax.scan(body, x, length=2)[0] ** 3)  # noqa: E731
    return several, jax.grad(loss)(query[0])

  got, expected = (jax.jit(functools.partial(results, how))() for how in (KERNEL, XLA))
  jax.tree.map(lambda a, b: close(a, b, 1e-5), got, expected)


def test_shared_keys_are_a_sliding_window():
  """The other kind of keys, by the window's kernels."""
  case = next(case for case in cases.CASES if case.name == "recent_packed")
  inputs, options = cases.make_inputs(case), cases.static_options(case)
  kernel, truth = (
    cases.operator(**inputs, **options, **how)[0]
    for how in (KERNEL, dict(implementation="reference"))
  )
  np.testing.assert_allclose(kernel, truth, atol=5e-6)


def test_what_is_refused():
  x, scores = jnp.zeros((1, 4, 1, 8)), jnp.zeros((1, 4, 1, 2))
  call = functools.partial(routed_attention, scores=scores, key_scores=scores, options=Routing(2))
  half = x.astype(jnp.float16)
  with pytest.raises(NotImplementedError, match="value must be float32 or bfloat16"):
    call(half, half, half, **KERNEL)
  with pytest.raises(NotImplementedError, match='implementation="tpu" compiles only for a TPU'):
    call(x, x, x, implementation="tpu")
  long = jax.ShapeDtypeStruct((1, 2**16, 1, 128), jnp.float32)
  reason = tpu_recent.fits(long, Tokens(long, long, scores, None), False, Routing(2**16))
  assert "window_size must be small enough" in reason
  many = jax.ShapeDtypeStruct((512, 2**15, 1, 8), jnp.float32)
  assert "fewer tiles" in tpu_recent.fits(many, Tokens(many, many, None, None), False, Routing(8))
  with pytest.raises(NotImplementedError, match="has no kernels"):
    routed_attention(x, x, x, scores, options=Routing(2, "topk_prefix"), **KERNEL)


# --- Faults that kernels of this kind are likely to have: the comparison must see each ------------


def window_not_opened(patch):
  right = tpu_recent._weights

  def wrong(plan, blocks, start, stop, *vectors):
    return right(plan, blocks, jnp.zeros_like(start), stop, *vectors)

  patch.setattr(tpu_recent, "_weights", wrong)


def blocks_swapped(patch):
  patch.setattr(
    tpu_recent, "_pair", lambda front, behind: jnp.concatenate([behind[...], front[...]], 0)
  )


def blocks_without_a_tile(patch):
  """Sums are moved on by one block a time, so that no block may be left out."""
  right = tpu_recent.find_tiles

  def wrong(band, block_size, size, blocks):
    found = right(band, block_size, size, blocks)
    return found._replace(block=jnp.where(found.block == 1, 2, found.block))

  patch.setattr(tpu_recent, "find_tiles", wrong)


def sums_not_moved_on(patch):
  """The kernel's second condition of two: another block than that of the step before."""
  right, calls = tpu_recent.pl.when, itertools.count()

  def wrong(condition):
    return right(condition) if next(calls) % 2 == 0 else lambda body: None

  patch.setattr(tpu_recent.pl, "when", wrong)


FAULTS = {
  window_not_opened: "output",
  blocks_swapped: "output",
  blocks_without_a_tile: "output",
  sums_not_moved_on: "d_key",
}


@functools.cache
def small():
  arrays, call = problem(packed=True)
  return Problem(call, arrays)


def test_no_fault(small_blocks):
  small().check(**KERNEL)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_fault_is_found(fault, small_blocks, monkeypatch):
  prepared = small()  # before the fault is planted
  fault(monkeypatch)
  with pytest.raises(AssertionError, match=rf"{FAULTS[fault]}: error"):
    prepared.check(FAULTS[fault], **KERNEL)


# --- Compiled for absent TPUs ---------------------------------------------------------------------


def make_case(name, length, heads, dim, clusters, window):
  sizes = dict(batch=1, length=length, heads=heads, kv_heads=heads, key_dim=dim, value_dim=dim)
  sizes |= dict(clusters=clusters, window=window)
  return Case(name, (), sizes, dict(routing=cases.RECENT, unshared=True))


BY_NAME = {
  case.name: case
  for case in (
    make_case("tiny", 1024, 2, 64, 16, 64),
    make_case("enwik8", 8192, 4, 128, 16, 512),
    make_case("widest", 4096, 2, 129, 8, 512),
  )
}


def check_compiled(case, dtype, chip):
  """Compiles training forward and backward of a case; VMEM, and what goes through HBM."""
  size = case.sizes
  rows = tuple(size[n] for n in ("batch", "length", "heads"))
  tokens = jax.ShapeDtypeStruct((*rows, size["key_dim"]), dtype)
  scores = jax.ShapeDtypeStruct((*rows, size["clusters"]), jnp.float32)

  def step(learned, scores, key_scores, d_output):
    def layer(query, key, value):
      return routed_attention(
        query, key, value, scores, key_scores=key_scores, **cases.static_options(case)
      )[0]

    output, pull = jax.vjp(layer, *learned)
    return output, pull(d_output)

  compiled = compile_for_tpu(step, [tokens] * 3, scores, scores, tokens, chip=chip)
  found = kernels(compiled)
  assert len(found) == 2, found
  assert all(kernel.vmem_bytes <= 64 * 2**20 for kernel in found.values()), found
  # Queries, outputs and their gradients in tiles, some empty, keys and theirs in blocks; not more.
  block = max(size["window"], tpu_recent.LANES)
  blocks = size["length"] // block + 1
  slots = size["length"] + blocks * tpu_recent.LANES
  row = size["heads"] * size["key_dim"] * jnp.dtype(dtype).itemsize
  # Keys and values are operands twice (two blocks of them), and are counted so.
  forward, backward = 2 * slots + 4 * (blocks + 1) * block, 3 * slots + 6 * (blocks + 1) * block
  moved = sum(kernel.hbm_bytes for kernel in found.values())
  assert moved <= 1.05 * row * (forward + backward), moved / row
  return compiled


# Instruction bundles of a grid step (128 queries, two blocks of keys), share of the matrix units'
# slots, spilled registers; the limits leave 5 % to what jax 0.12.0.1 with libtpu 0.0.50.1 makes.
SCHEDULES = {
  ("enwik8", "v5e", "bfloat16"): {
    "forward": (1735, 0.29, 170),
    "backward": (4535, 0.28, 660),
  },
}


@needs_libtpu
@pytest.mark.tpu_aot
@pytest.mark.parametrize(("name", "chip", "dtype"), SCHEDULES)
def test_schedules(name, chip, dtype):
  limits = SCHEDULES[name, chip, dtype]
  check_schedules(__file__, "recent_attention", name, chip, dtype, limits)


@needs_libtpu
@pytest.mark.tpu_aot
@pytest.mark.parametrize(
  ("name", "chip", "dtype"), [("tiny", "v6e", jnp.bfloat16), ("widest", "v5p", jnp.float32)]
)
def test_compiles(name, chip, dtype):
  check_compiled(BY_NAME[name], dtype, chip)


@needs_libtpu
@pytest.mark.tpu_aot
def test_the_kernel_is_chosen_where_it_fits():
  chosen = {}

  def trace(x):
    for name, dtype, window in (
      ("plain", jnp.bfloat16, 512), ("half", jnp.float16, 512), ("wide", jnp.float32, 2**15)
    ):  # fmt: skip
      x = jax.ShapeDtypeStruct((1, 2**15, 2, 64), dtype)
      scores = jax.ShapeDtypeStruct((1, 2**15, 2, 4), jnp.float32)
      tokens = Tokens(x, x, scores, None)
      chosen[name] = api._choose(x, tokens, scores, Routing(window), Extras(None, None), False)
    return jnp.zeros(())

  compile_for_tpu(trace, jax.ShapeDtypeStruct((1,), jnp.float32))
  assert chosen == dict(plain="tpu", half="xla", wide="xla")
