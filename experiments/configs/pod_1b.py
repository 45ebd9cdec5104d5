"""TransNormerLLM 1B on a slice of 16 TPU chips: sharded parameters, bfloat16, full remat.

Command   on every host of the slice, with a workdir that all of them see:
          python -m attnzoo.experiments.train --config=pod_1b --distributed \
            --workdir=<shared folder> --config.data.path=<folder with train.bin and val.bin>
          another shape: --config.mesh.model=2 (heads, width), --config.mesh.seq=2 (long rows)
          what it needs, told without a TPU: python -m attnzoo.experiments.compile_for \
            --model=transnormer-1b --topology=v5e:4x4 --mesh=data=16 --batch_size=64
Paper     TransNormerLLM (2023); its 1B model saw 1.2 T tokens. The recipe of the released models
          was not published: rate, batch and length are ours
Expected  not measured here
Hardware  written for v5e:4x4, 64 rows of 2048 a step; also fits v5p and v6e slices of 16
"""

from attnzoo import zoo
from attnzoo.experiments.data import DataConfig
from attnzoo.experiments.training import config


def get_config():
  return config.to_config_dict(
    config.Experiment(
      model=zoo.get_config("transnormer-1b", dtype="bfloat16", remat="full"),
      data=DataConfig(
        source="tokens",
        path="data/tokens",
        token_dtype="uint16",
        token_vocab_size=64000,
        token_end_id=2,
        sequence_length=2048,
        batch_size=64,
      ),
      optimizer=config.OptimizerConfig(
        learning_rate=3e-4, final_fraction=0.1, warmup_steps=2000, weight_decay=0.1, beta2=0.95
      ),
      train=config.TrainConfig(
        steps=1_000_000,
        log_every=20,
        eval_every=5000,
        eval_tokens=2_000_000,
        checkpoint_every=2000,
        sample_tokens=0,
      ),
      mesh=config.MeshConfig(data=16),
    )
  )
