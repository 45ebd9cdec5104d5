"""A small RAT on the source text of the Python standard library, byte by byte.

Command   python -m attnzoo.experiments.train --config=rat_small
          --config=rat_small:rat-tiny, :rat-rnn-tiny, :rat-attention-tiny or :rat-attention-swa-tiny
          for the models it is compared with, alike in all else
Paper     RAT: Bridging RNN Efficiency and Attention Accuracy in Language Modeling (2025), at toy
          size; no published figure to compare with
Expected  not measured here yet
Hardware  2 CPU cores, minutes
"""

from attnzoo import zoo
from attnzoo.experiments.data import DataConfig
from attnzoo.experiments.training import config


def get_config(preset: str = "rat-swa-tiny"):
  return config.to_config_dict(
    config.Experiment(
      model=zoo.get_config(preset, features=192, loss_chunk=512, train_length=256),
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
