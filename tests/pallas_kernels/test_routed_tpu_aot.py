"""The TPU kernels of routed attention, compiled for absent TPUs."""

import jax
import jax.numpy as jnp
import pytest

from attnzoo.pallas_kernels import Routing
from attnzoo.pallas_kernels.cases import Case
from attnzoo.pallas_kernels.routed_attention import api
from attnzoo.pallas_kernels.routed_attention.attend import Extras
from attnzoo.pallas_kernels.routed_attention.cases import (
  CASES,
  make_inputs,
  minimum_bytes,
  operator,
  static_options,
)
from attnzoo.pallas_kernels.routed_attention.state import Tokens
from attnzoo_testing.marks import slow_but
from attnzoo_testing.tpu_aot import (
  check_schedules,
  compile_for_tpu,
  kernels,
  needs_libtpu,
)

BY_NAME = {case.name: case for case in CASES}
ROWS = ("query", "key", "value", "scores", "key_scores")


def program(case, dtype):
  """(function, shapes): training forward and backward of a case, arrays as a layer has them.

  A layer's activations are [B, T, H * K]; the heads are split by a reshape inside.
  """
  size = case.sizes
  few = make_inputs(Case(case.name, case.tags, dict(size, length=16), case.options), dtype)
  batch, length, heads = (size[name] for name in ("batch", "length", "heads"))
  shapes = {}
  for name, x in few.items():
    whole = x.shape
    if name in ROWS:
      whole = batch, length, *x.shape[2:]
    if name in ROWS[:3]:
      whole = batch, length, heads * x.shape[3]
    shapes[name] = jax.ShapeDtypeStruct(whole, x.dtype)

  def step(inputs, d_output):
    others = dict(inputs)
    learned = {n: others.pop(n) for n in inputs if "scores" not in n and n != "lengths"}

    def layer(learned):
      heads_of = lambda x: x.reshape(batch, length, heads, -1) if x.ndim == 3 else x  # noqa: E731
      arrays = {name: heads_of(x) for name, x in learned.items()}
      output = operator(**arrays, **others, implementation="tpu", **static_options(case))[0]
      return output.reshape(batch, length, -1)

    output, vjp = jax.vjp(layer, learned)
    return output, vjp(d_output)

  d_output = jax.ShapeDtypeStruct((batch, length, heads * size["value_dim"]), dtype)
  return step, (shapes, d_output)


def check_compiled(case, dtype, chip):
  """Compiles a case; VMEM, memory traffic, and that nothing is gathered in HBM."""
  fn, shapes = program(case, dtype)
  compiled = compile_for_tpu(fn, *shapes, chip=chip)
  found = kernels(compiled)
  assert len(found) == 3, found  # members, forward, backward
  assert all(0 < kernel.vmem_bytes <= 125 * 2**20 for kernel in found.values()), found
  moved = sum(kernel.hbm_bytes for kernel in found.values())
  # Heads of 129 channels take 256 lanes, and 64 of a head that has no neighbour take 128.
  width = max(case.sizes["key_dim"], case.sizes["value_dim"])
  alone = width > 64 or case.sizes["heads"] % 2
  padding = -(-width // 128) * 128 / width if alone else 1
  least = padding * minimum_bytes(case, dtype, backward=True)
  assert moved <= 1.1 * least, moved / least
  # The rows of all members are as many as tokens, or more: a twelfth of the least for each array.
  copies = 0.5 if padding > 1 else 0.08
  used = compiled.memory_analysis().temp_size_in_bytes
  assert used <= copies * least, used / least
  return compiled


# Instruction bundles of the whole kernel (loops once), share of the matrix units' slots, spilled
# registers, of each kernel. The limits leave 5 % to what jax 0.12.0.1 with libtpu 0.0.50.1
# makes; `tpu_tuning.py` has the cycles per cluster.
SCHEDULES = {
  ("layer_wikitext_relative", "v5e", "bfloat16"): {
    "members": (3450, 0.01, 16),
    "forward": (11590, 0.26, 940),
    "backward": (22500, 0.34, 2440),
  },
  ("layer_enwik8_12k", "v6e", "bfloat16"): {
    "forward": (4230, 0.03, 10),
    "backward": (6560, 0.048, 145),
  },
  ("layer_imagenet", "v5p", "bfloat16"): {
    "forward": (4810, 0.106, 196),
    "backward": (5840, 0.218, 418),
  },
  ("layer_pg19_relative", "v5e", "bfloat16"): {
    "forward": (11150, 0.275, 785),
    "backward": (21040, 0.364, 2040),
  },
}


@needs_libtpu
@pytest.mark.tpu_aot
@pytest.mark.parametrize(
  ("name", "chip", "dtype"), slow_but(SCHEDULES, ("layer_imagenet", "v5p", "bfloat16"))
)
def test_compiled(name, chip, dtype):
  limits = SCHEDULES[name, chip, dtype]
  check_schedules(__file__, "routed_attention", name, chip, dtype, limits)


@needs_libtpu
@pytest.mark.tpu_aot
def test_odd_sizes_compile():
  """A chip without schedules above; float32, bidirectional, short rows of three odd heads."""
  options = dict(unshared=True, relative=7, lengths=True, routing=dict(causal=False))
  case = Case("odd", (), dict(BY_NAME["layer_ragged"].sizes, length=200, window=50), options)
  fn, shapes = program(case, jnp.float32)
  assert len(kernels(compile_for_tpu(fn, *shapes, chip="v7x"))) == 4  # members of both


@needs_libtpu
@pytest.mark.tpu_aot
def test_the_kernel_is_chosen_where_it_fits():
  """Without a memory, for "official" as long as a head's tokens fit in VMEM, in two dtypes."""
  chosen = {}
  official = Routing(8, "official")

  def trace(x):
    shape = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)  # noqa: E731
    table, memory = (shape(9, 64),) * 2, (shape(2, 4, 1, 64),) * 2
    for name, length, dtype, options, extras in (
      ("plain", 4096, jnp.bfloat16, official, Extras(None, None)),
      ("wide", 4096, jnp.float32, official, Extras(None, None)),
      ("half", 4096, jnp.float16, official, Extras(None, None)),
      ("relative", 4096, jnp.bfloat16, official, Extras(table, None)),
      ("memory", 4096, jnp.bfloat16, official, Extras(None, memory)),
      ("recent", 4096, jnp.bfloat16, Routing(8), Extras(None, None)),
      ("prefix", 4096, jnp.bfloat16, Routing(8, "topk_prefix"), Extras(None, None)),
      ("long", 2**17, jnp.bfloat16, official, Extras(None, None)),
    ):
      x = jax.ShapeDtypeStruct((1, length, 2, 64), dtype)
      scores = jax.ShapeDtypeStruct((1, length, 2, 4), jnp.float32)
      chosen[name] = api._choose(x, Tokens(x, x, scores, None), scores, options, extras, True)
    return jnp.zeros(())

  compile_for_tpu(trace, jax.ShapeDtypeStruct((1,), jnp.float32))
  found = {name for name, which in chosen.items() if which == "tpu"}
  assert found == {"plain", "wide", "relative", "recent"}
