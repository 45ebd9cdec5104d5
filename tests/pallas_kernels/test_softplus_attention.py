"""Softplus attention: against published values, its definition, and itself in other forms."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo.pallas_kernels.softmax_attention.cache import CacheState, empty_cache
from attnzoo.pallas_kernels.softplus_attention import (
  LSSA,
  LSSAR,
  VARIANTS,
  Variant,
  cases,
  softplus_attention,
  softplus_attention_step,
)
from attnzoo.pallas_kernels.softplus_attention.api import unit
from attnzoo_testing.goldens import golden, golden_config
from attnzoo_testing.marks import slow_but
from attnzoo_testing.mixers import close
from attnzoo_testing.oracle import Oracle

ORACLE = Oracle(cases.operator, cases, cases.RESULTS)
COUNTS = dict(row="seen", count="seen", seq="total")


def variant_of(config) -> Variant:
  """The variant that a golden file's record describes."""
  score = config["phi"]
  return Variant(
    score={"relu_p": "relu_power"}.get(score, score),
    score_power=config["phi_p"],
    score_bias=config["phi_bias"] == "neg_log_n",
    unit=config["qk_norm"] == "l2",
    unit_eps=config["qk_eps"],
    scale=config["scale"],
    count=COUNTS[config["n_mode"]],
    normalization=config["stage1"],
    power=float(config["p"]) if config["reweight"] else None,
    offset=config["offset"],
    skip_rows=config["skip_rows"],
    epsilon=config["eps_mode"],
    eps_first=config["eps1"],
    eps_second=config["eps2"],
    flat_tolerance=config["flat_tol"],
  )


FILES = (
  "lssa_base", "lssar_p15_base", "lssar_p3_base", "lssar_p15_eps", "variants", "extreme_raw",
  "extreme_peaked", "flat", "bf16in", "long", "retrieval", "segments",
)  # fmt: skip


def golden_runs():
  """(file, suffix of its keys, variant) of every published run."""
  for name in FILES:
    configs = golden_config(f"softplus_{name}")
    if "phi" in configs:
      yield name, "", variant_of(configs)
    else:
      for suffix, config in configs.items():
        yield name, f".{suffix}", variant_of(config)


def compare_golden(implementation, runs):
  """Outputs and gradients of some runs of one file, in one program."""
  name = runs[0][0]
  g = golden(f"softplus_{name}")
  q, k, v, do = (jnp.asarray(g[f"in/{n}"], jnp.float64) for n in ("q", "k", "v", "do"))
  ids = None
  if name == "segments":  # a token's document begins at the first key that it sees
    ids = jnp.asarray(np.argmax(g["in/mask"][:, 0], axis=2), jnp.int32)

  def one(variant, tokens, do):
    options = dict(variant=variant, segment_ids=ids, implementation=implementation)
    output, pull = jax.vjp(lambda *x: softplus_attention(*x, **options)[0], *tokens)
    return output, *pull(do)

  several = jax.jit(lambda tokens, do: [one(variant, tokens, do) for _, _, variant in runs])
  for (_, suffix, _), got in zip(runs, several((q, k, v), do), strict=True):
    for key, value in zip(("out/o", "grad/q", "grad/k", "grad/v"), got, strict=True):
      expected = g[key + suffix]
      error = np.abs(np.asarray(value) - expected).max() / (np.abs(expected).max() or 1.0)
      assert error < 1e-9, (name, suffix, key, error)


@pytest.mark.parametrize("file", slow_but(FILES, "lssar_p15_base", "extreme_raw", "flat"))
def test_published_values(file):
  """Every variant of the paper and every extreme, in float64."""
  with jax.enable_x64(True):
    runs = [run for run in golden_runs() if run[0] == file]
    for part in range(0, len(runs), 8):
      compare_golden("xla", runs[part : part + 8])


def test_definition_has_the_published_values():
  with jax.enable_x64(True):
    for file in ("lssar_p15_base", "extreme_raw", "flat"):
      compare_golden("reference", [run for run in golden_runs() if run[0] == file])


@pytest.mark.parametrize("name", ["decode", "chunk"])
def test_published_continuations(name):
  """The last tokens of a row after a state of those before; all gradients but the queries' own."""
  g = golden(f"softplus_{name}")
  q, k, v = (jnp.asarray(g[f"in/{n}"]) for n in ("q", "k", "v"))
  before = k.shape[1] - q.shape[1]
  for suffix, variant in (("lssa", LSSA), ("lssar_p15", LSSAR)):
    state = empty_cache(2, k.shape[1], *k.shape[2:], v.shape[3], jnp.float32)
    state = CacheState(
      state.key.at[:, :before].set(unit(k[:, :before], 1e-12)),
      state.value.at[:, :before].set(v[:, :before]),
      jnp.full((2,), before),
    )
    options = dict(initial_state=state, variant=variant)
    output, after = softplus_attention(q, k[:, before:], v[:, before:], **options)
    close(output, g[f"out/o.{suffix}"], 2e-5)
    np.testing.assert_array_equal(after.count, k.shape[1])
    if name == "decode":
      one = softplus_attention_step(q[:, 0], k[:, -1], v[:, -1], state, variant=variant)
      close(one[0], g[f"out/o.{suffix}"][:, 0], 2e-5)
      jax.tree.map(lambda a, b: close(a, b, 1e-6), one[1], after)


