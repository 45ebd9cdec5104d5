"""Any preset of the zoo as a language model: `--config=lm:<preset>`.

Command   python -m attnzoo.experiments.train --config=lm:transnormer-385m \
            --config.data.source=text --config.data.path=<folder or file> \
            --config.data.tokenizer=<tokenizer.json> --config.data.batch_size=<rows>
Paper     the recipe of the first author's small runs (nanoTransNormer): AdamW, betas 0.9 and 0.95,
          6e-4 falling to 6e-5 along a cosine, 2000 steps of warm-up, weight decay 0.1 on matrices,
          clipping at 1.0. The recipes of the released models were not published.
Expected  depends on preset and data; curves.png shows it
Hardware  385M and more need an accelerator; without --config.data.path the text is the standard
          library's, as bytes, which suits transnormer-tiny
"""

from attnzoo import zoo
from attnzoo.experiments.data import DataConfig
from attnzoo.experiments.training import config

DEFAULT = "transnormer-tiny"


def get_config(preset: str = DEFAULT):
  return config.to_config_dict(
    config.Experiment(
      model=zoo.get_config(preset, dtype="bfloat16"),
      data=DataConfig(sequence_length=1024, batch_size=16),
      optimizer=config.OptimizerConfig(
        learning_rate=6e-4,
        final_fraction=0.1,
        schedule="cosine",
        warmup_steps=2000,
        weight_decay=0.1,
        beta1=0.9,
        beta2=0.95,
        clip_norm=1.0,
      ),
      train=config.TrainConfig(
        steps=100_000,
        log_every=20,
        eval_every=2000,
        eval_tokens=1_000_000,
        checkpoint_every=1000,
      ),
    )
  )
