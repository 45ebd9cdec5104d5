"""The first author's character-level toy run (nanoTransNormer), on bytes.

Command   python -m attnzoo.experiments.train --config=char_toy
          with a text of your own: --config.data.path=<file>
Paper     nanoTransNormer's shakespeare_char: 6 layers, 3 heads, width 384, rows of 256, 64 of them,
          1e-3 falling to 1e-4 in 2000 steps after 100 of warm-up, beta2 0.99; no published loss
Expected  not measured here: 2000 steps are 33 M tokens, about an hour on two CPU cores
Hardware  any GPU, or a patient CPU
"""

from attnzoo import zoo
from attnzoo.experiments.data import ByteTokenizer, DataConfig
from attnzoo.experiments.training import config


def get_config():
  return config.to_config_dict(
    config.Experiment(
      model=zoo.get_config("transnormer-nano-char", vocab_size=ByteTokenizer.vocab_size),
      data=DataConfig(sequence_length=256, batch_size=64),
      optimizer=config.OptimizerConfig(
        learning_rate=1e-3, final_fraction=0.1, warmup_steps=100, beta2=0.99
      ),
      train=config.TrainConfig(steps=2000, eval_every=250, eval_tokens=262_144),
    )
  )
