"""The binaries as a user runs them: results, help, and one line for everything that is wrong."""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo.experiments.training import runs, state
from attnzoo.zoo import softplus_weights, transnormer_weights
from attnzoo_testing import small_runs
from attnzoo_testing.programs import Programs

# Every program starts, and most of them compile.
pytestmark = pytest.mark.slow

SMALL = [f"--config.model.{f}" for f in ("features=32", "num_layers=2", "heads=2", "glu_dim=48")]


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
  server = Programs(tmp_path_factory.mktemp("programs"))
  yield server
  server.close()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  return small_runs.write_text(tmp_path_factory.mktemp("text") / "text.txt", lines=200)


@pytest.fixture(scope="module")
def run(programs, text, tmp_path_factory):
  """A workdir after four steps, evaluated after the second and the last."""
  workdir = tmp_path_factory.mktemp("runs") / "small"
  finished = programs.run(
    "train", f"--workdir={workdir}", *SMALL, "--config.data.source=text",
    f"--config.data.path={text}", "--config.data.sequence_length=32", "--config.data.batch_size=4",
    "--config.train.steps=4", "--config.train.eval_every=2", "--config.train.checkpoint_every=2",
    "--config.train.log_every=2", "--config.train.sample_tokens=5",
    "--config.train.baselines=False",
  )  # fmt: skip
  assert finished.code == 0, finished.err
  return workdir, finished


def test_what_training_prints(run):
  workdir, finished = run
  progress = [line for line in finished.err.splitlines() if not line.startswith("step ")]
  assert progress == [], "nothing but progress belongs on stderr"
  for words in (
    "parameters",
    "data text, bytes",
    "batch  4 x 32",
    "this model",
    "curves",
    "sample",
  ):
    assert words in finished.out


def direct_bits_per_byte(workdir, data):
  """From the logits of the text as one row."""
  loaded = runs.load(workdir, "last")
  model = state.merge(loaded.parts, loaded.params)
  ids = np.array([256, *data, 256])
  logits = np.asarray(model(jnp.asarray(ids[None, :-1]))[0][0], np.float64)
  normaliser = np.log(np.exp(logits).sum(-1))
  nats = normaliser - logits[np.arange(len(ids) - 1), ids[1:]]
  return nats.sum() / math.log(2) / len(data), nats.mean()


def loss_by_rows(workdir, data, length, overlap):
  """Rows of `length` that start anew; each counts its targets but the first `overlap` of them."""
  loaded = runs.load(workdir, "last")
  model = state.merge(loaded.parts, loaded.params)
  forward = jax.jit(lambda tokens: model(tokens))
  ids = np.array([256, *data, 256])
  losses, start = [], 0
  while start + (overlap if start else 0) < len(ids) - 1:
    row = ids[start : start + length + 1]
    padded = np.pad(row[:-1], (0, length + 1 - len(row)))
    logits = np.asarray(forward(jnp.asarray(padded[None]))[0][0], np.float64)[: len(row) - 1]
    nats = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(row) - 1), row[1:]]
    losses.extend(nats[overlap if start else 0 :])
    start += length - overlap
  assert len(losses) == len(ids) - 1
  return np.mean(losses)


def test_evaluate(programs, run, text, tmp_path):
  workdir, _ = run
  data = text.read_bytes()
  cut = data.rfind(b"\n", 0, int(len(data) * 0.94)) + 1

  def evaluate(*flags):
    file = tmp_path / "result.json"
    finished = programs.run("evaluate", f"--workdir={workdir}", f"--json={file}", *flags)
    assert finished.code == 0, finished.err
    assert finished.err == ""
    return json.loads(file.read_text())

  whole = evaluate("--step=last", f"--sequence_length={len(data) - cut + 1}")
  per_byte, loss = direct_bits_per_byte(workdir, data[cut:])
  np.testing.assert_allclose([whole["bits_per_byte"], whole["loss"]], [per_byte, loss], rtol=1e-5)
  assert whole["step"] == 4
  for overlap in (0, 24):
    found = evaluate("--step=last", f"--overlap={overlap}")["loss"]
    np.testing.assert_allclose(found, loss_by_rows(workdir, data[cut:], 32, overlap), rtol=1e-5)
  train = evaluate("--step=2", "--split=train", "--max_tokens=64")
  assert (train["step"], train["split"]) == (2, "train")
  assert train["loss"] != whole["loss"]
  copy = tmp_path / "copy.txt"
  copy.write_bytes(data)
  other = evaluate(f"--data_path={copy}", "--step=last")
  by_rows = loss_by_rows(workdir, data[cut:], 32, 0)
  np.testing.assert_allclose(other["loss"], by_rows, rtol=1e-5)


