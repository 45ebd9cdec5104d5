"""ICD-9 codes as they are printed: MIMIC-III stores them without their dot."""

# What the official code makes of an empty code, as a diagnosis and as a procedure.
MISSING = ("nan", "na.n")


def dotted(code: str, *, procedure: bool = False) -> str:
  """Puts the dot in: 4019 -> 401.9, E8497 -> E849.7, V5861 -> V58.61; a procedure 9604 -> 96.04.

  Diagnoses that start with E have it after four characters, others after three, where anything
  follows; procedures always have it after two. An empty code becomes one of MISSING.
  """
  code = code.strip().replace(".", "") or "nan"
  if procedure:
    return f"{code[:2]}.{code[2:]}"
  whole = 4 if code.startswith("E") else 3
  return f"{code[:whole]}.{code[whole:]}" if len(code) > whole else code
