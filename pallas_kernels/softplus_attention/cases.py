"""Named shapes of softplus attention.

Options: `variant` names one of VARIANTS; `segments`, `lengths`, `state` and `scale` are those of
`sliding_window_attention`.
"""

from typing import Any

import numpy as np

from ..cases import Case
from ..sliding_window_attention.cases import make_store, make_tokens
from ..softmax_attention.cache import CacheState
from .api import softplus_attention
from .variants import VARIANTS


def _case(name, tags, batch, length, heads, key_dim, *, kv_heads=None, value_dim=None, **options):
  sizes = dict(batch=batch, length=length, heads=heads, kv_heads=kv_heads or heads, key_dim=key_dim)
  return Case(name, tags, sizes | dict(value_dim=value_dim or key_dim), options)


CASES = (
  _case("one_token", ("ci",), 2, 1, 2, 8, state="few", variant="lssa"),
  _case("lssa", ("ci",), 1, 70, 2, 16, variant="lssa"),
  _case("lssar", ("ci",), 1, 70, 2, 16),
  _case("grouped", ("ci",), 2, 50, 6, 8, kv_heads=2, value_dim=20, state="few",
        variant="lssar_p3"),
  _case("packed_and_padded", ("ci",), 4, 80, 4, 16, kv_heads=2, segments="packed", lengths=True,
        state="few"),
  _case("sigmoid_packed", ("ci",), 2, 40, 2, 8, segments="packed", lengths=True,
        variant="sigmoid_bias"),
  # GPT-2 small, and a wide head.
  _case("layer_124m", ("bench", "aot"), 8, 1024, 12, 64),
  _case("layer_124m_lssa", ("bench", "aot"), 8, 1024, 12, 64, variant="lssa"),
  _case("wide_heads", ("aot",), 1, 4096, 8, 128),
  _case("ragged_packed", ("aot",), 2, 4000, 4, 64, kv_heads=2, segments="packed", lengths=True,
        state="many"),
  _case("longest", ("aot",), 1, 65536, 2, 128, kv_heads=1),
  # Time against length on a CPU.
  *(_case(f"length_{t // 1024}k_{name}", ("bench",), 1, t, 8, 64, variant=name)
    for t in (1024, 4096, 16384) for name in ("lssa", "lssar_p15")),
)  # fmt: skip


def make_inputs(case: Case, dtype=np.float32, seed: int = 0) -> dict[str, np.ndarray]:
  """Keyword arguments of `operator` below for a case; tokens are in `dtype`."""
  rng = np.random.default_rng(seed)
  inputs = make_tokens(case, rng, dtype)
  if kind := case.options.get("state"):
    tokens = 7 if kind == "few" else 100
    store = make_store(case, rng, dtype, case.sizes["length"] + tokens + 2, tokens)
    norm = np.linalg.norm(store["stored_key"].astype(np.float32), axis=-1, keepdims=True)
    inputs |= store | dict(stored_key=(store["stored_key"] / norm).astype(dtype))
  return inputs


def static_options(case: Case) -> dict:
  """Keyword arguments of `operator` for a case that are not arrays."""
  return dict(variant=VARIANTS[case.options.get("variant", "lssar_p15")])


RESULTS = ("output", "stored_key", "stored_value")


def operator(
  *, stored_key: Any = None, stored_value: Any = None, count: Any = None, **arguments
) -> tuple:
  """`softplus_attention` on plain arrays; returns what RESULTS names."""
  state = None if count is None else CacheState(stored_key, stored_value, count)
  output, state = softplus_attention(**arguments, initial_state=state)
  return output, state.key, state.value


def flops(case: Case, chunk_size: int, backward: bool = False) -> int:
  """Operations on the causal half; with `backward`, forward and backward together.

  LSSAR's extra product with the keys is that of a kernel of two passes.
  """
  size = case.sizes
  pairs = size["batch"] * size["heads"] * size["length"] ** 2 // 2
  k, v = size["key_dim"], size["value_dim"]
  twice = case.options.get("variant") != "lssa"
  forward = 2 * (k + v) + 2 * k * twice
  return pairs * (forward + (2 * (3 * k + 2 * v + (k + v) * twice) if backward else 0))


def minimum_bytes(case: Case, dtype=np.float32, backward: bool = False) -> int:
  """Least memory traffic: every input read once, every output written once; `backward`: both."""
  size = case.sizes
  heads, kv_heads, width = size["heads"], size["kv_heads"], np.dtype(dtype).itemsize
  per_token = width * (heads + kv_heads) * (size["key_dim"] + size["value_dim"])
  if backward:  # the mean and the scale of every row are kept
    per_token += 16 * heads + 2 * per_token
  return size["batch"] * size["length"] * per_token
