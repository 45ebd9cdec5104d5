"""Routed attention compiled for GPUs that are not here: machine code and whole programs."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from attnzoo.pallas_kernels import Routing, routed_attention
from attnzoo.pallas_kernels.routed_attention import triton
from attnzoo_testing.cuda_aot import A100, H100, compile_for_h100
from attnzoo_testing.triton_launches import needs_plugin, needs_triton, operations, resources_of

OFFICIAL = Routing(512, "official", mask="rank", zero_values_seen=False)
# (GPU, (B, T, H, C, D), dtype, rows of the tables, most shared memory of the kernels with products,
# most bytes spilled per thread). Layers as of WikiText-103, enwik8, PG-19.
COMPILED = {
  "h100-relative": (H100, (1, 4096, 8, 8, 64), "bfloat16", 1027, 40960, 0),
  "h100-wide": (H100, (1, 12288, 4, 48, 128), "bfloat16", 0, 98304, 0),
  "a100-widest-relative": (A100, (1, 8192, 2, 16, 129), "bfloat16", 1027, 73728, 64),
}
MEMBERS_SPILLS = 64  # 12288 scores lie in the registers of 16 warps


def kernels_of(gpu, sizes, dtype, rows):
  problem = triton.Problem(*sizes, sizes[-1], dtype, True, True, rows, OFFICIAL)
  config = triton.choose_config(problem, gpu)
  launches = triton.forward_launches(problem, config) + triton.backward_launches(problem, config)
  dtypes = {name: dtype for launch in launches for name in launch.inputs} | {"scores": "float32"}
  dtypes |= {n: s.dtype.name for launch in launches for n, s in launch.outputs.items()}
  first = {launch.kernel: launch for launch in launches[::-1]}  # of several, the forward pass's
  return resources_of(first.values(), dtypes, gpu)


@needs_triton
@pytest.mark.cuda_aot
@pytest.mark.parametrize("name", COMPILED)
def test_machine_code(name):
  gpu, sizes, dtype, rows, shared_memory, spills = COMPILED[name]
  found = kernels_of(gpu, sizes, dtype, rows)
  for kernel, resources in found.items():
    print(name, kernel, resources)
  products = {"forward_kernel", "drop_kernel", "gradient_kernel"}
  products |= {"table_gradient_kernel"} if rows else set()
  assert set(found) == products | {"members_kernel", "combine_kernel"}
  for kernel, resources in found.items():
    limits = dict(members_kernel=MEMBERS_SPILLS, combine_kernel=0)
    assert resources.spills <= limits.get(kernel, spills), kernel
    assert not resources.serialized, kernel
    if kernel in products:
      assert resources.shared_memory <= shared_memory, kernel
      assert resources.tensor_cores > 0, kernel


def tokens(batch, length, heads, dim, clusters, dtype=jnp.bfloat16):
  query = jax.ShapeDtypeStruct((batch, length, heads, dim), dtype)
  scores = jax.ShapeDtypeStruct((batch, length, heads, clusters), jnp.float32)
  return query, query, scores


def sorts(compiled):
  return len(re.findall(r" (?:sort|topk)\(|TopK", compiled.as_text()))


def attention(query, value, scores, *tables, options=OFFICIAL):
  named = dict(zip(("relative_keys", "relative_values"), tables, strict=bool(tables)))
  return routed_attention(query, query, value, scores, options=options, **named)[0]


@needs_plugin
@pytest.mark.cuda_aot
def test_whole_program():
  """On a GPU the kernels are the default: three launches forward, four backward, no sort."""
  arrays, one_array = tokens(1, 1024, 2, 32, 4), 1024 * 2 * 32
  short = functools.partial(attention, options=Routing(256, "official"))
  tables = [jax.ShapeDtypeStruct((2 * 99 + 1, 32), jnp.float32)] * 2
  compiled = compile_for_h100(short, *arrays, *tables)
  calls, loops, largest = operations(compiled)
  assert (calls, loops, sorts(compiled)) == (3, 0, 0)
  assert largest == one_array

  def pull(cotangent, query, value, scores):
    return jax.vjp(lambda q, v: short(q, v, scores), query, value)[1](cotangent)

  compiled = compile_for_h100(pull, arrays[0], *arrays)
  calls, loops, largest = operations(compiled)
  assert (calls, loops, sorts(compiled)) == (7, 0, 0)
  assert largest == one_array
  # Outputs of the slots, later their gradients: at most three arrays at a time beside the inputs.
  assert compiled.memory_analysis().temp_size_in_bytes < 4 * 2 * one_array


@needs_plugin
@pytest.mark.cuda_aot
def test_lengths_and_vmap():
  """Sequences of a vmap run one after the other; padded rows are the kernels' too."""
  arrays = [jax.ShapeDtypeStruct((3, *x.shape), x.dtype) for x in tokens(2, 100, 2, 16, 3)]
  lengths = jax.ShapeDtypeStruct((3, 2), jnp.int32)

  def loss(floats, scores, lengths):
    query, value = floats
    output, _ = routed_attention(
      query, query, value, scores, options=Routing(40, "official"), lengths=lengths
    )
    return jnp.sum(output.astype(jnp.float32) ** 2)

  compiled = compile_for_h100(jax.vmap(jax.grad(loss)), arrays[:2], arrays[2], lengths)
  calls, loops, _ = operations(compiled)
  assert calls == 7
  assert loops >= 1


@needs_plugin
@pytest.mark.cuda_aot
@pytest.mark.parametrize("name", ["wide", "memory"])
def test_others_are_left_to_the_portable_path(name):
  dim, options = (136, {}) if name == "wide" else (16, {})
  arrays = tokens(1, 64, 2, dim, 2)
  if name == "memory":
    memory = jnp.zeros((2, 2, 1, dim), jnp.bfloat16)
    options = dict(memory_key=memory, memory_value=memory)

  def run(query, value, scores):
    routing = Routing(16, "official")
    return routed_attention(query, query, value, scores, options=routing, **options)[0]

  assert operations(compile_for_h100(run, *arrays))[0] == 0
