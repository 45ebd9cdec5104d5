"""Models whose loss in one pass over a text is no likelihood, and the same models without that.

Routed attention with membership "official" lets the future through (`Routing`). Its two losses have
fixed names, which every report uses.
"""

import dataclasses
from typing import Any

from attnzoo.experiments.training import config, state

LEAKY = "xent_teacher_forced_leaky"
HONEST = "xent_prefix"


def leaks(model: Any) -> bool:
  """Whether outputs of the model of this configuration depend on later tokens."""
  return getattr(model, "membership", None) == "official"


def honest(experiment: config.Experiment) -> config.Experiment:
  """The experiment with a model of the same parameters that sees no later tokens.

  It is there to be evaluated: its attention has no dropout, which only "official" offers.
  """
  model = dataclasses.replace(experiment.model, membership="topk_prefix", attention_dropout=0.0)
  return dataclasses.replace(experiment, model=model)


def honest_parts(experiment: config.Experiment) -> state.Parts:
  """What the parameters of the leaking model are merged with to be evaluated honestly."""
  other = honest(experiment)
  parts, _ = state.abstract_state(other)
  return parts._replace(constants=state.model_constants(other))
