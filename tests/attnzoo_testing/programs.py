"""The binaries as a user runs them, at the price of one start: each run is a fork of one server."""

import json
import os
import pathlib
import subprocess
import sys
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]

_SERVER = """
import json, os, runpy, sys
import attnzoo.experiments.training.summary, attnzoo.experiments.training.runs
import orbax.checkpoint, tensorboardX, grain
import matplotlib; matplotlib.use("Agg")
import matplotlib.pyplot
for line in sys.stdin:
  module, arguments, out, err = json.loads(line)
  child = os.fork()
  if child == 0:
    for path, number in ((os.devnull, 0), (out, 1), (err, 2)):
      os.dup2(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), number)
    code = 99
    try:
      sys.argv = [module, *arguments]
      runpy.run_module("attnzoo.experiments." + module, run_name="__main__", alter_sys=True)
      code = 0
    except SystemExit as stop:
      code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
      import traceback; traceback.print_exc()
    sys.stdout.flush(); sys.stderr.flush()
    os._exit(code)
  print(json.dumps(["pid", child]), flush=True)
  _, status = os.waitpid(child, 0)
  print(json.dumps(["code", os.waitstatus_to_exitcode(status)]), flush=True)
"""


class Finished(NamedTuple):
  code: int  # negative: the signal that ended it
  out: str
  err: str


class Programs:
  """`run("train", "--workdir=...")`. Close it at the end."""

  def __init__(self, folder: pathlib.Path, **environment: str):
    folder.mkdir(parents=True, exist_ok=True)
    self.folder, self._count = folder, 0
    env = os.environ | {"PYTHONPATH": str(ROOT / ".ns"), "JAX_PLATFORMS": "cpu"} | environment
    env["XLA_FLAGS"] = ""
    self._server = subprocess.Popen(
      [sys.executable, "-W", "ignore::DeprecationWarning", "-c", _SERVER],
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd=folder,
    )  # fmt: skip

  def start(self, module: str, *arguments: str) -> int:
    """Starts a program; returns its process id. `finish` must follow."""
    self._count += 1
    self._files = [self.folder / f"{self._count}.{name}" for name in ("out", "err")]
    request = [module, list(map(str, arguments)), *map(str, self._files)]
    self._server.stdin.write(json.dumps(request) + "\n")
    self._server.stdin.flush()
    return self._answer("pid")

  def finish(self) -> Finished:
    code = self._answer("code")
    return Finished(code, *(file.read_text() if file.exists() else "" for file in self._files))

  def run(self, module: str, *arguments: str) -> Finished:
    self.start(module, *arguments)
    return self.finish()

  def close(self) -> None:
    self._server.stdin.close()
    self._server.wait(30)
    self._server.stdout.close()

  def _answer(self, kind: str) -> int:
    got, value = json.loads(self._server.stdout.readline())
    assert got == kind
    return value
