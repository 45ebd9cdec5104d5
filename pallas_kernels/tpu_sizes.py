"""Sizes of TPU kernels: whole tiles, and how much VMEM they may have."""

from jax.experimental.pallas import tpu as pltpu

from .compat import target_platform

# What blocks and scratch may take: of 16 MiB that every chip has, or of what the chip in question
# has less the compiler's own.
SMALL_VMEM = 12 * 2**20
DEFAULT_LIMIT = 16 * 2**20
TEMPORARIES = 18 * 2**20


def round_up(number: int, multiple: int) -> int:
  return -(-number // multiple) * multiple


def vmem_bytes() -> int:
  """What estimates may come to on the chip that is compiled for."""
  if target_platform() != "tpu":
    return SMALL_VMEM
  capacity = pltpu.get_tpu_info().vmem_capacity_bytes
  return SMALL_VMEM if capacity <= DEFAULT_LIMIT else capacity - TEMPORARIES - 2 * 2**20


def vmem_limit(estimate: int) -> int | None:
  """Bytes of VMEM to ask for; None is the compiler's default, 16 MiB or more."""
  small = estimate <= SMALL_VMEM // 2 or vmem_bytes() == SMALL_VMEM
  return None if small else estimate + TEMPORARIES
