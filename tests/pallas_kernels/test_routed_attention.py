"""Routed attention: goldens of both published codes, the definition, who sees the future, steps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo.pallas_kernels import (
  Routing,
  empty_routed_state,
  routed_attention,
  routed_attention_step,
)
from attnzoo.pallas_kernels.routed_attention import cases
from attnzoo.pallas_kernels.routed_attention.members import top_members
from attnzoo_testing.goldens import golden, golden_config
from attnzoo_testing.marks import slow_but
from attnzoo_testing.mixers import close
from attnzoo_testing.oracle import Oracle

OFFICIAL = ("attn_h1_causal", "attn_h3_causal_rel", "attn_h2_causal_relclip_overlap",
            "attn_h2_bidir_unshared", "attn_h2_causal_unshared_rankmask")  # fmt: skip
PORT = ("kattn_causal_sharedqk", "kattn_causal_unshared_mem1", "kattn_causal_short_t",
        "kattn_bidir_mask")  # fmt: skip


def centred(x):
  """The published normalisation: no mean, variance 1."""
  centre = x - x.mean(-1, keepdims=True)
  return centre / jnp.sqrt((centre**2).mean(-1, keepdims=True) + 1e-6)


def unit(x):
  return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def scores_of(x, means):
  return jnp.einsum("bthk,hck->bthc", x, means)


def heads_last(x):
  return jnp.asarray(np.swapaxes(x, 1, 2), jnp.float64)


def means_of_members(g, value):
  """[B, T, 1, V]: of every token the mean over its clusters of their keys' mean value."""
  batch, _, clusters, _ = g["out/k_idx"].shape
  belongs = np.zeros((batch, value.shape[1], clusters, 1))  # 1 for the queries of a cluster
  np.put_along_axis(belongs, g["out/q_idx"].swapaxes(1, 3), 1, axis=1)
  rows = value[np.arange(batch)[:, None, None], g["out/k_idx"][:, 0], 0]  # [B, C, W, V]
  total = jnp.einsum("btcx,bcv->btxv", belongs, rows.mean(2))
  return total / (belongs.sum(2, keepdims=True) + 1e-5)


def golden_case(name):
  """(golden arrays, function of the differentiated ones and an implementation, those)."""
  if name in PORT:
    g, c = golden(f"routing_lucid_{name}"), golden_config(f"routing_lucid_{name}")
    shared, normal, means = c["shared_qk"], unit, g["param/kmeans.means"]
    options = Routing(
      c["w"], "official", c["causal"], scale=c["d"] ** -0.5, combine_eps=1e-5,
      own_pair="last_resort" if shared else "seen", zero_values_seen=not c.get("mask"),
    )  # fmt: skip
  else:
    g, c = golden(f"routing_official_{name}"), golden_config(f"routing_official_{name}")
    shared, normal, means = c["share_qk"], centred, g["param/means"]
    options = Routing(c["w"], "official", c["causal"], "rank", zero_values_seen=False)
  arrays = {n: heads_last(g[f"in/{n}"]) for n in "qkv" if f"in/{n}" in g}
  for learned in ("rel_k", "rel_v", "mem_key", "mem_value"):
    if f"param/{learned}" in g and g[f"param/{learned}"].size:
      arrays[learned] = jnp.asarray(g[f"param/{learned}"], jnp.float64)

  def run(arrays, implementation=None, **changes):
    q = arrays["q"]
    key = arrays.get("k", q)
    routed, routed_key = normal(q), normal(key)
    query = q if name in PORT else routed
    if shared or name not in PORT:
      key = routed_key
    value, masked = arrays["v"], c.get("mask")
    if masked:  # padding belongs to clusters, but is not seen there
      value = jnp.where(g["in/mask"][..., None, None], value, 0)
    output = routed_attention(
      query, key, value, scores_of(routed, means),
      options=dataclasses.replace(options, **changes),
      key_scores=None if shared else scores_of(routed_key, means),
      relative_keys=arrays.get("rel_k"), relative_values=arrays.get("rel_v"),
      memory_key=arrays.get("mem_key"), memory_value=arrays.get("mem_value"),
      implementation=implementation,
    )[0]  # fmt: skip
    if masked:  # the port gives it a mean of all members; not so here
      output = jnp.where(g["in/mask"][..., None, None], output, means_of_members(g, arrays["v"]))
    return output

  def commitment(arrays):
    """What the goldens' loss has beside the outputs: the distance to the nearest centroid."""
    q, k = (normal(arrays.get(n, arrays["q"])) for n in "qk")
    x = jnp.concatenate([q] if name in PORT and shared else [q, k], axis=1)
    own = jnp.argmax(scores_of(x, means), -1)  # [B, T, H]
    squared = jnp.mean((x - jnp.asarray(means)[jnp.arange(own.shape[2]), own]) ** 2)
    return c["commit"] * squared if name in PORT else 2 * c["beta"] * squared

  return g, run, arrays, commitment


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("name", [*OFFICIAL, *PORT])
def test_goldens(name, implementation):
  with jax.enable_x64(True):
    g, run, arrays, commitment = golden_case(name)
    cotangent = heads_last(g["in/cotangent"])

    def loss(arrays):
      output = run(arrays, implementation)
      return jnp.sum(output * cotangent) + commitment(arrays), output

    (_, output), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
    close(output, np.swapaxes(g["out/o"], 1, 2), 1e-12)
    for array, grad in grads.items():
      expected = g[f"grad/{array}"]
      close(grad, np.swapaxes(expected, 1, 2) if array in "qkv" else expected, 1e-11)


