"""BASED on multi-query associative recall: a short convolution, then linear attention.

Command   python -m attnzoo.experiments.train --config=mqar_based            (width 64, f 16)
          --config=mqar_based:128-16 and the other sizes of the presets mqar-based-<width>-<f>
          --config=mqar_based:small: width 32, f 8, a smaller task, for two CPU cores
          at other rates: --config.optimizer.learning_rate=3.16e-3; `recall_sweep` tries them all
Paper     Simple linear attention language models balance the recall-throughput tradeoff (2024),
          figure 2: AdamW, the best of 1e-3, 3.16e-3, 1e-2 and 3.16e-2 falling to 0 along a cosine
          in 32 epochs, weight decay 0.1 on everything, no clipping, batches of 256, seed 123.
          Left out: dropout of 0.1 on the embeddings, and ending early above a recall of 0.99
Expected  paper: 0.892 (64-16), 0.976 (128-16), 0.711 (64-8), averaged over the seven kinds of
          test examples; not measured here.
          small: 0.944 at the configured rate, 0.02 (measured by `recall_sweep`)
Hardware  paper: a GPU; small: 2 CPU cores, a few minutes
"""

from attnzoo import zoo
from attnzoo.experiments.recall import points, tasks
from attnzoo.experiments.training import config


def get_config(size: str = "64-16"):
  if size == "small":
    model = points.SERIES["based"].sizes["small"]["width 32, f 8"]
    return config.to_config_dict(tasks.SMALL.experiment(model))
  model = zoo.get_config(f"mqar-based-{size}", loss_chunk=64)
  return config.to_config_dict(tasks.PAPER.experiment(model))
