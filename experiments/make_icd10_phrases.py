"""Rebuilds the phrase table of the icd10 notes from the ICD-10-CM tabular list.

    pip install simple-icd-10-cm==1.5.0
    python -m attnzoo.experiments.make_icd10_phrases --out=icd10_phrases.json.gz

The table is shipped (data/notes/icd10_phrases.json.gz), so nobody needs this to train; it is here
to show where the phrases come from. Another release of the list gives other phrases and thereby
another task: figures measured on the two do not compare.
"""

import gzip
import hashlib
import importlib
import json
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

from absl import app, flags

from attnzoo.experiments.data.notes import assertions
from attnzoo.experiments.data.notes.cleaning import clean

_OUT = flags.DEFINE_string("out", "icd10_phrases.json.gz", "File to write.")

_PACKAGE, _RELEASE = "simple_icd_10_cm", "April 2026"
_NOTICE = (
  "Titles and inclusion terms of ICD-10-CM (tabular list, April 2026 release), lower-cased,"
  " shortened and in part left out. ICD-10-CM is published by the National Center for Health"
  " Statistics (CDC) and the Centers for Medicare & Medicaid Services, agencies of the government"
  " of the United States; it is an adaptation of ICD-10, whose copyright is the World Health"
  " Organization's. Read from the Python package simple-icd-10-cm 1.5.0, (c) 2021-2026 Stefano"
  " Travasci, MIT licence. No patient's text is in it."
)
_MOST_WORDS = 14
_SAYS_NOTHING = frozenset({"nos", "nec", "unspecified", "not"})
# Causes of injuries and contacts with health services are no findings that a note would confirm.
_NO_FINDINGS = ("20", "21")
_OUTSIDE = 2000


def phrase_table(tabular: Any, labels: Iterable[str] = assertions.ALL_LABELS) -> dict[str, Any]:
  """What the shipped file holds, as plain values.

  A label's phrases are the titles and inclusion terms of the category and of all below it, but
  for codes that only append a seventh character. Of phrases of the same words the first is kept.

  Args:
    tabular: the module simple_icd_10_cm, or one with its functions.
    labels: categories to make phrases for; phrases from outside are the same for any choice that
      lies in the same chapters.

  Returns:
    notice, release, labels (code -> title, phrases) and outside (phrases of other chapters: those
    without words of a cue, those with the smallest MD5, in alphabetical order).
  """
  labels = tuple(labels)
  known = {
    code: dict(title=tabular.get_description(code), phrases=_phrases(tabular, [code]))
    for code in labels
  }
  own = {_chapter(tabular, code) for code in labels}
  others = [
    code
    for code in tabular.get_all_codes()
    if tabular.is_category(code) and _chapter(tabular, code) not in {*own, *_NO_FINDINGS}
  ]
  taken = {_core(phrase) for entry in known.values() for phrase in entry["phrases"]}
  cues = {word for some in assertions.CUES.values() for cue in some for word in clean(cue).split()}
  outside = [
    phrase
    for phrase in _phrases(tabular, others)
    if _core(phrase) not in taken and cues.isdisjoint(clean(phrase).split())
  ]
  outside = sorted(sorted(outside, key=_md5)[:_OUTSIDE])
  return dict(notice=_NOTICE, release=_RELEASE, labels=known, outside=outside)


def packed(table: dict[str, Any]) -> bytes:
  """The bytes of the file: no time stamp, so that the same table gives the same file."""
  text = json.dumps(table, indent=0, ensure_ascii=True, sort_keys=True)
  return gzip.compress(text.encode(), compresslevel=9, mtime=0)


def _phrases(tabular: Any, codes: Iterable[str]) -> list[str]:
  kept: dict[frozenset[str], str] = {}
  for code in codes:
    for text in _wordings(tabular, code):
      # Hyphens stay: "non-st" is one word to whoever writes it.
      words = [w for w in re.sub(r"[^\w\s-]", " ", text.lower()).split() if w not in _SAYS_NOTHING]
      if 0 < len(words) <= _MOST_WORDS:
        kept.setdefault(frozenset(words), " ".join(words))
  return list(kept.values())


def _wordings(tabular: Any, code: str) -> Iterator[str]:
  for below in (code, *tabular.get_descendants(code)):
    if not tabular.is_extended_subcategory(below):
      yield tabular.get_description(below)
      yield from tabular.get_inclusion_term(below)


def _core(phrase: str) -> frozenset[str]:
  """The words that are left when numbers are not told apart."""
  return frozenset(re.sub(r"[^a-z ]", "", phrase).split())


def _chapter(tabular: Any, code: str) -> str:
  return tabular.get_ancestors(code)[-1]


def _md5(text: str) -> str:
  return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


def main(_) -> None:
  try:
    tabular = importlib.import_module(_PACKAGE)
  except ImportError as error:
    raise app.UsageError(
      "make_icd10_phrases: needs the tabular list (pip install simple-icd-10-cm==1.5.0)"
    ) from error
  table = phrase_table(tabular)
  path = pathlib.Path(_OUT.value)
  path.write_bytes(packed(table))
  count = sum(len(entry["phrases"]) for entry in table["labels"].values())
  print(f"{path}: {count} phrases of {len(table['labels'])} labels, {len(table['outside'])} others")


if __name__ == "__main__":
  app.run(main)
