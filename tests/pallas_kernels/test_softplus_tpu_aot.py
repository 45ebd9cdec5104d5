"""The TPU kernels of softplus attention, compiled for absent TPUs."""

import jax
import jax.numpy as jnp
import pytest

from attnzoo.pallas_kernels.cases import Case
from attnzoo.pallas_kernels.sliding_window_attention.history import Tokens
from attnzoo.pallas_kernels.softplus_attention import VARIANTS, api, softplus_attention
from attnzoo.pallas_kernels.softplus_attention.cases import (
  CASES,
  make_inputs,
  minimum_bytes,
  operator,
  static_options,
)
from attnzoo_testing.marks import each_once
from attnzoo_testing.tpu_aot import (
  check_schedules,
  compile_for_tpu,
  kernels,
  layout_copies,
  needs_libtpu,
)

BY_NAME = {case.name: case for case in CASES}
TOKENS = ("query", "key", "value")


def program(case, dtype):
  """(function, shapes): training forward and backward of a case, arrays as a layer has them.

  A layer's activations are [B, T, H * K]; the heads are split by a reshape inside.
  """
  size = case.sizes
  few = make_inputs(Case(case.name, case.tags, dict(size, length=16), case.options), dtype)
  shape = size["batch"], size["length"]
  shapes = {}
  for name, x in few.items():
    whole = x.shape
    if name in TOKENS:
      whole = (*shape, x.shape[2] * x.shape[3])
    elif name == "segment_ids":
      whole = shape
    elif name.startswith("stored"):  # a slot for every token
      whole = (x.shape[0], x.shape[1] - 16 + size["length"], *x.shape[2:])
    shapes[name] = jax.ShapeDtypeStruct(whole, x.dtype)

  def step(inputs, d_output):
    others = dict(inputs)
    arrays = [others.pop(name) for name in TOKENS]

    def layer(*arrays):
      dims = size["key_dim"], size["key_dim"], size["value_dim"]
      heads = [x.reshape(*shape, -1, dim) for x, dim in zip(arrays, dims, strict=True)]
      named = dict(zip(TOKENS, heads, strict=True), **others)
      output = operator(**named, implementation="tpu", **static_options(case))[0]
      return output.reshape(*shape, -1)

    output, vjp = jax.vjp(layer, *arrays)
    return output, vjp(d_output)

  d_output = jax.ShapeDtypeStruct((*shape, size["heads"] * size["value_dim"]), dtype)
  return step, (shapes, d_output)


def check_compiled(case, dtype, chip):
  """Compiles a case; VMEM, memory traffic, and that nothing grows with the square of the length."""
  fn, shapes = program(case, dtype)
  compiled = compile_for_tpu(fn, *shapes, chip=chip)
  found = kernels(compiled)
  size = case.sizes
  long = size["length"] > 10000  # keys in several spans
  assert len(found) == 2 + long, found
  assert all(0 < kernel.vmem_bytes <= 125 * 2**20 for kernel in found.values()), found
  once = minimum_bytes(case, dtype, backward=True)
  moved = sum(kernel.hbm_bytes for kernel in found.values())
  # A state doubles the keys, and each is there twice, for the two heads of a lane tile; the 8 parts
  # of dq are float32.
  most = 3.1 if long else 2.1 if "state" in case.options else 1.1
  assert moved <= most * once, moved / once
  if "segments" not in case.options:
    assert layout_copies(compiled) == []
  # All scores at once would be more than 5 times that of the smallest case.
  assert compiled.memory_analysis().temp_size_in_bytes < 4 * once


# Instruction bundles of the whole kernel (loops once), share of the matrix units' slots, spilled
# registers, of each kernel. The limits leave 5 % to what jax 0.12.0.1 with libtpu 0.0.50.1
# makes; `tpu_tuning.py` has the cycles per tile.
SCHEDULES = {
  ("layer_124m", "v5e", "bfloat16"): {
    "forward": (7740, 0.46, 650),
    "backward": (16630, 0.53, 700),
  },
  ("wide_heads", "v5e", "bfloat16"): {
    "forward": (5690, 0.31, 270),
    "backward": (10800, 0.41, 210),
  },
  ("ragged_packed", "v5p", "bfloat16"): {
    "forward": (15940, 0.38, 1580),
    "backward": (29650, 0.48, 5750),
  },
  ("longest", "v5e", "bfloat16"): {
    "forward": (7600, 0.35, 390),
    "row_sums": (3840, 0.46, 0),
    "backward": (10330, 0.43, 2090),
  },
  ("layer_124m", "v6e", "bfloat16"): {
    "forward": (7200, 0.18, 1340),
    "backward": (14640, 0.27, 3230),
  },
  ("layer_124m", "v5p", "bfloat16"): {
    "forward": (7970, 0.44, 650),
    "backward": (16760, 0.53, 770),
  },
  ("wide_heads", "v5e", "float32"): {
    "forward": (13290, 0.8, 2540),
    "backward": (33460, 0.8, 8630),
  },
}
QUICK = (
  ("layer_124m", "v5e", "bfloat16"),
  ("layer_124m", "v6e", "bfloat16"),
  ("ragged_packed", "v5p", "bfloat16"),
)


@needs_libtpu
@pytest.mark.tpu_aot
@pytest.mark.parametrize(("name", "chip", "dtype"), each_once(SCHEDULES, *QUICK))
def test_compiled(name, chip, dtype):
  limits = SCHEDULES[name, chip, dtype]
  check_schedules(__file__, "softplus_attention", name, chip, dtype, limits)


@needs_libtpu
@pytest.mark.tpu_aot
@pytest.mark.parametrize("chip", ["v4", "v7x"])
def test_odd_sizes_compile(chip):
  """Those chips that have no schedules above; float32, documents, three heads that share a key."""
  query, key, value = (
    jax.ShapeDtypeStruct((1, 300, *tail), jnp.float32) for tail in ((3, 80), (1, 80), (1, 200))
  )

  def loss(query, key, value, segment_ids):
    options = dict(segment_ids=segment_ids, implementation="tpu")
    return jnp.sum(softplus_attention(query, key, value, **options)[0])

  gradient = jax.grad(loss, (0, 1, 2))
  ids = jax.ShapeDtypeStruct((1, 300), jnp.int32)
  assert len(kernels(compile_for_tpu(gradient, query, key, value, ids, chip=chip))) == 2


@needs_libtpu
@pytest.mark.tpu_aot
def test_the_kernel_is_chosen_where_it_fits():
  """For LSSA and LSSAR in the dtypes it takes; others are left to the portable path."""
  chosen = {}

  def trace(x):
    for name, variant in VARIANTS.items():
      for dtype in (jnp.bfloat16, jnp.float16):
        y = x.astype(dtype)
        chosen[name, dtype] = api._choose(y, Tokens(y, y, None, x.shape[1]), variant)
    return x

  compile_for_tpu(trace, jax.ShapeDtypeStruct((1, 8, 1, 128), jnp.float32))
  taken = {key for key, implementation in chosen.items() if implementation == "tpu"}
  assert taken == {(name, jnp.bfloat16) for name in ("lssa", "lssar_p15", "lssar_p3")}
