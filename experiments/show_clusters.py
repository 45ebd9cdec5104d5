"""Shows which tokens of a text share a cluster, as a page that needs nothing but a browser.

    python -m attnzoo.experiments.show_clusters --workdir=runs/routing_small
    python -m attnzoo.experiments.show_clusters --text="def f(x): return x" --out=clusters.html

Layer and head are chosen on the page. A token has the colour of its cluster; under the pointer it
marks all tokens that share one with it, a query those whose keys do.
"""

import pathlib

import numpy as np
from absl import flags

from attnzoo.experiments import clusters_page, command_line
from attnzoo.experiments.data import Tokenizer, read_text
from attnzoo.experiments.training import runs, state

_WORKDIR = flags.DEFINE_string("workdir", "runs/routing_small", "Folder of the run.")
_STEP = flags.DEFINE_string("step", "best", "Checkpoint: best, last or the number of a step.")
_TOKENIZER = flags.DEFINE_string("tokenizer", "", "Where the run's tokenizer.json is now.")
_TEXT = flags.DEFINE_string("text", "", "The text; empty = the first of the held-out one.")
_TOKENS = flags.DEFINE_integer("tokens", 512, "Tokens of it to show at most.", lower_bound=1)
_OUT = flags.DEFINE_string("out", "", "HTML file to write; empty = clusters.html in the workdir.")


def main(_) -> None:
  run = runs.load(_WORKDIR.value, _STEP.value)
  if not getattr(run.experiment.model, "routed_heads", 0):
    raise ValueError(
      f"--workdir must hold a model with routed heads; got {_WORKDIR.value} (see --help)"
    )
  tokenizer = runs.the_tokenizer(run, _TOKENIZER.value)
  ids = _ids(run, tokenizer)
  clusters = clusters_page.clusters_by_head(state.merge(run.parts, run.params), ids)
  words = [tokenizer.decode([int(token)]) for token in ids[1:]]
  out = pathlib.Path(_OUT.value or pathlib.Path(_WORKDIR.value) / "clusters.html").expanduser()
  out.parent.mkdir(parents=True, exist_ok=True)
  text = clusters_page.page(words, {name: of[1:] for name, of in clusters.items()})
  out.write_text(text, encoding="utf-8")
  for name, of in clusters.items():
    sizes = of.sum(0)
    print(f"{name}: tokens in its {len(sizes)} clusters {', '.join(map(str, sizes))}")
  print(f"page {out}")


def _ids(run: runs.LoadedRun, tokenizer: Tokenizer) -> np.ndarray:
  """[T + 1], what stands before a text first."""
  text = _TEXT.value
  if not text:
    held_out = read_text(run.experiment.data, "validation")
    text = held_out[: 16 * _TOKENS.value].decode("utf-8", "ignore")
  ids = [*runs.opening(run.experiment.data, tokenizer), *tokenizer.encode(text).tolist()]
  return np.asarray(ids[: _TOKENS.value + 1], np.int32)


if __name__ == "__main__":
  command_line.run(main)
