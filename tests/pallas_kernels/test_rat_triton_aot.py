"""RAT attention compiled for GPUs that are not here: machine code and whole programs."""

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest

from attnzoo.pallas_kernels.rat_attention import RatState, layout, rat_attention, triton
from attnzoo_testing.cuda_aot import A100, H100, compile_for_h100, compile_launch

pytestmark = [
  pytest.mark.cuda_aot,
  pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton here"),
]
needs_plugin = pytest.mark.skipif(
  importlib.util.find_spec("jax_cuda13_plugin") is None
  or importlib.util.find_spec("jax_triton") is None,
  reason="no CUDA plugin or jax-triton here",
)

FLOAT32 = ("cos", "sin", "gate_bias", "own_score", "d_running_key", "d_running_value")
INT32 = ("first", "last", "begins", "numbers", "lengths")
SOFTMAX = ("attend_kernel", "row_gradient_kernel", "slot_gradient_kernel")
RECURRENCE = ("recurrence_kernel", "recurrence_gradient_kernel")
# (GPU, (B, T, H, G, K, L), dtype, most bytes that a thread may spill, most shared memory). L = 0 is
# the softmax alone, with slots of its own for every token; "packed" has documents.
COMPILED = {
  "h100-layer": (H100, (4, 4096, 16, 2, 128, 16), "bfloat16", 0, 102400),
  "h100-long-chunks": (H100, (1, 8192, 16, 2, 64, 64), "bfloat16", 0, 53248),
  "h100-documents": (H100, (2, 4000, 16, 16, 128, 0), "bfloat16", 0, 118784),
  "h100-packed": (H100, (4, 4096, 16, 2, 128, 16), "bfloat16", 0, 102400),
  "a100-many-slots": (A100, (1, 32768, 16, 2, 128, 16), "bfloat16", 0, 76800),
  "a100-narrow": (A100, (2, 4096, 8, 2, 64, 16), "bfloat16", 0, 40960),
  "a100-float32": (A100, (1, 4096, 8, 2, 128, 16), "float32", 384, 102400),
}


@pytest.mark.parametrize("name", COMPILED)
def test_machine_code(name):
  gpu, sizes, dtype, spills, shared_memory = COMPILED[name]
  batch, length, heads, groups, dim, chunk_size = sizes
  aligned = chunk_size > 0
  slots = length // (chunk_size or 16)
  packed = "packed" in name
  problem = triton.Problem(*sizes[:5], slots, chunk_size, dtype, aligned, aligned, packed, packed)
  config = triton.choose_config(problem, gpu)
  launches = triton.forward_launches(problem, config) + triton.backward_launches(problem, config)
  dtypes = {name: dtype for launch in launches for name in launch.inputs}
  dtypes |= {n: s.dtype.name for launch in launches for n, s in launch.outputs.items()}
  dtypes |= dict.fromkeys(FLOAT32, "float32") | dict.fromkeys(INT32, "int32")
  if not aligned:
    dtypes |= dict(own_value="float32", d_output="float32")
  found = {launch.kernel.split(":")[1]: compile_launch(launch, dtypes, gpu) for launch in launches}
  for kernel, resources in found.items():
    print(name, kernel, config, resources)
  assert set(found) == {*SOFTMAX, *(RECURRENCE if aligned else ())}
  for kernel, resources in found.items():
    assert resources.spills <= spills, kernel
    assert resources.shared_memory <= shared_memory, kernel
    assert not resources.serialized, kernel
    assert (resources.tensor_cores > 0) == (kernel in SOFTMAX), kernel


def attention(*tokens, **options):
  return rat_attention(*tokens, chunk_size=16, implementation="triton", **options)


def loss(*tokens):
  return jnp.sum(attention(*tokens)[0].astype(jnp.float32) ** 2)


def tokens(batch, length, heads, groups, dim, dtype=jnp.bfloat16):
  by_group = jax.ShapeDtypeStruct((batch, length, groups, dim), dtype)
  by_head = jax.ShapeDtypeStruct((batch, length, heads, dim), dtype)
  bias = jax.ShapeDtypeStruct((heads, dim), jnp.float32)
  return by_group, by_group, by_head, by_head, bias, by_head


