"""The Triton kernels of label-wise attention: interpreter, seeded faults, launches, refusals, GPU.

What the compilers make of the kernels is in test_code_triton_aot.py.
"""

import dataclasses
import functools
import importlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo.pallas_kernels import code_attention, compat
from attnzoo.pallas_kernels.code_attention import cases, triton, triton_vjp
from attnzoo_testing.cuda_aot import A100, H100, abstract_gpu
from attnzoo_testing.gradients import cotangents, results_and_gradients
from attnzoo_testing.numerics import assert_as_exact
from attnzoo_testing.oracle import Expected, Oracle
from attnzoo_testing.triton_interpreter import interpret
from attnzoo_testing.triton_launches import (
  assert_imports_no_triton,
  changed,
  check_other_machines_refused,
  compare_on_gpu,
  interpret_operator,
  needs_gpu,
  widest,
)

ORACLE = Oracle(cases.operator, cases, cases.RESULTS)
SCALE = -0.3  # of the run that is not a case: no mask, float16
RUNS = (*ORACLE.ci, "narrow")


def config(labels, tokens, *splits_and_parts) -> triton.Config:
  """splits, drop_splits, parts, part_splits"""
  return triton.Config(*[triton.Tile(labels, tokens, 4, 2)] * 4, *splits_and_parts)


# Labels and tokens beyond the last, splits of some blocks and of none, parts of several documents
# and of one.
CONFIGS = dict.fromkeys(RUNS, config(16, 32, 1, 1, 2, 1)) | dict(
  layer_small=config(32, 16, 1, 1, 2, 1),
  scattered=config(16, 32, 3, 2, 4, 2),
  many_labels=config(128, 32, 2, 1, 1, 1),
  narrow=config(32, 32, 2, 3, 3, 2),
)


# --- Arrays, truth, programs ----------------------------------------------------------------------


@functools.cache
def expected(run) -> Expected:
  """The oracle's; of "narrow", whose dtype it does not have, against the portable path."""
  if run != "narrow":
    return ORACLE.expected(run)
  case = dataclasses.replace(ORACLE.ci["layer_small"], options={})
  inputs = cases.make_inputs(case, np.float16)
  xla, definition = (
    functools.partial(cases.operator, implementation=name, scale=SCALE)
    for name in ("xla", "reference")
  )
  cotangent = cotangents(xla, inputs)
  portable = results_and_gradients(xla, inputs, cotangent, cases.RESULTS)
  with jax.enable_x64(True):
    truth = results_and_gradients(definition, widest(inputs), cotangent, cases.RESULTS)
  return Expected(inputs, cotangent, portable, truth)


def problem_of(run) -> triton.Problem:
  return triton_vjp.problem_of(expected(run).inputs, SCALE if run == "narrow" else 1.0)


@functools.cache
def program(run):
  """The launches of a forward and a backward pass, and their arrays."""
  inputs, cotangent, _, _ = expected(run)
  arrays = inputs | dict(d_output=cotangent[0].astype(inputs["query"].dtype))
  arrays = jax.device_get(triton_vjp.prepared(arrays, CONFIGS[run].forward.tokens))
  arrays.pop("mask", None)
  problem = problem_of(run)
  launches = triton.forward_launches(problem, CONFIGS[run])
  return launches + triton.backward_launches(problem, CONFIGS[run]), arrays


def compare(got, run):
  """Output, and gradients where there was a backward pass."""
  _, _, narrow, truth = expected(run)
  if "d_query_parts" in got:
    d_query = triton_vjp.sum_of_parts(jnp.asarray(got["d_query_parts"]), problem_of(run))
    got = got | dict(d_query=d_query)
  else:
    truth = dict(output=truth["output"])
  return assert_as_exact(got, narrow, truth, narrow["output"].dtype)


# --- Seeded faults --------------------------------------------------------------------------------


def fault(run, kernel, constants=None, **inputs):
  """`changed` launches of a run; some arrays to read instead of the right ones are there."""
  launches, arrays = program(run)
  arrays = dict(arrays, nothing=np.zeros((4, 512), np.float32))
  if "filled" in arrays:
    arrays["fewer"] = np.maximum(arrays["filled"] - 1, 0)
  spoiled = changed(launches, kernel, constants, **inputs)
  assert spoiled != launches
  forward = [one for one in spoiled if triton.KERNELS in one.kernel]
  return (spoiled if spoiled[: len(forward)] == launches[: len(forward)] else forward), arrays


