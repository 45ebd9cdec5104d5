"""The one place that knows about differences between jax versions and platforms."""

import importlib.util
from typing import Any

import jax


def target_platform() -> str:
  """Platform the current trace is for: "cpu", "tpu" or "cuda".

  Ahead-of-time compilation traces on a CPU host for devices that are not there; the abstract mesh
  in force then names the real target, and only without one does the default backend decide.
  """
  device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
  platform = device.platform if device is not None else jax.default_backend()
  return {"gpu": "cuda"}.get(platform, platform)


def has_jax_triton() -> bool:
  """True if jax-triton and triton can be imported (neither is imported by this question)."""
  return all(importlib.util.find_spec(name) is not None for name in ("triton", "jax_triton"))


def require_tpu(function: str, interpret: Any) -> None:
  """Raises NotImplementedError where a Pallas TPU kernel was asked for and cannot run."""
  if not interpret and target_platform() != "tpu":
    raise NotImplementedError(
      f'{function}: implementation="tpu" compiles only for a TPU and the target is '
      f'{target_platform()} (use "xla", or interpret=True to test the kernel)'
    )


def require_triton(function: str) -> None:
  """Raises NotImplementedError where a Triton kernel was asked for and cannot run."""
  if not has_jax_triton():
    raise NotImplementedError(
      f'{function}: implementation="triton" needs the packages jax-triton and triton, which are '
      'not installed (pip install "attnzoo[cuda]", or use "xla")'
    )
  if target_platform() != "cuda":
    raise NotImplementedError(
      f'{function}: implementation="triton" compiles only for an NVIDIA GPU and the target is '
      f'{target_platform()} (use "xla")'
    )
