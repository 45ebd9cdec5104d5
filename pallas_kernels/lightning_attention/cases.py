"""Named shapes of lightning attention.

Options: `decay` is "alibi" (the released rates of the first layer), "strong" (7 per token), "none";
`segments` is "packed" (documents of uneven length), "single" (every token its own document) or
absent; `lengths` adds right padding (one row empty); `state` adds an initial state; `scale`
multiplies the inputs.
"""

import numpy as np

from ..cases import Case, make_rows
from .decay import decay_rates


def _case(name, tags, batch, length, heads, key_dim, value_dim=None, **options):
  sizes = dict(batch=batch, length=length, heads=heads, key_dim=key_dim)
  return Case(name, tags, sizes | dict(value_dim=value_dim or key_dim), options)


CASES = (
  _case("one_token", ("ci",), 2, 1, 2, 8, state=True),
  _case("below_one_chunk", ("ci",), 1, 13, 3, 8, 24, state=True),
  _case("chunks_plus_one", ("ci",), 1, 129, 2, 16, state=True),
  _case("wide_key", ("ci",), 2, 100, 2, 40, 20, state=True),
  _case("no_decay", ("ci",), 1, 90, 2, 16, decay="none"),
  _case("strong_decay", ("ci",), 1, 150, 2, 16, decay="strong", state=True),
  _case("packed", ("ci",), 3, 150, 2, 16, segments="packed", state=True),
  _case("single_token_documents", ("ci",), 1, 70, 2, 8, segments="single", state=True),
  _case("padded", ("ci",), 4, 130, 2, 16, lengths=True, state=True),
  _case("packed_and_padded", ("ci",), 4, 140, 2, 16, segments="packed", lengths=True, state=True),
  _case("large_inputs", ("ci",), 1, 70, 2, 16, scale=100.0, state=True),
  # The layer shapes of the released models (head_dim 128; LRPE doubles the key of layer 0).
  _case("layer_385m", ("bench", "aot"), 4, 2048, 8, 128),
  _case("layer_1b_lrpe", ("aot",), 1, 4096, 16, 256, 128),
  _case("layer_1b", ("aot",), 1, 8192, 16, 128),
  _case("narrow_heads", ("aot",), 1, 4096, 8, 64, state=True),
  _case("ragged_packed", ("aot",), 2, 4000, 4, 128, segments="packed", lengths=True, state=True),
  # Time against length on a CPU.
  *(_case(f"length_{t // 1024}k", ("bench",), 1, t, 8, 64) for t in (1024, 4096, 16384, 32768)),
  # The six shapes of flash-linear-attention's own benchmark.
  *(
    _case(f"fla_{b}x{t}x{h}x{d}", ("bench",), b, t, h, d, gpu=True)
    for b, t, h, d in (
      (1, 8192, 96, 128),
      (2, 16384, 16, 128),
      (4, 2048, 16, 128),
      (4, 4096, 64, 128),
      (8, 2048, 8, 256),
      (8, 1024, 8, 64),
    )
  ),
)


def make_inputs(case: Case, dtype=np.float32, seed: int = 0) -> dict[str, np.ndarray]:
  """Keyword arguments of `lightning_attention` for a case; tokens are in `dtype`."""
  rng = np.random.default_rng(seed)
  size, option = case.sizes, case.options
  batch, length, heads = size["batch"], size["length"], size["heads"]
  key_dim, value_dim = size["key_dim"], size["value_dim"]

  def normal(*shape, scale=0.5):
    return (scale * option.get("scale", 1.0) * rng.standard_normal(shape)).astype(dtype)

  inputs = dict(
    query=normal(batch, length, heads, key_dim),
    key=normal(batch, length, heads, key_dim),
    value=normal(batch, length, heads, value_dim),
  )
  rates = {"alibi": decay_rates(heads), "strong": np.full(heads, 7.0), "none": None}
  if (rate := rates[option.get("decay", "alibi")]) is not None:
    inputs["log_decay"] = -rate.astype(np.float32)
  inputs |= make_rows(option, rng, batch, length)
  if option.get("state"):
    state = rng.standard_normal((batch, heads, key_dim, value_dim))
    inputs["initial_state"] = (option.get("scale", 1.0) * state).astype(np.float32)
  return inputs


def static_options(case: Case) -> dict:
  """Keyword arguments of `lightning_attention` for a case that are not arrays: there are none."""
  return {}


def flops(case: Case, chunk_size: int, backward: bool = False) -> int:
  """Operations with chunks of `chunk_size`; with `backward`, forward and backward together."""
  size = case.sizes
  k, v = size["key_dim"], size["value_dim"]
  per_token = 2 * chunk_size * (k + v) + 4 * k * v
  if backward:
    per_token += 2 * chunk_size * (3 * k + 2 * v) + 8 * k * v
  return size["batch"] * size["length"] * size["heads"] * per_token


def minimum_bytes(case: Case, dtype=np.float32, backward: bool = False) -> int:
  """Least memory traffic: every input read once, every output written once; `backward`: both."""
  size = case.sizes
  k, v, width = size["key_dim"], size["value_dim"], np.dtype(dtype).itemsize
  per_token = width * (2 * k + 2 * v) + (width * (4 * k + 3 * v) if backward else 0)
  tokens = size["batch"] * size["length"] * size["heads"]
  return tokens * per_token + 8 * k * v * size["batch"] * size["heads"]
