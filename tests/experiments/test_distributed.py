"""One training step on many devices is that of one device; several processes train as one."""

import contextlib
import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from attnzoo import zoo
from attnzoo.experiments.data import DataConfig
from attnzoo.experiments.training import checkpoints, config, hosts, loop, reports, state
from attnzoo.experiments.training.evaluation import place_batch
from attnzoo_testing.numerics import relative_error

BATCH, LENGTH, VOCABULARY = 16, 16, 60


def experiment(mesh, *, pieces=2, **model):
  sizes = dict(vocab_size=VOCABULARY, features=32, num_layers=2, heads=4, glu_dim=48, eos_id=None)
  return config.Experiment(
    model=zoo.get_config(
      "transnormer-tiny", **sizes | dict(lrpe_layers="all", loss_chunk=3, chunk_size=4) | model
    ),
    data=DataConfig(sequence_length=LENGTH, batch_size=BATCH),
    optimizer=config.OptimizerConfig(warmup_steps=1, z_loss=0.1),
    train=config.TrainConfig(steps=10, grad_accumulation=pieces),
    mesh=config.MeshConfig(*mesh),
  )


def batch():
  """Packed documents that begin anywhere, and targets that do not count."""
  draw = np.random.default_rng(0)
  tokens, targets = draw.integers(0, VOCABULARY, (2, BATCH, LENGTH)).astype(np.int32)
  starts = (draw.random((BATCH, LENGTH)) < 0.2).astype(np.int32)
  weights = (draw.random((BATCH, LENGTH)) < 0.8).astype(np.float32)
  return dict(tokens=tokens, targets=targets, weights=weights, segment_ids=1 + starts.cumsum(1))


def one_step(setup) -> dict[str, np.ndarray]:
  """Loss, gradient norm and gradients (in the optimiser's first moments) after a step."""
  count = setup.mesh.data * setup.mesh.seq * setup.mesh.model
  mesh = state.make_mesh(setup.mesh, jax.devices()[:count])
  state.check_divides(setup, mesh)
  with loop.in_mesh(mesh):
    parts, current, shardings = state.initial_state(setup, mesh)
    for x, sharding in zip(current.params.values(), shardings.params.values(), strict=True):
      assert x.sharding.is_equivalent_to(sharding, x.ndim)
    step = jax.jit(state.make_train_step(setup, parts), donate_argnums=0)
    current, metrics = step(current, place_batch(batch(), mesh))
  moments = next(s.mu for s in jax.tree.leaves(current.opt_state, is_leaf=_has_moments)
                 if _has_moments(s))  # fmt: skip
  assert int(current.step) == 1
  return jax.device_get(dict(moments, loss=metrics.loss, grad_norm=metrics.grad_norm))


def _has_moments(x):
  return hasattr(x, "mu")


@functools.cache
def one_device():
  """(a step on one device, how far another order of the same sums is from it)."""
  reference = one_step(experiment((1, 1, 1)))
  reordered = one_step(experiment((1, 1, 1), pieces=4, loss_chunk=16, chunk_size=16))
  return reference, {n: relative_error(x, reference[n])[0] for n, x in reordered.items()}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(8, 1, 1), (2, 2, 2), (1, 8, 1), (1, 1, 4)], ids=str)
def test_a_step_on_a_mesh_is_that_of_one_device(mesh):
  reference, noise = one_device()
  got = one_step(experiment(mesh))
  eps = np.finfo(np.float32).eps
  assert got.keys() == reference.keys()
  errors = {name: relative_error(x, reference[name])[0] for name, x in got.items()}
  wrong = {n: (e, noise[n]) for n, e in errors.items() if not e <= 4 * noise[n] + 4 * eps}
  assert not wrong


class _Device:
  platform = "cpu"

  def __init__(self, process_index):
    self.process_index = process_index


@pytest.mark.parametrize(
  ("processes", "expected"),
  [  # process of each place of (data, seq, model)
    ([[[0]], [[0]], [[1]], [[1]]], [(0, 2), (1, 2)]),
    ([[[1]], [[0]], [[1]], [[0]]], [(1, 2), (0, 2)]),  # in turn: 0 has the rows 1 and 3
    ([[[0, 1]], [[0, 1]]], [(0, 1), (0, 1)]),  # the model is cut: both need all rows
    ([[[0], [1]], [[2], [3]]], [(0, 2), (0, 2), (1, 2), (1, 2)]),  # the length is
  ],
)
def test_rows_that_a_process_loads(processes, expected, monkeypatch):
  mesh = _mesh_of(processes)
  for process, part in enumerate(expected):
    monkeypatch.setattr(jax, "process_index", lambda process=process: process)
    assert state.data_part.__wrapped__(mesh) == part


def test_rows_that_overlap_in_part_are_refused():
  with pytest.raises(ValueError, match="mesh: data must be split over the 2 hosts"):
    state.data_part.__wrapped__(_mesh_of([[[0, 0]], [[0, 1]], [[1, 1]]]))


def _mesh_of(processes):
  class Mesh:
    devices = np.vectorize(_Device, otypes=[object])(np.array(processes))
    shape = dict(zip(("data", "seq", "model"), devices.shape, strict=True))

  return Mesh


