"""What a model read in a note for each code that it gave: found, and drawn as page and picture."""

import html
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnzoo.experiments.coding.page import PAGE
from attnzoo.experiments.data import NoteSet
from attnzoo.experiments.data.notes.cleaning import NOTE_BREAK, tokens_with_places
from attnzoo.experiments.training import state
from attnzoo.layers import LabelClassifier

TRUE, FALSE, MISSED, UNKNOWN = "true positive", "false positive", "missed", "predicted"


class Code(NamedTuple):
  """One code of a note."""

  label: str
  name: str
  probability: float
  verdict: str  # TRUE, FALSE, MISSED, or UNKNOWN where nobody said which codes the note has
  weights: np.ndarray  # [n] of the note's tokens; they sum to 1


class Explanation(NamedTuple):
  """One note."""

  title: str
  text: str  # as it was given
  places: list[tuple[int, int]]  # [n] of each token in the text
  words: list[str]  # [n] what the model read, cleaned
  codes: list[Code]  # the likeliest first


def explain(
  parts: state.Parts,
  params: state.Params,
  notes: NoteSet,
  text: str,
  *,
  title: str,
  longest: int,
  threshold: float,
  truth: np.ndarray | None = None,
  most: int = 12,
) -> Explanation:
  """The codes above the threshold, those that were missed, and the weights of their tokens.

  Args:
    longest: tokens that the model reads at most.
    truth: [L], the codes that the note has; None where that is not known.
    most: codes at most; without any above the threshold the likeliest one is shown.

  Raises:
    ValueError: a text without a word that the model reads.
  """
  tokens = tokens_with_places(text, notes.rules)[:longest]
  if not tokens:
    raise ValueError(
      f"explain: the text of {title} must have words that are left by data.note_rules"
      f" ({notes.rules!r}); got none (give a longer text)"
    )
  ids = notes.vocabulary.encode([token.word for token in tokens])
  model = state.merge(parts, params)
  assert isinstance(model, LabelClassifier)  # for the type checker

  def read(ids):
    return jax.nn.sigmoid(model(ids[None]))[0]

  probabilities = np.asarray(jax.jit(read)(ids))
  chosen = _chosen(probabilities, threshold, truth, most)
  weights = np.asarray(jax.jit(lambda ids: model.weights(ids[None], jnp.asarray(chosen))[0])(ids))
  codes = [
    Code(notes.labels[i], notes.label_names[i], float(probabilities[i]),
         _verdict(probabilities[i] > threshold, truth, i), row)
    for i, row in zip(chosen, weights, strict=True)
  ]  # fmt: skip
  places = [(token.start, token.end) for token in tokens]
  return Explanation(title, text, places, [token.word for token in tokens], codes)


def _chosen(probabilities, threshold, truth, most) -> list[int]:
  order = [int(i) for i in np.argsort(-probabilities, kind="stable")]
  shown = [i for i in order if probabilities[i] > threshold or (truth is not None and truth[i])]
  return (shown or order[:1])[:most]


def _verdict(predicted: bool, truth: np.ndarray | None, code: int) -> str:
  if truth is None:
    return UNKNOWN
  if truth[code]:
    return TRUE if predicted else MISSED
  return FALSE


def to_json(explanations: Sequence[Explanation]) -> list[dict[str, Any]]:
  """Words and weights, for other programs."""
  return [
    dict(
      title=one.title,
      tokens=one.words,
      places=one.places,
      codes=[
        c._asdict() | dict(weights=[round(float(w), 6) for w in c.weights]) for c in one.codes
      ],
    )
    for one in explanations
  ]


def page(explanations: Sequence[Explanation], heading: str, facts: Mapping[str, str]) -> str:
  """One HTML page that needs nothing but a browser; note and code are chosen on it."""
  notes = [
    dict(
      title=one.title,
      pieces=pieces(one.text, one.places),
      codes=[
        dict(label=c.label, name=c.name, probability=c.probability, verdict=c.verdict,
             weights=[round(float(w), 5) for w in c.weights])
        for c in one.codes
      ],
    )
    for one in explanations
  ]  # fmt: skip
  lines = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in facts.items())
  data = json.dumps(notes).replace("<", "\\u003c")
  # The data last: a note may hold what looks like a place to fill in.
  return (
    PAGE.replace("@HEADING@", html.escape(heading))
    .replace("@FACTS@", lines)
    .replace("@DATA@", data)
  )


def pieces(text: str, places: Sequence[tuple[int, int]]) -> list[list[Any]]:
  """The whole text in stretches [text, number of the token or -1]; tokens may be parts of words."""
  found, at = [], 0
  for number, (start, end) in enumerate(places):
    if start > at:
      found.append([text[at:start], -1])
    found.append([text[max(start, at) : end], number])
    at = max(at, end)
  if at < len(text):
    found.append([text[at:], -1])
  return [[piece.replace(NOTE_BREAK, "\n\n"), number] for piece, number in found]


def draw(path: pathlib.Path, one: Explanation, codes: int = 3) -> pathlib.Path:
  """A PNG: the note's words set as text for its first codes, the darker the more they weigh."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  shown = one.codes[:codes]
  rows = _lines([one.text[a:b].replace(NOTE_BREAK, " ") for a, b in one.places])
  height = 0.24 * len(rows) + 0.5
  figure, panels = pyplot.subplots(
    len(shown), 1, figsize=(10, height * len(shown) + 0.2), squeeze=False
  )
  figure.subplots_adjust(left=0.02, right=0.98, bottom=0.02, top=1 - 0.3 / (height * len(shown)),
                         hspace=0.5 / height)  # fmt: skip
  for panel, code in zip(panels[:, 0], shown, strict=True):
    panel.set_axis_off()
    panel.set(xlim=(0, _WIDTH), ylim=(len(rows), 0))
    title = f"{code.label}  {code.name[:70]}  p = {code.probability:.2f}, {code.verdict}"
    panel.set_title(title, loc="left", fontsize=9, fontweight="bold")
    strongest = max(float(code.weights.max()), 1e-9)
    for line, words in enumerate(rows):
      for column, number, word in words:
        share = float(code.weights[number]) / strongest
        box = dict(facecolor=(0.85, 0.1, 0.1, share), edgecolor="none", pad=1.2)
        panel.text(column, line + 0.5, word, fontsize=8, family="monospace", va="center", bbox=box)
  figure.savefig(path, dpi=130)
  pyplot.close(figure)
  return path


_WIDTH = 138  # characters of a line in the picture


def _lines(words: Sequence[str]) -> list[list[tuple[int, int, str]]]:
  """(column, number of the word, word) of each line."""
  rows: list[list[tuple[int, int, str]]] = [[]]
  column = 0
  for number, word in enumerate(words):
    word = " ".join(word.split())[: _WIDTH - 1].replace("$", r"\$")
    if column + len(word) > _WIDTH:
      rows.append([])
      column = 0
    rows[-1].append((column, number, word))
    column += len(word) + 1
  return rows
