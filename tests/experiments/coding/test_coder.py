"""Training, evaluating and explaining a model that codes notes, on an invented MIMIC-III."""

import dataclasses
import functools
import http.server
import json
import shutil
import threading

import jax
import numpy as np
import pytest

from attnzoo.experiments.coding import explanation, report
from attnzoo.experiments.coding.prediction import from_the_data, make_predict_step, predict
from attnzoo.experiments.configs import transicd_icd10, transicd_mimic3
from attnzoo.experiments.data import DataConfig
from attnzoo.experiments.data.notes.assertions import load_assertions
from attnzoo.experiments.training import config, loop, reports, state, summary
from attnzoo.layers import label_margins
from attnzoo.zoo.transicd import PRESETS, TransICDConfig
from attnzoo.zoo.transicd_weights import export_weights
from attnzoo_testing import small_runs
from attnzoo_testing.invented_mimic3 import tables
from attnzoo_testing.programs import Programs
from attnzoo_testing.small_runs import changed

CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module", autouse=True)
def _one_device(tmp_path_factory):
  with small_runs.one_device(tmp_path_factory.mktemp("compiled")):
    yield


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
  """An experiment of eight steps on nine admissions."""
  folder = tmp_path_factory.mktemp("mimic")
  for name, data in tables().items():
    (folder / name).write_bytes(data)
  data = dict(source="mimic3", path=str(folder), sequence_length=64, batch_size=2)
  train = dict(steps=8, log_every=1, eval_every=2, checkpoint_every=2, baselines=True)
  return config.Experiment(
    model=TransICDConfig(200, 50, features=16, num_layers=1, heads=2, max_length=64),
    data=DataConfig(**data, cache=str(folder / "cache")),
    optimizer=config.OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup_steps=0),
    train=config.TrainConfig(**train),
  )


