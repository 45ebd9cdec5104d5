"""The shape of the repository: who may import whom, sizes of files and functions, names, links."""

import ast
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys

import jax.numpy as jnp
import jaxtyping
import pytest

from attnzoo import pallas_kernels

ROOT = pathlib.Path(__file__).parents[1]
# From the bottom up: each may import itself and those before it.
LAYERING = ("pallas_kernels", "layers", "zoo", "experiments")
MOST_LINES, MOST_IN_FUNCTION, MOST_IN_KERNEL = 400, 60, 120


def tracked_files() -> list[pathlib.Path]:
  """Everything that git has or would add; every source where this is no git checkout."""
  command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
  try:
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    names = [ROOT / name for name in listed.decode().split("\0") if name]
  except (OSError, subprocess.CalledProcessError):
    folders = (ROOT / name for name in (*LAYERING, "tests"))
    names = [path for folder in folders for path in folder.rglob("*.*")]
  return [path for path in names if path.is_file() and not path.is_symlink()]


FILES = tracked_files()
SOURCES = [path for path in FILES if path.suffix == ".py"]


def relative(path: pathlib.Path) -> str:
  return path.relative_to(ROOT).as_posix()


def folder_of(path: pathlib.Path) -> str:
  return path.relative_to(ROOT).parts[0]


def imports(path: pathlib.Path):
  """(line, level, absolute dotted names) of each import of a file, nested ones too."""
  parts = ("attnzoo", *path.relative_to(ROOT).with_suffix("").parts)
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield node.lineno, 0, [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      start = ".".join(parts[: -node.level] if node.level else ())
      base = ".".join(filter(None, (start, node.module)))
      names = [f"{base}.{alias.name}" for alias in node.names]
      yield node.lineno, node.level, names


def import_faults(path: pathlib.Path) -> list[str]:
  folder, faults = folder_of(path), []
  inside = LAYERING.index(folder) if folder in LAYERING else len(LAYERING)
  for line, level, names in imports(path):
    for name in names:
      first, _, rest = name.partition(".")
      target = rest.partition(".")[0]
      if first in LAYERING:
        fault = f"imports {first} as a top-level package; it is attnzoo.{first}"
      elif first == "attnzoo" and target in LAYERING[inside + 1 :]:
        fault = f"imports {name}: {folder} is below {target}"
      elif first == "attnzoo" and inside < 3 and not level:
        fault = f"imports {name} absolutely; inside the package imports are relative"
      elif inside >= 3 and level:
        fault = f"imports {name} relatively; here imports are absolute"
      elif folder == "pallas_kernels" and first == "flax":
        fault = "imports flax; kernels are functions on arrays"
      else:
        continue
      faults.append(f"{relative(path)}:{line} {fault}")
  return faults


def test_imports_go_one_way():
  found = [relative(path) for path in SOURCES]
  assert any(name.startswith("pallas_kernels/") for name in found), "the listing is broken"
  faults = list(itertools.chain.from_iterable(map(import_faults, SOURCES)))
  assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
  ("folder", "line", "fault"),
  [
    ("pallas_kernels", "from ..layers import norms", "is below layers"),
    ("pallas_kernels", "import flax.nnx", "functions on arrays"),
    ("layers", "def f():\n  from ..zoo import create", "is below zoo"),
    ("layers", "from attnzoo.layers import norms", "are relative"),
    ("zoo", "from .. import experiments", "is below experiments"),
    ("zoo", "import layers", "top-level package"),
    ("experiments", "from . import data", "are absolute"),
    ("tests", "from .goldens import golden", "are absolute"),
  ],
)
def test_wrong_imports_are_found(folder, line, fault, tmp_path, monkeypatch):
  monkeypatch.setitem(globals(), "ROOT", tmp_path)
  path = tmp_path / folder / "module.py"
  path.parent.mkdir()
  path.write_text(line)
  (message,) = import_faults(path)
  assert fault in message


