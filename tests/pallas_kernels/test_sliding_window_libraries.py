"""Sliding-window attention by the libraries' kernels, for devices that are not here; refusals."""

import functools
import importlib.util
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from attnzoo.pallas_kernels import (
  empty_window,
  sliding_window_attention,
  sliding_window_attention_step,
  softmax_attention,
)
from attnzoo.pallas_kernels.sliding_window_attention import cases, tpu
from attnzoo.pallas_kernels.softmax_attention import cases as softmax_cases
from attnzoo_testing.cuda_aot import abstract_gpu
from attnzoo_testing.gradients import cotangents, results_and_gradients
from attnzoo_testing.marks import slow_but
from attnzoo_testing.numerics import assert_as_exact
from attnzoo_testing.oracle import Oracle
from attnzoo_testing.tpu_aot import compile_for_tpu, kernels, needs_libtpu

NAMES = ("output", "final_key", "final_value")
ORACLE = Oracle(cases.operator, cases, NAMES)
# Three blocks of 128 queries, stored keys that do not fill a block, a window over two blocks.
ORACLE.ci["blocks"] = cases._case("blocks", (), 1, 300, 2, 8, 150, kv_heads=1, state="few")
TPU = dict(implementation="tpu", interpret=True)
# jax asks the plug-in which cuDNN it is for.
needs_plugin = pytest.mark.skipif(
  importlib.util.find_spec("jax_cuda13_plugin") is None, reason="jax-cuda13-plugin is missing"
)


# --- TPU ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "name", slow_but(["window_over_chunks", "grouped", "own_key_only"], "grouped")
)
def test_tpu_float32(name):
  ORACLE.compare(name, **TPU)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["blocks", "packed_and_padded"])
def test_tpu_float32_blocks_and_documents(name):
  ORACLE.compare(name, **TPU, chunk_size=128)


@pytest.mark.slow
def test_tpu_bfloat16():
  inputs = cases.make_inputs(ORACLE.ci["packed_and_padded"], jnp.bfloat16)
  left = ORACLE.options("packed_and_padded")
  cotangent = cotangents(functools.partial(cases.operator, **left), inputs)
  got, portable = (
    results_and_gradients(functools.partial(cases.operator, **left, **o), inputs, cotangent, NAMES)
    for o in (TPU, dict(implementation="xla"))
  )
  with jax.enable_x64(True):
    wide = {n: x.astype(np.float64) if x.dtype == jnp.bfloat16 else x for n, x in inputs.items()}
    reference = functools.partial(cases.operator, **left, implementation="reference")
    truth = results_and_gradients(reference, wide, cotangent, NAMES)
  assert_as_exact(got, portable, truth, jnp.bfloat16)


@pytest.mark.parametrize(("left", "offset"), [(64, 0), (128, 128), (0, 0), (200, 256), (None, 128)])
def test_window_skips_blocks_as_its_definition_would(left, offset):
  shape, block = (768, 1024), 128
  quick, plain = (kind(shape, (left, 0), offset) for kind in (tpu.Window, masks.LocalMask))
  for row in range(0, shape[0], block):
    for column in range(0, shape[1], block):
      index = slice(row, row + block), slice(column, column + block)
      assert (quick[index].any(), quick[index].all()) == (plain[index].any(), plain[index].all())