def test_position_mask_of_the_unshared_case():
  """Queries that see no key in one of their clusters are left out: the golden has a mean there."""
  with jax.enable_x64(True):
    g, run, arrays, _ = golden_case("attn_h2_causal_unshared_rankmask")
    first_key = g["out/k_idx"].min(-1)  # [B, H, C]
    place = np.arange(32)[:, None]
    holds = (g["out/q_idx"][..., None, :] == place).any(-1)  # [B, H, C, T]
    sees = np.swapaxes(~(holds & (first_key[..., None] > np.arange(32))).any(2), 1, 2)
    assert 0 < (~sees).sum() < 10
    for implementation in ("reference", "xla"):
      output = run(arrays, implementation, mask="position")
      close(output[sees], np.swapaxes(g["out/o_position_mask"], 1, 2)[sees], 1e-12)


@pytest.mark.parametrize("name", OFFICIAL[:3])
def test_goldens_with_the_membership_of_prefixes(name):
  with jax.enable_x64(True):
    g, run, arrays, _ = golden_case(name)
    changes = dict(membership="topk_prefix", mask="position", zero_values_seen=True)
    plain = {n: x for n, x in arrays.items() if not n.startswith("rel")}
    for given, expected in ((arrays, "prefix_o"), (plain, "prefix_o_norel")):
      if f"out/{expected}" in g:
        for implementation in ("reference", "xla"):
          output = run(given, implementation, **changes)
          close(output, np.swapaxes(g[f"out/{expected}"], 1, 2), 1e-12)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_golden_of_the_strictly_causal_membership(implementation):
  with jax.enable_x64(True):
    g = golden("routing_proposal_causal_recent")
    arrays = {n: heads_last(g[f"in/{n}"]) for n in "qv"}
    cotangent = heads_last(g["in/cotangent"])

    def loss(arrays):
      x = centred(arrays["q"])
      scores = scores_of(x, g["param/means"])
      output, _ = routed_attention(
        x, x, arrays["v"], scores, options=Routing(8), implementation=implementation
      )
      return jnp.sum(output * cotangent), output

    (_, output), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
    close(output, np.swapaxes(g["out/o"], 1, 2), 1e-12)
    for name, grad in grads.items():
      close(grad, np.swapaxes(g[f"grad/{name}"], 1, 2), 1e-11)


def tokens(rng, length, batch=2, heads=2, dim=8, clusters=3):
  arrays = [rng.standard_normal((batch, length, heads, dim)).astype(np.float32) for _ in range(3)]
  scores = rng.standard_normal((batch, length, heads, clusters)).astype(np.float32)
  return [*arrays, np.round(scores, 1)]  # with ties


@pytest.mark.parametrize(
  ("membership", "leaks"), [("official", True), ("topk_prefix", False), ("causal_recent", False)]
)
def test_who_sees_the_future(membership, leaks):
  """Other tokens from 40 on: earlier outputs stay bit for bit where nothing leaks."""
  rng = np.random.default_rng(0)
  one, other = tokens(rng, 64), tokens(rng, 64)
  mixed = [np.concatenate([a[:, :40], b[:, 40:]], axis=1) for a, b in zip(one, other, strict=True)]
  options = Routing(8, membership)
  assert options.leaks is leaks
  run = jax.jit(lambda arrays: routed_attention(*arrays, options=options)[0][:, :40])
  same = np.array_equal(run(one), run(mixed))
  assert same is not leaks


ORACLE = Oracle(cases.operator, cases, cases.RESULTS)
XLA = (
  "overlap_and_lengths",
  "recent_packed",
  "recent_own",
  "wide_clusters",
  "recent_pieces",
  "prefix_packed",
)


@pytest.mark.parametrize("name", slow_but(XLA, *XLA[:2]))
def test_xla_is_the_definition(name):
  ORACLE.compare(name, implementation="xla")


def with_key_scores(shared, scores):
  """Keys have scores of their own: those of the queries, of other tokens."""
  return {} if shared else dict(key_scores=scores[:, ::-1])


