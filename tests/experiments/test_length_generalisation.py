"""Loss by position, and the program that trains on short rows and measures on long ones."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from matplotlib import image

from attnzoo import zoo
from attnzoo.experiments.data import DataConfig, load_data
from attnzoo.experiments.lengths import generalisation_report
from attnzoo.experiments.training import by_position, state
from attnzoo_testing import small_runs
from attnzoo_testing.programs import Programs


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  return small_runs.write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture
def folder(tmp_path):
  """Documents of 30 to 300 bytes."""
  for i in range(12):
    small_runs.write_text(tmp_path / f"{i}.txt", lines=1 + 12 * i // 10, seed=i)
  return tmp_path


def test_the_loss_of_a_piece_is_that_of_the_model_there():
  sizes = dict(features=32, num_layers=1, heads=2, glu_dim=48)
  model = zoo.create("transnormer-tiny", rngs=nnx.Rngs(0), **sizes)
  parts, params = state.take_apart(model)
  rng = np.random.default_rng(0)
  tokens, targets = rng.integers(0, 257, (2, 5, 32)).astype(np.int32)
  options, loss = dict(piece=8, batch_size=2), jax.jit(model.loss)
  got = by_position.loss_by_position(parts, params, tokens, targets, **options)
  for number in range(4):
    weights = np.zeros((4, 32), np.float32)  # the fifth row does not fill a batch
    weights[:, 8 * number : 8 * (number + 1)] = 1
    sums = loss(jnp.asarray(tokens[:4]), jnp.asarray(targets[:4]), jnp.asarray(weights))
    np.testing.assert_allclose(got[number], sums.loss / sums.weight, rtol=1e-5)
  alone = by_position.loss_by_position(
    parts, params, tokens[:1], targets[:1], piece=32, batch_size=9
  )
  assert alone.shape == (1,)


def test_rows_lie_inside_documents(folder):
  config = DataConfig(source="text", path=str(folder), validation_path=str(folder),
                      sequence_length=16, split_documents=False)  # fmt: skip
  data = load_data(config)
  tokens, targets = by_position.whole_rows(data, config, 64, 1000)
  assert tokens.shape == targets.shape
  assert tokens.shape[1] == 64
  np.testing.assert_array_equal(tokens[:, 1:], targets[:, :-1])
  assert (tokens[:, 1:] != 256).all()  # a document may start with its end id, but goes on
  few, _ = by_position.whole_rows(data, config, 64, 3)
  assert [row.tolist() for row in few[[0, -1]]] == [row.tolist() for row in tokens[[0, -1]]]
  assert len(few) == 3
  with pytest.raises(ValueError, match="whole_rows: length must fit into a document of the valid"):
    by_position.whole_rows(data, config, 5000, 3)


def test_table():
  record = dict(
    series="rat-swa", length=32, piece=4, rows=7, steps=3, batch_size=2, parameters=1234,
    by_length=[[16, 2.5], [32, 2.0], [64, 1.875], [128, 2.25]], by_position=[2.0] * 32,
    train_seconds=9.0, measure_seconds=1.0,
  )  # fmt: skip
  env = dict(device="cpu", platform="cpu", processor="p", versions=dict(jax="1"), commit=None,
             date="2026")  # fmt: skip
  text = generalisation_report.markdown([record], env)
  row = "| rat-swa | 1,234 | 2.500 | 2.000 | 1.875 | 2.250 | +0.250 | 9 | 2.58 to 2.60 | 3.59 |"
  assert row in text
  assert "last 8 tokens of 7 held-out texts" in text
  assert "2.250 at 128" in generalisation_report.line(record)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  programs = Programs(tmp_path_factory.mktemp("programs"))
  yield programs.run
  programs.close()


@pytest.mark.slow
def test_program(run, text, tmp_path):
  flags = (
    "length_generalisation", "--models=rnn,attention-nope", "--steps=2", "--length=16",
    "--batch_size=2", "--rows=8", f"--data_path={text}", f"--workdir={tmp_path}",
    '--model_fields={"features": 32, "num_layers": 2}',
  )  # fmt: skip
  first = run(*flags)
  assert first.code == 0, first.err
  record = json.loads((tmp_path / "lengths.json").read_text())
  rnn, attention = record["models"]
  assert [len(model["by_position"]) for model in (rnn, attention)] == [32, 32]  # 2 positions each
  assert np.isfinite(rnn["by_position"]).all()
  assert [n for n, _ in rnn["by_length"]] == [8, 16, 32, 64]
  assert rnn["by_length"][-1][1] == pytest.approx(np.mean(rnn["by_position"][-2:]))
  assert attention["experiment"]["model"]["rotary_base"] is None
  table = (tmp_path / "lengths.md").read_text()
  assert f"| rnn | {rnn['parameters']:,} |" in table
  assert "2.69 | 2.67 |" in table
  assert image.imread(tmp_path / "lengths.png").ndim == 3
  again = run(*flags)
  assert again.code == 0, again.err
  assert "step 2/2" not in again.err  # finished models are not trained again
  assert (tmp_path / "lengths.md").read_text().splitlines()[4:] == table.splitlines()[4:]


@pytest.mark.slow
@pytest.mark.parametrize(
  ("flag", "message"),
  [
    ("--models=rat-sva", "did you mean 'rat-swa'"),
    ("--times=3", "--times must be a power of 2"),
    ("--length=20", "--length a multiple of 8"),
    ("--model_fields=[]", "--model_fields must be a JSON object"),
    ('--model_fields={"widht": 3}', "did you mean"),
  ],
)
def test_errors(run, tmp_path, flag, message):
  result = run("length_generalisation", flag, f"--workdir={tmp_path / 'no'}")
  assert result.code == 2
  assert message in result.err
  assert not (tmp_path / "no").exists()