@pytest.fixture(scope="module")
def done(setup, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run")
  return loop.train(setup, workdir), workdir


@pytest.mark.slow
def test_resumed_run_is_the_same(setup, done, tmp_path):
  """Dropout, order of the notes and margins included."""
  whole, _ = done
  assert setup.model.has_dropout
  loop.train(changed(setup, train=dict(steps=4)), tmp_path)
  resumed = loop.train(setup, tmp_path)
  assert resumed.run.first_step == 4
  for name, value in whole.state.params.items():
    np.testing.assert_array_equal(value, resumed.state.params[name], err_msg=name)


def test_margins_and_vectors_come_from_the_data(setup, done):
  outcome, _ = done
  notes = outcome.run.corpus
  expected = label_margins(notes.splits["train"].targets.sum(0))
  np.testing.assert_array_equal(outcome.state.params["margins"], expected)
  fresh = state.initial_state(setup, outcome.run.mesh)[1].params
  vectors = np.random.default_rng(0).standard_normal((notes.vocab_size, 16)).astype(np.float32)
  given = from_the_data(fresh, dataclasses.replace(notes, embedding=vectors))
  np.testing.assert_array_equal(given["embedding"][: len(vectors)], vectors)
  np.testing.assert_array_equal(
    given["embedding"][len(vectors) :], fresh["embedding"][len(vectors) :]
  )
  with pytest.raises(ValueError, match="vectors must have the model's 16 features; got 15"):
    from_the_data(fresh, dataclasses.replace(notes, embedding=vectors[:, :15]))


def test_frozen_vectors_stay(setup, tmp_path):
  frozen = dataclasses.replace(setup.model, freeze_embedding=True, dropout=0.0)
  outcome = loop.train(
    changed(dataclasses.replace(setup, model=frozen), train=dict(steps=2)), tmp_path
  )
  fresh = state.initial_state(dataclasses.replace(setup, model=frozen), outcome.run.mesh)[1].params
  after = outcome.state.params
  np.testing.assert_array_equal(after["embedding"], fresh["embedding"])
  assert np.any(after["head"] != fresh["head"])


def test_predictions_are_the_models(done):
  """Row by row and unpadded, in the order of the split."""
  outcome, _ = done
  run, notes = outcome.run, outcome.run.corpus
  params = outcome.state.params
  found = predict(run.eval_step, params, notes, run.experiment.data, run.mesh, split="test")
  model = state.merge(run.parts, params)
  for row, number in zip(found.probabilities, found.numbers, strict=True):
    alone = jax.nn.sigmoid(model(notes.splits["test"].note(number)[None]))[0]
    np.testing.assert_allclose(row, alone, atol=2e-6)
  assert make_predict_step(run.parts)
  lines = [m for m in reports.read_metrics(run.workdir) if "validation_micro_f1" in m]
  assert [m["step"] for m in lines] == [2, 4, 6, 8]


def test_stops_when_nothing_gets_better(setup, tmp_path, capsys):
  """With a rate of nothing no evaluation beats the first."""
  still = changed(
    setup, optimizer=dict(learning_rate=1e-30, weight_decay=0.0),
    train=dict(patience=2, steps=100, best_by="loss"),
  )  # fmt: skip
  outcome = loop.train(still, tmp_path)
  assert int(outcome.state.step) == 6
  assert "no better for 2 evaluations: stops at step 6" in capsys.readouterr().err


def test_report(done, capsys):
  outcome, workdir = done
  summary.finish(outcome)
  printed = capsys.readouterr().out
  for system in ("label frequency", "1-grams", "1- to 3-grams", "this model, step 8"):
    assert system in printed
  record = json.loads((workdir / "result.json").read_text())
  assert record["systems"]["this model, step 8"]["plain"]["documents"] == 2
  codes = (workdir / "codes.csv").read_text().splitlines()
  assert codes[0] == "code,title,notes,precision,recall,f1,auc"
  assert len(codes) == 51
  assert (workdir / "codes.png").stat().st_size > 5000
  assert report.try_baselines(outcome.run.corpus, workdir / "baselines.json")[0].name  # kept


def test_recall_by_words_of_training():
  """Of the embedded task: each positive is in one of the two parts."""
  notes = load_assertions(sizes=dict(train=60, validation=30, test=40))
  test = notes.splits["test"]
  truth = test.targets != 0
  assert 0.3 < test.seen[truth].mean() < 0.8
  assert not test.seen[~truth].any()


@pytest.mark.parametrize(
  ("parts", "message"),
  [
    (dict(data=DataConfig()), "data.source must be one of notes for TransICDConfig; got 'auto'"),
    (dict(mesh=config.MeshConfig(seq=2)), "mesh.seq must be 1 for notes; got 2"),
  ],
)
def test_what_an_experiment_refuses(setup, parts, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(setup, **parts)


def test_labels_of_other_data(setup, tmp_path):
  fewer = dataclasses.replace(setup, model=dataclasses.replace(setup.model, labels=49))
  with pytest.raises(ValueError, match=r"model.labels must be the data's 50; got 49"):
    loop.train(fewer, tmp_path)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", PRESETS)
def test_published_recipes(name):
  module = transicd_icd10 if name.endswith("small") else transicd_mimic3
  experiment = config.from_config_dict(module.get_config(name))
  assert experiment.optimizer.decayed == "everything"
  assert experiment.data.drop_remainder == ("released" in name)


# --- Explaining -----------------------------------------------------------------------------------


def explained(done, text, **options):
  outcome, _ = done
  run = outcome.run
  options = dict(title="a note", longest=64, threshold=0.0, most=4) | options
  return explanation.explain(run.parts, outcome.state.params, run.corpus, text, **options)


def test_explanation(done):
  outcome, _ = done
  split = outcome.run.corpus.splits["test"]
  one = explained(done, split.texts[0], truth=split.targets[0])
  assert len(one.codes) == 4
  for code in one.codes:
    assert code.verdict in (explanation.TRUE, explanation.FALSE)
    np.testing.assert_allclose(code.weights.sum(), 1, atol=1e-5)
    assert len(code.weights) == len(one.words) == len(one.places)
  high = explained(done, split.texts[0], truth=split.targets[0], threshold=1.0, most=99)
  assert {code.verdict for code in high.codes} == {explanation.MISSED}
  assert len(high.codes) == split.targets[0].sum()
  assert [c.verdict for c in explained(done, "chest pain", threshold=1.0).codes] == ["predicted"]
  with pytest.raises(ValueError, match="must have words that are left"):
    explained(done, "12 of 7")


def test_pieces_are_the_whole_text():
  text = "Chest-pain; no <b>fever</b>"
  cut = explanation.pieces(text, [(0, 10), (15, 18), (18, 23)])
  assert "".join(piece for piece, _ in cut) == text
  assert [number for _, number in cut] == [0, -1, 1, 2, -1]


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
  server = Programs(tmp_path_factory.mktemp("programs"))
  yield server
  server.close()


@pytest.mark.slow
def test_imported_weights(setup, done, programs, tmp_path):
  outcome, _ = done
  model = state.merge(outcome.run.parts, outcome.state.params)
  export_weights(model, setup.model, tmp_path / "published.safetensors")
  flags = (f"--source={tmp_path / 'published.safetensors'}", f"--data_path={setup.data.path}",
           f"--workdir={tmp_path / 'run'}")  # fmt: skip
  ended = programs.run("import_weights", *flags)
  assert ended.code == 0, ended.err
  ended = programs.run("evaluate", f"--workdir={tmp_path / 'run'}")
  assert ended.code == 0, ended.err
  assert "validation split" in ended.out
  ended = programs.run("generate", f"--workdir={tmp_path / 'run'}", "--prompt=x")
  assert ended.code == 2
  assert "--workdir must hold a model that writes" in ended.err


@pytest.mark.slow
def test_programs(done, programs, tmp_path):
  _, workdir = done
  ended = programs.run("evaluate", f"--workdir={workdir}", "--split=test", "--step=last",
                       f"--json={tmp_path / 'found.json'}")  # fmt: skip
  assert ended.code == 0, ended.err
  assert "test split" in ended.out
  assert json.loads((tmp_path / "found.json").read_text())["coding"]["documents"] == 2
  ended = programs.run("explain", f"--workdir={workdir}", "--notes=1,0", "--threshold=0.01",
                       f"--out={tmp_path / 'out'}")  # fmt: skip
  assert ended.code == 0, ended.err
  assert (tmp_path / "out" / "test_note_1.png").stat().st_size > 5000
  assert len(json.loads((tmp_path / "out" / "explain.json").read_text())) == 2
  assert "Lasix" not in ended.out + ended.err  # a word of the notes
  ended = programs.run("explain", f"--workdir={workdir}", "--notes=2")
  assert ended.code == 2
  assert "--notes must be numbers from 0 to 1; got '2'" in ended.err
  ended = programs.run("explain", f"--workdir={workdir}", "--text_file=absent.txt")
  assert ended.code == 2


@pytest.fixture
def browser():
  """Chromium without a window."""
  webdriver = pytest.importorskip("selenium.webdriver")
  if CHROMIUM is None:
    pytest.skip("no chromium on this machine (apt-get install chromium chromium-driver)")
  options = webdriver.ChromeOptions()
  options.binary_location = CHROMIUM
  for name in ("headless=new", "no-sandbox", "disable-gpu", "disable-background-networking"):
    options.add_argument(f"--{name}")
  service = webdriver.ChromeService(shutil.which("chromedriver"))
  driver = webdriver.Chrome(options=options, service=service)
  yield driver
  driver.quit()


@pytest.fixture
def served(tmp_path):
  """(folder, its address)."""
  handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
  handler.log_message = lambda *_: None
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield tmp_path, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def shade(span) -> float:
  """Opacity of a word's background."""
  colour = span.value_of_css_property("background-color")
  numbers = colour[colour.index("(") + 1 : -1].split(",")
  return float(numbers[3]) if len(numbers) == 4 else 1.0


def test_page_in_a_browser(browser, served):
  """Shades follow the code that is chosen, verdicts are marked, markup in notes stays text."""
  weights = np.array([0.7, 0.2, 0.1])
  text = "chest <script>document.title='x'</script> pain, @DATA@ fever"
  places = [(0, 5), (text.index("pain"), text.index("pain") + 4), (len(text) - 5, len(text))]
  words = ["chest", "pain", "fever"]
  verdicts = (explanation.TRUE, explanation.FALSE, explanation.MISSED)
  codes = [
    explanation.Code(f"I{n}", f"code <b>{n}</b>", 0.9 - 0.2 * n, verdict, np.roll(weights, n))
    for n, verdict in enumerate(verdicts)
  ]
  first = explanation.Explanation("first", text, places, words, codes)
  second = explanation.Explanation("second", "fever", [(0, 5)], ["fever"], [
    explanation.Code("J1", "other", 0.6, explanation.UNKNOWN, np.ones(1))])  # fmt: skip
  folder, address = served
  (folder / "page.html").write_text(explanation.page([first, second], "Codes", {"model": "m"}))
  browser.get(f"{address}/page.html")
  find = functools.partial(browser.find_elements, "css selector")
  assert browser.title == "Codes"
  assert find("#text")[0].text == text
  assert [b.find_element("class name", "verdict").text for b in find("#codes button")] == [
    *verdicts
  ]
  kinds = [b.get_attribute("class") for b in find("#codes button")]
  assert kinds == ["true", "false", "missed"]

  def shades():
    return [shade(span) for span in find("#text [data-token]")]

  np.testing.assert_allclose(shades(), 0.85 * weights / 0.7, atol=0.01)
  find("#codes button")[1].click()
  np.testing.assert_allclose(shades(), 0.85 * np.roll(weights, 1) / 0.7, atol=0.01)
  assert [b.get_attribute("aria-pressed") for b in find("#codes button")] == [
    "false",
    "true",
    "false",
  ]
  assert "I1 code <b>1</b> (false positive)" in find("#shown")[0].text
  browser.find_element("tag name", "body").send_keys("\ue015")  # arrow down
  np.testing.assert_allclose(shades(), 0.85 * np.roll(weights, 2) / 0.7, atol=0.01)
  assert find("#top")[0].text.startswith("most weight: fever 70 %")
  find("#note option")[1].click()
  assert find("#text")[0].text == "fever"
  assert [b.get_attribute("class") for b in find("#codes button")] == ["unknown"]
  assert not [
    e
    for e in browser.get_log("browser")
    if e["level"] == "SEVERE" and "favicon" not in e["message"]
  ]
