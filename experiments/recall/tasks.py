"""What the models of the recall experiments are trained and tested on.

`PAPER` is the setting of figure 2 of "Simple linear attention language models balance the
recall-throughput tradeoff" (2024), from the code of Zoology (2023): 180,000 examples of up to 256
tokens, tests of up to 1024. `SMALL` asks the same of smaller models on two CPU cores.
"""

import dataclasses
from typing import Any, NamedTuple

from attnzoo.experiments.data import DataConfig
from attnzoo.experiments.training import config


class Task(NamedTuple):
  """Examples and how to train on them."""

  data: DataConfig
  optimizer: config.OptimizerConfig
  train: config.TrainConfig
  learning_rates: tuple[float, ...]  # each point is trained with all of them, the best counts
  enough: float = 0.99  # recall at which training ends

  def experiment(self, model: Any, learning_rate: float | None = None) -> config.Experiment:
    """The record of one run, for `train`; without a rate at the middle one."""
    rates = sorted(self.learning_rates)
    rate = rates[len(rates) // 2] if learning_rate is None else learning_rate
    optimizer = dataclasses.replace(self.optimizer, learning_rate=rate)
    return config.Experiment(model=model, data=self.data, optimizer=optimizer, train=self.train)


# AdamW, weight decay on everything, a cosine down to 0, no warm-up, no clipping.
_OPTIMIZER = config.OptimizerConfig(
  final_fraction=0.0, warmup_steps=0, weight_decay=0.1, decayed="everything", beta1=0.9,
  beta2=0.999, clip_norm=0.0,
)  # fmt: skip
_EPOCH = 391 + 4 * 79  # batches of 256

PAPER = Task(
  DataConfig(
    source="mqar",
    mqar_train="64:4:100000,128:8:20000,256:16:20000,256:32:20000,256:64:20000",
    mqar_test="64:4:1000,64:8:1000,64:16:1000,128:32:1000,256:64:1000,512:128:1000,1024:256:1000",
    mqar_vocab_size=8192,
    sequence_length=0,
    batch_size=256,
    seed=123,
  ),
  _OPTIMIZER,
  config.TrainConfig(
    steps=32 * _EPOCH, seed=123, log_every=50, eval_every=_EPOCH, checkpoint_every=_EPOCH
  ),
  learning_rates=(1e-3, 3.16e-3, 1e-2, 3.16e-2),
)

SMALL = Task(
  DataConfig(
    source="mqar",
    mqar_train="64:4:30000,64:8:30000,64:16:30000",
    mqar_test="64:4:500,64:8:500,64:16:500",
    mqar_vocab_size=256,
    mqar_order="mixed",
    sequence_length=0,
    batch_size=64,
    seed=123,
  ),
  _OPTIMIZER,
  config.TrainConfig(steps=1500, seed=123, log_every=100, eval_every=250, checkpoint_every=250),
  learning_rates=(0.01, 0.015, 0.02, 0.03),
)

TASKS = {"small": SMALL, "paper": PAPER}
