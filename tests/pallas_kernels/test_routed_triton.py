"""The Triton kernels of routed attention: numerics in the interpreter, seeded faults.

Block sizes and refusals are in test_routed_triton_launches.py; what the compilers make of the
kernels is in test_routed_triton_aot.py.
"""

import concurrent.futures
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo.pallas_kernels import Routing
from attnzoo.pallas_kernels.routed_attention import triton, triton_vjp
from attnzoo.pallas_kernels.routed_attention.attend import Extras
from attnzoo.pallas_kernels.routed_attention.members import top_members
from attnzoo.pallas_kernels.routed_attention.reference import routed_reference
from attnzoo.pallas_kernels.routed_attention.state import Tokens
from attnzoo.pallas_kernels.routed_attention.xla import attend_clusters
from attnzoo_testing.cuda_aot import H100
from attnzoo_testing.numerics import assert_as_exact
from attnzoo_testing.triton_interpreter import interpret
from attnzoo_testing.triton_launches import changed, interpret_operator

LEARNED = ("query", "key", "value", "relative_keys", "relative_values")


class Run(NamedTuple):
  """A problem; `own`: what keys have of their own ("key", "scores"), `reach` of the tables."""

  batch: int
  length: int
  heads: int
  clusters: int
  dims: tuple[int, int]
  routing: Routing
  own: tuple[str, ...] = ()
  reach: int = 0
  lengths: tuple[int, ...] = ()
  zeros: bool = False  # some values are 0
  dtype: str = "float32"
  rows: int = 16  # slots of a program, where there are no tables


def official(window, **options):
  return Routing(window, "official", **options)


APART = ("key", "scores")
RUNS = {
  # Three tiles of slots, the last one of 5; the second sees a whole tile.
  "shared": Run(1, 45, 2, 2, (16, 16), official(37, scale=0.25)),
  "narrow": Run(1, 45, 1, 1, (8, 20), official(37, scale=0.25), dtype="float16", rows=32),
  "padded_clipped": Run(
    2, 30, 1, 2, (17, 17), official(20, scale=0.25), reach=5, lengths=(30, 13)
  ),
  "zeros_hidden": Run(
    1, 40, 1, 1, (16, 16), official(36, mask="rank", zero_values_seen=False, scale=0.25),
    zeros=True, reach=40,
  ),
  "positions": Run(1, 30, 2, 1, (16, 33), official(20, scale=0.25), APART, reach=9),
  "both_directions": Run(
    1, 30, 1, 1, (16, 16), official(20, causal=False, scale=0.25), APART, reach=25
  ),
  "ranks": Run(
    1, 30, 1, 2, (16, 16), official(20, mask="rank", own_pair="last_resort", scale=0.25), APART
  ),
  "last_resort": Run(
    1, 30, 1, 2, (16, 16), official(20, own_pair="last_resort", combine_eps=1e-5), ("key",)
  ),
}  # fmt: skip


# --- Arrays, truth, programs ----------------------------------------------------------------------


@functools.cache
def given(name) -> dict[str, Any]:
  """LEARNED, scores, d_output and key_scores; absent ones are not there."""
  run, rng = RUNS[name], np.random.default_rng(0)
  tokens, (key_dim, value_dim) = (run.batch, run.length, run.heads), run.dims
  shapes = dict(query=(*tokens, key_dim), value=(*tokens, value_dim))
  shapes["d_output"] = shapes["value"]
  if "key" in run.own:
    shapes["key"] = shapes["query"]
  if run.reach:
    rows = 2 * run.reach + 1
    shapes |= dict(relative_keys=(rows, key_dim), relative_values=(rows, value_dim))
  arrays = {n: rng.standard_normal(shape) for n, shape in shapes.items()}
  arrays = {n: x * (0.2 if "relative" in n else 1) for n, x in arrays.items()}  # spread weights
  arrays = {n: x.astype(run.dtype) for n, x in arrays.items()}
  if run.zeros:
    arrays["value"][:, 3:9] = 0
  for score in ("scores", "key_scores")[: 1 + ("scores" in run.own)]:
    near = np.round(rng.standard_normal((*tokens, run.clusters)), 1) + 0.0  # ties, no -0
    real = np.arange(run.length) < np.array(run.lengths or [run.length] * run.batch)[:, None]
    arrays[score] = np.where(real[..., None, None], near, -np.inf).astype(np.float32)
  return arrays


