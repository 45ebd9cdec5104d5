"""Trains a model of the zoo.

    python -m attnzoo.experiments.train --config=stdlib_small --workdir=runs/stdlib_small
    python -m attnzoo.experiments.train --config=lm:transnormer-385m --config.data.path=my/texts

Any field of the configuration can be changed: --config.train.steps=500. A workdir that holds a run
is gone on with; its checkpoints, metrics.jsonl, TensorBoard files and curves.png lie there.
On a TPU pod start the same command with --distributed on every host; the workdir is shared.
"""

import pathlib

from absl import flags
from ml_collections import config_flags

from attnzoo.experiments import command_line
from attnzoo.experiments.training import config, hosts, loop, summary

_CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,  # filled in by command_line, so that errors in overrides are reported like all others
  f"Experiment: a file, or the name of one in configs/ (default {command_line.DEFAULT_CONFIG}).",
)
_WORKDIR = flags.DEFINE_string(
  "workdir", "", "Folder of the run; empty = runs/<name of the config>."
)
_EXTEND = flags.DEFINE_integer(
  "extend", 0, "Steps to go on for when the run is complete already.", lower_bound=0
)
_DISTRIBUTED = flags.DEFINE_bool(
  "distributed", False, "Train together with other processes: on a TPU pod all that is needed."
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator", "", "Where processes do not find each other: host:port of process 0."
)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "... which of the processes this is.")
_PROCESS_COUNT = flags.DEFINE_integer("process_count", None, "... how many there are.")


def main(_) -> None:
  experiment = config.from_config_dict(_CONFIG.value)
  name = pathlib.Path(flags.FLAGS["config"].config_filename.partition(":")[0]).stem
  workdir = pathlib.Path(_WORKDIR.value or f"runs/{name}")
  place = (_COORDINATOR.value, _PROCESS_ID.value, _PROCESS_COUNT.value)
  if _DISTRIBUTED.value:
    hosts.join(*place)
  elif place != ("", None, None):
    raise ValueError(
      "--coordinator, --process_id and --process_count must come with --distributed; got them"
      " without (add it, or leave them out to train with one process)"
    )
  with hosts.failing_together():
    outcome = loop.train(experiment, workdir, extend=_EXTEND.value)
    if hosts.is_first():
      summary.finish(outcome)


if __name__ == "__main__":
  command_line.run(main)
