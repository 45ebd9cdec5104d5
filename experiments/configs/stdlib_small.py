"""A small TransNormerLLM on the source text of the Python standard library, byte by byte.

Command   make train        (python -m attnzoo.experiments.train --config=stdlib_small)
Paper     Various Lengths, Constant Speed (2024), at toy size; no published figure to compare with
Expected  see README.md, "The main job"
Hardware  2 CPU cores, under 5 minutes
"""

from attnzoo import zoo
from attnzoo.experiments.data import DataConfig
from attnzoo.experiments.training import config


def get_config():
  return config.to_config_dict(
    config.Experiment(
      model=zoo.get_config(
        "transnormer-tiny", features=192, num_layers=4, heads=6, glu_dim=512, loss_chunk=512
      ),
      data=DataConfig(source="stdlib", sequence_length=256, batch_size=16),
      optimizer=config.OptimizerConfig(learning_rate=3e-3, warmup_steps=50, weight_decay=0.1),
      train=config.TrainConfig(
        steps=600,
        log_every=20,
        eval_every=200,
        eval_tokens=131_072,
        checkpoint_every=200,
        sample_tokens=400,
        baselines=True,
      ),
    )
  )
