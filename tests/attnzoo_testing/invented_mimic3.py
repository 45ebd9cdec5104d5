"""A MIMIC-III of a few invented admissions, and what its labels must be."""

import collections
import random

DISCHARGE = "Discharge summary"
NOTES_HEADER = (
  "ROW_ID,SUBJECT_ID,HADM_ID,CHARTDATE,CHARTTIME,STORETIME,CATEGORY,DESCRIPTION,CGID,ISERROR,TEXT"
)
ICD_HEADER = "ROW_ID,SUBJECT_ID,HADM_ID,SEQ_NUM,ICD9_CODE"
TITLE_HEADER = "ROW_ID,ICD9_CODE,SHORT_TITLE,LONG_TITLE"

# (patient, admission, category, description, text) in the order of the table. Admission 108 comes
# before 101; 109 has no code of the most frequent, 110 is in no split, 199 no discharge summary.
PLAIN = 'Patient {0} denies chest pain.\nOn Lasix 40mg, "stable", EF=5{0}%; they don\'t smoke.'
NOTES = [
  (9, "108", DISCHARGE, "Report", 'He said ""no, never"", then\r\n\r\n"left", sat97'),
  (1, "101", DISCHARGE, "Report", "Admission Date: [**2101-5-3**]\nHistory of COPD, x-ray 45"),
  (1, "101", "Nursing", "Report", "Nursing words about ventilator settings"),
  (2, "102", DISCHARGE, "Report", "Short note, no pain"),
  (1, "101", DISCHARGE, "Addendum", "Addendum: pneumonia was ruled out\x1eafter 2 days"),
  (2, "", DISCHARGE, "Report", "Of nobody's admission"),
  *((n, str(100 + n), DISCHARGE, "Report", PLAIN.format(n) * n) for n in (3, 4, 5, 6, 7)),
  (10, "109", DISCHARGE, "Report", "Rare disease, zoster and gout"),
  (11, "110", DISCHARGE, "Report", "Outside of every split, urosepsis"),
  (19, "199", "Nursing", "Report", "Stable overnight"),
]
SPLIT_50 = dict(train=[101, 102, 103, 108, 777, 109], dev=[104, 105, 199], test=[106, 107])
SPLIT_FULL = dict(train=[101, 102, 103, 108, 109], dev=[104, 105], test=[106, 107])

# 51 codes of two or more, so that the 50th place is a tie: the codes of `_TIED` occur twice each.
_TIED = ("E8497", "V5861")


def _invent() -> tuple[list[tuple[int, str]], list[tuple[int, str]]]:
  """(diagnoses, procedures) as (admission, code), rows of admissions mixed."""
  generator = random.Random(5)
  common = [f"{n:03d}{n % 7}" for n in range(401, 437)] + ["311", "V103"]  # 38 diagnoses
  diagnoses = [(a, c) for c in common for a in generator.sample(range(101, 109), 3)]
  diagnoses += [(104, _TIED[0]), (106, _TIED[0]), (102, _TIED[1]), (110, _TIED[1])]
  diagnoses += [
    (109, "0539"),
    (109, "V1234"),
    (199, "4019"),
    (103, "4011"),
    (103, "4011"),
  ]
  diagnoses += [(a, "") for a in (102, 104, 105, 107)]  # often enough to be among the 50
  surgery = [f"{n}{'' if n % 3 else 4}" for n in range(960, 971)]  # 11 procedures
  procedures = [(a, c) for c in surgery for a in generator.sample(range(101, 109), 4)]
  procedures += [(105, ""), (199, "9604")]
  generator.shuffle(diagnoses)
  generator.shuffle(procedures)
  return diagnoses, procedures


DIAGNOSES, PROCEDURES = _invent()


def quoted(value: object) -> str:
  return '"' + str(value).replace('"', '""') + '"' if isinstance(value, str) else str(value)


def written(header: str, rows) -> bytes:
  lines = [header, *(",".join(map(quoted, row)) for row in rows)]
  return ("\n".join(lines) + "\n").encode()


def tables() -> dict[str, bytes]:
  """The files by name, as the database writes them."""

  def codes(rows):
    return written(ICD_HEADER, [(n, a - 100, a, 1, c) for n, (a, c) in enumerate(rows)])

  def titles(rows, word):
    listed = sorted({c for _, c in rows if c} - {"311"})
    return written(TITLE_HEADER, [(n, c, "", f"{word}, {c} type") for n, c in enumerate(listed)])

  notes = [
    (n, p, int(a) if a else "", "2101-01-01", "", "", c, d, "", "", t)
    for n, (p, a, c, d, t) in enumerate(NOTES)
  ]
  files = {
    "NOTEEVENTS.csv": written(NOTES_HEADER, notes),
    "DIAGNOSES_ICD.csv": codes(DIAGNOSES),
    "PROCEDURES_ICD.csv": codes(PROCEDURES),
    "D_ICD_DIAGNOSES.csv": titles(DIAGNOSES, "Disorder"),
    "D_ICD_PROCEDURES.csv": titles(PROCEDURES, "Operation"),
    "ICD9_descriptions": b"@\tRoot of all\n311\tDepressive disorder\n403.3\tNot this one\n",
  }
  for kind, split in (("50", SPLIT_50), ("full", SPLIT_FULL)):
    for name, ids in split.items():
      files[f"{name}_{kind}_hadm_ids.csv"] = "\n".join(map(str, ids)).encode()
  return files


def expected_text(admission: int) -> list[str]:
  """The admission's discharge summaries."""
  return [t for _, a, c, _, t in NOTES if a == str(admission) and c == DISCHARGE]


def dot(code: str, procedure: bool) -> str:
  """Written apart from the package: by the length of what stands before the dot."""
  before = 2 if procedure else 4 if code[0] == "E" else 3
  dotless = not procedure and len(code) <= before
  return code if dotless else code[:before] + "." + code[before:]


def codes_of(admission: int) -> list[str]:
  """Its codes as the labels are written, without missing ones."""
  return [dot(c, False) for a, c in DIAGNOSES if a == admission and c] + [
    dot(c, True) for a, c in PROCEDURES if a == admission and c
  ]


def top_codes() -> list[str]:
  """The 50 most frequent; of equals the one that is met first, by ascending admission."""
  met = [code for admission in range(101, 111) for code in codes_of(admission)]
  counts = collections.Counter(met)
  assert len(counts) > 51
  ranked = sorted(counts, key=lambda code: (-counts[code], met.index(code)))
  assert counts[ranked[49]] == counts[ranked[50]] == 2
  return sorted(ranked[:50])
