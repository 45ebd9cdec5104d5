"""A sliding window on multi-query associative recall, behind a short convolution.

Command   python -m attnzoo.experiments.train --config=mqar_sliding          (window 64, width 128)
          --config=mqar_sliding:256 and the other sizes of the presets mqar-sliding-<window>
          --config=mqar_sliding:small: window 32, width 32, a smaller task, for two CPU cores
Paper     figure 2 of the paper of `mqar_based`, whose recipe this is
Expected  paper: 0.07, 0.14, 0.31, 0.51, 0.66, 0.80, 0.94, 1.00 with windows of 8, 16, ...,
          1024; not measured here.
          small: 0.720 at the configured rate, 0.02 (measured by `recall_sweep`)
Hardware  paper: a GPU; small: 2 CPU cores, a few minutes
"""

from attnzoo import zoo
from attnzoo.experiments.recall import points, tasks
from attnzoo.experiments.training import config


def get_config(size: str = "64"):
  if size == "small":
    model = points.SERIES["sliding"].sizes["small"]["width 32, window 32"]
    return config.to_config_dict(tasks.SMALL.experiment(model))
  model = zoo.get_config(f"mqar-sliding-{size}", loss_chunk=64)
  return config.to_config_dict(tasks.PAPER.experiment(model))
