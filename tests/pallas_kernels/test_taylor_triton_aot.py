"""Taylor attention compiled for GPUs that are not here: machine code and whole programs."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest

from attnzoo.pallas_kernels import taylor_attention
from attnzoo.pallas_kernels.taylor_attention import triton
from attnzoo.pallas_kernels.taylor_attention.features import feature_count
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

FLOAT32 = ("log_decay", "initial_state", "sums", "d_final_state", "d_sums", "total", "d_total")
# (GPU, B, T, H, F, V, documents, most bytes that a thread may spill in each of KERNELS).
COMPILED = {
  "h100-64": (H100, 8, 2048, 16, 16, 64, False, (0, 0, 0, 32)),
  "h100-112-split": (H100, 1, 8192, 16, 16, 112, True, (0, 16, 0, 352)),
  "a100-112": (A100, 8, 2048, 16, 16, 112, False, (0, 0, 32, 128)),
}
KERNELS = ("sums_kernel", "forward_kernel", "query_gradient_kernel", "key_value_gradient_kernel")


@pytest.mark.parametrize("name", COMPILED)
def test_machine_code(name):
  gpu, *sizes, segments, most = COMPILED[name]
  problem = triton.Problem(*sizes, "bfloat16", True, False, segments, False)
  config = triton.choose_config(problem, gpu)
  dtypes = dict.fromkeys(("query", "key", "value", "output", "d_output"), "bfloat16")
  dtypes |= dict.fromkeys(FLOAT32, "float32") | dict(segments="int32")
  launches = triton.forward_launches(problem, config) + triton.backward_launches(problem, config)
  found = {launch.kernel.split(":")[1]: compile_launch(launch, dtypes, gpu) for launch in launches}
  for kernel, resources in found.items():
    print(name, kernel, config.chunk, config.pieces, resources)
  assert ("sums_kernel" in found) == ("split" in name)
  assert found.pop("total_gradient_kernel").spills == 0
  for kernel, resources in found.items():
    assert resources.shared_memory <= 65536, kernel  # a quarter of what there is
    assert resources.tensor_cores > 0, kernel
    assert resources.spills <= most[KERNELS.index(kernel)], kernel


def attention(query, key, value, log_decay=None, **options):
  return taylor_attention(query, key, value, log_decay, implementation="triton", **options)


def loss(*args):
  output, state = attention(*args)
  return jnp.sum(output.astype(jnp.float32) ** 2) + jnp.sum(state)


def tokens(batch, length, heads, dim, width, dtype=jnp.bfloat16):
  of_dim, of_width = ((batch, length, heads, n) for n in (dim, width))
  return tuple(jax.ShapeDtypeStruct(shape, dtype) for shape in (of_dim, of_dim, of_width))


def operations(compiled, length):
  """(kernel calls, names of the operations on token arrays that only move data, loops)."""
  text = compiled.as_text()
  calls = len(re.findall(r'custom_call_target="triton_kernel_call', text))
  moves = re.findall(
    rf"= \w+\[[\d,]*\b{length},[\d,]+\]\S* (copy|transpose|pad|slice|concatenate)\(", text
  )
  return calls, moves, len(re.findall(r" while\(", text))


def widest(compiled, length):
  """Numbers per token and head in the largest array with a token axis."""
  shapes = re.findall(rf"\w+\[((?:\d+,)*{length},[\d,]+)\]", compiled.as_text())
  return max(int(shape.split(",")[-1]) for shape in shapes)


@needs_plugin
@pytest.mark.parametrize(
  ("shape", "forward", "both"), [((8, 2048, 16, 16, 64), 1, 4), ((1, 8192, 4, 16, 112), 2, 6)]
)
def test_whole_program_has_the_kernels_alone(shape, forward, both):
  """No copies around the calls, no trace of the portable path, no features in memory."""
  compiled = compile_for_h100(attention, *tokens(*shape))
  assert operations(compiled, shape[1]) == (forward, [], 0)
  compiled = compile_for_h100(jax.grad(loss, argnums=(0, 1, 2)), *tokens(*shape))
  assert operations(compiled, shape[1]) == (both, [], 0)
  assert widest(compiled, shape[1]) == shape[4] < feature_count(shape[3])
  # Gradients in parts, d_output and 8 bytes per token and head; the states are small beside them.
  batch, length, heads, dim, width = shape
  per_token = 2 * width + 4 + 4 + (2 * 4 * 2 * dim if width > 64 else 0)
  states = 16 * 4 * batch * heads * feature_count(dim) * (width + 1)
  temporary = compiled.memory_analysis().temp_size_in_bytes
  assert temporary < batch * length * heads * (per_token + 2 * width) + 2 * states


@needs_plugin
def test_gradient_of_the_decay_takes_the_portable_path():
  arrays = (*tokens(1, 256, 2, 8, 16), jax.ShapeDtypeStruct((2,), jnp.float32))
  compiled = compile_for_h100(jax.grad(loss, argnums=(0, 1, 2)), *arrays)
  assert operations(compiled, 256)[::2] == (4, 0)
  compiled = compile_for_h100(jax.grad(loss, argnums=3), *arrays)
  assert operations(compiled, 256)[2] == 2  # forward and backward scan


@needs_plugin
def test_the_kernel_is_the_default_on_a_gpu():
  """With documents, padding and an initial state, all of them differentiated through."""
  state = jax.ShapeDtypeStruct((2, 2, feature_count(12), 41), jnp.float32)
  ids = (jax.ShapeDtypeStruct((2, 100), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.int32))

  def default(query, key, value, state, segment_ids, lengths):
    options = dict(segment_ids=segment_ids, lengths=lengths, initial_state=state)
    output, state = taylor_attention(query, key, value, **options)
    return jnp.sum(output.astype(jnp.float32) ** 2) + jnp.sum(state)

  gradient = jax.grad(default, argnums=(0, 1, 2, 3))
  compiled = compile_for_h100(gradient, *tokens(2, 100, 2, 12, 40), state, *ids)
  calls, _, loops = operations(compiled, 100)
  assert (calls, loops) == (4, 0)


@needs_plugin
def test_wide_queries_are_left_to_the_portable_path():
  compiled = compile_for_h100(lambda *x: taylor_attention(*x)[0], *tokens(1, 256, 2, 40, 16))
  calls, _, loops = operations(compiled, 256)
  assert (calls, loops) == (0, 1)
