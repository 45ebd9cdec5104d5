"""Fine-tuning of RAT on prompts with answers: `--config=rat_sft:<preset>`.

Data      .jsonl, one {"prompt": ..., "answer": ...} a line (--config.data.prompt_field and
          answer_field name others); without a validation_path 6 % of the prompts are held out
Command   python -m attnzoo.experiments.import_weights --model=rat-xl --source=<ratl16.pth> \
            --tokenizer=<LLaMA's tokenizer.json> --workdir=runs/rat-xl
          python -m attnzoo.experiments.train --config=rat_sft:rat-xl \
            --config.train.init_from=runs/rat-xl --config.data.path=<train.jsonl> \
            --config.data.tokenizer=<LLaMA's tokenizer.json>
          a model trained here: --config=rat_sft:rat-swa-tiny --config.train.init_from=<its workdir>
          with the fields of its --config.model that were changed
Paper     RAT (2025), fine-tuning recipe of the released code: 1 epoch in batches of 128 rows of
          4096 tokens, AdamW 1e-5 falling to 1e-6 along a cosine after 5 % of warm-up, betas 0.9 and
          0.95, weight decay 0.01, clipping at 1.0; one example a row, too long ones lose their
          middle (`data/sft.py`). NarrativeQA with summaries, F1: attention 61.3, rat 60.8, with
          windows 63.3 and 63.2; QMSum, Rouge-L: 23.4, 23.3, 23.4, 24.6.
Unlike    there, an epoch has every example once (there they are drawn with replacement).
          --config.data.sft_pack=True puts several short examples into a row, with as many fewer
          steps
Expected  not measured here
Hardware  1.3 B weights: accelerators, 128 rows a step, worked on in 8 parts of 16; the tiny presets
          a CPU
"""

from attnzoo import zoo
from attnzoo.experiments.data import DataConfig
from attnzoo.experiments.training import config


def get_config(preset: str = "rat-xl"):
  model = zoo.get_config(preset)
  of_bytes = model.vocab_size == 257
  return config.to_config_dict(
    config.Experiment(
      model=zoo.get_config(preset, remat="none" if of_bytes else "full"),
      data=DataConfig(
        source="sft",
        path="data/sft/train.jsonl",
        tokenizer="bytes" if of_bytes else "data/sft/tokenizer.json",
        sequence_length=512 if of_bytes else 4096,
        batch_size=128,
      ),
      optimizer=config.OptimizerConfig(
        learning_rate=1e-5,
        final_fraction=0.1,
        schedule="cosine",
        warmup_fraction=0.05,
        weight_decay=0.01,
        decayed="everything",
        beta1=0.9,
        beta2=0.95,
        clip_norm=1.0,
      ),
      train=config.TrainConfig(
        epochs=1,
        init_from="runs/" + preset,
        grad_accumulation=8,
        log_every=10,
        eval_every=100,
        eval_tokens=1_000_000,
        checkpoint_every=100,
        sample_tokens=100,
      ),
    )
  )
