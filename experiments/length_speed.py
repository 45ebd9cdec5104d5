"""Time of one layer against the length of the sequence: training, reading a prompt, decoding.

  python -m attnzoo.experiments.length_speed
  python -m attnzoo.experiments.length_speed --layers=attention,rat-16,rat-64,rat-128,rnn
  make length-speed ARGS="--lengths=2048,32768 --tokens=32768"

Layers are token mixers with their projections; every call of "train" (forward and backward) and
"prefill" (forward) works on equally many tokens in rows of the given length, "decode" takes one
token of each of --decode_batch sequences at that position. On a GPU the default is the setting of
RAT's single-layer figure, whose times stand beside the measured ones; on a CPU it is small. Layers
take turns, so that a busy machine disturbs them alike; the tables have medians. Tables, picture and
JSON are written into the workdir.
"""

import functools
import pathlib
import sys
from typing import Any

import jax
from absl import flags

from attnzoo.experiments import command_line
from attnzoo.experiments.benchmarking import report, timing
from attnzoo.experiments.lengths import layers, speed_report, torch_layer

FLAGS = flags.FLAGS
DTYPES = ("float32", "bfloat16")
# Defaults per platform: those of the published figure, and what two cores do in minutes.
_LARGE = dict(
  features=2048, heads=16, tokens=262_144, decode_batch=512, dtype="bfloat16", most_gib=60.0,
  lengths=(4096, 8192, 16384, 32768, 65536, 131072),
)  # fmt: skip
_SMALL = dict(
  features=256, heads=4, tokens=16_384, decode_batch=8, dtype="float32", most_gib=2.0,
  lengths=(1024, 2048, 4096, 8192, 16384),
)  # fmt: skip


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
  """Not done at import: other programs of this folder have flags of the same names."""
  number = functools.partial(flags.DEFINE_integer, flag_values=values)
  many = functools.partial(flags.DEFINE_list, flag_values=values)
  text = functools.partial(flags.DEFINE_string, flag_values=values)
  many("layers", ["attention", "rat-16", "rat-64", "rnn", layers.TORCH], f"Of {layers.KNOWN},"
       f" {layers.TORCH} (left out where it cannot run).")  # fmt: skip
  many("lengths", [], "Tokens of a row. Default: by device, as for all that follow.")
  many("passes", list(layers.PASSES), "Of train, prefill, decode.")
  number("features", None, "Width of the layer.", lower_bound=1)
  number("heads", None, "Heads.", lower_bound=1)
  number("groups", 2, "Of RAT's queries and keys.", lower_bound=1)
  number("tokens", None, "Of a call of train and prefill.", lower_bound=1)
  number("decode_batch", None, "Sequences decoded at once.", lower_bound=1)
  flags.DEFINE_enum("dtype", None, DTYPES, "Of activations.", flag_values=values)
  flags.DEFINE_float(
    "most_gib", None, "Decode states larger than this are not tried.", flag_values=values
  )
  number("repeats", 5, "Most runs of each.", lower_bound=3)
  flags.DEFINE_float("seconds", 2.0, "After 3 runs, stop when they took this.", flag_values=values)
  text("workdir", "runs/length_speed", "Folder for the results.")


def main(_) -> None:
  setting = _setting()
  sizes = layers.Sizes(**{name: setting[name] for name in layers.Sizes._fields})
  names, notes = _layers()
  env = report.environment()
  torch_threads(names)
  rows = []
  for pass_name in FLAGS.passes:
    for length in setting["lengths"]:
      found, missing = measure(names, pass_name, length, sizes, setting["most_gib"])
      rows += found
      notes += missing
  result = dict(environment=env, setting=setting, rows=rows, not_run=notes)
  workdir = pathlib.Path(FLAGS.workdir).expanduser()
  print(speed_report.write(workdir, result))
  print(" ".join(str(workdir / name) for name in speed_report.NAMES))


