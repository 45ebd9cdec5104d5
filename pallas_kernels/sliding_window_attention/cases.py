"""Named shapes of sliding-window attention.

Options: `segments` is "packed" (documents of uneven length), "single" (every token its own
document) or absent; `lengths` adds right padding (one row empty); `state` adds an initial state of
"few" tokens (not a full window) or "many"; `scale` multiplies query and key.
"""

from typing import Any

import numpy as np

from ..cases import Case, make_rows
from .api import sliding_window_attention
from .window import WindowState


def _case(
  name, tags, batch, length, heads, key_dim, left, *, kv_heads=None, value_dim=None, **options
):
  sizes = dict(batch=batch, length=length, heads=heads, kv_heads=kv_heads or heads, key_dim=key_dim)
  sizes |= dict(value_dim=value_dim or key_dim, left=left)
  return Case(name, tags, sizes, options)


CASES = (
  _case("one_token", ("ci",), 2, 1, 2, 8, 5, state="few"),
  _case("below_one_chunk", ("ci",), 1, 13, 3, 8, 4, value_dim=24, state="many"),
  _case("chunks_plus_one", ("ci",), 1, 65, 2, 16, 8, state="many"),
  _case("window_over_chunks", ("ci",), 2, 70, 2, 16, 40, state="few"),
  _case("window_over_everything", ("ci",), 2, 30, 2, 8, 100, state="few"),
  _case("own_key_only", ("ci",), 1, 30, 2, 8, 0, value_dim=12, state="many"),
  _case("grouped", ("ci",), 2, 50, 6, 8, 16, kv_heads=2, value_dim=20, state="few"),
  _case("packed", ("ci",), 3, 90, 2, 16, 12, segments="packed", state="many"),
  _case("single_token_documents", ("ci",), 1, 40, 2, 8, 6, segments="single", state="many"),
  _case("packed_and_padded", ("ci",), 4, 80, 4, 16, 12, kv_heads=2, segments="packed",
        lengths=True, state="few"),
  # The layer shapes of the released models (`window_size` 128 and 256, halved by their code).
  _case("layer_360m", ("bench", "aot"), 4, 2048, 16, 64, 64),
  _case("layer_360m_wide", ("bench", "aot"), 4, 2048, 16, 64, 128),
  _case("layer_1b", ("bench", "aot"), 4, 2048, 16, 112, 64),
  _case("wide_heads", ("aot",), 1, 4096, 8, 128, 128),
  _case("grouped_heads", ("aot",), 1, 4096, 16, 128, 128, kv_heads=4),
  _case("ragged_packed", ("aot",), 2, 4000, 4, 64, 64, segments="packed", lengths=True,
        state="many"),
  # Time against length on a CPU.
  *(_case(f"length_{t // 1024}k", ("bench",), 1, t, 8, 64, 64)
    for t in (1024, 2048, 4096, 16384, 32768)),
)  # fmt: skip


def make_inputs(case: Case, dtype=np.float32, seed: int = 0) -> dict[str, np.ndarray]:
  """Keyword arguments of `operator` below for a case; tokens are in `dtype`."""
  rng = np.random.default_rng(seed)
  left = case.sizes["left"]
  inputs = make_tokens(case, rng, dtype)
  if kind := case.options.get("state"):
    few = max(1, left // 3)
    inputs |= make_store(case, rng, dtype, left, few if kind == "few" else 2 * left + 3)
  return inputs


def make_tokens(case: Case, rng: np.random.Generator, dtype) -> dict[str, np.ndarray]:
  """Query, key, value, documents and lengths; shared with `softmax_attention`."""
  size, option = case.sizes, case.options
  batch, length = size["batch"], size["length"]
  scale = option.get("scale", 1.0)

  def normal(heads, dim, scale=1.0):
    return (scale * rng.standard_normal((batch, length, heads, dim))).astype(dtype)

  inputs = dict(
    query=normal(size["heads"], size["key_dim"], scale),
    key=normal(size["kv_heads"], size["key_dim"], scale),
    value=normal(size["kv_heads"], size["value_dim"]),
  )
  inputs |= make_rows(option, rng, batch, length)
  return inputs


def make_store(
  case: Case, rng: np.random.Generator, dtype, slots: int, count: int
) -> dict[str, np.ndarray]:
  """A state's arrays after about `count` tokens; slots without a token are not 0 either."""
  size = case.sizes
  shape = (size["batch"], slots, size["kv_heads"])
  return dict(
    stored_key=rng.standard_normal((*shape, size["key_dim"])).astype(dtype),
    stored_value=rng.standard_normal((*shape, size["value_dim"])).astype(dtype),
    count=np.maximum(count - np.arange(size["batch"]), 0).astype(np.int32),
  )


def static_options(case: Case) -> dict:
  """Keyword arguments of `operator` for a case that are not arrays."""
  return dict(left=case.sizes["left"])


def operator(
  *, stored_key: Any = None, stored_value: Any = None, count: Any = None, **arguments
) -> tuple:
  """`sliding_window_attention` on plain arrays: (output, keys and values of the final state)."""
  state = None if count is None else WindowState(stored_key, stored_value, count)
  output, state = sliding_window_attention(**arguments, initial_state=state)
  return output, state.key, state.value


def flops(case: Case, chunk_size: int, backward: bool = False) -> int:
  """Operations with chunks of `chunk_size`; with `backward`, forward and backward together."""
  size = case.sizes
  pairs = size["batch"] * size["length"] * size["heads"] * (chunk_size + size["left"])
  k, v = size["key_dim"], size["value_dim"]
  return pairs * (2 * (k + v) + (2 * (3 * k + 2 * v) if backward else 0))


def minimum_bytes(case: Case, dtype=np.float32, backward: bool = False) -> int:
  """Least memory traffic: every input read once, every output written once; `backward`: both."""
  size = case.sizes
  heads, kv_heads, width = size["heads"], size["kv_heads"], np.dtype(dtype).itemsize
  per_token = width * (heads + kv_heads) * (size["key_dim"] + size["value_dim"])
  if backward:  # the log-sum-exp is kept, 4 bytes per query; inputs again, cotangent, gradients
    per_token += 8 * heads + 2 * per_token
  return size["batch"] * size["length"] * per_token