def test_a_trained_model_with_other_fields(programs, run, tmp_path):
  workdir, _ = run
  losses, file = [], tmp_path / "result.json"
  for fields in ("{}", '{"dtype": "bfloat16"}'):
    flags = [f"--workdir={workdir}", f"--json={file}", f"--model_fields={fields}"]
    assert programs.run("evaluate", *flags).code == 0
    losses.append(json.loads(file.read_text())["loss"])
  assert 0 < abs(losses[1] - losses[0]) < 0.02 * losses[0]
  target = tmp_path / "gpt2"
  source = pathlib.Path(__file__).parent.parent / "zoo" / "data" / "gpt2"
  assert programs.run("import_weights", f"--source={source}", f"--workdir={target}").code == 0
  tokens = jnp.arange(8)[None]
  for variant in ("softmax", "softmax_rw_p15"):
    loaded = runs.load(target, model_fields=dict(variant=variant))
    logits, _ = state.merge(loaded.parts, loaded.params)(tokens)
    expected, _ = softplus_weights.import_weights(source, variant=variant)(tokens)
    np.testing.assert_array_equal(logits, expected)


def test_generate(programs, run, tmp_path):
  workdir, _ = run
  flags = [f"--workdir={workdir}", "--tokens=9", "--temperature=0", "--ignore_end"]
  prompts = ["the lazy", "naïve"]
  single = [programs.run("generate", *flags, f"--prompt={prompt}") for prompt in prompts]
  assert [one.code for one in single] == [0, 0], single
  together = programs.run("generate", *flags, *(f"--prompt={prompt}" for prompt in prompts))
  file = tmp_path / "prompts"
  file.write_text("\n".join(prompts) + "\n", encoding="utf-8")
  from_file = programs.run("generate", *flags, f"--prompts_file={file}")
  assert from_file.out == together.out
  for prompt, one in zip(prompts, single, strict=True):
    assert one.out.startswith(prompt)
    assert f"=== {one.out.strip()}\n" in together.out


def test_import_and_train_on(programs, run, text, tmp_path):
  """A published checkpoint becomes a workdir that generates as before and can be trained on."""
  workdir, _ = run
  loaded = runs.load(workdir, "last")
  config = loaded.experiment.model
  model = state.merge(loaded.parts, loaded.params)
  source = tmp_path / "published"
  source.mkdir()
  transnormer_weights.export_weights(model, config, source / "model.safetensors")
  published = dict(
    vocab_size=257, decoder_embed_dim=32, decoder_layers=2, decoder_attention_heads=2, glu_dim=48,
    pad_token_id=None, bos_token_id=None, eos_token_id=256,
  )  # fmt: skip
  (source / "config.json").write_text(json.dumps(published))
  target = tmp_path / "imported"
  flags = [f"--source={source}", f"--workdir={target}", "--tokenizer=bytes", "--prompt=the "]
  imported = programs.run("import_weights", *flags)
  assert imported.code == 0, imported.err
  count = sum(value.size for value in loaded.params.values())
  assert f"{count:,} parameters" in imported.out
  logits = model(jnp.asarray([[256, *b"the "]]))[0][0, -1]
  assert f"{float(logits.max()):.4f}" in imported.out
  for name, value in runs.load(target).params.items():
    np.testing.assert_array_equal(value, loaded.params[name])
  again = programs.run("import_weights", *flags)
  assert again.code == 2
  assert "--workdir must not hold a run yet" in again.err
  trained = programs.run(
    "train", "--config=lm", f"--workdir={target}", *SMALL, f"--config.data.path={text}",
    "--config.data.sequence_length=32", "--config.data.batch_size=4", "--config.train.steps=1",
    "--config.model.loss_chunk=256", "--config.train.sample_tokens=0",
    "--config.optimizer.learning_rate=1e-9",
  )  # fmt: skip
  assert trained.code == 0, trained.err
  for name, value in runs.load(target, "last").params.items():
    np.testing.assert_allclose(value, loaded.params[name], atol=1e-6)


