"""The first author's small run (nanoTransNormer): 12 layers of width 768 on OpenWebText.

Command   python -m attnzoo.experiments.train --config=openwebtext_nano \
            --config.data.path=<folder with train.bin and val.bin of GPT-2 ids>
          or from text: --config.data.source=text --config.data.tokenizer=<GPT-2's tokenizer.json>
Paper     nanoTransNormer: AdamW 6e-4 falling to 6e-5 in 600,000 steps after 2000 of warm-up, betas
          0.9 and 0.95, weight decay 0.1, clipping at 1.0, 0.49 M tokens a step in rows of 1024; its
          loss was not published. Unlike there, the phases of LRPE are not decayed.
Expected  not measured here
Hardware  written for 8 accelerators: 480 rows a step, worked on in 10 parts of 48
"""

from attnzoo import zoo
from attnzoo.experiments.data import DataConfig
from attnzoo.experiments.training import config


def get_config():
  return config.to_config_dict(
    config.Experiment(
      model=zoo.get_config("transnormer-nano"),
      data=DataConfig(
        source="tokens",
        path="data/openwebtext",
        token_dtype="uint16",
        token_vocab_size=50257,
        token_end_id=50256,
        sequence_length=1024,
        batch_size=480,
      ),
      optimizer=config.OptimizerConfig(
        learning_rate=6e-4, final_fraction=0.1, warmup_steps=2000, weight_decay=0.1, beta2=0.95
      ),
      train=config.TrainConfig(
        steps=600_000,
        grad_accumulation=10,
        log_every=10,
        eval_every=1000,
        eval_tokens=1_000_000,
        checkpoint_every=1000,
        sample_tokens=0,
      ),
    )
  )
