"""Figures of the published run on MIMIC-III v1.4, to tell whether the same data were read."""

from collections.abc import Mapping

# Fewer rows of notes than this are an extract, a demo or a test, which is not compared.
REAL_ROWS = 1_000_000

_SPLITS = ("train", "validation", "test")
_WHATEVER = dict(  # figure -> value
  notes=59_652,
  admissions_with_notes=52_726,
  admissions_with_codes=58_976,
  admissions=52_726,
  codes=8_930,
)
# Figure -> (values of the three splits, how far off one may be: half of the last digit printed).
_FULL = dict(notes=((47_723, 1_631, 3_372), 0.0))
_50 = dict(notes=((8_066, 1_573, 1_729), 0.0), labels_per_note=((5.6913, 5.8811, 6.0393), 6e-5))
# These only hold for texts that were cleaned by the official rules.
_50_OFFICIAL = dict(
  mean_tokens=((921.50, 1114.56, 1132.43), 6e-3),
  median_tokens=((840, 1040, 1055), 0.0),
  min_tokens=((54, 148, 127), 0.0),
  max_tokens=((5303, 3924, 4001), 0.0),
  unknown_share=((0.0019, 0.0044, 0.0042), 6e-5),
)
_VOCABULARY = 123_918


def published(labels: str, rules: str) -> dict[str, tuple[float, float]]:
  """Figure -> (value, tolerance) of the published run with the same options."""
  by_split = dict(_FULL if labels == "full" else _50)
  figures: dict[str, tuple[float, float]] = {name: (n, 0.0) for name, n in _WHATEVER.items()}
  if rules == "official":
    figures["vocabulary"] = (_VOCABULARY, 0.0)
    by_split |= _50_OFFICIAL if labels == "50" else {}
  for name, (values, slack) in by_split.items():
    figures |= {f"{split}_{name}": (v, slack) for split, v in zip(_SPLITS, values, strict=True)}
  return figures


def differences(figures: Mapping[str, float], labels: str, rules: str) -> list[str]:
  """What differs from the published run, a phrase each; empty for data that are not the real ones.

  Args:
    figures: `rows` of the table of notes, and what is compared.
  """
  if figures["rows"] < REAL_ROWS:
    return []
  return [
    f"{name} {figures[name]:,.6g} instead of {value:,.6g}"
    for name, (value, slack) in published(labels, rules).items()
    if abs(figures[name] - value) > slack
  ]
