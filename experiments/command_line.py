"""What the binaries share: config files by name, and errors that a user can read."""

import pathlib
import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from attnzoo.zoo import models

CONFIGS = pathlib.Path(__file__).parent / "configs"
DEFAULT_CONFIG = str(CONFIGS / "stdlib_small.py")

# Raised for what the user gave, with a message meant for the user.
USER_ERRORS = (ValueError, FileNotFoundError, NotImplementedError, FloatingPointError)


def run(main: Callable[[Sequence[str]], None]) -> None:
  """`absl.app.run`; what the user got wrong ends with one line and exit code 2, no traceback."""

  def guarded(argv):
    if flags.FLAGS["verbosity"].using_default_value:
      logging.set_verbosity(logging.WARNING)  # the checkpoint library tells a lot
    if len(argv) > 1:
      _leave(f"unexpected arguments {' '.join(argv[1:])} (options start with --; see --help)")
    try:
      main(argv)
    except USER_ERRORS as error:
      _leave(str(error))

  app.run(guarded, flags_parser=_parse_flags)


def _leave(message: str) -> None:
  print(f"error: {message}", file=sys.stderr)
  sys.exit(2)


def _parse_flags(argv: Sequence[str]) -> list[str]:
  try:
    return flags.FLAGS([argv[0], *map(_resolve_config, argv[1:])])
  except flags.Error as error:
    _leave(f"{error} (see --help)")
  except FileNotFoundError as error:
    _leave(str(error))
  except (AttributeError, KeyError, TypeError, ValueError) as error:  # of ml_collections
    _leave(str(error).strip("\"'"))


def _resolve_config(argument: str) -> str:
  """`--config=name` means the config file of that name in this package, unless a file says so."""
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
