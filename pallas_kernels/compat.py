"""The one place that knows about differences between jax versions and platforms."""

import importlib.util

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
