"""Results of programs that train several models: one file each, written when it is there."""

import hashlib
import json
import pathlib
from typing import Any


def digest(identity: Any) -> str:
  """Eight letters that stand for everything that decides a result."""
  return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]


def read(file: pathlib.Path) -> dict[str, Any] | None:
  """The record of a finished model; None where there is none that can be read."""
  try:
    return json.loads(file.read_text())
  except (OSError, ValueError):
    return None


def write(file: pathlib.Path, record: dict[str, Any]) -> None:
  """All of it or nothing: a program that is stopped leaves no half of a record."""
  draft = file.with_suffix(".draft")
  draft.write_text(json.dumps(record) + "\n")
  draft.replace(file)
