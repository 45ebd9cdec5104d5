"""Environment of the tests: a CPU with 8 virtual devices, able to compile for accelerators."""

import os

# Read when jax and libtpu are first imported, so set before any test module is.
_ENVIRONMENT = dict(
  JAX_PLATFORMS="cpu",
  TPU_SKIP_MDS_QUERY="1",
  TPU_WORKER_HOSTNAMES="localhost",
  TPU_ACCELERATOR_TYPE="v5litepod-4",
  ALLOW_MULTIPLE_LIBTPU_LOAD="1",
  TPU_LOG_DIR="disabled",
  TRITON_DEFAULT_FP_FUSION="1",
  TF_CPP_MIN_LOG_LEVEL="2",
)
for _name, _value in _ENVIRONMENT.items():
  os.environ.setdefault(_name, _value)
_DEVICES = "--xla_force_host_platform_device_count=8"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}".strip()

# Imported here and not above: jax reads the environment.
import jax  # noqa: E402

from attnzoo_testing import annotations  # noqa: E402

# Marks of tests that look at compiled programs.
_COMPILED = ("tpu_aot", "cuda_aot", "gpu")

annotations.install("attnzoo.pallas_kernels", "attnzoo.layers", "attnzoo.zoo")


def pytest_runtest_setup(item):
  """Exactness of operators is measured on the code that users run; all else compiles quickly."""
  as_users = "pallas_kernels" in item.path.parts or any(map(item.get_closest_marker, _COMPILED))
  jax.config.update("jax_disable_most_optimizations", not as_users)
