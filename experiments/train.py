"""Trains a model of the zoo.

    python -m attnzoo.experiments.train --config=stdlib_small --workdir=runs/stdlib_small
    python -m attnzoo.experiments.train --config=lm:transnormer-385m --config.data.path=my/texts

Any field of the configuration can be changed: --config.train.steps=500. A workdir that holds a run
is gone on with; its checkpoints, metrics.jsonl, TensorBoard files and curves.png lie there.
"""

import os
import pathlib

import jax
from absl import flags
from ml_collections import config_flags

from attnzoo.experiments import command_line
from attnzoo.experiments.training import config, loop, summary

_CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,  # filled in by command_line, so that errors in overrides are reported like all others
  f"Experiment: a file, or the name of one in configs/; {command_line.DEFAULT_CONFIG} if not given.",
)
_WORKDIR = flags.DEFINE_string(
  "workdir", "", "Folder of the run; empty = runs/<name of the config>."
)
_EXTEND = flags.DEFINE_integer(
  "extend", 0, "Steps to go on for when the run is complete already.", lower_bound=0
)
_DISTRIBUTED = flags.DEFINE_bool(
  "distributed", False, "Join the other hosts of a pod (jax.distributed.initialize)."
)


def main(_) -> None:
  experiment = config.from_config_dict(_CONFIG.value)
  name = pathlib.Path(flags.FLAGS["config"].config_filename.partition(":")[0]).stem
  workdir = pathlib.Path(_WORKDIR.value or f"runs/{name}")
  if not _DISTRIBUTED.value:
    _train(experiment, workdir)
    return
  jax.distributed.initialize()
  try:
    _train(experiment, workdir)
  except BaseException as error:
    # The other hosts wait in a collective that will never end: leave at once, so that they fail
    # too, instead of hanging until the heartbeat stops.
    print(f"error: host {jax.process_index()}: {error}", flush=True)
    os._exit(3)


def _train(experiment: config.Experiment, workdir: pathlib.Path) -> None:
  outcome = loop.train(experiment, workdir, extend=_EXTEND.value)
  if jax.process_index() == 0:
    summary.finish(outcome)


if __name__ == "__main__":
  command_line.run(main)
