"""Shows what a model that codes notes read for each code, as a page for a browser.

    python -m attnzoo.experiments.explain --workdir=runs/transicd_icd10
    python -m attnzoo.experiments.explain --workdir=runs/transicd_icd10 --notes=3,17 --out=heat
    python -m attnzoo.experiments.explain --workdir=runs/transicd_icd10 --text_file=note.txt

Writes explain.html (nothing but a browser is needed), a PNG per note and explain.json. The files
hold the notes' text: keep those of patients where patients' text may be.
"""

import json
import pathlib

import jax
import numpy as np
from absl import flags

from attnzoo.experiments import command_line
from attnzoo.experiments.coding import explanation
from attnzoo.experiments.coding.prediction import predict
from attnzoo.experiments.data import NoteSet, load_data
from attnzoo.experiments.training import config, runs, state
from attnzoo.experiments.training.evaluation import make_step

_WORKDIR = flags.DEFINE_string("workdir", "runs/transicd_icd10", "Folder of the run.")
_STEP = flags.DEFINE_string("step", "best", "Checkpoint: best, last or the number of a step.")
_SPLIT = flags.DEFINE_enum(
  "split", "test", ["train", "validation", "test"], "Where notes are from."
)
_NOTES = flags.DEFINE_list(
  "notes", ["0", "1", "2", "3", "4", "5"], "Numbers of notes of the split."
)
_TEXT_FILE = flags.DEFINE_string("text_file", "", "A note of your own instead, as a text file.")
_THRESHOLD = flags.DEFINE_float(
  "threshold", 0.0, "Probability above which a code is given; 0 = the best on validation.",
  lower_bound=0.0, upper_bound=1.0,
)  # fmt: skip
_CODES = flags.DEFINE_integer("codes", 12, "Codes of a note at most.", lower_bound=1)
_OUT = flags.DEFINE_string("out", "", "Folder to write to; empty = explain in the workdir.")


def main(_) -> None:
  run = runs.load(_WORKDIR.value, _STEP.value)
  workdir = pathlib.Path(_WORKDIR.value).expanduser()
  if getattr(run.experiment.model, "pool", "") != "labels":
    raise ValueError(
      f"--workdir must hold a model with attention per code; got {_WORKDIR.value} (TransICD with"
      " pool 'labels')"
    )
  data = run.experiment.data
  given = _own_text() if _TEXT_FILE.value else None
  notes = load_data(data, cache=workdir / "corpus")
  assert isinstance(notes, NoteSet)  # for the type checker
  chosen = [given] if given is not None else _chosen(notes)
  threshold = _THRESHOLD.value or _tuned(run, notes)
  options = dict(longest=data.sequence_length, threshold=threshold, most=_CODES.value)
  found = [
    explanation.explain(run.parts, run.params, notes, text, title=title, truth=truth, **options)
    for title, text, truth in chosen
  ]
  out = pathlib.Path(_OUT.value).expanduser() if _OUT.value else workdir / "explain"
  out.mkdir(parents=True, exist_ok=True)
  facts = {"model": f"{workdir.name}, step {run.step}", "notes": notes.name,
           "codes are given above": f"{threshold:.3f}"}  # fmt: skip
  page = explanation.page(found, "What the model read for each code", facts)
  (out / "explain.html").write_text(page, encoding="utf-8")
  (out / "explain.json").write_text(json.dumps(explanation.to_json(found)), encoding="utf-8")
  for one in found:
    name = one.title.replace(" ", "_")
    right = sum(code.verdict == explanation.TRUE for code in one.codes)
    print(f"{one.title}: {len(one.codes)} codes shown, {right} true positives")
    print(f"picture {explanation.draw(out / f'{name}.png', one)}")
  print(f"page {out / 'explain.html'}")


def _own_text() -> tuple[str, str, None]:
  path = pathlib.Path(_TEXT_FILE.value).expanduser()
  try:
    return path.stem, path.read_text(encoding="utf-8"), None
  except UnicodeDecodeError:
    raise ValueError(
      f"--text_file must be UTF-8 text; got {path} (save it as text first)"
    ) from None


def _chosen(notes: NoteSet) -> list[tuple[str, str, np.ndarray]]:
  split = notes.splits[_SPLIT.value]
  found = []
  for name in _NOTES.value:
    if not name.strip().isdigit() or int(name) >= len(split):
      raise ValueError(
        f"--notes must be numbers from 0 to {len(split) - 1}; got {name!r} (notes of the"
        f" {_SPLIT.value} split, such as 0,4,7)"
      )
    number = int(name)
    found.append((f"{_SPLIT.value} note {number}", split.texts[number], split.targets[number]))
  return found


def _tuned(run: runs.LoadedRun, notes: NoteSet) -> float:
  mesh = state.make_mesh(config.MeshConfig(), jax.devices()[:1])
  step = make_step(run.parts, notes)
  found = predict(step, run.params, notes, run.experiment.data, mesh, split="validation")
  return found.threshold(notes, "validation")


if __name__ == "__main__":
  command_line.run(main)
