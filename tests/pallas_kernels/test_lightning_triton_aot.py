"""Lightning attention compiled for GPUs that are not here: machine code and whole programs."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo.pallas_kernels import lightning_attention
from attnzoo.pallas_kernels.lightning_attention import triton
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

# (GPU, dtype, B, T, H, K, V, most bytes that a thread may spill).
COMPILED = {
  "h100-bf16-64": (H100, "bfloat16", 8, 1024, 8, 64, 64, 0),
  "h100-bf16-128": (H100, "bfloat16", 4, 4096, 64, 128, 128, 64),
  "h100-bf16-128-split": (H100, "bfloat16", 2, 16384, 16, 128, 128, 64),
  "h100-bf16-256x128": (H100, "bfloat16", 1, 4096, 16, 256, 128, 200),
  "h100-bf16-256": (H100, "bfloat16", 8, 2048, 8, 256, 256, 250),
  "h100-f32-128": (H100, "float32", 4, 2048, 8, 128, 128, 16),
  "a100-bf16-64": (A100, "bfloat16", 8, 1024, 8, 64, 64, 0),
  "a100-bf16-128": (A100, "bfloat16", 4, 4096, 64, 128, 128, 16),
  "a100-bf16-256": (A100, "bfloat16", 8, 2048, 8, 256, 256, 16),
  "a100-f32-128": (A100, "float32", 4, 2048, 8, 128, 128, 16),
}
FLOAT32 = ("log_decay", "initial_state", "sums", "d_final_state", "d_sums")


@pytest.mark.parametrize("name", COMPILED)
def test_machine_code(name):
  gpu, dtype, *sizes, most = COMPILED[name]
  problem = triton.Problem(*sizes, dtype, segments=False, lengths=False)
  config = triton.choose_config(problem, gpu)
  arrays = ("query", "key", "value", "d_output")
  dtypes = dict.fromkeys(arrays, dtype) | dict.fromkeys(FLOAT32, "float32")
  launches = triton.forward_launches(problem, config) + triton.backward_launches(problem, config)
  found = {launch.kernel.split(":")[1]: compile_launch(launch, dtypes, gpu) for launch in launches}
  for kernel, resources in found.items():
    print(name, kernel, config.chunk, config.pieces, resources)
  for kernel, resources in found.items():
    assert resources.shared_memory <= gpu.shared_memory, kernel
    assert resources.tensor_cores > 0, kernel
    assert resources.spills <= most, kernel
    assert not resources.serialized, kernel


def attention(query, key, value, log_decay=None):
  if log_decay is None:
    log_decay = np.linspace(-1, 0, query.shape[2], dtype=np.float32)
  return lightning_attention(query, key, value, log_decay, implementation="triton")


def loss(*args):
  output, state = attention(*args)
  return jnp.sum(output.astype(jnp.float32) ** 2) + jnp.sum(state)


def operations(compiled, length):
  """(kernel calls, names of the operations on token arrays that only move data, loops)."""
  text = compiled.as_text()
  calls = len(re.findall(r'custom_call_target="triton_kernel_call', text))
  moves = re.findall(
    rf"= \w+\[\d+,{length},[\d,]+\]\S* (copy|transpose|pad|slice|concatenate)\(", text
  )
  return calls, moves, len(re.findall(r" while\(", text))


@needs_plugin
@pytest.mark.parametrize(
  ("shape", "forward", "both"), [((4, 2048, 16, 128), 1, 2), ((1, 8192, 4, 64), 2, 4)]
)
def test_whole_program_has_the_kernels_alone(shape, forward, both):
  """No transposes or copies around the calls, and no trace of the portable path."""
  tokens = (jax.ShapeDtypeStruct(shape, jnp.bfloat16),) * 3
  assert operations(compile_for_h100(attention, *tokens), shape[1]) == (forward, [], 0)
  gradient = jax.grad(loss, argnums=(0, 1, 2))
  assert operations(compile_for_h100(gradient, *tokens), shape[1]) == (both, [], 0)


@needs_plugin
def test_gradient_of_the_decay_takes_the_portable_path():
  tokens = (jax.ShapeDtypeStruct((1, 512, 2, 64), jnp.bfloat16),) * 3
  decay = jax.ShapeDtypeStruct((2,), jnp.float32)
  compiled = compile_for_h100(jax.grad(loss, argnums=3), *tokens, decay)
  assert operations(compiled, 512)[2] == 2  # forward and backward scan


@needs_plugin
def test_the_kernel_is_the_default_on_a_gpu():
  """With documents, padding and an initial state, all of them differentiated through."""
  tokens = (jax.ShapeDtypeStruct((2, 500, 2, 40), jnp.float16),) * 3
  state = jax.ShapeDtypeStruct((2, 2, 40, 40), jnp.float32)
  ids = (jax.ShapeDtypeStruct((2, 500), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.int32))

  def default(query, key, value, state, segment_ids, lengths):
    options = dict(segment_ids=segment_ids, lengths=lengths, initial_state=state)
    output, state = lightning_attention(query, key, value, **options)
    return jnp.sum(output.astype(jnp.float32) ** 2) + jnp.sum(state)

  gradient = jax.grad(default, argnums=(0, 1, 2, 3))
  calls, _, loops = operations(compile_for_h100(gradient, *tokens, state, *ids), 500)
  assert (calls, loops) == (2, 0)


@needs_plugin
def test_vmap_runs_the_launches_one_after_the_other():
  """Per-example gradients compile: a loop around each launch, none of the portable path."""
  tokens = (jax.ShapeDtypeStruct((3, 1, 256, 2, 64), jnp.bfloat16),) * 3
  gradients = jax.vmap(jax.grad(loss, argnums=(0, 1, 2)))
  calls, _, loops = operations(compile_for_h100(gradients, *tokens), 256)
  assert calls == loops > 0
