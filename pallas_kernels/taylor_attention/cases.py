"""Named shapes of Taylor attention.

Options: `decay` True gives rates from 1/2 down; `segments` is "packed" (documents of uneven
length), "single" (every token its own document) or absent; `lengths` adds right padding (one row
empty); `state` adds an initial state, that of eight tokens; `normalize` False leaves out the
division; `scale` multiplies query and key.
"""

import numpy as np

from ..cases import Case, make_rows
from .features import feature_count, pairs


def _case(name, tags, batch, length, heads, key_dim, value_dim, **options):
  sizes = dict(batch=batch, length=length, heads=heads, key_dim=key_dim, value_dim=value_dim)
  return Case(name, tags, sizes, options)


CASES = (
  _case("one_token", ("ci",), 2, 1, 2, 8, 8, state=True),
  _case("below_one_chunk", ("ci",), 1, 13, 3, 8, 24, state=True),
  _case("chunks_plus_one", ("ci",), 1, 129, 2, 16, 16, state=True),
  _case("odd_features", ("ci",), 2, 70, 2, 5, 7, state=True),
  _case("decayed", ("ci",), 1, 90, 2, 8, 16, decay=True, state=True),
  _case("not_normalized", ("ci",), 1, 70, 2, 8, 16, normalize=False, state=True),
  _case("packed", ("ci",), 3, 150, 2, 8, 16, segments="packed", state=True),
  _case("single_token_documents", ("ci",), 1, 70, 2, 8, 8, segments="single", state=True),
  _case("padded", ("ci",), 4, 130, 2, 8, 16, lengths=True, state=True),
  _case("packed_and_padded", ("ci",), 4, 140, 2, 8, 16, segments="packed", lengths=True,
        decay=True, state=True),
  _case("large_inputs", ("ci",), 1, 70, 2, 8, 16, scale=100.0, state=True),
  # The layer shapes of the released models, and that of their throughput benchmark.
  _case("layer_360m", ("bench", "aot"), 4, 2048, 16, 16, 64),
  _case("layer_1b", ("bench", "aot"), 4, 2048, 16, 16, 112),
  _case("layer_1b_28_heads", ("aot",), 1, 4096, 28, 16, 64),
  _case("ragged_packed", ("aot",), 2, 4000, 8, 16, 64, segments="packed", lengths=True, state=True),
  # Time against length on a CPU.
  *(_case(f"length_{t // 1024}k", ("bench",), 1, t, 16, 16, 64)
    for t in (1024, 4096, 16384, 32768)),
  # The lengths of the authors' kernel benchmark.
  *(_case(f"kernel_{t}", ("bench",), 4, t, 16, 16, 64, gpu=True)
    for t in (1024, 4096, 8192, 16384, 32768)),
)  # fmt: skip


def make_inputs(case: Case, dtype=np.float32, seed: int = 0) -> dict[str, np.ndarray]:
  """Keyword arguments of `taylor_attention` for a case; tokens are in `dtype`."""
  rng = np.random.default_rng(seed)
  size, option = case.sizes, case.options
  batch, length, heads = size["batch"], size["length"], size["heads"]
  key_dim, value_dim = size["key_dim"], size["value_dim"]
  scale = option.get("scale", 1.0)

  def normal(*shape):
    return rng.standard_normal(shape)

  inputs = dict(
    query=(scale * normal(batch, length, heads, key_dim)).astype(dtype),
    key=(scale * normal(batch, length, heads, key_dim)).astype(dtype),
    value=normal(batch, length, heads, value_dim).astype(dtype),
  )
  if option.get("decay"):
    inputs["log_decay"] = np.log1p(-(0.5 ** np.arange(1, heads + 1))).astype(np.float32)
  inputs |= make_rows(option, rng, batch, length)
  if option.get("state"):
    inputs["initial_state"] = random_state(rng, batch, heads, value_dim, key_dim, scale)
  return inputs


def static_options(case: Case) -> dict:
  """Keyword arguments of `taylor_attention` for a case that are not arrays."""
  return dict(normalize=case.options.get("normalize", True))


def random_state(rng, batch, heads, value_dim, key_dim, scale=1.0) -> np.ndarray:
  """The state after eight random tokens, float32 [B, H, P, V + 1]."""
  key = scale * rng.standard_normal((batch, heads, 8, key_dim))
  value = rng.standard_normal((batch, heads, 8, value_dim))
  i, j = pairs(key_dim)
  features = np.concatenate([np.ones_like(key[..., :1]), key, key[..., i] * key[..., j]], -1)
  values = np.concatenate([value, np.ones_like(value[..., :1])], -1)
  return np.einsum("bhtp,bhtv->bhpv", features, values).astype(np.float32)


def flops(case: Case, chunk_size: int, backward: bool = False) -> int:
  """Operations with chunks of `chunk_size`; with `backward`, forward and backward together."""
  size = case.sizes
  f, v = size["key_dim"], size["value_dim"]
  state = feature_count(f) * (v + 1)
  per_token = 2 * chunk_size * (f + v + 1) + 4 * state
  if backward:
    per_token += 2 * chunk_size * (3 * f + 2 * (v + 1)) + 8 * state
  return size["batch"] * size["length"] * size["heads"] * per_token


def minimum_bytes(case: Case, dtype=np.float32, backward: bool = False) -> int:
  """Least memory traffic: every input read once, every output written once; `backward`: both.

  The sum of weights of every token is kept for the backward pass, 4 bytes.
  """
  size = case.sizes
  f, v, width = size["key_dim"], size["value_dim"], np.dtype(dtype).itemsize
  per_token = width * (2 * f + 2 * v) + (8 + width * (4 * f + 4 * v) if backward else 0)
  heads = size["batch"] * size["heads"]
  return heads * (size["length"] * per_token + 8 * feature_count(f) * (v + 1))
