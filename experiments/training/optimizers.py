"""Optimisers and learning rates: optax's, and Adafactor."""

import jax.numpy as jnp
import optax

from attnzoo.experiments.training.adafactor import adafactor
from attnzoo.experiments.training.config import OptimizerConfig

# Parameters are named by their path; these endings are matrices, to be decayed.
_EMBEDDINGS = ("embedding", "embedder.table", "positions.table", "head")
_MATRICES = ("kernel", "head_mix", *_EMBEDDINGS)


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
  """Linear warm-up to the peak, then down to `final_fraction` of it as the schedule says.

  "inverse_sqrt" knows no last step: peak sqrt(hold / max(step, hold)), constant for `hold_steps`.
  """
  peak, low = config.learning_rate, config.learning_rate * config.final_fraction
  warmup = min(config.warmup_steps, steps)
  if config.warmup_fraction:
    warmup = int(config.warmup_fraction * steps)
  rest = max(steps - warmup, 1)
  if config.schedule == "constant":
    after = [(optax.constant_schedule(peak), 0)]
  elif config.schedule == "cosine":
    after = [(optax.cosine_decay_schedule(peak, rest, config.final_fraction), 0)]
  elif config.schedule == "linear":
    after = [(optax.linear_schedule(peak, low, rest), 0)]
  elif config.schedule == "inverse_sqrt":
    hold = config.hold_steps
    after = [(lambda step: peak * jnp.sqrt(hold / jnp.maximum(step + warmup, hold)), 0)]
  else:
    decay = max(int(config.decay_fraction * steps), 1)
    start = max(steps - decay, warmup)
    falling = optax.linear_schedule(peak, low, decay)
    after = [(optax.constant_schedule(peak), 0), (falling, start - warmup)]
  schedules = [optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))]
  schedules += [schedule for schedule, _ in after]
  return optax.join_schedules(schedules, [warmup + offset for _, offset in after])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
  """Clipping, then AdamW, Adafactor or Muon with weight decay on what `config.decayed` names.

  Adafactor's is the gradient of `weight_decay` / 2 times the sum of squares: part of the loss.
  """
  rate = learning_rate(config, steps)
  masks = dict(
    matrices=_matrix_mask, weights=_weight_mask, all_but_biases=_no_bias_mask, everything=None
  )
  mask = masks[config.decayed]
  if config.name == "adamw":
    update = optax.adamw(
      rate, config.beta1, config.beta2, weight_decay=config.weight_decay, mask=mask
    )
  elif config.name == "adafactor":
    update = adafactor(rate)
    if config.weight_decay:
      update = optax.chain(optax.add_decayed_weights(config.weight_decay, mask), update)
  else:
    update = optax.contrib.muon(
      rate,
      weight_decay=config.weight_decay,
      weight_decay_mask=_matrix_mask,
      adam_b1=config.beta1,
      adam_b2=config.beta2,
      adam_weight_decay=config.weight_decay,
      consistent_rms=0.2,
      muon_weight_dimension_numbers=_muon_dimensions,
    )
  clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
  return optax.chain(clip, update)


def _matrix_mask(params: dict) -> dict[str, bool]:
  return {name: name.endswith(_MATRICES) for name in params}


def _weight_mask(params: dict) -> dict[str, bool]:
  return {name: not name.endswith(("bias", *_EMBEDDINGS)) for name in params}


def _no_bias_mask(params: dict) -> dict[str, bool]:
  return {name: not name.endswith("bias") for name in params}


def _muon_dimensions(params: dict) -> dict[str, optax.contrib.MuonDimensionNumbers | None]:
  """Which axes of each stacked kernel are its rows and columns; None leaves it to AdamW."""
  layouts = {
    "heads_in.kernel": optax.contrib.MuonDimensionNumbers((2,), (3, 4)),  # [L, parts, D, H, K]
    "heads_out.kernel": optax.contrib.MuonDimensionNumbers((1, 2), (3,)),  # [L, H, V, D]
  }
  dense = optax.contrib.MuonDimensionNumbers((1,), (2,))  # [L, in, out]
  single = optax.contrib.MuonDimensionNumbers((0,), (1,))  # [in, out]

  def dimensions(name):
    if not name.endswith("kernel"):
      return None
    if not name.startswith("groups."):
      return single
    return next((d for ending, d in layouts.items() if name.endswith(ending)), dense)

  return {name: dimensions(name) for name in params}
