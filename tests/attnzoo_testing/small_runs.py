"""A language model of a few thousand weights and a text of a few kilobytes, to train in tests."""

import contextlib
import dataclasses
import pathlib

import jax
from jax.experimental.compilation_cache import compilation_cache

from attnzoo import zoo
from attnzoo.experiments.data import DataConfig
from attnzoo.experiments.training import config, state

WORDS = "the lazy dog ate seven naïve foxes near a river bank while nobody was looking".split()


def write_text(path: pathlib.Path, lines: int = 400, seed: int = 0) -> pathlib.Path:
  """Lines of words in an order that looks random but is always the same."""
  number, text = 12345 + seed, []
  for _ in range(lines):
    line = []
    for _ in range(7):
      number = (number * 1103515245 + 12345) % (1 << 31)
      line.append(WORDS[(number >> 16) % len(WORDS)])
    text.append(" ".join(line))
  path.write_text("\n".join(text) + "\n")
  return path


def experiment(
  text: pathlib.Path, *, model=(), optimizer=(), data=(), **train
) -> config.Experiment:
  """Two layers of width 32 over bytes; 6 steps, evaluated and saved every 3."""
  train = dict(steps=6, log_every=1, eval_every=3, checkpoint_every=3, sample_tokens=8) | train
  sizes = dict(features=32, num_layers=2, heads=2, glu_dim=48, loss_chunk=16)
  return config.Experiment(
    model=zoo.get_config("transnormer-tiny", **(sizes | dict(model))),
    data=DataConfig(
      source="text", path=str(text), **(dict(sequence_length=32, batch_size=4) | dict(data))
    ),
    optimizer=config.OptimizerConfig(
      **(dict(learning_rate=3e-3, warmup_steps=2) | dict(optimizer))
    ),
    train=config.TrainConfig(**train),
  )


def changed(base: config.Experiment, **parts) -> config.Experiment:
  """`changed(e, train=dict(steps=3))`: the experiment with some fields of its parts replaced."""
  new = {name: dataclasses.replace(getattr(base, name), **f) for name, f in parts.items()}
  return dataclasses.replace(base, **new)


@contextlib.contextmanager
def one_device(folder: pathlib.Path):
  """Inside, runs see one of the eight virtual devices, and share what they compile."""
  make_mesh = state.make_mesh
  cache = dict(
    jax_compilation_cache_dir=str(folder),
    jax_persistent_cache_min_compile_time_secs=0,
    jax_persistent_cache_min_entry_size_bytes=0,
  )
  before = {name: getattr(jax.config, name) for name in cache}
  state.make_mesh = lambda config, devices=None: make_mesh(config, devices or jax.devices()[:1])
  for name, value in cache.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()
  try:
    yield
  finally:
    state.make_mesh = make_mesh
    for name, value in before.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()
