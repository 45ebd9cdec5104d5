"""Full attention on multi-query associative recall, behind a short convolution.

Command   python -m attnzoo.experiments.train --config=mqar_attention        (width 64)
          --config=mqar_attention:128 is the wider preset mqar-attention-128
          --config=mqar_attention:small: width 32, a smaller task, for two CPU cores
Paper     figure 2 of the paper of `mqar_based`, whose recipe this is. Left out: dropout of 0.1 on
          the embeddings and on the attention weights, and ending early above a recall of 0.99
Expected  paper: 1.00; not measured here.
          small: 0.995 after 500 steps at the configured rate, 0.02 (measured by `recall_sweep`,
          which ends there)
Hardware  paper: a GPU; small: 2 CPU cores, a few minutes
"""

from attnzoo import zoo
from attnzoo.experiments.recall import points, tasks
from attnzoo.experiments.training import config


def get_config(size: str = "64"):
  if size == "small":
    model = points.SERIES["attention"].sizes["small"]["width 32"]
    return config.to_config_dict(tasks.SMALL.experiment(model))
  model = zoo.get_config(f"mqar-attention-{size}", loss_chunk=64)
  return config.to_config_dict(tasks.PAPER.experiment(model))
