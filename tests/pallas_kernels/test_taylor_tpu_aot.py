"""The TPU kernels of Taylor attention, compiled for absent TPUs."""

import math
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

from attnzoo.pallas_kernels import taylor_attention, taylor_attention_step
from attnzoo.pallas_kernels.taylor_attention.cases import (
  CASES,
  make_inputs,
  minimum_bytes,
  static_options,
)
from attnzoo.pallas_kernels.taylor_attention.features import feature_count
from attnzoo_testing.marks import each_once
from attnzoo_testing.tpu_aot import (
  check_schedule,
  compile_for_tpu,
  kernels,
  layout_copies,
  needs_libtpu,
  schedules,
)

BY_NAME = {case.name: case for case in CASES}


def program(case, dtype):
  """(function, shapes): training forward and backward of a case, arrays as a layer has them.

  A layer's activations are [B, T, H * D]; the heads are split by a reshape inside.
  """
  shapes = {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in make_inputs(case).items()}
  size = case.sizes

  def flat(dim):
    return jax.ShapeDtypeStruct((size["batch"], size["length"], size["heads"] * dim), dtype)

  key_dim, value_dim = size["key_dim"], size["value_dim"]
  shapes |= dict(query=flat(key_dim), key=flat(key_dim), value=flat(value_dim))

  def step(inputs, d_output):
    others = dict(inputs)
    arrays = [others.pop(name) for name in ("query", "key", "value")]

    def layer(*arrays):
      heads = [x.reshape(*x.shape[:2], size["heads"], -1) for x in arrays]
      output, _ = taylor_attention(*heads, **others, implementation="tpu", **static_options(case))
      return output.reshape(*output.shape[:2], -1)

    output, vjp = jax.vjp(layer, *arrays)
    return output, vjp(d_output)

  return step, (shapes, flat(value_dim))


def check_compiled(case, dtype, chip):
  """Compiles a case; VMEM, memory traffic, copies and features outside of the kernels."""
  fn, shapes = program(case, dtype)
  compiled = compile_for_tpu(fn, *shapes, chip=chip)
  found = kernels(compiled)
  assert len(found) == 2, found
  assert all(0 < kernel.vmem_bytes <= 32 * 2**20 for kernel in found.values()), found
  moved = sum(kernel.hbm_bytes for kernel in found.values())
  assert moved <= 1.3 * minimum_bytes(case, dtype, backward=True), moved
  size = case.sizes
  tokens = size["batch"] * size["length"] * size["heads"]
  if size["heads"] * size["key_dim"] % 128 == 0:
    # Else the compiler wants other layouts for the program's own arguments. A given state is small.
    large = layout_copies(compiled, at_least=tokens * size["key_dim"] * jnp.dtype(dtype).itemsize)
    assert large == []
  # No array of the program is as large as the second-order features of all tokens.
  shapes = re.findall(r"\b(?:bf16|f32)\[([\d,]+)\]", compiled.as_text())
  largest = max(math.prod(map(int, dims.split(","))) for dims in shapes)
  assert (
    tokens * size["value_dim"] <= largest < tokens * size["key_dim"] * (size["key_dim"] + 1) // 2
  )


# Instruction bundles of the whole kernel (loops once), share of the matrix units' slots, spilled
# registers, forward and backward. The limits leave 5 % to what jax 0.12.0.1 with libtpu 0.0.50.1
# makes; `tpu_tuning.py` has the cycles per token.
SCHEDULES = {
  ("layer_360m", "v5e", "bfloat16"): ((4280, 0.49, 70), (8131, 0.6, 1243)),
  ("layer_360m", "v6e", "bfloat16"): ((4438, 0.51, 1516), (7874, 0.63, 5757)),
  ("layer_1b", "v5p", "bfloat16"): ((5086, 0.52, 252), (8728, 0.62, 1603)),
  ("layer_1b", "v6e", "bfloat16"): ((4862, 0.55, 2281), (9047, 0.59, 6981)),
  ("layer_1b_28_heads", "v5p", "bfloat16"): ((4470, 0.47, 97), (8626, 0.56, 1266)),
  ("ragged_packed", "v5e", "bfloat16"): ((4145, 0.5, 139), (7832, 0.62, 1644)),
  ("layer_360m", "v5e", "float32"): ((14180, 0.85, 3119), (33379, 0.87, 7291)),
}

_CHILD = """
import jax.numpy as jnp
from test_taylor_tpu_aot import BY_NAME, check_compiled
check_compiled(BY_NAME[{name!r}], jnp.{dtype}, {chip!r})
"""


@needs_libtpu
@pytest.mark.tpu_aot
@pytest.mark.parametrize(("name", "chip", "dtype"), each_once(SCHEDULES))
def test_compiled(name, chip, dtype, monkeypatch):
  monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parent))
  found = schedules(_CHILD.format(name=name, chip=chip, dtype=dtype))
  for which, limits in zip(("forward", "backward"), SCHEDULES[name, chip, dtype], strict=True):
    check_schedule(found, f"taylor_attention_{which}", limits)


@needs_libtpu
@pytest.mark.tpu_aot
def test_a_step_moves_the_state_once():
  """Decoding 128 sequences: bytes are those of reading and writing the packed float32 state."""

  def tokens(dim):
    return jax.ShapeDtypeStruct((128, 16, dim), jnp.bfloat16)

  state = jax.ShapeDtypeStruct((128, 16, feature_count(16), 65), jnp.float32)

  def step(query, key, value, state):
    return taylor_attention_step(query, key, value, None, state)

  compiled = compile_for_tpu(step, tokens(16), tokens(16), tokens(64), state)
  assert compiled.cost_analysis()["bytes accessed"] <= 1.3 * 2 * 4 * math.prod(state.shape)
