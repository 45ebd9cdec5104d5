"""Attention of everything to everything: against a plain float64 definition, on every platform."""

import functools
import importlib.util
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from attnzoo.pallas_kernels import bidirectional_attention, sharded_bidirectional_attention
from attnzoo.pallas_kernels.softmax_attention import bidirectional
from attnzoo_testing.cuda_aot import abstract_gpu
from attnzoo_testing.gradients import cotangents, results_and_gradients
from attnzoo_testing.mixers import close, mesh_of
from attnzoo_testing.numerics import assert_as_exact
from attnzoo_testing.tpu_aot import compile_for_tpu, kernels, needs_libtpu

NAMES = ("output",)


def definition(query, key, value, lengths):
  scores = jnp.einsum("bihk,bjhk->bhij", query, key) / query.shape[-1] ** 0.5
  real = jnp.arange(key.shape[1]) < lengths[:, None]
  scores = jnp.where(real[:, None, None], scores, -1e30)
  output = jnp.einsum("bhij,bjhv->bihv", jax.nn.softmax(scores, -1), value)
  return (jnp.where((lengths > 0)[:, None, None, None], output, 0),)


def operator(*, attend=bidirectional_attention, **arguments):
  return (attend(**arguments),)


@functools.cache
def expected(length):
  rng = np.random.default_rng(length)
  sizes = dict(query=24, key=24, value=16)
  inputs = {n: rng.standard_normal((4, length, 2, k)).astype(np.float32) for n, k in sizes.items()}
  inputs["lengths"] = np.array([length, 0, 1, length // 2 + 1], np.int32)
  cotangent = cotangents(definition, inputs)
  narrow = results_and_gradients(definition, inputs, cotangent, NAMES)
  with jax.enable_x64(True):
    wide = {n: x.astype(np.float64) if x.dtype == np.float32 else x for n, x in inputs.items()}
    truth = results_and_gradients(definition, wide, cotangent, NAMES)
  return inputs, cotangent, narrow, truth


def compare(length, **options):
  inputs, cotangent, narrow, truth = expected(length)
  got = results_and_gradients(functools.partial(operator, **options), inputs, cotangent, NAMES)
  assert_as_exact(got, narrow, truth, np.float32)


@pytest.mark.parametrize("rows", [7, 1000])
def test_portable(rows, monkeypatch):
  """Strips of 7 queries, the last one not full, and all at once."""
  monkeypatch.setattr(bidirectional, "_STRIP_BYTES", rows * 4 * 4 * 2 * 40)
  compare(40, implementation="xla")


def test_one_token():
  compare(1, implementation="xla")
  compare(40, implementation="reference")


def test_tpu():
  compare(40, implementation="tpu", interpret=True)


def test_mesh():
  attend = functools.partial(sharded_bidirectional_attention, mesh=mesh_of(4, 1, 2))
  compare(40, attend=attend)


def test_all_tokens_without_lengths():
  inputs = {n: x for n, x in expected(40)[0].items() if n != "lengths"}
  full = jnp.full((4,), 40)
  close(bidirectional_attention(**inputs), bidirectional_attention(**inputs, lengths=full), 1e-6)


@pytest.mark.parametrize("attend", ["one device", "mesh"])
def test_dropout(attend):
  """A third of the weights of 200 tokens: unbiased, the same by the same key, gone without one."""
  x = jnp.ones((4, 200, 2, 8))
  function = bidirectional_attention
  if attend == "mesh":
    function = functools.partial(sharded_bidirectional_attention, mesh=mesh_of(4, 1, 2))
  options = dict(dropout_rate=1 / 3, lengths=jnp.full((4,), 150))
  drawn = function(x, x, x, **options, dropout_key=jax.random.key(0))
  assert abs(float(drawn.mean()) - 1) < 4 * (0.5 / 150 / 1600) ** 0.5
  assert abs(float(drawn[..., 0].std()) - (0.5 / 150) ** 0.5) < 0.005
  assert (
    np.unique(drawn[..., 0].round(5).reshape(8, -1), axis=0).shape[0] == 8
  )  # no row like another
  close(drawn, function(x, x, x, **options, dropout_key=jax.random.key(0)), 0)
  close(function(x, x, x, **options), x, 1e-6)


def test_memory_is_linear():
  """8 documents of 2,500 tokens and 8 heads: all scores would be 1.6 GB."""
  x = jax.ShapeDtypeStruct((8, 2500, 8, 16), jnp.float32)
  loss = lambda *x: jnp.sum(bidirectional_attention(*x) ** 2)  # noqa: E731
  memory = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 0.4e9, memory.temp_size_in_bytes


@needs_libtpu
@pytest.mark.tpu_aot
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_compiles_for_tpu(dtype):
  def run(x, lengths):
    output, pull = jax.vjp(lambda x: bidirectional_attention(x, x, x, lengths=lengths), x)
    return output, pull(output)

  x, lengths = (jax.ShapeDtypeStruct(*s) for s in (((8, 2500, 8, 16), dtype), ((8,), jnp.int32)))
  assert len(kernels(compile_for_tpu(run, x, lengths))) == 3


@pytest.mark.skipif(
  importlib.util.find_spec("jax_cuda13_plugin") is None, reason="jax-cuda13-plugin is missing"
)
@pytest.mark.cuda_aot
def test_cudnn_is_told_the_lengths():
  def run(x, lengths):
    output, pull = jax.vjp(lambda x: bidirectional_attention(x, x, x, lengths=lengths), x)
    return output, pull(output)

  version = mock.patch.object(fused_attention_stablehlo, "check_cudnn_version", return_value=91400)
  with abstract_gpu(), version:
    args = [jax.ShapeDtypeStruct(*s) for s in (((2, 99, 4, 12), jnp.bfloat16), ((2,), jnp.int32))]
    text = jax.jit(run).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
  assert re.findall(r"@__cudnn\$(\w+)\(", text) == ["fmhaSoftmax", "fmhaSoftmaxBackward"]
  assert re.findall(r"mask_type\\22: \\22(\w+)", text) == ["PADDING"] * 2
  assert "tensor<2x100x4x16xbf16>" in text


def test_what_is_refused():
  x = jnp.zeros((2, 5, 2, 8))
  key = jax.random.key(0)
  for options, message in (
    (dict(lengths=jnp.zeros((3,), jnp.int32)), r"lengths must have shape \(2,\); got \(3,\)"),
    (dict(lengths=jnp.zeros((2,))), "lengths must be integers"),
    (dict(dropout_rate=1.0), "dropout_rate must lie in"),
    (dict(implementation="triton"), "implementation must be None or one of"),
  ):
    with pytest.raises(ValueError, match=message):
      bidirectional_attention(x, x, x, **options)
  for options, message in (
    (dict(implementation="tpu"), "the target is cpu"),
    (dict(implementation="cudnn"), "takes bfloat16 or float16; got float32"),
    (dict(implementation="tpu", interpret=True, dropout_rate=0.1, dropout_key=key), "no dropout"),
  ):
    with pytest.raises(NotImplementedError, match=message):
      bidirectional_attention(x, x, x, **options)
