"""The TPU kernels of RAT attention, compiled for absent TPUs."""

import math
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

from attnzoo.pallas_kernels.cases import Case
from attnzoo.pallas_kernels.rat_attention import api, rat_attention
from attnzoo.pallas_kernels.rat_attention.cases import (
  CASES,
  make_inputs,
  minimum_bytes,
  operator,
  static_options,
)
from attnzoo_testing.marks import each_once
from attnzoo_testing.tpu_aot import (
  CHIPS,
  check_schedule,
  compile_for_tpu,
  kernels,
  layout_copies,
  needs_libtpu,
  schedules,
)

BY_NAME = {case.name: case for case in CASES}
LONGEST = Case(
  "layer_1b_longest", ("aot",),
  dict(batch=1, length=131072, heads=16, kv_heads=2, key_dim=128, value_dim=128, chunk=16),
)  # fmt: skip
TOKENS = ("query", "key", "value", "gate_logits", "output_logits")
STORED = ("stored_key", "stored_value")


def program(case, dtype):
  """(function, shapes): training forward and backward of a case, arrays as a layer has them.

  A layer's activations are [B, T, H * K]; the heads are split by a reshape inside.
  """
  inputs = make_inputs(Case(case.name, case.tags, dict(case.sizes, length=16), case.options))
  size = case.sizes
  shape = size["batch"], size["length"]
  shapes = {}
  for name, x in inputs.items():
    tail = (x.shape[2] * x.shape[3],) if name in TOKENS else ()
    whole = (*shape, *tail) if name in (*TOKENS, "segment_ids") else x.shape
    if name in STORED:
      slots = -(-(case.options["state"] + shape[1]) // size["chunk"])
      whole = (shape[0], slots, *x.shape[2:])
    narrow = name in (*TOKENS, *STORED)
    shapes[name] = jax.ShapeDtypeStruct(whole, dtype if narrow else x.dtype)

  def step(inputs, d_output):
    others = dict(inputs)
    arrays = [others.pop(name) for name in (*TOKENS, "gate_bias")]

    def layer(*arrays):
      *tokens, bias = arrays
      tokens = [x.reshape(*shape, -1, size["key_dim"]) for x in tokens]
      named = dict(zip(TOKENS, tokens, strict=True), gate_bias=bias, **others)
      output, *_ = operator(**named, implementation="tpu", **static_options(case))
      return output.reshape(*shape, -1)

    output, vjp = jax.vjp(layer, *arrays)
    return output, vjp(d_output)

  return step, (shapes, shapes["value"])


def check_compiled(case, dtype, chip):
  """Compiles a case; VMEM, memory traffic and copies around the kernels."""
  fn, shapes = program(case, dtype)
  compiled = compile_for_tpu(fn, *shapes, chip=chip)
  found = kernels(compiled)
  moves = [name for name in found if "rat_attention_move" in name]
  assert len(found) - len(moves) == 2, found
  assert all(0 < kernel.vmem_bytes <= 120 * 2**20 for kernel in found.values()), found
  size = case.sizes
  width = size["heads"] * size["key_dim"] * jnp.dtype(dtype).itemsize
  if "state" in case.options:
    return  # recurrence and slots of the portable path
  moved = sum(kernel.hbm_bytes for kernel in found.values())
  least = minimum_bytes(case, dtype, backward=True)
  # Documents: nine arrays are moved, and rows are up to a fourth longer.
  assert moved <= (2.8 if "segments" in case.options else 1.1) * least, moved
  assert compiled.cost_analysis()["bytes accessed"] <= 3.3 * least  # copies to VMEM included
  if dtype != jnp.float32:
    assert wide_arrays(compiled, case) == []
  if "segments" in case.options:
    return
  assert layout_copies(compiled, at_least=size["length"] * width // 2) == []
  # Next to the kernels nothing is made that is as large as the recurrence would be in float32.
  assert compiled.memory_analysis().temp_size_in_bytes < 2 * size["batch"] * size["length"] * width


def wide_arrays(compiled, case):
  """Shapes of float32 arrays in memory that are as large as the recurrence would be."""
  size = case.sizes
  least = size["batch"] * size["length"] * size["heads"] * size["key_dim"]
  # What is inside of a fused computation stays in registers.
  text = re.sub(r"^%fused_computation.*?^}", "", compiled.as_text(), flags=re.DOTALL | re.MULTILINE)
  shapes = set(re.findall(r"f32\[([\d,]+)\]", text))
  return [x for x in shapes if math.prod(map(int, x.split(","))) >= least]


# Instruction bundles of the whole kernel (loops once), share of the matrix units' slots, spilled
# registers, forward and backward. The limits leave 5 % to what jax 0.12.0.1 with libtpu 0.0.50.1
# makes; `tpu_tuning.py` has the cycles per token.
SCHEDULES = {
  ("layer_1b", "v5e", "bfloat16"): ((4679, 0.27, 1026), (8866, 0.28, 2391)),
  ("layer_1b", "v5p", "bfloat16"): ((5034, 0.25, 1028), (9312, 0.27, 2426)),
  ("layer_1b", "v6e", "bfloat16"): ((3960, 0.16, 1226), (7146, 0.17, 2679)),
  ("layer_1b", "v5e", "float32"): ((6667, 0.57, 1176), (12512, 0.61, 2821)),
  ("layer_1b_long_chunks", "v5e", "bfloat16"): ((5557, 0.22, 910), (11705, 0.21, 1341)),
  ("narrow_heads", "v5e", "bfloat16"): ((7784, 0.32, 2550), (13537, 0.37, 3329)),
  ("layer_1b_documents", "v5e", "bfloat16"): ((5213, 0.24, 1157), (9107, 0.28, 2583)),
  ("layer_1b_documents", "v5p", "bfloat16"): ((5432, 0.23, 1163), (9467, 0.27, 2623)),
  ("layer_1b_documents", "v6e", "bfloat16"): ((4494, 0.14, 1390), (7614, 0.16, 2916)),
  ("ragged_from_a_state", "v5e", "bfloat16"): ((1930, 0.19, 126), (2238, 0.28, 144)),
}

_CHILD = """
import jax.numpy as jnp
from attnzoo.pallas_kernels.rat_attention import layout
from test_rat_tpu_aot import BY_NAME, check_compiled
layout.either = lambda fits, kernel, general: kernel()  # the other way has a test of its own
check_compiled(BY_NAME[{name!r}], jnp.{dtype}, {chip!r})
"""


@needs_libtpu
@pytest.mark.tpu_aot
@pytest.mark.parametrize(("name", "chip", "dtype"), each_once(SCHEDULES))
def test_compiled(name, chip, dtype, monkeypatch):
  monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parent))
  found = schedules(_CHILD.format(name=name, chip=chip, dtype=dtype))
  kind = "softmax_" if "state" in BY_NAME[name].options else ""
  for which, limits in zip(("forward", "backward"), SCHEDULES[name, chip, dtype], strict=True):
    check_schedule(found, f"rat_attention_{kind}{which}", limits)


