"""What the binaries share: config files by name, and errors that a user can read."""

import json
import pathlib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags, logging

from attnzoo.zoo import models

CONFIGS = pathlib.Path(__file__).parent / "configs"
DEFAULT_CONFIG = "stdlib_small"

# Raised for what the user gave, with a message meant for the user.
USER_ERRORS = (ValueError, OSError, NotImplementedError, FloatingPointError)


def run(main: Callable[[Sequence[str]], None]) -> None:
  """`absl.app.run`; what the user got wrong ends with one line and exit code 2, no traceback.

  `--verbosity=1` shows the traceback, and what the checkpoint library has to tell.
  """

  def parse(argv):
    argv = _parse_flags(argv)
    if flags.FLAGS["verbosity"].using_default_value:  # absl would make that INFO
      flags.FLAGS.verbosity = logging.WARNING
    return argv

  def guarded(argv):
    if len(argv) > 1:
      _leave(f"unexpected arguments {' '.join(argv[1:])} (options start with --; see --help)")
    try:
      main(argv)
    except USER_ERRORS as error:
      if logging.get_verbosity() >= logging.DEBUG:
        raise
      _leave(str(error))
    except KeyboardInterrupt:
      sys.stdout.flush()
      print("\ninterrupted", file=sys.stderr)
      sys.exit(130)

  app.run(guarded, flags_parser=parse)


def json_object(name: str, text: str) -> dict[str, Any]:
  """The value of flag `name`, a JSON object. Raises ValueError for anything else."""
  try:
    fields = json.loads(text)
    if not isinstance(fields, dict):
      raise ValueError("no object")
  except ValueError as error:
    raise ValueError(
      f'--{name} must be a JSON object; got {text!r} ({error}; such as {{"features": 256}})'
    ) from None
  return fields


def _leave(message: str) -> None:
  sys.stdout.flush()
  print(f"error: {' '.join(message.split())}", file=sys.stderr)
  sys.exit(2)


def _parse_flags(argv: Sequence[str]) -> list[str]:
  try:
    return flags.FLAGS(_with_config(list(argv)))
  except (flags.Error, OSError, ValueError) as error:
    _leave(f"{_readable(error)} (see --help)")
  except (AttributeError, KeyError, TypeError) as error:  # of ml_collections
    _leave(f"--config: {_readable(error)}")


def _readable(error: Exception) -> str:
  """The message without the quotes that KeyError and ml_collections put around it."""
  text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
  if suggested := re.search(r'Did you mean "(.*?)" instead of "(.*?)"\?', text):
    right, wrong = suggested.groups()
    return f"there is no field {wrong!r}; did you mean {right!r}?"
  if "Error whilst parsing config file" in text:  # a whole traceback; its last line is ours
    return "--config: " + text.strip().splitlines()[-1].partition(": ")[2]
  return text


def _with_config(argv: list[str]) -> list[str]:
  """Config files by name: `--config=lm:tiny` is configs/lm.py; none given is the default one."""
  if "config" not in flags.FLAGS:
    return argv
  result = argv[:1]
  arguments = iter(argv[1:])
  for argument in arguments:
    if argument in ("--config", "-config"):  # the value is the next argument
      argument = f"--config={next(arguments, '')}"
    result.append(_resolve_config(argument))
  if not any(argument.startswith(("--config=", "-config=")) for argument in result):
    result.insert(1, _resolve_config(f"--config={DEFAULT_CONFIG}"))
  return result


def _resolve_config(argument: str) -> str:
  if not argument.startswith(("--config=", "-config=")):
    return argument
  flag, _, value = argument.partition("=")
  path, colon, option = value.partition(":")
  if pathlib.Path(path).is_file():
    return argument
  known = {file.stem: file for file in sorted(CONFIGS.glob("*.py")) if file.stem != "__init__"}
  name = pathlib.Path(path).stem
  if name not in known or pathlib.Path(path).parent.name not in ("", "configs"):
    hint = models.nearest(name, list(known))
    raise FileNotFoundError(f"--config must name a config file; got {path!r} ({hint})")
  return f"{flag}={known[name]}{colon}{option}"
