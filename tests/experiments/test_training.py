"""Training: resuming changes nothing, workdirs are checked before they are written to, and what a
run leaves behind."""

import json

import jax
import numpy as np
import pytest

from attnzoo.experiments.training import checkpoints, config, loop, reports, runs, summary
from attnzoo_testing import small_runs
from attnzoo_testing.small_runs import changed


@pytest.fixture(scope="module", autouse=True)
def _one_device(tmp_path_factory):
  with small_runs.one_device(tmp_path_factory.mktemp("compiled")):
    yield


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  return small_runs.write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def straight(text, tmp_path_factory):
  """Six steps at once: (experiment, outcome, workdir)."""
  workdir = tmp_path_factory.mktemp("straight")
  experiment = small_runs.experiment(text)
  return experiment, loop.train(experiment, workdir), workdir


def numbers(workdir):
  """metrics.jsonl without what depends on the clock."""
  return [
    {k: v for k, v in line.items() if k not in ("tokens_per_second", "mfu")}
    for line in reports.read_metrics(workdir)
  ]


def assert_same_state(got, expected):
  assert jax.tree.structure(got) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def stopped_after(experiment, steps, workdir, monkeypatch):
  """The first part of a run, stopped as a SIGTERM does: the schedule is that of the whole."""
  import contextlib

  from attnzoo.experiments.training import hosts

  @contextlib.contextmanager
  def stop():
    yield lambda step: step == steps

  with monkeypatch.context() as patch:
    patch.setattr(hosts, "sigterm", stop)
    outcome = loop.train(experiment, workdir)
  assert outcome.evaluation is None
  assert int(outcome.state.step) == steps
  return outcome


@pytest.mark.slow
@pytest.mark.parametrize(
  ("optimizer", "train"),
  [
    (dict(), dict()),
    (dict(), dict(grad_accumulation=2)),
    (dict(name="muon", z_loss=1e-4, schedule="warmup_stable_decay"), dict()),
  ],
  ids=["adamw", "accumulated", "muon"],
)
def test_a_resumed_run_is_the_straight_run(optimizer, train, text, tmp_path, monkeypatch, request):
  experiment = small_runs.experiment(text, optimizer=optimizer, **train)
  if not optimizer and not train:
    _, expected, workdir = request.getfixturevalue("straight")
  else:
    workdir = tmp_path / "straight"
    expected = loop.train(experiment, workdir)
  # Stopped between two checkpoints, so that the position in the data matters.
  stopped_after(experiment, 4, tmp_path / "resumed", monkeypatch)
  got = loop.train(experiment, tmp_path / "resumed")
  assert got.run.first_step == 4
  assert_same_state(got.state, expected.state)
  assert got.evaluation == expected.evaluation
  assert got.run.batches.get_state() == expected.run.batches.get_state()
  assert numbers(tmp_path / "resumed") == numbers(workdir)
  assert [m["step"] for m in numbers(workdir)] == [1, 2, 3, 3, 4, 5, 6, 6]


def test_training_learns_and_differs_by_seed(straight, text, tmp_path):
  experiment, outcome, workdir = straight
  losses = [m["loss"] for m in numbers(workdir) if "loss" in m]
  assert losses[-1] < losses[0] < np.log(257) * 1.1
  other = changed(experiment, train=dict(seed=1, steps=1))
  loop.train(other, tmp_path)
  assert numbers(tmp_path)[0]["loss"] != losses[0]


def test_steps_that_are_done_again_are_not_listed_twice(straight, text, tmp_path, monkeypatch):
  experiment, _, workdir = straight
  stopped_after(experiment, 5, tmp_path, monkeypatch)
  checkpoint = checkpoints.folder(tmp_path) / "5"
  checkpoint.rename(tmp_path / "away")  # as if step 5 had not been saved
  with (tmp_path / reports.METRICS_FILE).open("a") as file:
    file.write('{"step": 6, "lo')  # as a killed process leaves it
  loop.train(experiment, tmp_path)
  assert numbers(tmp_path) == numbers(workdir)