@needs_libtpu
@pytest.mark.tpu_aot
def test_documents_of_any_number_compile():
  """Both ways in one program: there is no float32 recurrence in it. Rows end in partial blocks."""
  case = BY_NAME["ragged_packed"]
  fn, shapes = program(case, jnp.bfloat16)
  compiled = compile_for_tpu(fn, *shapes)
  found = [name for name in kernels(compiled) if "rat_attention_move" not in name]
  assert sum("rat_attention_forward" in name for name in found) == 3  # one anew for gradients
  assert sum("rat_attention_backward" in name for name in found) == len(found) - 3 == 2
  assert wide_arrays(compiled, case) == []


@needs_libtpu
@pytest.mark.tpu_aot
def test_the_longest_sequence_compiles():
  """131072 tokens in 8192 chunks; on the chip with the least VMEM of those with much."""
  check_compiled(LONGEST, jnp.bfloat16, "v5p")


@needs_libtpu
@pytest.mark.tpu_aot
def test_what_does_not_fit_is_left_to_the_portable_path():
  """On v4, with 16 MiB of VMEM, and by name it is refused."""

  def choice(length, implementation=None):
    chosen = []

    def trace(query, value):
      chosen.append(api._choose(query, value, None, None, 16))
      if implementation is not None:
        bias = jnp.zeros((2, 128))
        rat_attention(query, query, value, value, bias, chunk_size=16, implementation="tpu")
      return value

    shape = jax.ShapeDtypeStruct((1, length, 2, 128), jnp.bfloat16)
    compile_for_tpu(trace, shape, shape, chip="v4")
    return chosen[0]

  assert choice(32768) == "tpu"
  assert choice(2**20) == "xla"
  with pytest.raises(NotImplementedError, match="few enough chunks for the TPU's VMEM"):
    choice(2**20, "tpu")


@needs_libtpu
@pytest.mark.tpu_aot
@pytest.mark.parametrize("chip", CHIPS)
def test_head_and_chunk_sizes_compile(chip):
  """Forward and backward of small problems: odd sizes, no output gate, no rotation."""
  for heads, groups, dim, chunk_size in ((2, 1, 64, 3), (3, 3, 80, 1), (2, 2, 256, 100)):
    tokens = jax.ShapeDtypeStruct((1, 300, heads, dim), jnp.bfloat16)
    group = jax.ShapeDtypeStruct((1, 300, groups, dim), jnp.bfloat16)
    bias = jax.ShapeDtypeStruct((heads, dim), jnp.float32)
    options = dict(chunk_size=chunk_size, rotary_base=None if chunk_size == 3 else 1e4)

    def loss(query, key, value, gates, bias, options=options):
      output, state = rat_attention(query, key, value, gates, bias, implementation="tpu", **options)
      return jnp.sum(output.astype(jnp.float32)) + jnp.sum(state.value.astype(jnp.float32))

    gradient = jax.grad(loss, (0, 1, 2, 3, 4))
    compiled = compile_for_tpu(gradient, group, group, tokens, tokens, bias, chip=chip)
    assert len(kernels(compiled)) == 2
