"""TransICD on MIMIC-III's discharge summaries, as published: `--config=transicd_mimic3:<preset>`.

Command   python -m attnzoo.experiments.train --config=transicd_mimic3 --config.data.path=mimic3 \
            --config.data.split_path=caml
          `path` has the CSVs of MIMIC-III v1.4 (or .csv.gz), `split_path` CAML's *_hadm_ids.csv
          transicd-bce-50, transicd-mean-50, transicd-gru-50: the rows of the paper's table;
          transicd-full with --config.data.labels=full; transicd-released-50 as the released code
          runs: positions by row of the batch, the shortest notes left out, the last epoch counts
Paper     TransICD (2021): micro AUC 92.3, macro AUC 89.4, micro F1 64.4, macro F1 56.2, P@5 61.7
          (all x 100, threshold 0.5, 30 epochs)
Expected  not run here: MIMIC-III needs credentials. Reproductions by others lie at micro AUC
          0.92-0.925, macro F1 0.54-0.57, micro F1 0.63-0.65, P@5 0.60-0.63
Hardware  one GPU, under three minutes an epoch as published
"""

from attnzoo import zoo
from attnzoo.experiments.data import DataConfig
from attnzoo.experiments.training import config

_EPOCH = 8066 // 8  # steps


def get_config(preset: str = "transicd-50"):
  released, full = "released" in preset, preset.endswith("full")
  return config.to_config_dict(
    config.Experiment(
      model=zoo.get_config(preset),
      data=DataConfig(
        source="mimic3", path="mimic3", labels="full" if full else "50", embedding="cbow",
        sequence_length=2500, batch_size=8, drop_remainder=released, seed=271,
      ),
      optimizer=config.OptimizerConfig(
        learning_rate=1e-3, schedule="constant", warmup_steps=0, weight_decay=0.01,
        decayed="everything", beta2=0.999, clip_norm=0.0,
      ),
      train=config.TrainConfig(
        epochs=30, seed=271, log_every=50, eval_every=_EPOCH, checkpoint_every=_EPOCH,
        sample_tokens=0, baselines=True,
      ),
    )
  )  # fmt: skip