def swapped(run):
  """d key and d value change places."""
  launches, arrays = program(run)
  outputs = launches[-1].outputs
  turned = dict(d_value=outputs["d_value"], d_key=outputs["d_key"])
  return (*launches[:-1], dataclasses.replace(launches[-1], outputs=turned)), arrays


NATURAL = 1 / np.log(2)
# What must fail the comparison: (run, its launches with the fault).
FAULTS = {
  "padding_read": ("layer_small", fault, ("forward", dict(MASKED=False))),
  "padding_backwards": ("layer_small", fault, (":query", dict(MASKED=False))),
  "padding_has_gradients": ("layer_small", fault, (":token", dict(MASKED=False))),
  "last_block_dropped": ("scattered", fault, ("forward",), dict(filled="fewer")),
  "last_block_dropped_backwards": ("scattered", fault, (":query",), dict(filled="fewer")),
  "scale_missing": ("narrow", fault, ("forward", dict(SCALE=NATURAL))),
  "scale_missing_of_the_query": ("narrow", fault, (":query", dict(FACTOR=1.0))),
  "scale_missing_of_the_key": ("narrow", fault, (":token", dict(FACTOR=1.0))),
  "gradients_swapped": ("sharp", swapped, ()),
  "sum_not_subtracted": ("strips", fault, (":token",), dict(part_drop="nothing")),
  "splits_not_rescaled": ("many_labels", fault, ("join",), dict(part_top="nothing")),
}
# name: (run, text of the forward kernel's module, what stands there instead)
EDITS = {
  "blocks_not_rescaled": ("sharp", "(largest - larger)", "(larger - larger)"),
  "sum_not_rescaled": ("layer_small", "summed * shrink +", "summed +"),
}


def edited(folder, name):
  """The program of a run whose forward kernel comes from an edited copy of its module."""
  run, right, wrong = EDITS[name]
  launches, arrays = program(run)
  package = triton.KERNELS.rsplit(".", 2)[0]
  text = pathlib.Path(importlib.util.find_spec(triton.KERNELS).origin).read_text()
  assert text.count(right) == 1
  text = text.replace(right, wrong).replace("from ..", f"from {package}.")
  (folder / f"{name}.py").write_text(text)
  return (dataclasses.replace(launches[0], kernel=f"{name}:forward_kernel"),), arrays


# --- Numerics -------------------------------------------------------------------------------------


def poisoned(run):
  """What lies in blocks without real tokens is no number."""
  launches, arrays = program(run)
  arrays, tile = dict(arrays), CONFIGS[run].forward.tokens
  empty = ~np.logical_or.reduceat(
    arrays["real"] > 0, np.arange(0, arrays["real"].shape[1], tile), 1
  )
  empty = np.repeat(empty, tile, 1)[:, : arrays["real"].shape[1]]
  assert empty.any(1).sum() > 1
  for name in ("key", "value"):
    arrays[name] = np.where(empty[..., None], np.nan, arrays[name])
  return launches, arrays


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
  """Results by run and fault, from one child."""
  pytest.importorskip("triton")
  programs = {run: program(run) for run in RUNS} | dict(poisoned=poisoned("scattered"))
  for name, (run, make, *arguments) in FAULTS.items():
    positional, named = (*arguments, {})[:2]
    programs[name] = make(run, *positional, **named)
  folder = tmp_path_factory.mktemp("kernels")
  programs |= {name: edited(folder, name) for name in EDITS}
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(folder)
    return dict(zip(programs, interpret(list(programs.values())), strict=True))


@pytest.mark.parametrize("run", RUNS)
def test_interpreter(interpreted, run):
  assert {"output", "d_query", "d_key", "d_value"} == set(compare(interpreted[run], run))


@pytest.mark.parametrize("name", [*FAULTS, *EDITS])
def test_fault_is_seen(interpreted, name):
  with pytest.raises(AssertionError, match="above"):
    compare(interpreted[name], (FAULTS | EDITS)[name][0])


def test_blocks_without_real_tokens_are_not_read(interpreted):
  compare(interpreted["poisoned"], "scattered")