@pytest.mark.parametrize(
  ("given", "message"),
  [
    (("a:1", 0, None), "must be given together; missing are --process_count"),
    (("", None, 2), "missing are --coordinator, --process_id"),
    (("a:1", 2, 2), "--process_id must lie in 0"),
    (("a", 0, 2), "--coordinator must be host:port of process 0; got 'a'"),
    (("", None, None), "--distributed must run on a TPU pod"),
  ],
)
def test_wrong_places_of_processes(given, message, monkeypatch):
  def initialize():  # what jax says where it finds no pod
    raise ValueError("coordinator_address should be defined.")

  monkeypatch.setattr(jax.distributed, "initialize", initialize)
  with pytest.raises(ValueError, match=message):
    hosts.join(*given)


# --- Real processes on this machine.


def endless(path) -> config.Experiment:
  return config.Experiment(
    model=zoo.get_config("transnormer-tiny", features=32, num_layers=2, heads=4, glu_dim=48),
    data=DataConfig(source="text", path=str(path), sequence_length=32, batch_size=4, workers=0),
    optimizer=config.OptimizerConfig(schedule="constant", warmup_steps=1),
    train=config.TrainConfig(
      steps=1_000_000, log_every=1, eval_every=0, checkpoint_every=1_000_000, sample_tokens=0
    ),
  )


@contextlib.contextmanager
def two_processes(config_file, workdir):
  """Two processes of `train`; yields them, their output goes to files beside the workdir."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
  environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"
  command = [
    sys.executable, "-m", "attnzoo.experiments.train", f"--config={config_file}",
    f"--workdir={workdir}", "--distributed", f"--coordinator=127.0.0.1:{port}",
    "--process_count=2",
  ]  # fmt: skip
  with contextlib.ExitStack() as stack:
    processes = []
    for i in range(2):
      log = stack.enter_context((workdir.parent / f"{workdir.name}.{i}.log").open("w+"))
      processes.append(
        subprocess.Popen([*command, f"--process_id={i}"], env=environment, stdout=log, stderr=log)
      )
    try:
      yield processes
    finally:
      for process in processes:
        process.kill()
        process.wait()


def losses(workdir) -> dict[int, float]:
  with contextlib.suppress(ValueError):  # a line that is being written
    return {m["step"]: m["loss"] for m in reports.read_metrics(workdir) if "loss" in m}
  return {}


def wait_for(step, workdir, processes):
  deadline = time.monotonic() + 240
  while step not in losses(workdir):
    text = "".join(file.read_text()[-3000:] for file in workdir.parent.glob("*.log"))
    assert all(process.poll() is None for process in processes), text
    assert time.monotonic() < deadline, text
    time.sleep(0.1)


@pytest.mark.slow
def test_two_processes(tmp_path):
  """Same losses as one process; a SIGTERM to one saves and ends both; one process goes on from the
  checkpoint; both go on from it, and when one is killed the other ends at once."""
  text = tmp_path / "text.txt"
  text.write_text("\n".join(str(number * number) for number in range(4000)))
  setup, workdir = endless(text), tmp_path / "joint"
  file = tmp_path / "config.py"
  file.write_text(
    "from attnzoo.experiments.training import config\n\n"
    "def get_config():\n"
    f"  record = {config.to_json_dict(setup)!r}\n"
    "  return config.to_config_dict(config.from_config_dict(record))\n"
  )
  with two_processes(file, workdir) as processes:
    wait_for(6, workdir, processes)
    processes[1].send_signal(signal.SIGTERM)
    codes = [process.wait(timeout=60) for process in processes]
  log = (tmp_path / "joint.0.log").read_text()
  assert codes == [0, 0], log
  last = max(losses(workdir))
  assert f"Stopped at step {last}" in log
  assert list(losses(workdir)) == list(range(1, last + 1))  # one process writes, each step once
  assert checkpoints.Checkpoints(workdir).steps == [last]

  few = dict(vars(setup), train=config.TrainConfig(**vars(setup.train) | dict(steps=6)))
  alone = config.Experiment(**few | dict(mesh=config.MeshConfig(data=4, model=2)))
  loop.train(alone, tmp_path / "alone")  # on the 8 devices of this process
  expected = losses(tmp_path / "alone")
  np.testing.assert_allclose([losses(workdir)[i] for i in expected], list(expected.values()), 1e-4)

  shutil.copytree(workdir, tmp_path / "copy")
  loop.train(alone, tmp_path / "copy", extend=2)  # parts of two processes' parameters put together

  with two_processes(file, workdir) as processes:
    wait_for(last + 2, workdir, processes)
    processes[1].kill()
    began = time.monotonic()
    code = processes[0].wait(timeout=60)
    waited = time.monotonic() - began
  log = (tmp_path / "joint.0.log").read_text()
  assert code not in (0, -signal.SIGKILL), log
  assert waited < 30, log  # the heartbeat would take 100 seconds
  assert "error: process 0 of 2 stops: " in log
  together, resumed = losses(workdir), losses(tmp_path / "copy")
  steps = (last + 1, last + 2)
  np.testing.assert_allclose([together[i] for i in steps], [resumed[i] for i in steps], 1e-4)