def pallas_grids(jaxpr):
  """Name and grid of every Pallas call of a program."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == "pallas_call":
      yield str(equation.params["name"]), equation.params["grid_mapping"].grid
    for value in equation.params.values():
      for inner in value if isinstance(value, tuple | list) else [value]:
        inner = getattr(inner, "jaxpr", inner)  # closed or open
        if hasattr(inner, "eqns"):
          yield from pallas_grids(inner)


@pytest.mark.parametrize("left", [64, 128])
def test_tpu_grid_is_linear_in_the_length(left):
  """Two key blocks per query block, forward and backward, whatever the length."""
  for length in (2048, 8192):
    x = jax.ShapeDtypeStruct((1, length, 2, 64), jnp.bfloat16)

    def loss(x, left=left):
      return jnp.sum(sliding_window_attention(x, x, x, left=left, **TPU)[0])

    grids = dict(pallas_grids(jax.make_jaxpr(jax.grad(loss))(x).jaxpr))
    assert len(grids) == 3, grids
    assert all(int(np.prod(g)) == 2 * 2 * length // tpu.DEFAULT_BLOCK for g in grids.values()), (
      grids
    )


def compile_case(module, name, chip, dtype):
  """Forward and backward of one case."""
  case = {case.name: case for case in module.CASES}[name]
  inputs = module.make_inputs(case, dtype)
  floats = [n for n, x in inputs.items() if x.dtype == dtype]
  options = dict(module.static_options(case), implementation="tpu")

  def run(inputs):
    rest = {n: x for n, x in inputs.items() if n not in floats}
    function = lambda x: module.operator(**x, **rest, **options)  # noqa: E731
    results, pull = jax.vjp(function, {n: inputs[n] for n in floats})
    return results, pull(results)

  return compile_for_tpu(run, inputs, chip=chip)


@needs_libtpu
@pytest.mark.tpu_aot
@pytest.mark.parametrize(
  ("module", "name", "chip", "dtype"),
  [
    *((cases, name, "v5e", jnp.bfloat16) for name in
      ("layer_360m", "layer_360m_wide", "layer_1b", "grouped_heads", "ragged_packed")),
    (cases, "layer_360m", "v5e", jnp.float32),
    *((cases, name, chip, jnp.bfloat16) for name in ("layer_1b", "wide_heads")
      for chip in ("v5p", "v6e")),
    (softmax_cases, "layer_1b", "v5e", jnp.bfloat16),
  ],
)  # fmt: skip
def test_compiles_for_tpu(module, name, chip, dtype):
  names = [re.sub(r"_(segmented|no|residuals|mha).*", "", n.replace("mha_", ""))
           for n in kernels(compile_case(module, name, chip, dtype))]  # fmt: skip
  assert sorted(names) == ["splash_dkv", "splash_dq", "splash_fwd"]


# --- cuDNN ----------------------------------------------------------------------------------------


def cuda_program(function, *shapes, dtype=jnp.bfloat16):
  """The program text of function and gradient for an H100."""

  def run(*args):
    output, pull = jax.vjp(lambda *a: function(*a)[0], *args)
    return output, pull(output)

  # cuDNN itself, a large download, is only asked which version it is.
  version = mock.patch.object(fused_attention_stablehlo, "check_cudnn_version", return_value=91400)
  with abstract_gpu(), version:
    args = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    return jax.jit(run).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def cudnn_calls(text):
  return re.findall(r"@__cudnn\$(\w+)\(", text)


QUERY, KEY = (2, 100, 4, 64), (2, 100, 2, 64)
CALLS = ["fmhaSoftmax", "fmhaSoftmaxBackward"]


@needs_plugin
@pytest.mark.cuda_aot
@pytest.mark.parametrize("left", [16, 1])
@pytest.mark.parametrize("implementation", [None, "cudnn"])
def test_cudnn_gets_the_window(left, implementation):
  """cuDNN counts the query's own key too: its window of n + 1 is n to the left."""
  function = functools.partial(sliding_window_attention, left=left, implementation=implementation)
  text = cuda_program(function, QUERY, KEY, KEY)
  assert cudnn_calls(text) == CALLS
  assert re.findall(r"sliding_window_length\\22: (\d+)", text) == [str(left + 1)] * 2
  assert re.findall(r"mask_type\\22: \\22(\w+)", text) == ["CAUSAL"] * 2
  assert re.findall(r"fmha_scale\\22: ([\d.]+)", text) == ["0.125"] * 2


@needs_plugin
@pytest.mark.cuda_aot
def test_cudnn_without_a_window():
  text = cuda_program(softmax_attention, QUERY, KEY, KEY)
  assert cudnn_calls(text) == CALLS
  assert re.findall(r"sliding_window_length\\22: (\d+)", text) == ["0"] * 2


@needs_plugin
@pytest.mark.cuda_aot
def test_cudnn_head_dims_and_odd_lengths_are_padded():
  function = functools.partial(sliding_window_attention, left=8, scale=0.5)
  text = cuda_program(function, (2, 9, 4, 20), (2, 9, 4, 20), (2, 9, 4, 30))
  assert cudnn_calls(text) == CALLS
  assert "(tensor<2x10x4x32xbf16>, tensor<2x10x4x32xbf16>, tensor<2x10x4x32xbf16>) ->" in text
  assert "fmha_scale\\22: 0.5" in text


REFUSED = {
  "knows no documents": dict(segment_ids=jnp.zeros((2, 100), jnp.int32)),
  "takes no initial_state": dict(initial_state=empty_window(2, 8, 2, 64, 64, jnp.bfloat16)),
  "takes bfloat16 or float16; got float32": dict(dtype=jnp.float32),
  "takes a head_dim up to 128; got 160": dict(dim=160),
}


@needs_plugin
@pytest.mark.cuda_aot
@pytest.mark.parametrize("reason", REFUSED)
def test_what_cudnn_does_not_take_goes_to_xla(reason):
  options = dict(REFUSED[reason])
  dtype, dim = options.pop("dtype", jnp.bfloat16), options.pop("dim", 64)
  shapes = [(*shape[:3], dim) for shape in (QUERY, KEY, KEY)]
  function = functools.partial(sliding_window_attention, left=8, **options)
  assert not cudnn_calls(cuda_program(function, *shapes, dtype=dtype))
  with pytest.raises(NotImplementedError, match=f'implementation="cudnn" {reason}.*use "xla"'):
    cuda_program(functools.partial(function, implementation="cudnn"), *shapes, dtype=dtype)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU here")
