"""Folders that are written once and then shared by runs."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def written_once(entry: Path, write: Callable[[Path], None]) -> Path:
  """The folder `entry`, filled by `write(folder)` if it is not there.

  It is written under another name and renamed when complete, so that a killed run leaves no half
  entry and of several hosts that write the same entry one wins. `write` makes a meta.json last.
  """
  if (entry / "meta.json").is_file():
    return entry
  entry.parent.mkdir(parents=True, exist_ok=True)
  draft = Path(tempfile.mkdtemp(prefix=f"{entry.name}.", suffix=".tmp", dir=entry.parent))
  try:
    write(draft)
    try:
      os.rename(draft, entry)
    except OSError:
      if not (entry / "meta.json").is_file():
        raise
  finally:
    shutil.rmtree(draft, ignore_errors=True)
  return entry
