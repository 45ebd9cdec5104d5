"""The generation benchmark, run small through the real program."""

import json

import pytest

from attnzoo_testing.programs import Programs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  programs = Programs(tmp_path_factory.mktemp("programs"), JAX_PLATFORMS="cpu")
  yield programs.run
  programs.close()


@pytest.mark.slow
@pytest.mark.parametrize("prompt", [0, 16])
def test_table_and_json(run, prompt, tmp_path):
  result = run(
    "generation_speed", "--models=transnormer-tiny,attn-tiny", "--batch_size=2",
    f"--prompt={prompt}", "--tokens=8", "--repeats=3", f"--json={tmp_path / 'speed.json'}",
  )  # fmt: skip
  assert result.code == 0, result.err
  assert "| transnormer-tiny |" in result.out
  record = json.loads((tmp_path / "speed.json").read_text())
  linear, softmax = record["rows"]
  assert all(row["write_tokens_per_s"] > 0 for row in record["rows"])
  assert ("read_s" in linear) == bool(prompt)
  # Keys and values of every layer, prompt and generated tokens, and a count per layer.
  caches = 4 * 2 * 4 * 128 * (prompt + 8)
  assert caches < softmax["state_bytes"] <= caches + 4 * 4 * 4


def test_unknown_model_is_told_at_once(run):
  result = run("generation_speed", "--models=based-tinny")
  assert result.code == 2
  assert "did you mean 'based-tiny'" in result.err