def measure(
  names: list[str], pass_name: str, length: int, sizes: layers.Sizes, most_gib: float
) -> tuple[list[dict], list[str]]:
  """(a row for every layer, why others have none) of one pass at one length."""
  batch = sizes.decode_batch if pass_name == "decode" else sizes.tokens // length
  runs, missing = {}, []
  for name in names:
    print(f"{pass_name} {length}: {name} ...", file=sys.stderr, flush=True)
    try:
      runs[name] = _prepared(name, pass_name, length, sizes, most_gib)
    except layers.OutOfMemory as error:
      missing.append(f"out of memory: {error}")
  rows = []
  for name, spread in timing.interleaved(runs, FLAGS.repeats, FLAGS.seconds).items():
    times = dict(median_s=spread.median, p20_s=spread.p20, p80_s=spread.p80, runs=spread.runs)
    rows.append(dict({"pass": pass_name}, layer=name, length=length, batch=batch, **times))
  return rows, missing


def _prepared(name: str, pass_name: str, length: int, sizes: layers.Sizes, most_gib: float):
  if pass_name == "decode":
    as_ours = "attention" if name == layers.TORCH else name
    size = layers.state_bytes(as_ours, length, sizes) / 2**30
    if size > most_gib:
      raise layers.OutOfMemory(f"{name}, a state of {size:.3g} GiB at {length} tokens (--most_gib)")
  calls = FLAGS.repeats + 1  # the first one compiles
  if name == layers.TORCH:
    return torch_layer.prepare(pass_name, length, sizes, calls=calls)
  return layers.prepare(name, pass_name, length, sizes, calls=calls)


def _setting() -> dict:
  """Sizes by flags and device.

  Raises:
    ValueError: they do not go together.
  """
  setting: dict[str, Any] = dict(
    _SMALL if jax.default_backend() == "cpu" else _LARGE, groups=FLAGS.groups
  )
  for name in ("features", "heads", "tokens", "decode_batch", "dtype", "most_gib"):
    if FLAGS[name].value is not None:
      setting[name] = FLAGS[name].value
  if FLAGS.lengths:
    if not all(text.isdigit() for text in FLAGS.lengths):
      raise ValueError(f"--lengths must be whole numbers; got {FLAGS.lengths} (such as 1024,2048)")
    setting["lengths"] = tuple(map(int, FLAGS.lengths))
  for length in setting["lengths"]:
    if length <= FLAGS.repeats or setting["tokens"] % length:
      raise ValueError(
        f"--lengths must divide --tokens ({setting['tokens']}) and exceed --repeats"
        f" ({FLAGS.repeats}); got {length} (rows of a call are equally long)"
      )
  if setting["features"] % (2 * setting["heads"]):
    raise ValueError(
      f"--features must be a multiple of twice the {setting['heads']} heads; got"
      f" {setting['features']} (rotary positions turn pairs of channels)"
    )
  for name in FLAGS.passes:
    if name not in layers.PASSES:
      raise ValueError(f"--passes must be of {layers.PASSES}; got {name!r} (separated by commas)")
  return setting


def _layers() -> tuple[list[str], list[str]]:
  """(layers to time, why others are not)."""
  names, notes = [], []
  for name in FLAGS.layers:
    if name != layers.TORCH and not layers.is_layer(name):
      raise ValueError(
        f"--layers must be of {layers.KNOWN}, {layers.TORCH}; got {name!r} (separated by commas)"
      )
    if name == layers.TORCH and (reason := torch_layer.obstacle()):
      notes.append(f"{name}: {reason}")
    else:
      names.append(name)
  return names, notes


def torch_threads(names: list[str]) -> None:
  """torch gets as many threads as XLA has, and rounds denormal numbers to 0 as XLA does."""
  if layers.TORCH in names:
    import torch

    torch.set_num_threads(timing.cpu_threads())
    torch.set_flush_denormal(True)


if __name__ == "__main__":
  define_flags()
  command_line.run(main)
