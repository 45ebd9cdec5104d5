"""A larger TransNormerLLM on the Python standard library's source text.

Command   make train-long        (python -m attnzoo.experiments.train --config=stdlib_long)
Paper     Various Lengths, Constant Speed (2024), at toy size; no published figure to compare with
Expected  1.652 bits per byte of the held-out text (Python 3.12.1)
Hardware  2 CPU cores, about a quarter of an hour; --config.train.steps=3400 for about an hour
"""

import dataclasses

from attnzoo import zoo
from attnzoo.experiments.configs import stdlib_small
from attnzoo.experiments.training import config


def get_config():
  small = config.from_config_dict(stdlib_small.get_config())
  return config.to_config_dict(
    dataclasses.replace(
      small,
      model=zoo.get_config(
        "transnormer-tiny", features=256, num_layers=6, heads=4, glu_dim=704, loss_chunk=512
      ),
      data=dataclasses.replace(small.data, batch_size=16),
      optimizer=dataclasses.replace(small.optimizer, learning_rate=3e-3, warmup_steps=100),
      train=dataclasses.replace(small.train, steps=650, eval_every=130, checkpoint_every=130),
    )
  )
