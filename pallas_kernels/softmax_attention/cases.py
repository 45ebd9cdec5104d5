"""Named shapes of full attention; the options are those of `sliding_window_attention`."""

from typing import Any

import numpy as np

from ..cases import Case
from ..sliding_window_attention.cases import make_store, make_tokens
from .api import softmax_attention
from .cache import CacheState


def _case(name, tags, batch, length, heads, key_dim, *, kv_heads=None, value_dim=None, **options):
  sizes = dict(batch=batch, length=length, heads=heads, kv_heads=kv_heads or heads, key_dim=key_dim)
  return Case(name, tags, sizes | dict(value_dim=value_dim or key_dim), options)


CASES = (
  _case("one_token", ("ci",), 2, 1, 2, 8, state="few"),
  _case("no_state", ("ci",), 1, 70, 2, 16),
  _case("grouped", ("ci",), 2, 50, 6, 8, kv_heads=2, value_dim=20, state="few"),
  _case("packed_and_padded", ("ci",), 4, 80, 4, 16, kv_heads=2, segments="packed", lengths=True,
        state="few"),
  _case("layer_360m", ("bench", "aot"), 4, 2048, 16, 64),
  _case("layer_1b", ("aot",), 4, 2048, 16, 112),
  *(_case(f"length_{t // 1024}k", ("bench",), 1, t, 8, 64) for t in (1024, 2048, 4096)),
)  # fmt: skip


def make_inputs(case: Case, dtype=np.float32, seed: int = 0) -> dict[str, np.ndarray]:
  """Keyword arguments of `operator` below for a case; tokens are in `dtype`."""
  rng = np.random.default_rng(seed)
  inputs = make_tokens(case, rng, dtype)
  if case.options.get("state"):
    inputs |= make_store(case, rng, dtype, case.sizes["length"] + 9, 7)
  return inputs


def static_options(case: Case) -> dict:
  """Keyword arguments of `operator` for a case that are not arrays: none."""
  return {}


def operator(
  *, stored_key: Any = None, stored_value: Any = None, count: Any = None, **arguments
) -> tuple:
  """`softmax_attention` on plain arrays: (output, keys and values of the final state)."""
  state = None if count is None else CacheState(stored_key, stored_value, count)
  output, state = softmax_attention(**arguments, initial_state=state)
  return output, state.key, state.value


def flops(case: Case, chunk_size: int, backward: bool = False) -> int:
  """Operations on the causal half; with `backward`, forward and backward together."""
  size = case.sizes
  pairs = size["batch"] * size["heads"] * size["length"] ** 2 // 2
  k, v = size["key_dim"], size["value_dim"]
  return pairs * (2 * (k + v) + (2 * (3 * k + 2 * v) if backward else 0))


def minimum_bytes(case: Case, dtype=np.float32, backward: bool = False) -> int:
  """Least memory traffic: every input read once, every output written once; `backward`: both."""
  size = case.sizes
  heads, kv_heads, width = size["heads"], size["kv_heads"], np.dtype(dtype).itemsize
  per_token = width * (heads + kv_heads) * (size["key_dim"] + size["value_dim"])
  if backward:
    per_token += 8 * heads + 2 * per_token
  return size["batch"] * size["length"] * per_token