@pytest.mark.slow
def test_extending_a_complete_run(straight, tmp_path, capsys):
  experiment, outcome, workdir = straight
  again = loop.train(experiment, workdir)
  assert_same_state(again.state, outcome.state)
  assert again.evaluation == outcome.evaluation
  assert "complete after 6 steps: nothing left to train" in capsys.readouterr().out
  short = changed(experiment, train=dict(steps=2))
  loop.train(short, tmp_path)
  extended = loop.train(short, tmp_path, extend=2)
  assert int(extended.state.step) == 4
  assert "2 more at the final learning rate" in capsys.readouterr().out
  assert [m["step"] for m in numbers(tmp_path) if "loss" in m] == [1, 2, 3, 4]
  assert int(loop.train(short, tmp_path).state.step) == 4


def snapshot(folder):
  """Every file with its content."""
  files = sorted(path for path in folder.rglob("*") if path.is_file())
  return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_another_model_other_data_or_another_tokenizer_is_refused(straight, text, tmp_path):
  experiment, _, workdir = straight
  before = snapshot(workdir)
  wider = changed(experiment, model=dict(features=64))
  with pytest.raises(ValueError, match=r"width 64\); it holds .*width 32\): features 32 there, 64"):
    loop.train(wider, workdir)
  elsewhere = small_runs.write_text(tmp_path / "other.txt", seed=7)
  with pytest.raises(ValueError, match="must be gone on with on its own data"):
    loop.train(changed(experiment, data=dict(path=str(elsewhere))), workdir)
  with pytest.raises(ValueError, match=r"'batch_size': 8.*\(or choose another --workdir\)"):
    loop.train(changed(experiment, data=dict(batch_size=8)), workdir)
  record = json.loads((workdir / "config.json").read_text())
  record["tokenizer"]["fingerprint"] = "another"
  (workdir / "config.json").write_text(json.dumps(record))
  with pytest.raises(ValueError, match="tokenizer must be the checkpoint's"):
    loop.train(experiment, workdir)
  (workdir / "config.json").write_bytes(before["config.json"])
  assert snapshot(workdir) == before


@pytest.mark.slow
def test_how_a_model_is_computed_may_change(straight, tmp_path, monkeypatch):
  experiment, _, workdir = straight
  stopped_after(experiment, 3, tmp_path, monkeypatch)
  free = dict(dtype="bfloat16", remat="full", implementation="xla", chunk_size=16, loss_chunk=8)
  outcome = loop.train(changed(experiment, model=free), tmp_path)
  assert int(outcome.state.step) == 6
  expected = numbers(workdir)[-1]["validation_loss"]
  assert abs(outcome.evaluation.loss - expected) < 0.05


def test_damaged_config(straight, tmp_path, monkeypatch):
  experiment, _, _ = straight
  short = changed(experiment, train=dict(steps=1))
  (tmp_path / "config.json").write_text("{")  # without checkpoints it says nothing
  loop.train(short, tmp_path)
  for text in ("{", "[]", "{}", '{"experiment": {}}'):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json must be the record of a run"):
      loop.train(short, tmp_path)
    with pytest.raises(ValueError, match="config.json must be the record of a run"):
      runs.load(tmp_path)
  (tmp_path / "config.json").unlink()
  with pytest.raises(FileNotFoundError, match="must hold a run with a config.json"):
    loop.train(short, tmp_path)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run(straight, text, tmp_path):
  experiment, _, _ = straight
  loop.train(changed(experiment, train=dict(steps=3)), tmp_path)
  before = snapshot(checkpoints.folder(tmp_path))
  wild = changed(
    experiment,
    train=dict(steps=9, checkpoint_every=1, eval_every=0),
    optimizer=dict(learning_rate=1e30, warmup_steps=0, schedule="constant", clip_norm=0),
  )
  with pytest.raises(
    FloatingPointError, match=r"must be finite; got .*(nan|inf).* at step [45] \(the checkpoint of"
  ) as caught:
    loop.train(wild, tmp_path)
  assert "step 3 is kept" in str(caught.value)
  assert snapshot(checkpoints.folder(tmp_path)) == before
  with pytest.raises(FloatingPointError, match="no checkpoint was written yet"):
    loop.train(wild, tmp_path / "new")


