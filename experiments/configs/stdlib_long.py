"""The one-hour CPU run: a larger TransNormerLLM on the Python standard library's source text.

Command   make train-long        (python -m attnzoo.experiments.train --config=stdlib_long)
Paper     Various Lengths, Constant Speed (2024), at toy size; no published figure to compare with
Expected  see README.md, "The one-hour run"
Hardware  2 CPU cores, about an hour
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
        "transnormer-tiny", features=256, num_layers=6, heads=8, glu_dim=704, loss_chunk=512
      ),
      train=dataclasses.replace(small.train, steps=8000, eval_every=1000, checkpoint_every=500),
    )
  )
