"""A small TransNormerLLM on the source text of the Python standard library, byte by byte.

Command   make train        (python -m attnzoo.experiments.train --config=stdlib_small)
Paper     Various Lengths, Constant Speed (2024), at toy size; no published figure to compare with
Expected  1.990 bits per byte of the held-out text (Python 3.12.1)
Hardware  2 CPU cores, under 5 minutes
"""

from attnzoo import zoo
from attnzoo.experiments.data import DataConfig
from attnzoo.experiments.training import config


def get_config():
  return config.to_config_dict(
    config.Experiment(
      model=zoo.get_config(
        "transnormer-tiny", features=192, num_layers=4, heads=3, glu_dim=512, loss_chunk=512
      ),
      data=DataConfig(source="stdlib", sequence_length=256, batch_size=8),
      optimizer=config.OptimizerConfig(
        name="muon", learning_rate=4e-3, schedule="linear", warmup_steps=50
      ),
      train=config.TrainConfig(
        steps=500,
        log_every=10,
        eval_every=100,
        eval_tokens=65_536,
        checkpoint_every=100,
        sample_tokens=400,
        baselines=True,
      ),
    )
  )
