"""A small Routing Transformer on the source text of the Python standard library, in byte pairs.

Command   python -m attnzoo.experiments.train --config=routing_small
          --config=routing_small:routing-tiny-local for the same with local attention alone
Paper     Efficient Content-Based Sparse Attention with Routing Transformers (2021), at toy size; no
          published figure to compare with. Membership "causal_recent" does not leak, and routed
          keys are the queries of the token before. As published it trains with
          --config.model.membership=official --config.model.routed_keys=queries
          --config.model.positions=shaw: look at `xent_prefix` then, not at
          `xent_teacher_forced_leaky`
Expected  1.270 and 1.268 bits per byte of all held-out text, 1.470 and 1.475 with local attention
          alone (seeds 0 and 1; Python 3.12.1)
Hardware  one CPU core, a quarter of an hour
"""

import pathlib

from attnzoo import zoo
from attnzoo.experiments import data
from attnzoo.experiments.data import DataConfig
from attnzoo.experiments.training import config

TOKENIZER = pathlib.Path(data.__file__).parent / "stdlib_bpe.json"  # `make_tokenizer`, 1024 ids


def get_config(preset: str = "routing-tiny"):
  return config.to_config_dict(
    config.Experiment(
      model=zoo.get_config(preset, vocab_size=1024, loss_chunk=512),
      data=DataConfig(
        source="stdlib", tokenizer=str(TOKENIZER), sequence_length=1024, batch_size=4
      ),
      optimizer=config.OptimizerConfig(
        name="muon", learning_rate=4e-3, schedule="linear", warmup_steps=50
      ),
      train=config.TrainConfig(
        steps=1000,
        log_every=10,
        eval_every=200,
        eval_tokens=65_536,
        checkpoint_every=200,
        sample_tokens=400,
        baselines=True,
      ),
    )
  )