@pytest.mark.gpu
@pytest.mark.parametrize("left", [0, 1, 63])
def test_cudnn_on_a_gpu(left):
  case = cases._case("gpu", (), 2, 200, 4, 24, left, kv_heads=2, value_dim=40, lengths=True)
  inputs = cases.make_inputs(case, jnp.bfloat16)
  function = functools.partial(cases.operator, left=left)
  cotangent = cotangents(functools.partial(function, implementation="xla"), inputs)
  got, portable = (
    results_and_gradients(functools.partial(function, implementation=i), inputs, cotangent, NAMES)
    for i in ("cudnn", "xla")
  )
  with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
    wide = {n: x.astype(np.float64) if x.dtype == jnp.bfloat16 else x for n, x in inputs.items()}
    reference = functools.partial(function, implementation="reference")
    truth = results_and_gradients(reference, wide, cotangent, NAMES)
  assert_as_exact(got, portable, truth, jnp.bfloat16)


# --- Refusals -------------------------------------------------------------------------------------


def zeros(*shape, dtype=jnp.float32):
  return jnp.zeros(shape, dtype)


def state(left=3, heads=2, key_dim=8, dtype=jnp.float32):
  return empty_window(2, left, heads, key_dim, 8, dtype)


@pytest.mark.parametrize(
  ("message", "changed"),
  [
    ("query must have a multiple of the 2 heads of key; got 3", dict(query=zeros(2, 6, 3, 8))),
    ("key must have shape (2, 6, 2, 8); got (2, 6, 2, 4)", dict(key=zeros(2, 6, 2, 4))),
    ("key must agree with query in batch and length (2, 6); got (2, 5)",
     dict(key=zeros(2, 5, 2, 8))),
    ("value must agree with key in batch, length and heads (2, 6, 2); got (2, 6, 4)",
     dict(value=zeros(2, 6, 4, 8))),
    ("value must have the dtype of query, float32; got bfloat16",
     dict(value=zeros(2, 6, 2, 8, dtype=jnp.bfloat16))),
    ("query must have no empty axis; got (2, 0, 4, 8)", dict(query=zeros(2, 0, 4, 8))),
    ("left must be at least 0; got -1", dict(left=-1)),
    ("chunk_size must be at least 1; got 0", dict(chunk_size=0)),
    ("segment_ids must have shape (2, 6); got (2, 7)",
     dict(segment_ids=zeros(2, 7, dtype=jnp.int32))),
    ("lengths must be integers; got float32", dict(lengths=zeros(2))),
    ("initial_state.key must have shape (2, 3, 2, 8); got (2, 4, 2, 8)",
     dict(initial_state=state(left=4))),
    ("initial_state.key must have shape (2, 3, 2, 8); got (2, 3, 4, 8)",
     dict(initial_state=state(heads=4))),
    ("initial_state.key must have the dtype of the call's, float32; got bfloat16",
     dict(initial_state=state(dtype=jnp.bfloat16))),
    ("initial_state.count must be integers; got float32",
     dict(initial_state=state()._replace(count=zeros(2)))),
    ("implementation must be None or one of 'reference', 'xla', 'tpu', 'cudnn'; got 'triton'",
     dict(implementation="triton")),
  ],
)  # fmt: skip
def test_wrong_arguments(message, changed):
  arguments = dict(query=zeros(2, 6, 4, 8), key=zeros(2, 6, 2, 8), value=zeros(2, 6, 2, 8), left=3)
  with pytest.raises(ValueError, match="^sliding_window_attention: " + re.escape(message)):
    sliding_window_attention(**(arguments | changed))


@pytest.mark.parametrize(
  ("implementation", "dtype"), [("tpu", jnp.float32), ("cudnn", jnp.bfloat16)]
)
@pytest.mark.parametrize("function", [softmax_attention, sliding_window_attention])
def test_kernels_of_other_platforms(function, implementation, dtype):
  x = zeros(1, 4, 2, 8, dtype=dtype)
  options = dict(left=2) if function is sliding_window_attention else {}
  with pytest.raises(NotImplementedError, match='and the target is cpu .*use "xla"'):
    function(x, x, x, **options, implementation=implementation)


def test_tpu_knows_no_float16():
  x = zeros(1, 4, 2, 8, dtype=jnp.float16)
  with pytest.raises(NotImplementedError, match='"tpu" takes float32 or bfloat16; got float16'):
    sliding_window_attention(x, x, x, left=2, **TPU)


def test_step_with_the_state_of_another_window():
  with pytest.raises(ValueError, match="state must have left = 3 slots; got 4"):
    sliding_window_attention_step(zeros(2, 4, 8), zeros(2, 2, 8), zeros(2, 2, 8), state(4), left=3)
