"""A small LSSAR on the source text of the Python standard library, byte by byte.

Command   python -m attnzoo.experiments.train --config=softplus_small
          --config=softplus_small:softplus-softmax-tiny, :softplus-lssa-tiny, :softplus-p3-tiny,
          :softplus-sigmoid-tiny or :softplus-relu-tiny for the models it is compared with, alike in
          all else; `evaluate --sequence_length=1024` reads longer rows than these
Paper     Softplus Attention with Re-weighting Boosts Length Extrapolation in Large Language Models
          (2025), at toy size; no published figure to compare with. `length_extrapolation` trains
          all of them and measures loss and retrieval at up to 16 times the trained length
Expected  not measured here yet
Hardware  2 CPU cores, minutes
"""

from attnzoo import zoo
from attnzoo.experiments.data import DataConfig
from attnzoo.experiments.training import config


def get_config(preset: str = "softplus-tiny"):
  return config.to_config_dict(
    config.Experiment(
      model=zoo.get_config(preset, features=192, heads=3, loss_chunk=512),
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
