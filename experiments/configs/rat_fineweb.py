"""The released RAT models and their baselines on FineWeb-Edu: `--config=rat_fineweb:<preset>`.

Presets   rat-xl, rat-swa-xl, rat-rnn-xl, rat-attention-xl, rat-attention-swa-xl
Command   python -m attnzoo.experiments.train --config=rat_fineweb:rat-xl \
            --config.data.path=<folder with train.bin and val.bin of LLaMA ids>
          or from text: --config.data.source=text --config.data.tokenizer=<LLaMA's tokenizer.json>
          one step compiled for a slice that is not there: python -m \
            attnzoo.experiments.compile_for --model=rat-xl --topology=v5e:4x4 --mesh=data=16
Paper     RAT: Bridging RNN Efficiency and Attention Accuracy in Language Modeling (2025), recipe of
          the released code: AdamW, 8e-4 falling to 1e-6 along a cosine, 5 % of warm-up, betas 0.9
          and 0.95, weight decay 0.1 on every parameter, clipping at 1.0, 512 rows of 4096 tokens a
          step, 52,452 steps (110 B tokens). Rows know no documents, and where the input is the end
          token nothing is learned. Validation perplexity: attention 7.61, rat 7.67, attention with
          a window 7.61, rat with a window 7.57.
Unlike    there, rows are cut and visited in random order, not in the order of the file
Expected  not measured here
Hardware  written for 16 accelerators: 512 rows a step, worked on in 16 parts of 32
"""

from attnzoo import zoo
from attnzoo.experiments.data import DataConfig
from attnzoo.experiments.training import config


def get_config(preset: str = "rat-xl"):
  return config.to_config_dict(
    config.Experiment(
      model=zoo.get_config(preset, dtype="bfloat16", remat="full"),
      data=DataConfig(
        source="tokens",
        path="data/fineweb_edu",
        token_dtype="uint16",
        token_vocab_size=32000,
        token_end_id=2,
        validation_fraction=0.005,
        split_documents=False,
        predict_first=False,
        sequence_length=4096,
        batch_size=512,
        seed=1005,
      ),
      optimizer=config.OptimizerConfig(
        learning_rate=8e-4,
        final_fraction=1e-6 / 8e-4,
        schedule="cosine",
        warmup_fraction=0.05,
        weight_decay=0.1,
        decayed="everything",
        beta1=0.9,
        beta2=0.95,
        clip_norm=1.0,
      ),
      train=config.TrainConfig(
        steps=52_452,
        grad_accumulation=16,
        seed=1005,
        log_every=20,
        eval_every=1000,
        eval_tokens=4_194_304,
        checkpoint_every=1000,
        sample_tokens=0,
      ),
    )
  )
