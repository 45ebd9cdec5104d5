"""What is kept, what happens to damaged checkpoints, and that interrupted runs go on."""

import contextlib
import gc
import json
import os
import pathlib
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo.experiments.training import checkpoints, loop, reports, runs
from attnzoo.experiments.training.state import TrainState
from attnzoo_testing import small_runs
from attnzoo_testing.programs import Programs


@pytest.fixture(scope="module", autouse=True)
def _one_device(tmp_path_factory):
  with small_runs.one_device(tmp_path_factory.mktemp("compiled")):
    yield


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
  text = small_runs.write_text(tmp_path_factory.mktemp("text") / "text.txt")
  return small_runs.experiment(text)


@pytest.fixture(scope="module")
def trained(experiment, tmp_path_factory):
  """A complete run with checkpoints of steps 3 and 6, never written to."""
  workdir = tmp_path_factory.mktemp("trained")
  return loop.train(experiment, workdir), workdir


@pytest.fixture
def copy(trained, tmp_path):
  shutil.copytree(trained[1], tmp_path / "run")
  return tmp_path / "run"


def small_state(step):
  params = {"embedding": jnp.full((3, 2), float(step))}
  moments = {"mu": {"embedding": jnp.ones((3, 2), jnp.bfloat16)}, "count": jnp.int32(step)}
  return TrainState(jnp.int32(step), params, moments)


def save_all(workdir, losses, **keep):
  with contextlib.closing(checkpoints.Checkpoints(workdir, **keep)) as saved:
    for step, loss in losses.items():
      saved.save(step, small_state(step), {"data": str(step)}, loss)
    saved.wait()
    return saved.steps, saved.best_step()


LOSSES = {1: 3.0, 2: 1.0, 3: None, 4: 1.5, 5: 9.0, 6: 8.0}


@pytest.mark.parametrize(
  ("keep", "kept"),
  [
    (dict(keep_last=2, keep_best=1), [2, 5, 6]),
    (dict(keep_last=1, keep_best=2), [2, 4, 6]),
    (dict(keep_last=3, keep_best=0), [4, 5, 6]),
    (dict(keep_last=9, keep_best=1), [1, 2, 3, 4, 5, 6]),
  ],
  ids=str,
)
def test_the_newest_and_the_best_are_kept(keep, kept, tmp_path):
  steps, best = save_all(tmp_path, LOSSES, **keep)
  assert steps == kept
  assert best == min((s for s in kept if LOSSES[s]), key=LOSSES.get)
  with contextlib.closing(checkpoints.Checkpoints(tmp_path, read_only=True)) as again:
    assert (again.steps, again.best_step()) == (steps, best)


def test_without_validation_the_newest_is_the_best(tmp_path):
  assert save_all(tmp_path, {1: None, 2: None, 3: None}, keep_last=2) == ([2, 3], 3)


def test_dtypes_and_structure_come_back(tmp_path):
  state = small_state(4)
  save_all(tmp_path, {4: 1.0})
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  like = checkpoints.abstract_like(state, jax.tree.map(lambda _: sharding, state))
  with contextlib.closing(checkpoints.Checkpoints(tmp_path)) as saved:
    restored = saved.restore(like)
    alone = saved.restore_params(like.params, 4)
  assert restored.record == {"data": "4"}
  assert jax.tree.structure(restored.state) == jax.tree.structure(state)
  for got, wanted in zip(
    jax.tree.leaves((restored.state, alone)), jax.tree.leaves((state, state.params)), strict=True
  ):
    assert got.dtype == wanted.dtype
    np.testing.assert_array_equal(got, wanted)


def parts(step):
  """Files of a checkpoint by what they hold."""
  files = [path for path in step.rglob("*") if path.is_file()]
  return {
    "record": [path for path in files if path.parent.name == "record"],
    "numbers": [path for path in files if "/d/" in path.as_posix()],
    "manifest": [path for path in files if path.name == "manifest.ocdbt"],
    "metadata": [path for path in files if path.name in ("_METADATA", "_sharding")],
    "everything": files,
  }


# A read that fails leaves other reads of tensorstore behind, which miss the reader's event loop.
pytestmark = [
  pytest.mark.slow,
  pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning"),
]


