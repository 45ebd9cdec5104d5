"""The Routing Transformer's published runs: `--config=routing_published:<preset>`.

Command   python -m attnzoo.experiments.train --config=routing_published:routing-enwik8-8k \
            --config.data.path=enwik8
          routing-wikitext103-4k (a folder of wiki.*.tokens), routing-pg19 (a folder of train,
          validation and test), routing-imagenet64, routing-cifar10, and their -local baselines.
          Without a leak: --config.model.membership=causal_recent --config.model.positions=rotary
Paper     Efficient Content-Based Sparse Attention with Routing Transformers (2021): test perplexity
          15.8 (WikiText-103), 0.99 bits per byte (enwik8), 33.2 word perplexity (PG-19), 3.43 bits
          per dim (ImageNet-64); all of them `xent_teacher_forced_leaky`. The recipe is that of the
          released code: Adafactor, 0.01 for 10,000 steps, then falling with the inverse root
Expected  not run here: it needs accelerators. `xent_prefix` is what the models really predict
Hardware  PG-19: 128 TPU v3 cores, weeks
"""

from attnzoo import zoo
from attnzoo.experiments.data import DataConfig
from attnzoo.experiments.training import config

# Name of the data in a preset -> source, tokens of a row (0: a picture), weight decay in the loss.
_DATA = {
  "wikitext103": ("wikitext", 4096, 2e-5),
  "enwik8": ("enwik8", 8192, 0.0),
  "pg19": ("pg19", 8192, 0.0),
  "imagenet64": ("imagenet64", 0, 0.0),
  "cifar10": ("cifar10", 0, 0.0),
  "mnist": ("mnist", 0, 0.0),
}


def get_config(preset: str = "routing-enwik8-8k"):
  kind = preset.removeprefix("routing-").partition("-")[0]
  if kind not in _DATA:
    raise ValueError(
      f"routing_published: preset must be one of published data ({', '.join(_DATA)}); got"
      f" {preset!r} (lm:<preset> trains any model)"
    )
  source, length, decay = _DATA[kind]
  if preset.endswith("-1k"):
    length = 1024
  elif preset.endswith("-12k"):
    length = 12288
  overrides = dict(vocab_size=257) if kind == "enwik8" else {}  # our bytes have an end id
  data = DataConfig(
    source=source, path=source, sequence_length=length, batch_size=128, split_documents=False
  )
  return config.to_config_dict(
    config.Experiment(
      model=zoo.get_config(preset, dtype="bfloat16", remat="full", **overrides),
      data=data,
      optimizer=config.OptimizerConfig(
        name="adafactor",
        learning_rate=0.01,
        schedule="inverse_sqrt",
        warmup_steps=0,
        hold_steps=10_000,
        weight_decay=decay,
        decayed="all_but_biases",
        clip_norm=0,
      ),
      train=config.TrainConfig(
        steps=1_000_000, log_every=50, eval_every=5000, eval_tokens=1_000_000, checkpoint_every=2500
      ),
    )
  )
