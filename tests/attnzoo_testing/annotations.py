"""Makes every annotated function of the package check its annotations, shapes included.

`install()` is called once, before attnzoo is imported. What a function refuses with an error of its
own stays as it is; a call that breaks the annotations and is not refused raises TypeCheckError.
"""

import ast
import functools
import importlib.abc
import importlib.machinery
import sys

import beartype
import jax
import jaxtyping
import numpy as np

# What an argument annotated as an array may be: jax takes numpy arrays wherever it takes its own.
AnyArray = jax.Array | np.ndarray

# Triton compiles the source text of its kernels, so those modules are left as they are written.
_EXCLUDED = "triton"
# Errors that have been through `checked` once: the functions further out only let them pass.
_final: list[jaxtyping.TypeCheckError] = []


def install(*packages: str) -> None:
  sys.meta_path.insert(0, _Finder(packages))


def checked(function):
  """The function with its annotations checked, one set of axis sizes per call."""
  typed = jaxtyping.jaxtyped(function, typechecker=beartype.beartype)

  @functools.wraps(function)
  def wrapper(*args, **kwargs):
    try:
      return typed(*args, **kwargs)
    except jaxtyping.TypeCheckError as error:
      if error not in _final:
        function(*args, **kwargs)  # The message that a user would see comes first.
        _final.append(error)
      raise

  return wrapper


class _Finder(importlib.abc.MetaPathFinder):
  def __init__(self, packages):
    self._packages = packages

  def find_spec(self, fullname, path=None, target=None):
    package = ".".join(fullname.split(".")[:2])
    if package not in self._packages or fullname.rpartition(".")[2].startswith(_EXCLUDED):
      return None
    spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
    if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
      spec.loader = _Loader(fullname, spec.loader.path)
    return spec


class _Loader(importlib.machinery.SourceFileLoader):
  def get_code(self, fullname):
    # Not cached: the byte code in __pycache__ is the unchecked one.
    path = self.get_filename(fullname)
    return self.source_to_code(self.get_data(path), path)

  def source_to_code(self, data, path, *, _optimize=-1):
    tree = ast.parse(data, path)
    for node in ast.walk(tree):
      if isinstance(node, ast.FunctionDef):
        annotations = [_allow_numpy(arg) for arg in ast.walk(node.args) if isinstance(arg, ast.arg)]
        if any(annotations) or node.returns is not None:
          # Innermost, so that jax.custom_vjp and the like wrap the checked function.
          node.decorator_list.append(_name_here("checked", node))
    return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)


def _allow_numpy(argument: ast.arg) -> bool:
  """Widens the annotation in place; returns whether there is one."""
  if argument.annotation is not None:
    argument.annotation = _TakesNumpy().visit(argument.annotation)
  return argument.annotation is not None


class _TakesNumpy(ast.NodeTransformer):
  """Array and jax.Array -> AnyArray."""

  def visit_Name(self, node):
    return _name_here("AnyArray", node) if node.id == "Array" else node

  def visit_Attribute(self, node):
    return _name_here("AnyArray", node) if ast.unparse(node) == "jax.Array" else node


def _name_here(name: str, location: ast.AST) -> ast.expr:
  """An expression for a name of this module that works in any module."""
  expression = ast.parse(f"__import__({__name__!r}, fromlist=['']).{name}", mode="eval").body
  for node in ast.walk(expression):
    ast.copy_location(node, location)
  return expression