@pytest.mark.parametrize("name", slow_but(ORACLE.ci, "lssar", "packed_and_padded"))
def test_as_exact_as_the_input(name):
  """float32 against the float64 definition, all results and gradients."""
  ORACLE.compare(name, implementation="xla")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lssa", "packed_and_padded"])
def test_wide(name):
  ORACLE.compare_wide(name, implementation="xla")


@pytest.mark.parametrize("name", ["lssa", "lssar_p15", "relu_mean"])
def test_prefill_then_steps_are_the_whole(name):
  """Prompts of unequal length in one batch, then token by token."""
  variant, length = VARIANTS[name], 12
  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(rng.standard_normal((2, length, h, 8)), jnp.float32) for h in (4, 2, 2))
  lengths = jnp.asarray([5, 0])
  state = empty_cache(2, length, 2, 8, 8, jnp.float32)
  read = jax.jit(functools.partial(softplus_attention, variant=variant))
  step = jax.jit(functools.partial(softplus_attention_step, variant=variant))
  prompt = [x[:, :5] for x in (q, k, v)]
  _, state = read(*prompt, lengths=lengths, initial_state=state)
  # N of "total" is what there is so far: a prompt has its own length for all its rows.
  alone = jax.jit(
    functools.partial(softplus_attention, variant=variant, implementation="reference")
  )
  for t in range(7):
    rows, place = jnp.arange(2), lengths + t
    output, state = step(*(x[rows, place] for x in (q, k, v)), state)
    whole, _ = alone(q, k, v, lengths=place + 1)
    close(output, whole[rows, place], 1e-5)


def test_packed_documents_are_as_if_alone():
  rng = np.random.default_rng(1)
  q, k, v = (jnp.asarray(rng.standard_normal((1, 30, 2, 8)), jnp.float32) for _ in range(3))
  ids = jnp.asarray([[3] * 9 + [5] * 1 + [3] * 20])
  for variant in (LSSAR, VARIANTS["sigmoid_bias"]):
    packed, _ = softplus_attention(q, k, v, segment_ids=ids, variant=variant)
    for start, stop in ((0, 9), (9, 10), (10, 30)):
      alone, _ = softplus_attention(*(x[:, start:stop] for x in (q, k, v)), variant=variant)
      close(packed[:, start:stop], alone, 1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_scores_of_ten_thousand(dtype):
  """The literal formula overflows; this is finite and near the definition in float64."""
  rng = np.random.default_rng(2)
  q, k, v = (rng.standard_normal((1, 40, 2, 16)) for _ in range(3))
  q, k = 50 * q, 50 * k
  tokens = [jnp.asarray(x, dtype) for x in (q, k, v)]
  for variant in (
    dataclasses.replace(LSSAR, unit=False, scale=1.0),
    dataclasses.replace(LSSA, unit=False, scale=1.0),
  ):
    function = functools.partial(softplus_attention, variant=variant)
    output, pull = jax.vjp(lambda *x, f=function: f(*x)[0], *tokens)
    gradients = pull(jnp.ones_like(output))
    assert np.abs(np.einsum("bthk,bshk->bhts", q, k)).max() > 1e4
    with jax.enable_x64(True):
      wide = [jnp.asarray(np.asarray(x, np.float64)) for x in tokens]
      exact, _ = function(*wide, implementation="reference")
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in (output, *gradients))
    error = np.asarray(output, np.float64) - np.asarray(exact)
    assert np.sqrt(np.mean(error**2)) < 4 * float(jnp.finfo(dtype).eps) * np.abs(exact).max()


def test_memory_is_linear():
  """Forward and backward of 16k tokens and 8 heads in less than 2 GB."""
  tokens = [jax.ShapeDtypeStruct((1, 16384, 8, 64), jnp.float32)] * 3
  for variant in (LSSA, LSSAR):
    loss = lambda *x, v=variant: jnp.sum(softplus_attention(*x, variant=v)[0])  # noqa: E731
    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*tokens).compile()
    memory = compiled.memory_analysis()
    used = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    assert used < 2e9, used


def test_what_is_refused():
  x = jnp.zeros((1, 4, 2, 8))
  with pytest.raises(ValueError, match="query must have a multiple of the 2 heads of key; got 3"):
    softplus_attention(jnp.zeros((1, 4, 3, 8)), x, x)
  with pytest.raises(ValueError, match="initial_state must have a slot for each of the 4 tokens"):
    softplus_attention(x, x, x, initial_state=empty_cache(1, 3, 2, 8, 8, jnp.float32))
  with pytest.raises(ValueError, match="chunk_size must be at least 1; got 0"):
    softplus_attention(x, x, x, chunk_size=0)
  with pytest.raises(NotImplementedError, match='implementation="triton"'):
    softplus_attention(x, x, x, implementation="triton")
  for change, message in (
    (dict(score="softmax"), "score must be one of"),
    (dict(power=0.5), "power must be at least 1; got 0.5"),
    (dict(scale="sqrt"), "scale must be a number or one of"),
    (dict(epsilon="clamp", power=3.0), "eps_second must be above 0"),
  ):
    with pytest.raises(ValueError, match=message):
      Variant(**change)
