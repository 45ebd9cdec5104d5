"""The Triton kernels of routed attention: block sizes, memory traffic, refusals, a run on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo.pallas_kernels import Routing, compat, routed_attention
from attnzoo.pallas_kernels.cases import Case
from attnzoo.pallas_kernels.routed_attention import cases, triton
from attnzoo_testing.cuda_aot import A100, H100, abstract_gpu
from attnzoo_testing.triton_launches import (
  assert_imports_no_triton,
  check_other_machines_refused,
  compare_on_gpu,
  needs_gpu,
)

LAYERS = [case for case in cases.CASES if "aot" in case.tags]


def problem_of(case, dtype="bfloat16"):
  size = case.sizes
  sizes = (size[n] for n in ("batch", "length", "heads", "clusters", "key_dim", "value_dim"))
  shared = not case.options.get("unshared")
  rows = 2 * case.options["relative"] + 1 if "relative" in case.options else 0
  options = cases.static_options(case)["options"]
  return triton.Problem(*sizes, dtype, shared, shared, rows, options)


def launches_of(problem, gpu=H100):
  config = triton.choose_config(problem, gpu)
  return triton.forward_launches(problem, config), triton.backward_launches(problem, config)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("gpu", [A100, H100], ids=["a100", "h100"])
def test_launches_cover_everything(gpu, dtype):
  for case in LAYERS:
    problem = problem_of(case, dtype)
    forward, backward = launches_of(problem, gpu)
    apart = not problem.shared_members
    assert len(forward) == 3 + apart
    assert len(backward) == 4 + (not problem.shared_key) + (problem.relative > 0)
    written, read = {}, set()
    for launch in forward + backward:
      constants, slots = launch.constants, launch.grid[0] // problem.clusters
      written, read = written | launch.outputs, read | set(launch.inputs)
      if "ROWS" not in constants:
        assert constants["T_BLOCK"] >= problem.length
      elif "TILE" in constants:
        assert constants["ROWS"] % constants["TILE"] == 0
        assert constants["K_BLOCK"] + constants["K_LAST"] >= problem.key_dim
        assert constants["V_BLOCK"] + constants["V_LAST"] >= problem.value_dim
        assert constants["LIMIT"] < 0 or constants["ROWS"] == constants["TILE"]
        if "table" not in launch.kernel:
          assert 0 <= slots * constants["ROWS"] - problem.window < constants["ROWS"]
          assert launch.grid[1] == problem.batch * problem.heads
      else:
        assert launch.grid[0] * constants["ROWS"] >= problem.length
    given = {"query", "key", "value", "relative_keys", "relative_values", "d_output"}
    given |= {"scores", "key_scores"}
    assert read <= written.keys() | given
    assert {"output", "d_query", "d_value"} <= written.keys()


def bytes_of(launches, problem):
  """Of all arrays that the launches read and write, each once per launch."""
  tokens = (problem.batch, problem.length, problem.heads)
  kind = jnp.dtype(problem.dtype).itemsize
  sizes = {n: np.prod([*tokens, triton.padded(problem.key_dim)]) * kind for n in ("query", "key")}
  sizes |= dict.fromkeys(
    ("value", "d_output"), np.prod([*tokens, triton.padded(problem.value_dim)]) * kind
  )
  sizes["scores"] = 4 * np.prod([*tokens, problem.clusters])
  for launch in sum(launches_of(problem), ()):
    sizes |= {n: np.prod(x.shape) * x.dtype.itemsize for n, x in launch.outputs.items()}
  return sum(sizes[n] for launch in launches for n in {*launch.inputs, *launch.outputs})


@pytest.mark.parametrize("name", ["layer_wikitext", "layer_enwik8", "layer_enwik8_12k"])
def test_memory_traffic(name):
  """Forward 7 rows per token, backward 8 per slot and 5 per token: scores and places included."""
  problem = problem_of(next(case for case in LAYERS if case.name == name))
  forward, backward = (bytes_of(launches, problem) for launches in launches_of(problem))
  tokens = problem.batch * problem.heads * problem.length
  row = 2 * problem.key_dim
  assert problem.clusters * problem.window == problem.length
  print(name, forward / tokens, 7 * row + 12, backward / tokens, 13 * row)
  assert forward <= tokens * (7 * row + 12)
  assert backward <= tokens * 13 * row


# --- Refusals -------------------------------------------------------------------------------------


def refused(message, dtype="bfloat16", dim=16, length=8, **options):
  tokens = jax.ShapeDtypeStruct((1, length, 2, dim), np.dtype(dtype))
  scores = jax.ShapeDtypeStruct((1, length, 2, 3), np.dtype(np.float32))
  with pytest.raises(NotImplementedError, match=message):
    jax.eval_shape(
      functools.partial(
        routed_attention, options=Routing(4, "official"), implementation="triton", **options
      ),
      tokens, tokens, tokens, scores,
    )  # fmt: skip


@pytest.mark.skipif(not compat.has_jax_triton(), reason="no jax-triton here")
def test_refuses():
  memory = np.zeros((2, 3, 1, 16), np.float32)
  with abstract_gpu():
    refused("query must have at most 129 channels per head; got 130", dim=130)
    refused("query must have at most 16384 tokens per row; got 16385", length=16385)
    tables = dict.fromkeys(("relative_keys", "relative_values"), np.zeros((3, 72), np.float32))
    refused("at most 64 channels per head in float32 with relative_keys", "float32", 72, **tables)
    refused("memory_key must be None; got an array", memory_key=memory, memory_value=memory)
    with jax.enable_x64(True):
      refused("query must be float32, bfloat16 or float16; got float64", "float64")
  with abstract_gpu("Voodoo 5"):
    refused("device kind must be one of")


def test_refuses_other_machines(monkeypatch):
  check_other_machines_refused(monkeypatch, refused, triton)


def test_triton_is_imported_only_to_launch():
  assert_imports_no_triton("attnzoo.pallas_kernels.routed_attention.triton_vjp")


# --- On a GPU -------------------------------------------------------------------------------------


def make_case(name, batch, length, heads, dim, clusters, window, **options):
  sizes = dict(batch=batch, length=length, heads=heads, kv_heads=heads, key_dim=dim)
  return Case(name, (), sizes | dict(value_dim=dim, clusters=clusters, window=window), options)


GPU_CASES = (
  make_case("layer", 1, 4096, 4, 64, 8, 512),
  make_case("relative", 1, 2048, 2, 64, 4, 512, relative=513),
  make_case("wide_relative", 1, 1024, 2, 129, 4, 200, relative=150),
  make_case("odd", 2, 777, 3, 40, 5, 111, lengths=True, routing=dict(zero_values_seen=False)),
  make_case("apart", 1, 900, 2, 64, 4, 150, unshared=True, relative=100),
  make_case("both_directions", 1, 900, 2, 129, 4, 150, unshared=True,
            routing=dict(causal=False, mask="rank")),
  make_case("tied", 1, 512, 2, 64, 4, 100, tied=True),
)  # fmt: skip


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: case.name)
def test_gpu(case, dtype):
  compare_on_gpu(cases, case, dtype, fixed=("scores", "key_scores"))
