"""BASED and its attention baselines on the Pile: `--config=based_pile:<preset>`.

Command   python -m attnzoo.experiments.train --config=based_pile:based-360m \
            --config.data.path=<folder with train.bin and val.bin of GPT-2 ids>
          or from text: --config.data.source=text --config.data.tokenizer=<GPT-2's tokenizer.json>
          one step compiled for a slice that is not there: python -m \
            attnzoo.experiments.compile_for --model=based-360m --topology=v5e:4x4 --mesh=data=16
Paper     Simple linear attention language models balance the recall-throughput tradeoff (2024):
          AdamW, 8e-4 falling to 8e-5 along a cosine, betas 0.9 and 0.95, weight decay 0.1, clipping
          at 1.0, 256 rows of 2048 tokens a step; 20,000 steps (10 B tokens) with 200 of warm-up, or
          100,000 (50 B) with 1000 for based-1b-50b. Its Pile perplexity at 10 B tokens: based-360m
          8.65, attn-360m 8.39, based-1b 7.43, attn-1b 7.26; at 50 B: 6.30 and 6.28.
Expected  not measured here
Hardware  written for 8 accelerators: 256 rows a step, worked on in 4 parts of 64
"""

from attnzoo import zoo
from attnzoo.experiments.data import DataConfig
from attnzoo.experiments.training import config


def get_config(preset: str = "based-360m"):
  long = preset.endswith("-50b")
  return config.to_config_dict(
    config.Experiment(
      model=zoo.get_config(preset, dtype="bfloat16", remat="full"),
      data=DataConfig(
        source="tokens",
        path="data/pile",
        token_dtype="uint16",
        token_vocab_size=50257,
        token_end_id=50256,
        sequence_length=2048,
        batch_size=256,
      ),
      optimizer=config.OptimizerConfig(
        learning_rate=8e-4,
        final_fraction=0.1,
        schedule="cosine",
        warmup_steps=1000 if long else 200,
        weight_decay=0.1,
        decayed="weights",
        beta1=0.9,
        beta2=0.95,
        clip_norm=1.0,
      ),
      train=config.TrainConfig(
        steps=100_000 if long else 20_000,
        grad_accumulation=4,
        log_every=20,
        eval_every=1000,
        eval_tokens=2_000_000,
        checkpoint_every=1000,
        sample_tokens=0,
      ),
    )
  )
