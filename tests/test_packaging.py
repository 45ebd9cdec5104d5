"""The wheel: it holds the four folders as attnzoo.*, and works away from the checkout."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = ("experiments", "layers", "pallas_kernels", "zoo")
# What `import attnzoo.layers` must not load: optional packages, and Pallas, which takes a second.
LATE = (
  "grain jax.experimental.pallas jax_triton matplotlib safetensors tensorboardX tokenizers torch"
  " tqdm triton"
).split()


def run(*command, **options) -> str:
  result = subprocess.run(command, capture_output=True, text=True, **options)
  assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
  return result.stdout


def shipped() -> set[str]:
  """What the tree says the wheel has to hold."""
  paths = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))
  data = ("py.typed", "icd10_phrases.json.gz", "stdlib_bpe.json")
  kept = (path for path in paths if path.suffix == ".py" or path.name in data)
  return {f"attnzoo/{path.relative_to(ROOT).as_posix()}" for path in kept}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
  """Built as a release is: an sdist of a copy of the tree, and the wheel from that sdist."""
  tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
  for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, tree)
  for folder in FOLDERS:
    # __pycache__ goes along on purpose: it must not become a package.
    shutil.copytree(ROOT / folder, tree / folder)
    (tree / folder / "__pycache__").mkdir(exist_ok=True)
  run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, tree)
  (path,) = out.glob("*.whl")
  return path


def test_wheel_holds_the_tree(wheel):
  with zipfile.ZipFile(wheel) as archive:
    names = {name for name in archive.namelist() if ".dist-info/" not in name}
  assert "attnzoo/layers/py.typed" in names
  assert names == shipped()


CHILD = """
import importlib, json, sys
import layers  # the user's own
import attnzoo.layers
loaded = [name for name in LATE if name in sys.modules]
files = {}
for folder in FOLDERS:
  module = importlib.import_module(f"attnzoo.{folder}")
  files[folder] = getattr(module, "__file__", None) or list(module.__path__)[0]
print(json.dumps(dict(files=files, loaded=loaded, mine=layers.MINE, bare=sorted(sys.modules))))
"""


def test_installed_wheel_works_elsewhere(wheel, tmp_path):
  """Installed into a folder of its own, run from a folder with the user's own layers.py."""
  site, here = tmp_path / "site", tmp_path / "here"
  here.mkdir()
  (here / "layers.py").write_text("MINE = 'mine'\n")
  pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
  run(*pip, "--no-deps", "--no-index", "--target", site, wheel)
  program = f"LATE = {LATE!r}\nFOLDERS = {FOLDERS!r}\n{CHILD}"
  environment = os.environ | {"PYTHONPATH": str(site)}
  told = json.loads(run(sys.executable, "-c", program, cwd=here, env=environment))
  for folder, file in told["files"].items():
    assert pathlib.Path(file).is_relative_to(site / "attnzoo" / folder), told["files"]
  assert told["loaded"] == []
  assert told["mine"] == "mine"
  assert not set(FOLDERS) - {"layers"} & set(told["bare"])


def test_make_lists_its_targets():
  """`make` alone explains itself and sets nothing up."""
  text = run("make", cwd=ROOT)
  for target in ("train", "train-long", "test", "test-fast", "test-gpu", "bench", "lint", "clean"):
    assert f"make {target} " in text


def test_set_up_refuses_an_unsuitable_python(tmp_path):
  environment = os.environ | {"VENV": str(tmp_path / "venv"), "PYTHON": str(tmp_path / "python")}
  command = [ROOT / ".ci" / "set-up", "data"]
  result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
  assert result.returncode == 1
  assert "is not a Python 3.12 or newer" in result.stderr
  assert not (tmp_path / "venv").exists()
