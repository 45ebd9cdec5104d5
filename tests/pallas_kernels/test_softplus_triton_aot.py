"""Softplus attention compiled for GPUs that are not here: machine code and whole programs."""

import functools

import jax
import jax.numpy as jnp
import pytest

from attnzoo.pallas_kernels.cases import Case
from attnzoo.pallas_kernels.softmax_attention.cache import CacheState
from attnzoo.pallas_kernels.softplus_attention import (
  LSSA,
  LSSAR,
  VARIANTS,
  cases,
  softplus_attention,
  triton,
)
from attnzoo_testing.cuda_aot import A100, H100, compile_for_h100
from attnzoo_testing.triton_launches import (
  compare_on_gpu,
  needs_gpu,
  needs_plugin,
  needs_triton,
  operations,
  resources_of,
)

FLOAT32 = dict.fromkeys(("scale", "count"), "float32")
INT32 = dict.fromkeys(("documents", "first", "stop"), "int32")
# (GPU, (B, T, S, H, G, D), dtype, variant, most shared memory, most registers of the forward
# kernel: 128 for two programs on a multiprocessor). More keys than queries: with documents.
COMPILED = {
  "h100-lssa": (H100, (8, 1024, 1024, 12, 12, 64), "bfloat16", LSSA, 65536, 128),
  "h100-wide-packed": (H100, (2, 4000, 4110, 4, 2, 128), "bfloat16", LSSAR, 131072, 255),
  "h100-float32": (H100, (1, 4096, 4096, 8, 8, 128), "float32", LSSA, 81920, 248),
  "a100-packed": (A100, (2, 4000, 4110, 4, 2, 64), "bfloat16", LSSAR, 33024, 128),
  "a100-wide": (A100, (1, 4096, 4096, 8, 8, 128), "bfloat16", LSSAR, 98304, 255),
  "a100-float32": (A100, (1, 4096, 4096, 8, 2, 64), "float32", LSSAR, 49152, 248),
}


def kernels_of(gpu, sizes, dtype, variant):
  batch, length, total, heads, groups, dim = sizes
  documents = total > length
  shape = (batch, length, total, heads, groups, dim, dim)
  problem = triton.Problem(*shape, dtype, not documents, documents, variant)
  config = triton.choose_config(problem, gpu)
  launches = (triton.forward_launch(problem, config), *triton.backward_launches(problem, config))
  dtypes = {name: dtype for launch in launches for name in launch.inputs}
  return resources_of(launches, dtypes | FLOAT32 | INT32, gpu)


@needs_triton
@pytest.mark.cuda_aot
@pytest.mark.parametrize("name", COMPILED)
def test_machine_code(name):
  gpu, sizes, dtype, variant, shared_memory, registers = COMPILED[name]
  found = kernels_of(gpu, sizes, dtype, variant)
  for kernel, resources in found.items():
    print(name, kernel, resources)
  assert set(found) == {"forward_kernel", "row_gradient_kernel", "key_gradient_kernel"}
  assert found["forward_kernel"].registers <= registers
  for kernel, resources in found.items():
    assert not resources.spills, kernel
    assert resources.shared_memory <= shared_memory, kernel
    assert resources.tensor_cores > 0, kernel
    assert not resources.serialized, kernel


def tokens(batch, length, heads, groups, dim, dtype=jnp.bfloat16):
  query = jax.ShapeDtypeStruct((batch, length, heads, dim), dtype)
  key = jax.ShapeDtypeStruct((batch, length, groups, dim), dtype)
  return query, key, key


@needs_plugin
@pytest.mark.cuda_aot
def test_whole_program():
  """On a GPU the kernels are the default: one launch forward, two backward, nothing of [T, T]."""
  batch, length, heads, groups, dim = shape = (2, 4096, 8, 2, 64)
  arrays = tokens(*shape)

  def pull(cotangent, *arrays):
    return jax.vjp(lambda *x: softplus_attention(*x)[0], *arrays)[1](cotangent)

  calls, loops, largest = operations(compile_for_h100(softplus_attention, *arrays))
  assert (calls, loops) == (1, 0)
  one_array = batch * length * heads * dim
  assert largest == one_array
  compiled = compile_for_h100(pull, arrays[0], *arrays)
  calls, loops, largest = operations(compiled)
  assert (calls, loops) == (3, 0)
  assert largest == one_array
  # Query, its gradient and output in bfloat16; 32 bytes for each row of statistics.
  assert compiled.memory_analysis().temp_size_in_bytes < 4 * 2 * one_array


@needs_plugin
@pytest.mark.cuda_aot
def test_documents_state_and_vmap():
  """Sequences of a vmap run one after the other; packed rows and states are the kernels' too."""
  lengths = jax.ShapeDtypeStruct((3, 2), jnp.int32)
  ids = jax.ShapeDtypeStruct((3, 2, 100), jnp.int32)
  stored = jax.ShapeDtypeStruct((3, 2, 120, 2, 64), jnp.bfloat16)

  def loss(floats, ids, lengths):
    *arrays, key, value = floats
    options = dict(segment_ids=ids, lengths=lengths, initial_state=CacheState(key, value, lengths))
    return jnp.sum(softplus_attention(*arrays, **options)[0].astype(jnp.float32) ** 2)

  floats = [jax.ShapeDtypeStruct((3, *x.shape), x.dtype) for x in tokens(2, 100, 4, 2, 64)]
  compiled = compile_for_h100(jax.vmap(jax.grad(loss)), [*floats, stored, stored], ids, lengths)
  calls, loops, _ = operations(compiled)
  assert calls == 3
  assert loops >= 1


@needs_plugin
@pytest.mark.cuda_aot
@pytest.mark.parametrize("name", ["float64", "softmax"])
def test_others_are_left_to_the_portable_path(name):
  variant, dtype = (LSSA, jnp.float64) if name == "float64" else (VARIANTS[name], jnp.bfloat16)
  with jax.enable_x64(name == "float64"):
    attention = functools.partial(softplus_attention, variant=variant)
    compiled = compile_for_h100(attention, *tokens(1, 64, 2, 1, 16, dtype))
  assert operations(compiled)[0] == 0


# --- On a GPU -------------------------------------------------------------------------------------


def make_case(name, batch, length, heads, dim, groups, **options):
  sizes = dict(batch=batch, length=length, heads=heads, kv_heads=groups)
  return Case(name, (), sizes | dict(key_dim=dim, value_dim=dim), options)


GPU_CASES = (
  make_case("lssa", 2, 2048, 4, 64, 4, variant="lssa"),
  make_case("lssar", 2, 2048, 4, 64, 4),
  make_case("odd", 1, 777, 6, 72, 3, variant="lssar_p3"),
  make_case("packed", 2, 1501, 4, 128, 2, segments="packed", lengths=True, state="many"),
)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: case.name)
def test_gpu(case, dtype):
  compare_on_gpu(cases, case, dtype)