@pytest.mark.parametrize(
  ("membership", "shared"),
  [("topk_prefix", True), ("causal_recent", True), ("causal_recent", False)],
)
def test_steps_and_pieces_are_the_whole(membership, shared):
  """From the state after a prompt of unequal lengths, by steps, and in two pieces."""
  options = Routing(4, membership)
  q, k, v, s = tokens(np.random.default_rng(2), 24)
  others = np.asarray(with_key_scores(shared, s).get("key_scores", s))

  def scored(arrays):
    *arrays, own = arrays
    return arrays, {} if shared else dict(key_scores=own)

  def whole_call(arrays, **more):
    arrays, own = scored(arrays)
    return routed_attention(*arrays, options=options, **own, **more)

  def step_call(arrays, state):
    arrays, own = scored(arrays)
    return routed_attention_step(*arrays, state, options=options, **own)

  read = jax.jit(lambda arrays, n, state: whole_call(arrays, lengths=n, initial_state=state))
  step = jax.jit(step_call)
  whole, _ = whole_call((q, k, v, s, others))
  empty = empty_routed_state(2, 2, 3, 4, 8, 8)
  prompt = [x[:, :12] for x in (q, k, v, s, others)]
  stops = np.array([12, 7])
  _, state = read(prompt, stops, empty)
  for t in range(5):
    now = stops + t
    output, state = step([x[np.arange(2), now] for x in (q, k, v, s, others)], state)
    close(output, np.asarray(whole)[np.arange(2), now], 2e-6)
  first, state = read(prompt, np.array([12, 12]), empty)
  rest, _ = read([x[:, 12:] for x in (q, k, v, s, others)], np.array([12, 12]), state)
  close(np.concatenate([first, rest], axis=1), whole, 2e-6)


def test_memory_of_a_training_step():
  """Forward and backward of 16k tokens and 8 heads in less than 1 GB."""
  (case,) = (case for case in cases.CASES if case.name == "length_16k_official")
  inputs = jax.eval_shape(lambda: cases.make_inputs(case))
  options = cases.static_options(case)["options"]

  def loss(query, value, scores):
    return jnp.sum(routed_attention(query, query, value, scores, options=options)[0] ** 2)

  arguments = [inputs[n] for n in ("query", "value", "scores")]
  step = jax.jit(jax.grad(loss, (0, 1))).lower(*arguments).compile()
  assert step.memory_analysis().temp_size_in_bytes < 1e9


def test_ties_go_to_the_earlier_token():
  scores = np.array([1, 3, 3, 2, 3, 2], np.float32).reshape(1, 6, 1, 1)
  assert top_members(jnp.asarray(scores), 2).ravel().tolist() == [1, 2]
  assert top_members(jnp.asarray(scores), 4).ravel().tolist() == [1, 2, 3, 4]


def test_tokens_of_no_cluster():
  """Output exactly 0, and finite gradients."""
  q, k, v, _ = tokens(np.random.default_rng(3), 10)
  s = np.zeros((2, 10, 2, 1), np.float32)
  s[:, 5:] = 1
  run = lambda q: routed_attention(q, k, v, s, options=Routing(5, "official"))[0]  # noqa: E731
  output, pull = jax.vjp(run, q)
  assert not np.asarray(output[:, :5]).any()
  assert np.asarray(output[:, 5:]).any()
  assert np.isfinite(pull(jnp.ones_like(output))[0]).all()


def test_what_is_refused():
  q, k, v, s = tokens(np.random.default_rng(4), 10)
  table = np.zeros((3, 8), np.float32)
  ids = np.zeros((2, 10), np.int32)
  for change, message in (
    (dict(window_size=0), "Routing: window_size must be at least 1; got 0"),
    (dict(membership="topk"), "membership must be one of .*; got 'topk'"),
    (dict(causal=False), "membership must be 'official' where causal is False"),
    (dict(mask="rank"), "mask must be 'position' with 'causal_recent'"),
    (dict(own_pair="last_resort"), "own_pair must be 'seen' with 'causal_recent'"),
  ):
    with pytest.raises(ValueError, match=message):
      dataclasses.replace(Routing(4), **change)
  official = Routing(4, "official")
  for options, changes, message in (
    (official, dict(segment_ids=ids), 'segment_ids must be None with membership="official"'),
    (Routing(4), dict(relative_keys=table, relative_values=table), "relative_keys must be None"),
    (official, dict(relative_keys=table), "relative_values must be given with the other; got None"),
    (official, dict(relative_keys=table[:2], relative_values=table[:2]), "an odd number of rows"),
    (official, dict(scores=s[:, :3]), r"scores must be \[2, 10, 2, C\]; got \(2, 3, 2, 3\)"),
    (official, dict(scores=s.astype(np.float16)), "scores must be float32 or wider; got float16"),
    (official, dict(key=k[:, :, :1], value=v[:, :, :1]), "key must have the 2 heads of query"),
    (official, dict(lengths=np.array([1, 2, 3])), "lengths must have shape"),
  ):
    arguments = dict(query=q, key=k, value=v, scores=s) | changes
    with pytest.raises(ValueError, match=message):
      routed_attention(**arguments, options=options)
  with pytest.raises(NotImplementedError, match='implementation="tpu" compiles only for a TPU'):
    routed_attention(q, k, v, s, options=official, implementation="tpu")