def learned(name):
  return tuple(n for n in LEARNED if n in given(name))


def results(name):
  return ("output", *(f"d_{n}" for n in learned(name)))


def with_gradients(function, name, dtype):
  """Results of function(dictionary of LEARNED)."""
  names = learned(name)

  @jax.jit
  def run(*floats):
    output, pull = jax.vjp(lambda *x: function(dict(zip(names, x, strict=True))), *floats)
    return output, *pull(jnp.asarray(given(name)["d_output"], output.dtype))

  got = run(*(jnp.asarray(given(name)[n], dtype) for n in names))
  return {n: np.asarray(x) for n, x in zip(results(name), got, strict=True)}


def tables_of(arrays):
  return (arrays["relative_keys"], arrays["relative_values"]) if "relative_keys" in arrays else None


@functools.cache
def expected(name):
  """(from the inputs' dtype, the truth in float64); narrow inputs: by the portable path."""
  run, scores = RUNS[name], jnp.asarray(given(name)["scores"])
  others = given(name).get("key_scores")
  real = jnp.isfinite(scores[:, :, 0, 0])

  def definition(x):
    return routed_reference(
      x["query"], x.get("key", x["query"]), x["value"], scores,
      None if others is None else jnp.asarray(others), run.routing, tables_of(x), None, real, None,
    )  # fmt: skip

  narrow = definition if run.dtype == "float32" else functools.partial(attend, attend_clusters, run)
  narrow = with_gradients(narrow, name, run.dtype)
  with jax.enable_x64(True):
    return narrow, with_gradients(definition, name, "float64")


def attend(function, run, x):
  """By an implementation; x are arrays under LEARNED."""
  name = next(n for n, one in RUNS.items() if one is run)
  scores = jnp.asarray(given(name)["scores"])
  others = jnp.asarray(given(name)["key_scores"]) if "scores" in run.own else scores
  tokens = Tokens(x.get("key", x["query"]), x["value"], others, None)
  return function(x["query"], tokens, scores, run.routing, Extras(tables_of(x), None))


def config_of(name):
  square = triton.Tile(16, 16, 4, 1)
  others = square if RUNS[name].reach else triton.Tile(RUNS[name].rows, 16, 4, 1)
  return triton.Config(others, others, others, square, 2)


@functools.cache
def program(name):
  """The launches of a forward and a backward pass, and their arrays."""
  arrays = given(name)
  problem = triton_vjp.problem_of(arrays, RUNS[name].routing)
  config = config_of(name)
  launches = triton.forward_launches(problem, config) + triton.backward_launches(problem, config)
  return launches, {n: np.asarray(x) for n, x in triton_vjp.prepared(arrays).items()}


def finished(arrays, name):
  """Results; the tables' from their partial sums."""
  problem = triton_vjp.problem_of(given(name), RUNS[name].routing)
  arrays = dict(arrays)
  for table in ("relative_keys", "relative_values") if problem.relative else ():
    parts = jnp.asarray(arrays[f"d_{table}"])[..., : given(name)[table].shape[1]]
    arrays[f"d_{table}"] = triton_vjp.table_gradient(parts, problem, config_of(name))
  return {n: arrays[n] for n in results(name)}


# --- Seeded faults --------------------------------------------------------------------------------


def fault(kernel, constants=None, **inputs):
  return lambda launches: changed(launches, kernel, constants, **inputs)


# (fault, run): every one of them must fail the comparison.
FAULTS = {
  "later_members_seen": (fault("forward", dict(CAUSAL="none")), "last_resort"),
  "later_members_backwards": (fault(":gradient", dict(CAUSAL="none")), "last_resort"),
  "ranks_for_positions": (fault(":gradient", dict(CAUSAL="slot")), "positions"),
  "no_share": (fault(":gradient", share="ones"), "last_resort"),
  "sum_not_subtracted": (fault(":gradient", drop="nothing"), "last_resort"),
  "queries_for_keys": (fault("combine", key_slot_of="slot_of"), "ranks"),
  "another_epsilon": (fault("combine", dict(EPSILON=1e-3)), "last_resort"),
  "zeros_seen_backwards": (fault("gradient", dict(ZEROS_SEEN=True)), "zeros_hidden"),
  "own_pair_learns": (fault(":gradient", dict(LAST_RESORT=False)), "last_resort"),
  "shorter_tables": (fault("drop", dict(LIMIT=4)), "zeros_hidden"),
  "tables_of_later_members": (fault("table", dict(CAUSAL="none")), "zeros_hidden"),
  "one_member_less": (fault("members_kernel", dict(W=19)), "last_resort"),
}