@pytest.mark.parametrize("program", ["train", "evaluate", "generate", "import_weights"])
@pytest.mark.parametrize("flag", ["--help", "--helpshort"])
def test_help(programs, program, flag):
  finished = programs.run(program, flag)
  assert finished.code in (0, 1)  # absl's choice
  assert f"python -m attnzoo.experiments.{program}" in finished.out
  assert "--workdir" in finished.out
  assert "Traceback" not in finished.out + finished.err


TRAIN = {
  "--stepz=3": "Unknown command line flag 'stepz'",
  "more": "unexpected arguments more",
  "--config=zzz": "--config must name a config file; got 'zzz' (known: based_pile,",
  "--config=stdlib_smal": "did you mean 'stdlib_small'?",
  "--config=lm:transnormer-1B": "did you mean 'transnormer-1b'?",
  "--config.train.stepz=3": "there is no field 'stepz'; did you mean 'steps'?",
  "--config.model.nlayers=3": "did you mean 'num_layers'?",
  "--config.trian.steps=3": "did you mean 'train'?",
  "--config.train.steps=abc": "invalid literal for int() with base 10: 'abc'",
  "--config.train.steps=-3": "TrainConfig: steps must be at least 1; got -3",
  "--config.optimizer.learning_rate=fast": "could not convert string to float: 'fast'",
  "--config.model.family=based2": "name must be a known family",
  "--config.model.dtype=float33": "dtype must be",
  "--config.model.activation=sillu": "did you mean 'silu'?",
  "--config.data.source=texts": "did you mean 'text'?",
  "--config.data.source=text --config.data.path=nowhere.txt": "got nowhere.txt",
  "--config.data.source=text --config.data.path=empty.txt": "the empty file empty.txt",
  "--config.mesh.model=3": "must be the 1 devices; got 1 x 1 x 3",
  "--config.train.grad_accumulation=3": "multiple of train.grad_accumulation (3); got",
  "--config.model.vocab_size=100": "model.vocab_size must be at least the data's 257",
  "--config=openwebtext_nano": "got data/openwebtext",
}
OTHERS = {
  ("evaluate", "--workdir=nowhere"): "must hold a run with a config.json; got nowhere",
  ("evaluate", "--workdir={run} --split=tset"): "split must be one of",
  ("evaluate", "--workdir={run} --overlap=32"): "overlap must lie in 0..31",
  ("evaluate", "--workdir={run} --step=7"): "must be 'best', 'last' or one of [2, 4]; got '7'",
  ("evaluate", "--workdir={run} --data_path=nowhere"): "got nowhere",
  ("evaluate", "--workdir={run} --model_fields=[1]"): "--model_fields must be a JSON object",
  ("generate", '--workdir={run} --model_fields={"head":2}'): "did you mean 'heads'",
  ("evaluate", '--workdir={run} --model_fields={"features":64}'): "is (257, 64) and not (257, 32)",
  ("generate", "--workdir=nowhere"): "must hold a run with a config.json; got nowhere",
  ("generate", "--workdir={run} --temperature=-1"): "temperature must be at least 0; got -1.0",
  ("generate", "--workdir={run} --tokens=0"): "flag --tokens=0",
  ("generate", "--workdir={run} --prompts_file=nowhere"): "nowhere",
  ("import_weights", ""): "--source must be given",
  ("import_weights", "--source=nowhere --workdir=new"): "source must exist; got nowhere",
  ("import_weights", "--source=. --workdir=new --model=transnormer3-15b"): "cannot be imported",
  ("import_weights", "--source=. --workdir=new --model=transnormer-1B"): "'transnormer-1b'",
}


@pytest.mark.parametrize(
  ("program", "arguments", "message"),
  [
    *(("train", arguments, message) for arguments, message in TRAIN.items()),
    *((program, arguments, message) for (program, arguments), message in OTHERS.items()),
  ],
)
def test_one_line_for_what_is_wrong(program, arguments, message, programs, run, tmp_path):
  folder = pathlib.Path(programs.folder)
  (folder / "empty.txt").touch()
  arguments = arguments.replace("{run}", str(run[0])).split()
  if program == "train":
    arguments.append(f"--workdir={tmp_path / 'new'}")
  before = sorted(path.name for path in folder.iterdir() if path.suffix not in (".out", ".err"))
  finished = programs.run(program, *arguments)
  assert finished.code == 2, finished
  assert finished.err.startswith("error: ")
  assert finished.err.count("\n") == 1
  assert message in finished.err
  assert len(finished.err) < 600
  assert not (tmp_path / "new").exists()
  after = sorted(path.name for path in folder.iterdir() if path.suffix not in (".out", ".err"))
  assert after == before