@pytest.mark.parametrize("damage", ["truncated", "deleted"])
@pytest.mark.parametrize("part", ["record", "numbers", "manifest", "everything"])
def test_a_damaged_newest_checkpoint(part, damage, trained, copy, experiment, caplog):
  files = parts(checkpoints.folder(copy) / "6")[part]
  assert files
  for file in files:
    if damage == "deleted":
      file.unlink()
    else:
      file.write_bytes(file.read_bytes()[: file.stat().st_size // 3])
  outcome = loop.train(experiment, copy)
  assert outcome.run.first_step == 3
  for name, value in trained[0].state.params.items():
    np.testing.assert_array_equal(outcome.state.params[name], value)
  assert "The checkpoint of step 6 cannot be read" in caplog.text
  assert (copy / "damaged" / "6").is_dir()
  assert runs.load(copy, "last").step == 6  # saved anew, and whole
  gc.collect()  # what the failed reads left behind is reported here, not in later tests


def test_only_damaged_checkpoints(copy, experiment):
  for step in ("3", "6"):
    for file in parts(checkpoints.folder(copy) / step)["numbers"]:
      file.unlink()
  with pytest.raises(
    ValueError, match=r"must hold a checkpoint that can be read; step 6: .*step 3"
  ):
    loop.train(experiment, copy)
  assert {path.name for path in checkpoints.folder(copy).iterdir()} >= {"3", "6"}
  with pytest.raises(ValueError, match=r"step 6 in .* cannot be read;.*other steps there: \[3\]"):
    runs.load(copy, "last")
  gc.collect()


def test_half_written_checkpoints_are_ignored(copy, experiment):
  half = checkpoints.folder(copy) / "9.orbax-checkpoint-tmp"
  shutil.copytree(checkpoints.folder(copy) / "6", half)
  assert loop.train(experiment, copy).run.first_step == 6
  assert runs.load(copy, "last").step == 6


def test_loading_a_run_reads_the_weights_and_writes_nothing(trained, copy):
  before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
  losses = {m["step"]: m["validation_loss"] for m in reports.read_metrics(copy) if len(m) == 4}
  assert set(losses) == {3, 6}
  for step, number in (("best", min(losses, key=losses.get)), ("last", 6), ("3", 3)):
    assert runs.load(copy, step).step == number
  loaded = runs.load(copy, "last")
  for name, value in trained[0].state.params.items():
    np.testing.assert_array_equal(loaded.params[name], value)
  jax.tree.map(
    np.testing.assert_array_equal, loaded.parts.constants, trained[0].run.parts.constants
  )
  assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before
  for step in ("4", "-1", "first"):
    with pytest.raises(ValueError, match=r"must be 'best', 'last' or one of \[3, 6\]; got"):
      runs.load(copy, step)
  shutil.rmtree(checkpoints.folder(copy))
  with pytest.raises(ValueError, match="must hold a checkpoint; got .*train first"):
    runs.load(copy)
  with pytest.raises(FileNotFoundError, match="must hold a run with a config.json"):
    runs.load(copy / "nowhere")


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
  server = Programs(tmp_path_factory.mktemp("programs"))
  yield server
  server.close()


def flags_of(experiment, workdir, **train):
  sizes = ("features", "num_layers", "heads", "glu_dim", "loss_chunk")
  values = {f"model.{name}": getattr(experiment.model, name) for name in sizes}
  for name in ("source", "path", "sequence_length", "batch_size"):
    values[f"data.{name}"] = getattr(experiment.data, name)
  settings = dict(baselines=False, log_every=1, eval_every=0, sample_tokens=8) | train
  values |= {f"train.{name}": value for name, value in settings.items()}
  return [f"--workdir={workdir}", *(f"--config.{name}={value}" for name, value in values.items())]


def wait_for(condition, seconds=120):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, "nothing happened"
    time.sleep(0.02)


def last_step(workdir):
  lines = reports.read_metrics(workdir)
  return lines[-1]["step"] if lines else 0


def test_signals(programs, experiment, tmp_path):
  """SIGTERM saves and exits with 0; SIGKILL loses what follows the last checkpoint; both go on."""
  workdir = tmp_path / "run"
  endless = flags_of(experiment, workdir, steps=10**6, checkpoint_every=10**6)
  process = programs.start("train", *endless)
  wait_for(lambda: last_step(workdir) >= 3)
  os.kill(process, signal.SIGTERM)
  ended = programs.finish()
  assert ended.code == 0, ended.err
  assert "the same command goes on from there" in ended.out
  (stopped,) = (int(path.name) for path in checkpoints.folder(workdir).iterdir())
  assert stopped == last_step(workdir) >= 3
  assert (workdir / reports.CURVES_FILE).stat().st_size > 10_000

  process = programs.start("train", *flags_of(experiment, workdir, steps=10**6, checkpoint_every=5))
  wait_for(lambda: last_step(workdir) >= stopped + 12)
  os.kill(process, signal.SIGKILL)
  ended = programs.finish()
  assert ended.code == -signal.SIGKILL
  assert f"Goes on from the checkpoint of step {stopped}." in ended.out

  ended = programs.run("train", *flags_of(experiment, workdir, steps=last_step(workdir) + 2))
  assert ended.code == 0, ended.err
  assert "Goes on from the checkpoint of step" in ended.out
  steps = [m["step"] for m in reports.read_metrics(workdir) if "loss" in m]
  assert steps == list(range(1, steps[-1] + 1)), "steps are missing or listed twice"
  record = json.loads(pathlib.Path(workdir, "config.json").read_text())
  assert record["experiment"]["train"]["steps"] == steps[-1]
