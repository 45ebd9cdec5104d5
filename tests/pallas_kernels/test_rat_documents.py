"""RAT attention on rows of several documents: their layout, and the TPU kernels on it.

The Triton kernels have the same case in test_rat_triton.py, what the compilers make of the programs
is in test_rat_tpu_aot.py and test_rat_triton_aot.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from attnzoo.pallas_kernels.rat_attention import (
  cases,
  layout,
  rat_attention,
  tpu_backward,
  tpu_move,
  tpu_packed,
  tpu_rows,
  tpu_tuning,
)
from attnzoo.pallas_kernels.segments import run_index
from attnzoo_testing.gradients import cotangents, results_and_gradients
from attnzoo_testing.marks import some_faults
from attnzoo_testing.numerics import assert_as_exact
from attnzoo_testing.oracle import widen

# Tokens of the documents of each row: some have one, some end in the middle of a chunk, some are
# longer than a block of rows and a tile of summaries.
CHUNK = 3  # the kernels give it a row more
ROWS = ((1, 1, 50, 47, 1), (7, 33, 60), (100,))
LENGTHS = (100, 90, 41)
MANY = (1,) * 30 + (31, 39)  # more chunks than the kernels provide for


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  """Several blocks of rows, tiles of summaries and blocks to move in short sequences."""
  monkeypatch.setattr(tpu_rows, "LANES", 16)
  monkeypatch.setattr(tpu_rows, "PANEL", 32)
  monkeypatch.setattr(tpu_tuning, "TILE", 8)
  monkeypatch.setattr(tpu_tuning, "WIDE_TILE", 8)
  monkeypatch.setattr(tpu_tuning, "MAX_ROWS", 32)
  monkeypatch.setattr(tpu_tuning, "ATTEND_ROWS", 32)
  monkeypatch.setattr(tpu_tuning, "MOVED_LANES", 16)


@pytest.fixture
def kernels_only(monkeypatch):
  """Leaves out the portable path, which costs seconds of compiling."""

  def either(fits, kernel, general):
    return kernel()

  monkeypatch.setattr(layout, "either", either)


def segment_ids(*rows):
  return np.stack([np.repeat(np.arange(len(row)), row) for row in rows]).astype(np.int32)


# --- The layout -----------------------------------------------------------------------------------


def lay_out(rows, lengths, chunk_size):
  lengths = None if lengths is None else np.int32(lengths)
  return layout.lay_out(run_index(segment_ids(*rows)), lengths, chunk_size)


@pytest.mark.parametrize("chunk_size", [1, 4, 7])
def test_layout_is_its_loop(chunk_size):
  found = jax.tree.map(np.asarray, lay_out(ROWS, LENGTHS, chunk_size))
  for row, (documents, length) in enumerate(zip(ROWS, LENGTHS, strict=True)):
    total, token = 0, 0
    for tokens in documents:
      if token == 100:
        break
      # What is behind the row's length belongs to the last document that has a real token.
      tokens = 100 - token if token + tokens >= length else tokens
      first, total = total, total + -(-tokens // chunk_size)
      for index in range(tokens):
        chunk, place = divmod(index, chunk_size)
        assert [x[row, token] for x in found.places] == [chunk, place, first, first + chunk]
        assert found.end[row, token] == total - 1
        if token == length - 1:
          assert (found.first[row], found.position[row]) == (first, index + 1)
          assert found.row[row] == place
        token += 1
    assert found.total[row] == total


@pytest.mark.parametrize("slots", [25, 33])
def test_windows_have_every_document_once(slots):
  """Whole documents, in order, each in as few chunks as it needs."""
  rows = (*ROWS, MANY, (1,) * 100)
  found = lay_out(rows, None, 4)
  start, seen = jnp.zeros((len(rows),), jnp.int32), np.zeros((len(rows), 100), int)
  places = jax.tree.map(np.asarray, found.places)
  while np.any(start < found.total):
    window = layout.window(found, start, slots)
    assert np.all((window.stop > start) | (start == found.total))
    seen += np.asarray(window.inside)
    for row, inside in enumerate(np.asarray(window.inside)):
      begin, number = (np.asarray(x)[row] for x in (window.begin, window.number))
      here = np.concatenate([np.arange(a, b) for a, b in zip(begin[:-1], begin[1:], strict=True)])
      np.testing.assert_array_equal(here, np.flatnonzero(inside))
      slot = places.own[row, inside] - int(start[row])
      np.testing.assert_array_equal(slot, np.repeat(np.arange(slots), np.diff(begin)))
      np.testing.assert_array_equal(number[slot], places.chunk[row, inside])
      assert not np.any(number[np.diff(begin) == 0])
    start = window.stop
  assert np.all(seen == 1)


@pytest.mark.parametrize(("length", "chunk_size"), [(4096, 16), (100, 4), (30, 4), (7, 16), (9, 1)])
def test_capacity(length, chunk_size):
  """Eight documents always fit, and every token may be one where slots are as many."""
  slots = layout.capacity(length, chunk_size)
  few = layout.lay_out(jnp.minimum(jnp.arange(length), 7)[None], None, chunk_size)
  tiny = layout.lay_out(jnp.arange(length)[None], None, chunk_size)
  assert layout.fits(few, slots) in (None, True)
  fits = layout.fits(tiny, slots)
  assert fits is None if slots == length else not fits


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_moves_are_a_gather(dtype):
  """There, back, and with gradients; also where blocks are partial or have nothing."""
  rng = np.random.default_rng(0)
  place = np.sort(rng.permutation(150)[:90].reshape(2, 45), axis=1)
  place[1] = np.r_[0, 1, 2, 100:142]  # blocks without a token
  source = np.full((2, 150), -1)
  for row in range(2):
    source[row, place[row]] = np.arange(45)
  x, dy = rng.standard_normal((2, 45, 32)), rng.standard_normal((2, 150, 32))
  x, dy = jnp.asarray(x, dtype), jnp.asarray(dy, dtype)

  @functools.partial(jax.jit, static_argnums=0)
  def run(fill, x, dy):
    there, back = tpu_move.plan_moves(source, 45), tpu_move.plan_moves(place, 150)
    y, pull = jax.vjp(lambda x: tpu_move.move(x, there, back, 150, fill, True), x)
    return y, pull(dy)[0]

  for fill in (0.0, 1e4):
    y, dx = run(fill, x, dy)
    taken = np.take_along_axis(np.asarray(x), np.maximum(source, 0)[..., None], 1)
    filling = np.asarray(fill, dtype)
    np.testing.assert_array_equal(y, np.where(source[..., None] < 0, filling, taken))
    np.testing.assert_array_equal(dx, np.take_along_axis(np.asarray(dy), place[..., None], 1))


# --- The kernels ----------------------------------------------------------------------------------


@functools.cache
def packed():
  """As `expected`, of ROWS and LENGTHS."""
  inputs = cases.make_inputs(cases._case("packed", (), len(ROWS), 100, 4, 8, CHUNK, groups=2))
  return expected(inputs | dict(segment_ids=segment_ids(*ROWS), lengths=np.int32(LENGTHS)))


def expected(inputs):
  """(inputs, cotangents, results of the portable path, of the definition in float64)."""
  function = functools.partial(cases.operator, chunk_size=CHUNK)
  cotangent = cotangents(functools.partial(function, implementation="xla"), inputs)
  run = lambda name, x: results_and_gradients(  # noqa: E731
    functools.partial(function, implementation=name), x, cotangent, cases.RESULTS
  )
  with jax.enable_x64(True):
    truth = run("reference", widen(inputs))
  return inputs, cotangent, run("xla", inputs), truth


def compare(inputs, cotangent, portable, truth):
  options = dict(implementation="tpu", interpret=True, chunk_size=CHUNK)
  kernel = functools.partial(cases.operator, **options)
  got = results_and_gradients(kernel, inputs, cotangent, cases.RESULTS)
  assert_as_exact(got, portable, truth, np.float32)


@pytest.mark.usefixtures("kernels_only")
@pytest.mark.slow
def test_kernels_on_documents():
  """Output, final state and all gradients."""
  compare(*packed())


@pytest.mark.slow
def test_windows_of_documents(monkeypatch):
  """The last document begins in the second window of one row, in the first of the other."""
  monkeypatch.setattr(layout, "either", lambda fits, kernel, general: general())
  inputs = {name: x[:2] if name != "gate_bias" else x for name, x in packed()[0].items()}
  inputs |= dict(segment_ids=segment_ids(MANY, ROWS[0]), lengths=np.int32([95, 90]))
  compare(*expected(inputs))


@pytest.mark.slow
def test_one_program_takes_all_documents():
  """Those that fit and those that do not; output and final state."""
  inputs = packed()[0]
  one = {name: x[:1] if name != "gate_bias" else x for name, x in inputs.items()}
  function = functools.partial(cases.operator, chunk_size=CHUNK)
  kernel = jax.jit(functools.partial(function, implementation="tpu", interpret=True))
  for row in (ROWS[0], MANY):
    one |= dict(segment_ids=segment_ids(row))
    with jax.enable_x64(True):
      truth = function(**widen(one), implementation="reference")
    portable = function(**one, implementation="xla")
    named = (dict(zip(cases.RESULTS, x, strict=True)) for x in (kernel(**one), portable, truth))
    assert_as_exact(*named, np.float32)


@pytest.mark.slow
@pytest.mark.usefixtures("kernels_only")
def test_tpu_memory_model():
  """The interpreter that knows TPU memories: unset scratch is NaN, parallel axes are shuffled.

  Of the problem that the faults below are planted in.
  """
  attempt("gradients", pltpu.InterpretParams(detect_races=True))


# --- Faults: the comparison must see each ---------------------------------------------------------


def of_document(change):
  right = tpu_rows.of_document

  def wrong(plan, first, *rest):
    return right(plan, first[...] + change, *rest)

  return lambda patch: patch.setattr(tpu_rows, "of_document", wrong)


def slot_of_another_document_seen(patch):
  of_document(-1)(patch)


def first_slot_not_seen(patch):
  of_document(1)(patch)


def of_documents(patch, change):
  right = tpu_packed._documents
  patch.setattr(tpu_packed, "_documents", lambda *args: change(right(*args)))


def oldest_tile_skipped(patch):
  of_documents(patch, lambda x: x._replace(oldest=x.oldest + 1))


def oldest_tile_skipped_backwards(patch):
  right = tpu_backward.backward
  wrong = lambda plan, scalars, *rest: right(plan, (scalars[0] + 1, *scalars[1:]), *rest)  # noqa: E731
  patch.setattr(tpu_backward, "backward", wrong)


def chunks_numbered_by_slot(patch):
  slots = lambda x: x.number + (jnp.arange(x.number.shape[1]) >= 5)  # noqa: E731
  of_documents(patch, lambda x: x._replace(number=slots(x)))


def filling_has_gradients(patch):
  right = tpu_packed._maps

  def wrong(*args):
    source, place = right(*args)
    return jax.lax.cummax(source, axis=1), place

  patch.setattr(tpu_packed, "_maps", wrong)


def other_documents_state(patch):
  right = layout.final_state
  patch.setattr(
    layout, "final_state", lambda found, *rest: right(found._replace(first=0 * found.first), *rest)
  )


FAULTS = {
  slot_of_another_document_seen: "output",
  first_slot_not_seen: "output",
  oldest_tile_skipped: "output",
  oldest_tile_skipped_backwards: "d_key",
  chunks_numbered_by_slot: "output",
  filling_has_gradients: "d_key",
  other_documents_state: "stored_key",
}


@functools.cache
def small():
  """A problem of one head in 3 blocks of 8 chunks of 4: inputs, and what the definition makes."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
  tokens = ("query", "key", "value", "gate_logits")
  inputs = {name: normal(1, 80, 1, 8) for name in tokens} | dict(gate_bias=1 + normal(1, 8))
  inputs["segment_ids"] = segment_ids((37, 43))
  reference = functools.partial(results, implementation="reference")
  cotangent = cotangents(reference, inputs)
  narrow = results_and_gradients(reference, inputs, cotangent, NAMES)
  with jax.enable_x64(True):
    return inputs, cotangent, narrow, results_and_gradients(reference, widen(inputs), cotangent,
                                                            NAMES)  # fmt: skip


NAMES = ("output", "stored_key")


def results(**arguments):
  output, state = rat_attention(**arguments, chunk_size=4)
  return output, state.key


def attempt(which, interpret=True):
  inputs, cotangent, narrow, truth = small()
  kernel = functools.partial(results, implementation="tpu", interpret=interpret)
  if which in NAMES:
    got = dict(zip(NAMES, jax.jit(kernel)(**inputs), strict=True))
  else:
    got = results_and_gradients(kernel, inputs, cotangent, NAMES)
  assert_as_exact(got, narrow, {name: truth[name] for name in got}, np.float32)


@pytest.mark.usefixtures("kernels_only")
@pytest.mark.parametrize("fault", some_faults(FAULTS), ids=lambda fault: fault.__name__)
def test_fault_is_found(fault, monkeypatch):
  small()  # before the fault is planted
  fault(monkeypatch)
  with pytest.raises(AssertionError, match=rf"{FAULTS[fault]}: error"):
    attempt(FAULTS[fault])
