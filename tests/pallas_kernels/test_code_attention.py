"""Label-wise attention: against published values, its definition, a mesh, and its bounds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo.pallas_kernels import code_attention, code_attention_weights, sharded_code_attention
from attnzoo.pallas_kernels.code_attention import cases
from attnzoo_testing.goldens import golden
from attnzoo_testing.gradients import cotangents, results_and_gradients
from attnzoo_testing.mixers import close, mesh_of
from attnzoo_testing.numerics import assert_as_exact
from attnzoo_testing.oracle import Oracle

ORACLE = Oracle(cases.operator, cases, cases.RESULTS)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("file", ["a", "b"])
def test_published_values(file, implementation):
  """The released code's scores have a bias per label, which its softmax ignores."""
  g = golden(f"transicd_{file}")
  with jax.enable_x64(True):
    key = jnp.tanh(jnp.asarray(g["out/attn_pretanh"], jnp.float64))
    query = jnp.asarray(g["param/attn.l2.weight"], jnp.float64)
    value = jnp.asarray(g["out/encoder"], jnp.float64)
    mask = jnp.asarray(g["in/tokens"] != 0)
    output = code_attention(query, key, value, mask=mask, implementation=implementation)
    weights = np.asarray(code_attention_weights(query, key, mask=mask))
  close(output, g["out/code_repr"], 2e-6)
  close(weights, g["out/attn_weights"], 2e-6)
  np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-12)
  assert not weights.swapaxes(1, 2)[~np.asarray(mask)].any()


@pytest.mark.parametrize("name", ORACLE.ci)
def test_as_exact_as_the_input(name):
  """float32 against the float64 definition, output and all gradients."""
  ORACLE.compare(name, implementation="xla")


@pytest.mark.parametrize("name", ["layer_small", "scattered", "strips"])
def test_wide(name):
  ORACLE.compare_wide(name, implementation="xla")


def test_document_of_padding_alone():
  """Zeros, and gradients that are numbers and 0 for its own tokens."""
  inputs = cases.make_inputs(ORACLE.ci["layer_small"])
  for implementation in ("reference", "xla"):
    function = functools.partial(code_attention, mask=inputs["mask"], implementation=implementation)
    arrays = [jnp.asarray(inputs[n]) for n in ("query", "key", "value")]
    output, pull = jax.vjp(function, *arrays)
    query, key, value = pull(jnp.ones_like(output))
    assert not any(np.any(x[1]) for x in (output, key, value))
    assert all(np.isfinite(x).all() for x in (output, query, key, value))


def test_more_padding_changes_nothing():
  inputs = cases.make_inputs(ORACLE.ci["layer_small"])
  wider = {n: np.pad(inputs[n], ((0, 0), (0, 9), (0, 0))) for n in ("key", "value")}
  mask = np.pad(inputs["mask"], ((0, 0), (0, 9)))
  got = code_attention(inputs["query"], **wider, mask=mask)
  close(got, code_attention(**inputs), 1e-6)


def test_memory_of_the_full_code_set():
  """A training step's attention over 8,922 labels x 2,500 tokens x 8 documents stays below 2 GB."""
  (case,) = [case for case in cases.CASES if case.name == "full"]
  inputs = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in cases.make_inputs(case).items()}
  loss = lambda q, k, v, mask: jnp.sum(code_attention(q, k, v, mask=mask) ** 2)  # noqa: E731
  memory = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*inputs.values()).compile().memory_analysis()
  used = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
  size = case.sizes
  assert 4 * size["batch"] * size["labels"] * size["length"] > 0.7e9  # one array of all scores
  assert used < 0.6e9, used


@pytest.mark.parametrize("options", [{}, dict(label_axes=("data", "model"), batch_axes=())])
def test_labels_and_batch_over_a_mesh(options):
  inputs = cases.make_inputs(cases._case("sharded", (), 4, 30, 24, 8, 12, mask="padding"))
  one, mesh = functools.partial(code_attention, implementation="xla"), mesh_of(4, 1, 2)
  several = functools.partial(sharded_code_attention, mesh=mesh, **options)
  named = lambda f: lambda **x: (f(**x),)  # noqa: E731
  cotangent = cotangents(named(one), inputs)
  expected = results_and_gradients(named(one), inputs, cotangent, cases.RESULTS)
  with jax.enable_x64(True):
    wide = {n: x.astype(np.float64) if n != "mask" else x for n, x in inputs.items()}
    truth = results_and_gradients(named(one), wide, cotangent, cases.RESULTS)
  got = results_and_gradients(named(several), inputs, cotangent, cases.RESULTS)
  assert_as_exact(got, expected, truth, np.float32)


def test_what_is_refused():
  query, key, mask = jnp.zeros((5, 8)), jnp.zeros((2, 4, 8)), jnp.ones((2, 4), bool)
  for change, message in (
    (dict(query=jnp.zeros((2, 5, 8))), r"query must have the axes \[labels, K\]; got \(2, 5, 8\)"),
    (dict(query=jnp.zeros((5, 7))), r"key must have shape \(2, 4, 7\); got \(2, 4, 8\)"),
    (dict(value=jnp.zeros((2, 3, 8))), "value must have shape"),
    (dict(value=jnp.zeros((2, 4, 8), jnp.bfloat16)), "value must have the dtype of query"),
    (dict(mask=mask.astype(jnp.int32)), "mask must be boolean; got int32"),
    (dict(mask=mask[:, :3]), "mask must have shape"),
    (dict(query=query[:0]), "query must have no empty axis"),
    (dict(chunk_size=0), "chunk_size must be at least 1; got 0"),
    (dict(implementation="cuda"), "implementation must be None or one of"),
  ):
    with pytest.raises(ValueError, match=message):
      code_attention(**dict(dict(query=query, key=key, value=key, mask=mask), **change))
  with pytest.raises(NotImplementedError, match='implementation="triton"'):
    code_attention(query, key, key, implementation="triton")
  with pytest.raises(NotImplementedError, match='implementation="tpu"'):
    code_attention(query, key, key, implementation="tpu")
  with pytest.raises(ValueError, match="labels must be divisible by the 2 devices"):
    sharded_code_attention(query, key, key, mesh=mesh_of(2, 1, 2), batch_axes="data")
