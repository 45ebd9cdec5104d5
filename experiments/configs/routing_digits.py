"""A small Routing Transformer on scikit-learn's handwritten digits, value by value.

Command   python -m attnzoo.experiments.train --config=routing_digits
          --config=routing_digits:routing-digits-local for the same with local attention alone
Paper     Efficient Content-Based Sparse Attention with Routing Transformers (2021), at toy size and
          with membership "causal_recent", which does not leak; no published figure to compare with.
          samples.png has drawn digits above, real ones below
Expected  with data.validation_fraction=0.25 1.855 bits per dim after 600 steps (4 seeds, 1.849 to
          1.865); with local attention alone 1.872 (1.866 to 1.876)
Hardware  2 CPU cores, a minute and a half
"""

from attnzoo import zoo
from attnzoo.experiments.data import DataConfig
from attnzoo.experiments.training import config


def get_config(preset: str = "routing-digits"):
  return config.to_config_dict(
    config.Experiment(
      model=zoo.get_config(preset),
      data=DataConfig(source="digits", sequence_length=0, batch_size=32),
      optimizer=config.OptimizerConfig(
        name="muon", learning_rate=4e-3, schedule="linear", warmup_steps=50
      ),
      train=config.TrainConfig(
        steps=600, log_every=10, eval_every=100, eval_tokens=0, checkpoint_every=100,
        sample_tokens=64,
      ),
    )
  )  # fmt: skip
