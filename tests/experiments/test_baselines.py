"""Baselines against a plain implementation, and their order on a real text."""

import lzma
import math
import os
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from attnzoo.experiments import baselines

TRAIN = b"the cat sat on the mat. the dog sat on the log. a cat and a dog, and \xff\x00 bytes. " * 3
HELD = b"the dog and the cat sat on a log; zebra \x01"


def witten_bell(train, context, byte):
  """P(byte | context) by dictionaries, straight from the equation."""
  followers = defaultdict(Counter)
  for k in range(len(context) + 1):
    for i in range(k, len(train)):
      followers[train[i - k : i]][train[i]] += 1
  probability = 1 / 256
  for k in range(len(context) + 1):
    seen = followers.get(context[len(context) - k :]) if k else followers[b""]
    if seen:
      types = len(seen)
      probability = (seen[byte] + types * probability) / (sum(seen.values()) + types)
  return probability


@pytest.mark.parametrize("order", [0, 1, 2, 3, 5])
def test_probabilities_follow_the_equation(order):
  # The longest context of `witten_bell` is counted over the whole text, like ours.
  expected = [witten_bell(TRAIN, HELD[max(0, i - order) : i], HELD[i]) for i in range(len(HELD))]
  model = baselines.ByteNgram(TRAIN, order)
  np.testing.assert_allclose(model.probability(HELD), expected, rtol=1e-12)
  expected_bits = -sum(map(math.log2, expected)) / len(HELD)
  bits = baselines.ngram_bits_per_byte(TRAIN, HELD, order)
  assert bits == pytest.approx(expected_bits, rel=1e-12)


@pytest.mark.parametrize("context", [b"", b"t", b"the", b"\xff\x00", b"never seen"])
def test_probabilities_sum_to_one(context):
  model = baselines.ByteNgram(TRAIN, 3)
  total = sum(model.probability(context + bytes([byte]))[-1] for byte in range(256))
  assert total == pytest.approx(1, abs=1e-12)


def test_lower_orders_of_one_model_are_the_lower_models():
  model = baselines.ByteNgram(TRAIN, 4)
  lower = baselines.ByteNgram(TRAIN, 2)
  np.testing.assert_array_equal(model.probability(HELD, 2), lower.probability(HELD))


def test_xz_alone_and_after_train():
  alone = baselines.xz_bits_per_byte(b"", HELD)
  packed = lzma.compress(HELD, preset=9 | lzma.PRESET_EXTREME)
  assert lzma.decompress(packed) == HELD
  assert alone == 8 * len(packed) / len(HELD)
  assert baselines.xz_bits_per_byte(TRAIN, HELD, after_train=True) < alone


def test_table_names_every_baseline(capsys):
  figures = baselines.print_baselines(TRAIN, HELD, orders=(1, 3), xz_after_train=True)
  assert list(figures) == ["xz -9e", "xz -9e after train", "order-1 bytes", "order-3 bytes"]
  assert figures["order-3 bytes"] < figures["order-1 bytes"]
  printed = capsys.readouterr().out
  for name, value in figures.items():
    assert f"{value:.3f} bits per byte" in printed
    assert name in printed
  assert f"{len(HELD)} held-out bytes" in printed


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: baselines.ByteNgram(TRAIN, 8), "order must lie in 0..7; got 8"),
    (lambda: baselines.ByteNgram(b"ab", 3), "train must be longer than the order 3; got 2 bytes"),
    (lambda: baselines.ByteNgram(TRAIN, 1).probability(HELD, 2), "order must lie in 0..1; got 2"),
    (lambda: baselines.ngram_bits_per_byte(TRAIN, b"", 1), "data must hold text; got 0 bytes"),
    (lambda: baselines.xz_bits_per_byte(TRAIN, b""), "validation must hold text; got 0 bytes"),
  ],
)
def test_errors(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def run(*arguments):
  root = Path(__file__).parents[2]
  command = [sys.executable, "-m", "attnzoo.experiments.baselines", *arguments]
  environment = os.environ | dict(PYTHONPATH=str(root / ".ns"))
  return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_command_prints_the_table_or_one_line_of_error(tmp_path):
  path = tmp_path / "book.txt"
  path.write_bytes(b"some words in a line\n" * 100)
  done = run(f"--path={path}", "--orders=1,2")
  assert done.returncode == 0, done.stderr
  assert "order-2 bytes" in done.stdout
  failed = run("--path=/missing")
  assert failed.returncode == 1
  assert failed.stderr.startswith("error: data: path must name an existing file or folder")
  assert failed.stderr.count("\n") == 1
