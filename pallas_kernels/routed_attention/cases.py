"""Named shapes of routed attention.

Options: `routing`, fields of `Routing` other than membership="official" and scale=K ** -0.5, which
spreads the weights (with the published 1 a token sees little but itself); `unshared` gives keys and
their members apart from the queries'; `relative` adds tables of that reach; `memory` that many
learned keys per cluster; `tied` makes every third token the first one; `pieces` reads the row in
two calls, the first of that many tokens; `segments` and `lengths` are those of `make_rows`.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from ..cases import Case, make_rows
from .api import routed_attention
from .options import Routing

RECENT, PREFIX = dict(membership="causal_recent"), dict(membership="topk_prefix")


def _case(
  name, tags, batch, length, heads, key_dim, clusters, window, *, value_dim=None, **options
):
  sizes = dict(batch=batch, length=length, heads=heads, kv_heads=heads, key_dim=key_dim)
  sizes |= dict(value_dim=value_dim or key_dim, clusters=clusters, window=window)
  return Case(name, tags, sizes, options)


CASES = (
  _case("one_token", ("ci",), 2, 1, 2, 8, 3, 4),
  _case("shorter_than_window", ("ci",), 1, 11, 2, 8, 2, 16),
  _case("layer_small", ("ci",), 1, 64, 2, 16, 4, 16),
  _case("overlap_and_lengths", ("ci",), 3, 40, 2, 8, 5, 12, lengths=True, value_dim=20),
  _case("wide_clusters", ("ci",), 1, 200, 1, 8, 2, 150, relative=20),
  _case("tied", ("ci",), 2, 37, 1, 8, 3, 9, tied=True),
  _case("published_scale", ("ci",), 1, 40, 2, 8, 4, 10, routing=dict(scale=1.0)),
  _case("relative", ("ci",), 2, 40, 2, 8, 4, 10, relative=9),
  _case("relative_clipped", ("ci",), 3, 33, 2, 8, 3, 12, relative=4, lengths=True),
  _case("bidirectional", ("ci",), 1, 40, 2, 8, 4, 10, unshared=True,
        routing=dict(causal=False, mask="rank")),
  _case("unshared", ("ci",), 1, 40, 2, 8, 4, 10, unshared=True, memory=2),
  _case("unshared_rank", ("ci",), 1, 40, 1, 8, 4, 10, unshared=True,
        routing=dict(mask="rank", zero_values_seen=False)),
  _case("recent", ("ci",), 2, 50, 2, 8, 4, 9, routing=RECENT, value_dim=12),
  _case("recent_packed", ("ci",), 3, 60, 2, 8, 3, 7, routing=RECENT, segments="packed",
        lengths=True),
  _case("recent_own", ("ci",), 3, 60, 2, 8, 3, 7, routing=RECENT, segments="packed", lengths=True,
        unshared=True, value_dim=12),
  _case("recent_pieces", ("ci",), 2, 40, 2, 8, 3, 6, routing=RECENT, pieces=17),
  _case("prefix_packed", ("ci",), 3, 70, 1, 8, 3, 5, routing=PREFIX, segments="packed",
        lengths=True),
  _case("prefix_pieces", ("ci",), 2, 40, 2, 8, 3, 6, routing=PREFIX, pieces=17, relative=3),
  # Routed heads of a layer of the published models: WikiText-103, enwik8, PG-19, ImageNet-64.
  _case("layer_wikitext", ("bench", "aot"), 1, 4096, 8, 64, 8, 512),
  _case("layer_wikitext_relative", ("aot",), 1, 4096, 8, 64, 8, 512, relative=513),
  _case("layer_enwik8", ("bench", "aot"), 1, 8192, 4, 128, 16, 512),
  _case("layer_enwik8_relative", ("aot",), 1, 8192, 4, 128, 16, 512, relative=513),
  _case("layer_enwik8_12k", ("bench", "aot"), 1, 12288, 4, 128, 48, 256),
  _case("layer_pg19", ("bench", "aot"), 1, 8192, 2, 129, 16, 512),
  _case("layer_pg19_relative", ("aot",), 1, 8192, 2, 129, 16, 512, relative=513),
  _case("layer_imagenet", ("bench", "aot"), 1, 12288, 4, 64, 8, 2048),
  _case("layer_ragged", ("aot",), 2, 4000, 3, 64, 9, 500, lengths=True, value_dim=96),
  _case("layer_unshared", ("aot",), 1, 4096, 4, 64, 8, 512, unshared=True),
  _case("layer_bidirectional", ("aot",), 1, 4096, 4, 64, 8, 512, unshared=True,
        routing=dict(causal=False, mask="rank")),
  # Time against length on a CPU, with as many clusters as a cluster has members.
  *(_case(f"length_{side * side // 1024}k_{name}", ("bench",), 1, side * side, 8, 64, side, side,
          routing=routing)
    for side in (32, 64, 128) for name, routing in (("official", {}), ("recent", RECENT))),
)  # fmt: skip


def make_inputs(case: Case, dtype=np.float32, seed: int = 0) -> dict[str, np.ndarray]:
  """Keyword arguments of `operator` below for a case; tokens are in `dtype`, scores in float32.

  Queries, keys and centroids are rows without mean, of variance 1, as in the published model.
  """
  rng = np.random.default_rng(seed)
  size, option = case.sizes, case.options
  batch, length, heads = (size[n] for n in ("batch", "length", "heads"))
  clusters, dim, width = (size[n] for n in ("clusters", "key_dim", "value_dim"))
  means = _centred(rng, heads, clusters, dim)

  def routed():
    x = _centred(rng, batch, length, heads, dim)
    if option.get("tied"):
      x[:, ::3] = x[:, :1]
    return x.astype(dtype), np.einsum("bthk,hck->bthc", x, means, optimize=True)

  inputs = dict(value=rng.standard_normal((batch, length, heads, width)).astype(dtype))
  inputs["query"], inputs["scores"] = routed()
  if option.get("unshared"):
    inputs["key"], inputs["key_scores"] = routed()
  for name, n in (("keys", dim), ("values", width)):
    if reach := option.get("relative"):
      table = 0.2 * rng.standard_normal((2 * reach + 1, n))
      inputs[f"relative_{name}"] = table.astype(dtype)
  for name, n in (("key", dim), ("value", width)):
    if count := option.get("memory"):
      inputs[f"memory_{name}"] = rng.standard_normal((heads, clusters, count, n)).astype(dtype)
  return inputs | make_rows(option, rng, batch, length)


def _centred(rng, *shape):
  x = rng.standard_normal(shape).astype(np.float32)
  x -= x.mean(-1, keepdims=True)
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def static_options(case: Case) -> dict:
  """Keyword arguments of `operator` for a case that are not arrays."""
  fields = dict(membership="official", scale=case.sizes["key_dim"] ** -0.5)
  fields |= case.options.get("routing", {})
  options: dict[str, Any] = dict(options=Routing(case.sizes["window"], **fields))
  if pieces := case.options.get("pieces"):
    options["pieces"] = pieces
  return options


RESULTS = ("output",)


def operator(*, query, key=None, pieces: int = 0, options: Routing, **arguments: Any) -> tuple:
  """`routed_attention`; without `key` the queries are the keys. Returns what RESULTS names.

  With `pieces`, all but the reference reads that many tokens first, and goes on from the state.
  """
  arguments |= dict(query=query, key=query if key is None else key)
  if not pieces or arguments.get("implementation") == "reference":
    return routed_attention(**arguments, options=options)[:1]
  rows = ("query", "key", "value", "scores")
  first = arguments | {n: arguments[n][:, :pieces] for n in rows}
  rest = arguments | {n: arguments[n][:, pieces:] for n in rows}
  start, state = routed_attention(**first, options=options)
  end, _ = routed_attention(**rest, options=options, initial_state=state)
  return (jnp.concatenate([start, end], axis=1),)


def pairs(case: Case) -> int:
  """How many pairs of query and key meet."""
  size, options = case.sizes, static_options(case)["options"]
  length, window = size["length"], min(size["window"], size["length"])
  if options.membership == "official":
    seen = window * (window + 1) // 2 if options.causal else window**2
    seen *= size["clusters"]
  elif options.membership == "causal_recent":
    seen = length * window
  else:
    seen = size["clusters"] * length**2  # all are looked at
  return size["batch"] * size["heads"] * seen


def flops(case: Case, chunk_size: int, backward: bool = False) -> int:
  """Operations on the pairs that meet; with `backward`, forward and backward together."""
  k, v = case.sizes["key_dim"], case.sizes["value_dim"]
  return pairs(case) * (2 * (k + v) + (2 * (3 * k + 2 * v) if backward else 0))


def minimum_bytes(case: Case, dtype=np.float32, backward: bool = False) -> int:
  """Least memory traffic: every input read once, every output written once; `backward`: both."""
  size = case.sizes
  keys = 2 if case.options.get("unshared") else 1
  per_token = np.dtype(dtype).itemsize * (keys * size["key_dim"] + 2 * size["value_dim"])
  if backward:
    per_token *= 3
  per_token += 4 * keys * size["clusters"]  # the scores
  return size["batch"] * size["length"] * size["heads"] * per_token
