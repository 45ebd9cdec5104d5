"""Named shapes of RAT attention.

Options: `output` False leaves out the output gate; `rotary` False the rotary positions; `segments`
is "packed" (documents of uneven length), "single" (every token its own document) or absent;
`lengths` adds right padding (one row empty); `state` adds a state of that many tokens, fewer in
later rows; `scale` multiplies query and key.
"""

from typing import Any

import numpy as np

from ..cases import Case, make_rows
from .api import rat_attention
from .state import RatState


def _case(name, tags, batch, length, heads, head_dim, chunk_size, *, groups=None, **options):
  sizes = dict(batch=batch, length=length, heads=heads, kv_heads=groups or heads)
  sizes |= dict(key_dim=head_dim, value_dim=head_dim, chunk=chunk_size)
  return Case(name, tags, sizes, options)


CASES = (
  _case("one_token", ("ci",), 2, 1, 2, 8, 4, state=9),
  _case("below_one_chunk", ("ci",), 1, 7, 2, 8, 16),
  _case("chunks_of_one", ("ci",), 1, 20, 2, 8, 1, output=False),
  _case("whole_chunks", ("ci",), 2, 64, 4, 16, 16, groups=2),
  _case("partial_chunk", ("ci",), 1, 45, 4, 8, 4, groups=2),
  _case("one_chunk", ("ci",), 1, 24, 2, 8, 24),
  _case("odd_chunk_no_rotary", ("ci",), 1, 50, 2, 7, 3, rotary=False),
  _case("from_a_state", ("ci",), 3, 40, 2, 8, 4, state=22),
  _case("packed", ("ci",), 3, 90, 4, 8, 4, groups=2, segments="packed", state=13),
  _case("single_token_documents", ("ci",), 1, 30, 2, 8, 4, segments="single"),
  _case("packed_and_padded", ("ci",), 4, 70, 2, 8, 5, segments="packed", lengths=True, state=8),
  _case("large_inputs", ("ci",), 1, 40, 2, 8, 4, scale=30.0),
  # The layer shape of the released models, and chunk sizes of the paper's figures.
  _case("layer_1b", ("bench", "aot"), 4, 4096, 16, 128, 16, groups=2),
  _case("layer_1b_documents", ("aot",), 4, 4096, 16, 128, 16, groups=2, segments="packed"),
  _case("layer_1b_long_chunks", ("aot",), 1, 8192, 16, 128, 64, groups=2),
  _case("narrow_heads", ("aot",), 2, 4096, 8, 64, 16, groups=2),
  _case("ragged_packed", ("aot",), 2, 4000, 4, 128, 16, groups=2, segments="packed", lengths=True),
  _case("ragged_from_a_state", ("aot",), 2, 4000, 4, 128, 16, groups=2, segments="packed",
        lengths=True, state=40),
  # Time against length on a CPU.
  *(_case(f"length_{t // 1024}k", ("bench",), 1, t, 8, 64, 16, groups=2)
    for t in (2048, 4096, 16384, 32768)),
  # Constant tokens, as in the paper's figure.
  *(_case(f"constant_{t // 1024}k", ("bench",), 262144 // t, t, 16, 128, 16, groups=2, gpu=True)
    for t in (4096, 16384, 65536, 131072)),
)  # fmt: skip


def make_inputs(case: Case, dtype=np.float32, seed: int = 0) -> dict[str, np.ndarray]:
  """Keyword arguments of `operator` below for a case; tokens are in `dtype`."""
  rng = np.random.default_rng(seed)
  size, option = case.sizes, case.options
  batch, length, heads, dim = (size[n] for n in ("batch", "length", "heads", "key_dim"))
  scale = option.get("scale", 1.0)

  def normal(*shape, scale=1.0):
    return (scale * rng.standard_normal(shape)).astype(dtype)

  groups = size["kv_heads"]
  inputs = dict(
    query=normal(batch, length, groups, dim, scale=scale),
    key=normal(batch, length, groups, dim, scale=scale),
    value=normal(batch, length, heads, dim),
    gate_logits=normal(batch, length, heads, dim),
    gate_bias=rng.uniform(0, 2, (heads, dim)).astype(np.float32),
  )
  if option.get("output", True):
    inputs["output_logits"] = normal(batch, length, heads, dim)
  inputs |= make_rows(option, rng, batch, length)
  if tokens := option.get("state"):
    slots = -(-(tokens + length) // size["chunk"])
    inputs["stored_key"] = normal(batch, slots, heads, dim)
    inputs["stored_value"] = normal(batch, slots, heads, dim)
    inputs["running_key"] = rng.standard_normal((batch, heads, dim)).astype(np.float32)
    inputs["running_value"] = rng.standard_normal((batch, heads, dim)).astype(np.float32)
    inputs["position"] = np.maximum(tokens - np.arange(batch), 0).astype(np.int32)
  return inputs


def static_options(case: Case) -> dict:
  """Keyword arguments of `operator` for a case that are not arrays."""
  rotary_base = 10000.0 if case.options.get("rotary", True) else None
  return dict(chunk_size=case.sizes["chunk"], rotary_base=rotary_base)


RESULTS = ("output", "stored_key", "stored_value", "running_key", "running_value")


def operator(
  *, stored_key=None, stored_value=None, running_key=None, running_value=None, position=None, **rest
) -> tuple:
  """`rat_attention` on plain arrays; returns what RESULTS names."""
  stored: Any = (stored_key, stored_value, running_key, running_value, position)
  output, state = rat_attention(
    **rest, initial_state=None if position is None else RatState(*stored)
  )
  return output, *state[:4]


def flops(case: Case, chunk_size: int, backward: bool = False) -> int:
  """Operations; `chunk_size` is that of the case. With `backward`, forward and backward together.

  The softmax is causal: half of all pairs of tokens and chunks.
  """
  size = case.sizes
  per_token = 2 * size["length"] // size["chunk"] + 10
  if backward:
    per_token += 5 * size["length"] // size["chunk"] + 30
  return size["batch"] * size["length"] * size["heads"] * size["key_dim"] * per_token


def minimum_bytes(case: Case, dtype=np.float32, backward: bool = False) -> int:
  """Least memory traffic: every input read once, every output written once; `backward`: both."""
  size = case.sizes
  width, heads, groups = np.dtype(dtype).itemsize, size["heads"], size["kv_heads"]
  gated = 1 + bool(case.options.get("output", True))
  read = (1 + gated) * heads + 2 * groups  # value, gates; query, key
  per_token = read + heads + 2 * heads / size["chunk"]
  if backward:  # inputs, output and its cotangent again; gradients; the log-sum-exp
    per_token += 2 * read + 2 * heads + 2 * heads / size["chunk"]
  total = size["batch"] * size["length"] * size["key_dim"] * per_token * width
  return int(total) + backward * 8 * size["batch"] * size["length"] * heads
