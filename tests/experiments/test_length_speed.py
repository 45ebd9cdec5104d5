"""Time of a layer against length: what is timed, and the program with its tables."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib import image

from attnzoo.experiments.lengths import layers, published, speed_report, torch_layer
from attnzoo_testing.programs import Programs

SIZES = layers.Sizes(
  features=32, heads=2, groups=2, dtype="float32", tokens=32, decode_batch=2
)  # fmt: skip
NAMES = ("attention", "rat-4", "rnn")


@pytest.mark.parametrize("name", NAMES)
def test_a_state_is_filled_as_reading_fills_it(name):
  """Counts are those after so many tokens, and every step adds one up to the last slot."""
  mixer = layers.make_mixer(name, SIZES)
  x = jnp.ones((2, 16, 32))
  state = mixer.init_state(2, 16)
  _, read = jax.jit(lambda x, state: mixer(x, state=state))(x[:, :13], state)
  filled = layers.state_after(mixer, 2, 16, 13)
  assert jax.tree.structure(filled) == jax.tree.structure(read)
  for got, expected in zip(jax.tree.leaves(filled), jax.tree.leaves(read), strict=True):
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    if jnp.issubdtype(got.dtype, jnp.integer):
      np.testing.assert_array_equal(got, expected)
    else:
      assert np.std(got) > 0
  step = jax.jit(mixer.step)
  for _ in range(3):
    y, filled = step(x[:, 0], filled)
    assert np.isfinite(y).all()
  assert layers.state_bytes(name, 16, SIZES) == sum(x.nbytes for x in jax.tree.leaves(state))


def test_passes_do_what_they_are_called():
  """Training gives gradients of the input and all parameters; decoding ends at the last slot."""
  sizes = dict(query=32 * 32, key=32 * 32, value=32 * 32, output=32 * 32)
  variables, d_x = layers.prepare("attention", "train", 16, SIZES, calls=1)()
  assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == sum(sizes.values())
  assert d_x.shape == (2, 16, 32)
  assert all(np.any(leaf) for leaf in jax.tree.leaves((variables, d_x)))
  y, _ = layers.prepare("rat-4", "prefill", 16, SIZES, calls=1)()
  assert y.shape == (2, 16, 32)
  run = layers.prepare("attention", "decode", 16, SIZES, calls=4)
  assert all(np.isfinite(run()).all() for _ in range(3))
  run()
  assert np.isnan(run()).all()  # far beyond the cache: the position really moves on


def test_memory_that_is_not_there_is_told_apart(monkeypatch):
  def fail(*_):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 3 bytes.")

  monkeypatch.setattr(layers, "_whole", fail)
  with pytest.raises(layers.OutOfMemory, match="rnn, train at 16 tokens"):
    layers.prepare("rnn", "train", 16, SIZES, calls=1)


@pytest.mark.skipif(torch_layer.obstacle() is not None, reason=str(torch_layer.obstacle()))
def test_the_torch_layer_is_attention():
  """Against our layer with the same weights."""
  import torch

  mixer = layers.make_mixer("attention", SIZES)
  kernel = np.asarray(mixer.heads_in.kernel[...])  # [3, D, H, K]
  out = np.asarray(mixer.heads_out.kernel[...])  # [H, K, D]
  x = np.random.default_rng(0).normal(size=(2, 16, 32)).astype(np.float32)
  weights = torch.tensor(kernel.transpose(0, 2, 3, 1).reshape(96, 32))
  _, _, tables = torch_layer._make(16, SIZES, "cpu")
  heads = torch_layer._heads(torch.tensor(x), weights, SIZES, tables)
  got = torch_layer._mixed(*heads, torch.tensor(out.reshape(32, 32).T.copy()), causal=True)
  np.testing.assert_allclose(got.numpy(), mixer(jnp.asarray(x))[0], atol=2e-6)
  run = torch_layer.prepare("decode", 16, SIZES, calls=2)
  assert run().shape == (2, 1, 32)


def test_published_times_stand_beside_ours():
  rows = [
    {"pass": p, "layer": name, "length": 4096, "median_s": seconds}
    for p in ("train", "decode")
    for name, seconds in (("attention", 0.3), ("rat-16", 0.1), ("torch-attention", 0.2))
  ]  # fmt: skip
  setting = dict(features=32, heads=2, tokens=64, decode_batch=1, dtype="float32")
  env = dict(device="cpu", platform="cpu", processor="p", cpu_threads=2, versions={}, commit=None,
             date="2026")  # fmt: skip
  text = speed_report.markdown(dict(setting=setting, environment=env, rows=rows, not_run=["x: y"]))
  assert "| 4,096 | 300 | 100 | 200 | 2.00 | 120 | 150 | 75 | 0.80 |" in text
  assert "| 131,072 | - | - | - | - | out of memory | 13.1 | 0.4 | - |" in text
  assert "not run: x: y" in text
  for times in published.LATENCY.values():
    assert {4096, 16384, 131072} == set(times)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  programs = Programs(tmp_path_factory.mktemp("programs"))
  yield programs.run
  programs.close()


@pytest.mark.slow
def test_program(run, tmp_path):
  result = run(
    "length_speed", "--layers=attention,rat-4", "--passes=prefill,decode", "--lengths=16,32",
    "--features=16", "--heads=2", "--tokens=32", "--decode_batch=2", "--repeats=3",
    "--most_gib=0.000007", f"--workdir={tmp_path}",
  )  # fmt: skip
  assert result.code == 0, result.err
  assert "## decoding" in result.out
  assert (tmp_path / "speed.md").read_text() in result.out
  record = json.loads((tmp_path / "speed.json").read_text())
  times = {(row["pass"], row["layer"], row["length"]): row for row in record["rows"]}
  assert len(times) == 2 * 2 * 2 - 1  # at 32 tokens the caches of attention are too large
  assert ("decode", "attention", 32) not in times
  assert "--most_gib" in record["not_run"][0]
  assert all(row["median_s"] > 0 and row["runs"] == 3 for row in record["rows"])
  assert image.imread(tmp_path / "speed.png").ndim == 3
  for flag, message in (
    ("--layers=rat", "--layers must be of attention, rnn, rat-"),
    ("--lengths=5", "--lengths must divide --tokens"),
    ("--lengths=a", "--lengths must be whole numbers"),
    ("--heads=3", "--features must be a multiple"),
    ("--passes=trian", "--passes must be of"),
  ):
    refused = run("length_speed", flag)
    assert refused.code == 2
    assert message in refused.err