def test_documents_without_tokens_are_exactly_zero(interpreted):
  for run in ("layer_small", "scattered", "many_labels"):
    got, real = interpreted[run], program(run)[1]["real"] > 0
    assert not real[1].any()
    assert not got["output"][1].any()
    assert not got["d_key"][~real].any()
    assert not got["d_value"][~real].any()


@pytest.mark.slow
def test_differentiable_function(monkeypatch):
  """With the block sizes that a GPU would have; its launches are interpreted."""
  pytest.importorskip("triton")
  interpret_operator(monkeypatch, triton, triton_vjp, H100)
  ORACLE.compare("layer_small", implementation="triton")


# --- Block sizes, refusals ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("gpu", [A100, H100], ids=["a100", "h100"])
def test_launches_cover_everything(dtype, gpu):
  for case in cases.CASES:
    sizes = (case.sizes[n] for n in ("batch", "labels", "length", "key_dim", "value_dim"))
    problem = triton.Problem(*sizes, dtype, "mask" in case.options, 1.0)
    chosen = triton.choose_config(problem, gpu)
    assert chosen.forward.tokens == chosen.drop.tokens == chosen.query_gradient.tokens  # one list
    assert chosen.part_splits == 1 or chosen.parts == problem.batch
    written, read = {}, set()
    forward = triton.forward_launches(problem, chosen)
    assert len(forward) == 1 + (chosen.splits > 1)
    for launch in forward + triton.backward_launches(problem, chosen):
      constants, (blocks, places) = launch.constants, launch.grid
      by_token = "token" in launch.kernel
      size, block = (problem.length, "TILE") if by_token else (problem.labels, "ROWS")
      assert blocks == -(-size // constants[block])
      assert places % (constants.get("PARTS") or problem.batch) == 0
      assert constants["V_BLOCK"] >= problem.value_dim
      assert constants.get("K_BLOCK", problem.key_dim) >= problem.key_dim
      written, read = written | launch.outputs, read | set(launch.inputs)
    given = {"query", "key", "value", "d_output", "real", "blocks", "filled"}
    assert read <= given | written.keys()
    assert {"output", "d_query_parts", "d_key", "d_value"} <= written.keys()
    # What is added up afterwards: at most a fixed amount, or one per document where labels are few.
    parts = written["d_query_parts"].shape[0] * -(-problem.labels // chosen.query_gradient.rows)
    assert parts <= 8 * gpu.multiprocessors


def test_few_and_many_labels_fill_a_gpu():
  """Programs of the published sizes: about one for each multiprocessor at least."""
  for case in (case for case in cases.CASES if "bench" in case.tags):
    sizes = (case.sizes[n] for n in ("batch", "labels", "length", "key_dim", "value_dim"))
    problem = triton.Problem(*sizes, "bfloat16", True, 1.0)
    chosen = triton.choose_config(problem, H100)
    launches = triton.forward_launches(problem, chosen) + triton.backward_launches(problem, chosen)
    for launch in launches:
      if "join" not in launch.kernel:
        assert np.prod(launch.grid) > 0.9 * H100.multiprocessors, launch.kernel


def refused(message, dtype="bfloat16", key_dim=16, value_dim=16):
  query, key, value = (
    jax.ShapeDtypeStruct(shape, np.dtype(dtype))
    for shape in ((5, key_dim), (1, 8, key_dim), (1, 8, value_dim))
  )
  with pytest.raises(NotImplementedError, match=message):
    jax.eval_shape(functools.partial(code_attention, implementation="triton"), query, key, value)


@pytest.mark.skipif(not compat.has_jax_triton(), reason="no jax-triton here")
def test_refuses():
  with abstract_gpu():
    refused("key must have at most 256 channels; got 257", key_dim=257)
    refused("value must have at most 256 channels; got 300", value_dim=300)
    with jax.enable_x64(True):
      refused("query must be float32, bfloat16 or float16; got float64", "float64")
  with abstract_gpu("Voodoo 5"):
    refused("device kind must be one of")


def test_refuses_other_machines(monkeypatch):
  check_other_machines_refused(monkeypatch, refused, triton)


def test_triton_is_imported_only_to_launch():
  assert_imports_no_triton("attnzoo.pallas_kernels.code_attention.triton_vjp")


# --- On a GPU -------------------------------------------------------------------------------------

GPU_CASES = [case for case in cases.CASES if case.name != "full"]


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: case.name)
def test_gpu(case, dtype):
  compare_on_gpu(cases, case, dtype)
