"""Several processes that train together: joining, stopping at the same step, failing together."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


def join(coordinator: str, process_id: int | None, process_count: int | None) -> None:
  """Connects this process with the others. Call before jax looks for devices.

  On TPU pods, and under launchers that jax knows (Slurm, Open MPI, Kubernetes), nothing needs to be
  given. Elsewhere all three: the address `host:port` of process 0, which of the processes this is,
  and how many there are.

  Raises:
    ValueError: only some of the three, a number out of range, or none of them on such a machine.
  """
  given = dict(coordinator=coordinator or None, process_id=process_id, process_count=process_count)
  missing = [f"--{name}" for name, value in given.items() if value is None]
  if not missing:
    if process_count < 1 or not 0 <= process_id < process_count:
      raise ValueError(
        f"--process_id must lie in 0..--process_count - 1; got {process_id} of {process_count}"
        " (each process has its own)"
      )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
      raise ValueError(
        f"--coordinator must be host:port of process 0; got {coordinator!r} (such as 10.0.0.2:1234)"
      )
    jax.distributed.initialize(coordinator, process_count, process_id)
    return
  if len(missing) < 3:
    raise ValueError(
      f"--coordinator, --process_id and --process_count must be given together; missing are"
      f" {', '.join(missing)} (on a TPU pod give none of them)"
    )
  try:
    jax.distributed.initialize()
  except ValueError as error:
    raise ValueError(
      "--distributed must run on a TPU pod or under a launcher that jax knows; this is neither"
      f" (elsewhere give --coordinator, --process_id and --process_count; jax says: {error})"
    ) from error


def is_first() -> bool:
  """True in the one process that prints and writes what all would print and write alike."""
  return jax.process_index() == 0


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
  """Ends this process at once with exit code 3 and the reason if the block raises.

  With several processes an error in one leaves the others in a collective that will never end.
  Closing files and checkpoints first would wait for them. A process that is gone, however, is
  noticed by the others, and their collectives raise.
  """
  try:
    yield
  except BaseException as error:
    if jax.process_count() == 1:
      raise
    reason = f"{type(error).__name__}: {error}".strip()
    message = f"error: process {jax.process_index()} of {jax.process_count()} stops: {reason}"
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(3)


@contextlib.contextmanager
def sigterm() -> Iterator[Callable[[int], bool]]:
  """Keeps a SIGTERM from ending the process; yields what says after each step whether to stop.

  A SIGTERM to one of several processes stops all of them, at a step that they agree on; ask after
  every step.
  """
  if jax.process_count() > 1:  # jax takes the signal itself
    yield multihost_utils.reached_preemption_sync_point
    return
  stop = threading.Event()
  if threading.current_thread() is not threading.main_thread():
    yield lambda step: False  # signals reach the main thread only
    return
  before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
  try:
    yield lambda step: stop.is_set()
  finally:
    signal.signal(signal.SIGTERM, before)
