"""Runs Triton launches on a CPU, by Triton's interpreter, on numpy arrays and without torch.

`interpret` starts one child process for all the programs it is given: whether a kernel is
interpreted is decided when its module is imported, and that of this process must stay compilable.
bfloat16 is refused: the interpreter multiplies its bits as integers.
"""

import os
import pathlib
import pickle
import subprocess
import sys
import tempfile

import numpy as np

SUPPORTED = ("float32", "float16", "int32", "int16")


def interpret(programs: list[tuple], timeout: float = 600) -> list[dict[str, np.ndarray]]:
  """Runs each program, (launches, arrays by name); returns the arrays with the outputs added.

  Outputs start as NaN, so that what a kernel leaves unwritten is seen.
  """
  for _, arrays in programs:
    for name, array in arrays.items():
      if array.dtype.name not in SUPPORTED:
        raise ValueError(f"interpret: {name} must be one of {SUPPORTED}; got {array.dtype}")
  paths = [str(pathlib.Path(__file__).parents[1]), *sys.path]
  environment = dict(
    os.environ, TRITON_INTERPRET="1", PYTHONPATH=os.pathsep.join(filter(None, paths))
  )
  with tempfile.TemporaryDirectory() as folder:
    files = [os.path.join(folder, name) for name in ("programs", "results")]
    with open(files[0], "wb") as file:
      pickle.dump(programs, file)
    command = [sys.executable, "-m", "attnzoo_testing.triton_interpreter", *files]
    child = subprocess.run(
      command, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    if child.returncode:
      raise RuntimeError(f"interpret: the child process failed\n{child.stderr[-4000:]}")
    with open(files[1], "rb") as file:
      return pickle.load(file)


class _Storage:
  """Memory of an array under the names of a torch storage, which is all the interpreter uses."""

  def __init__(self, array):
    self.array = array

  def data_ptr(self):
    return self.array.ctypes.data

  def cpu(self):
    return _Storage(self.array.copy())

  def copy_(self, other):
    self.array[...] = other.array


class _Tensor:
  """A numpy array under the names of a torch tensor."""

  device = "cpu"

  def __init__(self, array, storage=None):
    self.array = array
    self.storage = storage or _Storage(array)

  @property
  def dtype(self):
    return self.array.dtype.name

  def data_ptr(self):
    return self.storage.data_ptr()

  def untyped_storage(self):
    return self.storage

  def new_empty(self, *_, **__):
    return _Tensor(np.empty(0, self.array.dtype))

  def set_(self, storage, *_):
    self.storage, self.array = storage, storage.array

  def storage_offset(self):
    return 0

  def size(self):
    return self.array.shape

  def stride(self):
    return tuple(step // self.array.itemsize for step in self.array.strides)


def _run(launches, arrays):
  """In the child: executes the launches one after the other."""
  from attnzoo.pallas_kernels.triton_call import load_kernel

  arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
  for launch in launches:
    for name, shape in launch.outputs.items():
      arrays[name] = np.full(shape.shape, np.nan, shape.dtype)
    operands = [_Tensor(arrays[name]) for name in (*launch.inputs, *launch.outputs)]
    load_kernel(launch)[launch.grid](*operands, **launch.constants)
  return arrays


def _main(source, target):
  with open(source, "rb") as file:
    programs = pickle.load(file)
  results = [_run(*program) for program in programs]
  with open(target, "wb") as file:
    pickle.dump(results, file)


if __name__ == "__main__":
  _main(*sys.argv[1:])
