"""Linear attention alone on multi-query associative recall: two Taylor layers, no convolution.

Command   python -m attnzoo.experiments.train --config=mqar_linear           (width 64, f 16)
          --config=mqar_linear:small: width 32, f 8, a smaller task, for two CPU cores
Paper     not a point of its figure 2; the recipe is that of `mqar_based`. Without positions and
          without a convolution nothing tells which value stands beside which key
Expected  no published figure.
          small: 0.103 at the configured rate, 0.02 (measured by `recall_sweep`); guessing among
          the values of the context gives 0.146
Hardware  64-16: a GPU; small: 2 CPU cores, a few minutes
"""

from attnzoo import zoo
from attnzoo.experiments.recall import points, tasks
from attnzoo.experiments.training import config


def get_config(size: str = ""):
  if size == "small":
    model = points.SERIES["linear"].sizes["small"]["width 32, f 8"]
    return config.to_config_dict(tasks.SMALL.experiment(model))
  model = zoo.get_config("mqar-linear-only", loss_chunk=64)
  return config.to_config_dict(tasks.PAPER.experiment(model))