def lines_of_code(function: ast.FunctionDef) -> int:
  """Lines from `def` to the end, without the docstring."""
  first = function.body[0]
  documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
  docstring = first.end_lineno - first.lineno + 1 if documented else 0
  return function.end_lineno - function.lineno + 1 - docstring


def is_kernel(function: ast.FunctionDef) -> bool:
  decorators = map(ast.unparse, function.decorator_list)
  return function.name.endswith("_kernel") or any("triton.jit" in name for name in decorators)


def size_faults(path: pathlib.Path) -> list[str]:
  text = path.read_text()
  lines = text.count("\n")
  faults = [f"{relative(path)} has {lines} lines"] if lines > MOST_LINES else []
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.FunctionDef):
      limit = MOST_IN_KERNEL if is_kernel(node) else MOST_IN_FUNCTION
      if lines_of_code(node) > limit:
        faults.append(f"{relative(path)}:{node.lineno} {node.name} has {lines_of_code(node)} lines")
  return faults


def test_files_and_functions_are_short():
  faults = list(itertools.chain.from_iterable(map(size_faults, SOURCES)))
  assert not faults, "\n".join(faults)


def test_long_ones_are_found(tmp_path, monkeypatch):
  monkeypatch.setitem(globals(), "ROOT", tmp_path)
  body = "\n".join(["  x = 1"] * 70)
  path = tmp_path / "module.py"
  path.write_text(f"def f():\n{body}\ndef f_kernel():\n{body}\n" + "\n" * 300)
  assert size_faults(path) == ["module.py has 442 lines", "module.py:1 f has 71 lines"]


def test_no_file_is_called_utils():
  assert not [relative(path) for path in FILES if path.stem in ("util", "utils")]


def test_links_for_tools():
  """`.ns/attnzoo/<folder>` leads to the folder: what lets type checkers and pytest see attnzoo."""
  links = {path.name: os.readlink(path) for path in (ROOT / ".ns" / "attnzoo").iterdir()}
  assert links == {folder: f"../../{folder}" for folder in LAYERING}


def test_no_machine_and_no_host():
  """No path of somebody's machine, no address of a package index: both rot."""
  roots = "|".join(("work", "tmp", "root", "home"))
  pattern = re.compile(rf"(?<![\w.~}})/-])/(?:{roots})(?:/|\b)|//[\w.-]*(?:pypi|pythonhosted)\b")
  assert pattern.search("cd /" + "work/main")
  assert pattern.search("https:/" + "/pypi.org/simple")
  assert not pattern.search("network/work ./tmp")
  faults = []
  for path in FILES:
    text = path.read_bytes().decode("utf-8", errors="ignore")
    for number, line in enumerate(text.splitlines(), 1):
      if pattern.search(line):
        faults.append(f"{relative(path)}:{number} {line.strip()}")
  assert not faults, "\n".join(faults)


def test_folders_are_no_top_level_modules():
  program = (
    "import json, sys, attnzoo.experiments, attnzoo.layers, attnzoo.pallas_kernels, attnzoo.zoo;"
    "print(json.dumps(sorted(name for name in sys.modules if '.' not in name)))"
  )
  environment = os.environ | {"PYTHONPATH": str(ROOT / ".ns")}
  result = subprocess.run(
    [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True
  )
  assert result.returncode == 0, result.stderr
  assert not set(json.loads(result.stdout)) & set(LAYERING)
  assert not set(sys.modules) & set(LAYERING)


def test_annotations_are_checked():
  """The hook of conftest.py is in force: wrong shapes inside are found, own errors come first."""
  query, value, state = (jnp.ones(shape) for shape in ((2, 3, 4), (2, 3, 5), (2, 3, 4, 6)))
  with pytest.raises(jaxtyping.TypeCheckError, match="lightning_attention_step"):
    pallas_kernels.lightning_attention_step(query, query, value, None, state[..., :1])
  with pytest.raises(ValueError, match="^lightning_attention: query must have 4 axes"):
    pallas_kernels.lightning_attention(query, query, value)