def operations(compiled):
  """(kernel calls, loops, bytes of the largest array that an operation of XLA's own writes)."""
  text = compiled.as_text()
  entry = text[text.index("\nENTRY") :]
  widths = {"f32": 4, "bf16": 2, "s32": 4, "pred": 1}
  largest = 0
  for line in entry.splitlines():
    if re.search(
      r" (fusion|copy|transpose|reduce|convert|pad|slice|concatenate|broadcast)\(", line
    ):
      for kind, shape in re.findall(r"\b(f32|bf16|s32|pred)\[([\d,]+)\]", line.split("(")[0]):
        size = widths[kind]
        for number in shape.split(","):
          size *= int(number)
        largest = max(largest, size)
  calls = len(re.findall(r'custom_call_target="triton_kernel_call', text))
  return calls, len(re.findall(r" while\(", text)), largest


@needs_plugin
@pytest.mark.parametrize("shape", [(4, 4096, 16, 2, 128)])
def test_whole_program_has_the_kernels_alone(shape):
  """XLA's own operations touch the query's groups, tables and sums of the biases' gradient."""
  batch, length, heads, groups, dim = shape
  arrays = tokens(*shape)
  by_group = 4 * batch * length * groups * dim
  compiled = compile_for_h100(attention, *arrays)
  calls, loops, largest = operations(compiled)
  assert (calls, loops) == (2, 0)
  assert largest <= by_group // 2
  one_array = 2 * batch * length * heads * dim
  assert compiled.memory_analysis().temp_size_in_bytes < 1.2 * one_array

  def pull(cotangent, *arrays):
    return jax.vjp(lambda *x: attention(*x)[0], *arrays)[1](cotangent)

  compiled = compile_for_h100(pull, arrays[2], *arrays)
  calls, loops, largest = operations(compiled)
  assert (calls, loops) == (5, 0)
  assert largest <= by_group
  # The cotangent of the ungated output, the query's gradient per head, summaries, statistics.
  assert compiled.memory_analysis().temp_size_in_bytes < 3 * one_array


@needs_plugin
@pytest.mark.parametrize(
  ("documents", "state", "count"),
  [(False, False, 5), (True, False, 5), (True, True, 3)],
)
def test_the_kernels_are_the_default_on_a_gpu(documents, state, count, monkeypatch):
  """With padding, and a state in the middle of a chunk: then the softmax is the kernels'."""
  # Compiling the portable path for documents that do not fit takes half a minute.
  monkeypatch.setattr(layout, "either", lambda fits, kernel, general: kernel())
  lengths = jax.ShapeDtypeStruct((2,), jnp.int32)
  ids = jax.ShapeDtypeStruct((2, 100), jnp.int32)
  slots = jax.ShapeDtypeStruct((2, 9, 4, 64), jnp.bfloat16)
  running = jax.ShapeDtypeStruct((2, 4, 64), jnp.float32)
  given = RatState(slots, slots, running, running, lengths)

  def total(floats, lengths, ids, position):
    *tokens, before = floats
    rows = dict(lengths=lengths)
    rows |= dict(segment_ids=ids) if documents else {}
    rows |= dict(initial_state=before._replace(position=position)) if state else {}
    output, after = rat_attention(*tokens, chunk_size=16, **rows)
    floats = jax.tree.leaves(after._replace(position=None))
    return sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in (output, *floats))

  floats = (*tokens(2, 100, 4, 2, 64), given._replace(position=None))
  compiled = compile_for_h100(jax.grad(total), floats, lengths, ids, lengths)
  assert operations(compiled)[0] == count


@needs_plugin
def test_float64_is_left_to_the_portable_path():
  with jax.enable_x64(True):
    arrays = tokens(1, 64, 2, 1, 16, jnp.float64)
    compiled = compile_for_h100(functools.partial(rat_attention, chunk_size=16), *arrays)
  assert operations(compiled)[0] == 0