@pytest.mark.slow
def test_summary(straight, text, tmp_path, capsys, monkeypatch):
  experiment = changed(straight[0], train=dict(baselines=True))
  outcome = loop.train(experiment, straight[2])
  summary.finish(outcome)
  printed = capsys.readouterr().out
  assert "this model" in printed
  assert f"{outcome.evaluation.bits_per_byte:6.3f}" in printed
  assert "order-2 bytes" in printed
  assert "sample:" in printed
  picture = (straight[2] / reports.CURVES_FILE).read_bytes()
  assert picture[:8] == b"\x89PNG\r\n\x1a\n"
  from matplotlib import image

  pixels = image.imread(straight[2] / reports.CURVES_FILE)[..., :3]
  for curve in ((31, 119, 180), (255, 127, 14), (44, 160, 44)):  # training, validation, xz
    distance = np.abs(pixels - np.array(curve) / 255).max(-1).min()
    assert distance < 0.25, "no such curve"  # thin dashes are blended with the background
  monkeypatch.setattr(summary, "_compute_baselines", lambda data: pytest.fail("not cached"))
  summary.finish(outcome)
  assert "order-2 bytes" in capsys.readouterr().out
  cached = straight[2] / summary.BASELINES_FILE
  cached.write_text("{")
  monkeypatch.setattr(summary, "_compute_baselines", lambda data: {"computed again": 1.0})
  summary.finish(outcome)
  assert "computed again" in capsys.readouterr().out


def test_progress_lines(straight, text, tmp_path, capsys, monkeypatch):
  experiment = changed(straight[0], train=dict(log_every=2, eval_every=0))
  loop.train(experiment, tmp_path)
  lines = capsys.readouterr().err.splitlines()
  steps = [line for line in lines if line.startswith("step") and "validation" not in line]
  assert [line.split()[1] for line in steps] == ["2/6", "4/6", "6/6"]
  assert all("loss" in line and "tokens/s" in line and line.endswith("left") for line in steps)
  assert sum("validation" in line for line in lines) == 1


def test_speed_and_time_left(monkeypatch, capsys):
  """10 steps of 100 tokens in 2 s each; 5 s of pause do not count, nor does the first step."""
  clock = [0.0]
  monkeypatch.setattr(reports.time, "monotonic", lambda: clock[0])
  progress = reports.Progress(0, 11, 100, flops_per_token=6.0, peak_flops=600.0)
  progress.start()
  for step in range(2, 12):
    clock[0] += 2
    if step == 3:
      clock[0] += 5
      progress.pause(5)
    figures = progress.show(step, 1.0)
    assert figures == {"tokens_per_second": 50.0, "mfu": 0.5}
  lines = capsys.readouterr().err.splitlines()
  assert lines[0] == "step 2/11  loss 1.0000  50 tokens/s  MFU 50.0%  0:18 left"
  assert lines[-1].endswith("0:00 left")
  assert reports.duration(3725) == "1:02:05"


def test_on_a_terminal_the_line_is_redrawn(monkeypatch, capsys):
  monkeypatch.setattr(reports.sys.stderr, "isatty", lambda: True, raising=False)
  progress = reports.Progress(0, 9, 100, flops_per_token=6.0, peak_flops=None)
  progress.show(1, 2.0)
  progress.show(2, 1.0)
  progress.say("validation")
  progress.show(3, 1.0)
  progress.close()
  progress.close()
  written = capsys.readouterr().err
  assert written.count("\n") == 2
  assert written.endswith("step 3/9  loss 1.0000\n")


def test_config_round_trip_and_refusals(straight):
  experiment = straight[0]
  stored = json.loads(json.dumps(config.to_json_dict(experiment)))
  assert config.from_config_dict(stored) == experiment
  assert config.from_config_dict(config.to_config_dict(experiment)) == experiment
  for change, message in (
    (dict(trian={}), "trian must be a part of an experiment.*did you mean 'train'"),
    (dict(train=dict(stepz=3)), r"train.stepz must be a field of TrainConfig.*'steps'"),
    (dict(model=dict(family="transnorm")), "did you mean 'transnormer'"),
    (dict(model=dict()), "model.family must name a family"),
    (dict(train=dict(grad_accumulation=3)), "multiple of train.grad_accumulation"),
    (dict(train=dict(best_by="p_at_5")), "train.best_by must be 'loss' or empty.*got 'p_at_5'"),
    (dict(optimizer=dict(name="adam")), "must be one of.*got 'adam'"),
  ):
    with pytest.raises(ValueError, match=message):
      config.from_config_dict(stored | change)