def spoiled(name, arrays):
  """The program of a fault from the first launch that it changes; what is before stands."""
  fault, run = FAULTS[name]
  launches, _ = program(run)
  wrong = fault(launches)
  first = next(n for n, pair in enumerate(zip(launches, wrong, strict=True)) if pair[0] != pair[1])
  more = dict(nothing=np.zeros_like(arrays["drop"]), ones=np.ones_like(arrays["share"]))
  return wrong[first:], arrays | more


# --- Numerics -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interpreted():
  """Arrays by run and fault; children run while the truth is computed here."""
  pytest.importorskip("triton")
  with concurrent.futures.ThreadPoolExecutor(1) as executor:

    def work():
      clean = dict(zip(RUNS, interpret([program(name) for name in RUNS]), strict=True))
      wrong = interpret([spoiled(name, clean[FAULTS[name][1]]) for name in FAULTS])
      return clean | dict(zip(FAULTS, wrong, strict=True))

    arrays = executor.submit(work)
    for run in RUNS:
      expected(run)
    return arrays.result()


def compare(got, run):
  return assert_as_exact(finished(got, run), *expected(run), np.dtype(RUNS[run].dtype))


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_interpreter(interpreted, run):
  compare(interpreted[run], run)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_seen(interpreted, fault):
  with pytest.raises(AssertionError, match="above"):
    compare(interpreted[fault], FAULTS[fault][1])


@pytest.mark.slow
def test_padding_is_no_member(interpreted):
  """Slots without a member are marked, and nobody's; members ascend."""
  arrays = interpreted["padded_clipped"]
  members, slot_of = arrays["members"][1, 0], arrays["slot_of"][1, 0]
  assert np.array_equal(members, np.tile([*range(13), *[-1] * 7], (2, 1)))
  assert np.array_equal(slot_of, np.tile([*range(13), *[-1] * 17], (2, 1)))
  assert not np.any(arrays["output"][1, 13:])


def test_members():
  """Those of `lax.top_k`, ties included, in order; as bits, from the largest to subnormals."""
  pytest.importorskip("triton")
  rng = np.random.default_rng(1)
  length, widest = 45, np.finfo(np.float32).max
  rows = [
    np.round(rng.standard_normal((length, 2)), 1) + 0.0,
    np.zeros((length, 2)),
    rng.choice([-widest, -1.0, -1e-45, 0.0, 1e-45, 1.0, widest], (length, 2)),
    np.sort(rng.standard_normal((length, 2)), axis=0),
  ]
  scores = np.stack(rows)[:, :, None].astype(np.float32)  # [4, T, 1, C]
  windows = (1, 16, 44, 45)
  problems = [
    triton.Problem(4, length, 1, 2, 16, 16, "float32", True, True, 0, official(window))
    for window in windows
  ]
  programs = [((triton.members_launch(problem),), dict(scores=scores)) for problem in problems]
  for window, got in zip(windows, interpret(programs), strict=True):
    members = np.asarray(top_members(jnp.asarray(scores), window))
    assert np.array_equal(got["members"], members)
    slots = np.full((4, 1, 2, length), -1)
    np.put_along_axis(slots, members, np.arange(window), -1)
    assert np.array_equal(got["slot_of"], slots)


@pytest.mark.slow
def test_differentiable_function(monkeypatch):
  """With the block sizes that a GPU would have; its launches are interpreted."""
  pytest.importorskip("triton")

  interpret_operator(monkeypatch, triton, triton_vjp, H100)
  function = functools.partial(attend, triton_vjp.attend_clusters_triton, RUNS["padded_clipped"])
  got = with_gradients(function, "padded_clipped", "float32")
  assert_as_exact(got, *expected("padded_clipped"), np.dtype("float32"))
