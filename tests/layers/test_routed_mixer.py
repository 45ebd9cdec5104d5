"""The routed mixer: the mixer protocol, who sees the future, devices, what training notes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnzoo.layers import RoutedMixer, RoutedMixerConfig
from attnzoo.pallas_kernels import Routing
from attnzoo_testing import mixers
from attnzoo_testing.mixers import close

RECENT = RoutedMixerConfig(
  12, heads=4, routed_heads=2, head_dim=6, clusters=3, routing=Routing(3, scale=0.4),
  block_size=2, positions="rotary", init=nnx.initializers.normal(0.5),
)  # fmt: skip
SHAW = dict(positions="shaw", max_distance=2)
OWN, PREVIOUS = (dataclasses.replace(RECENT, routed_keys=keys) for keys in ("own", "previous"))
PREFIX = dataclasses.replace(RECENT, routing=Routing(3, "topk_prefix"), **SHAW)
OFFICIAL = dataclasses.replace(RECENT, routing=Routing(3, "official"), **SHAW)


def make(config, **kwargs):
  return RoutedMixer(config, rngs=nnx.Rngs(0), **kwargs)


def inputs(rows, length):
  return jax.random.normal(jax.random.key(1), (rows, length, 12))


@pytest.mark.parametrize(
  "config", [RECENT, OWN, PREVIOUS, PREFIX], ids=["causal_recent", "own", "previous", "topk_prefix"]
)
def test_mixer_protocol(config):
  mixers.check_protocol(make(config), inputs(rows=3, length=7), [1, 3, 4])


def test_official_is_read_without_the_future_where_there_is_a_state():
  x = inputs(rows=2, length=9)
  mixer = make(OFFICIAL)
  prefix = mixers.run(make(PREFIX), x)[0]
  given, _ = mixers.run(mixer, x, state=mixer.init_state(2))
  close(given, prefix)
  assert np.abs(mixers.run(mixer, x)[0] - prefix).max() > 0.01


@pytest.mark.parametrize(
  ("config", "leaks"),
  [(RECENT, False), (OWN, False), (PREVIOUS, False), (PREFIX, False), (OFFICIAL, True)],
  ids=["causal_recent", "own", "previous", "topk_prefix", "official"],
)  # fmt: skip
def test_who_sees_the_future(config, leaks):
  """Other tokens from the 12th on: the outputs before are the same bits, but for "official"."""
  x, other = inputs(rows=2, length=24), jax.random.normal(jax.random.key(2), (2, 24, 12))
  changed = jnp.where(jnp.arange(24)[:, None] < 12, x, other)
  call = jax.jit(lambda x: make(config)(x)[0][:, :12])
  assert np.array_equal(call(x), call(changed)) != leaks


@pytest.mark.parametrize("config", [RECENT, OWN, PREVIOUS], ids=["queries", "own", "previous"])
def test_over_devices(config):
  mixers.check_sharded(make(config), inputs(rows=4, length=12), 2, 2, 2, relative=2e-5)


def test_notes_over_devices_are_those_of_one():
  """Counts, sums and the commitment loss are of the whole batch, on any mesh."""
  graph, variables = nnx.split(make(OFFICIAL))
  x = inputs(rows=4, length=12)

  def note(variables, x):
    return nnx.merge(graph, variables).with_note(x)[2]

  expected = jax.jit(note)(variables, x)
  with jax.set_mesh(mixers.mesh_of(4, 1, 2)):
    got = jax.jit(lambda *args: note(*args))(variables, x)
  jax.tree.map(lambda a, b: close(a, b, 1e-6), got, expected)
  assert expected.sums.count.sum() == 4 * 12 * 2


def test_commitment_is_in_the_note_and_moves_the_queries():
  mixer = make(RECENT)
  x = inputs(rows=2, length=8)
  graph, params, rest = nnx.split(mixer, nnx.Param, ...)
  loss = jax.jit(jax.grad(lambda p: nnx.merge(graph, p, rest).with_note(x)[2].loss))
  gradient = loss(params)
  d = gradient.heads_in.kernel[...]  # [3, D, H, K]
  assert np.any(d[0, :, :2])  # routed queries
  assert not np.any(d[0, :, 2:])  # local ones
  assert not np.any(d[1:])  # keys and values


def test_keys_of_their_own_are_noted_too():
  mixer = make(OWN)
  x = inputs(rows=2, length=8)
  note = jax.jit(lambda x: mixer.with_note(x)[2])(x)
  assert note.sums.count.sum() == 2 * 8 * 2 * 2  # queries and keys of two heads
  for config in (RECENT, PREVIOUS):
    note = jax.jit(lambda x, config=config: make(config).with_note(x)[2])(x)
    assert note.sums.count.sum() == 2 * 8 * 2


def test_previous_keys_are_the_queries_of_the_token_before():
  """Output and gradient are those of a float64 definition; zeros where a document begins."""
  heads, window = PREVIOUS.routed_heads, PREVIOUS.routing.window_size
  config = dataclasses.replace(PREVIOUS, heads=heads, positions="none", head_mix=False)
  mixer = make(config)
  x, ids = inputs(rows=1, length=11), np.repeat([[0, 1]], [5, 6], axis=1)
  cotangent = np.random.default_rng(0).standard_normal((11, 12))
  kernels = [mixer.heads_in.kernel, mixer.heads_out.kernel, mixer.centroids.means]
  w_in, w_out, means = (np.asarray(kernel[...], np.float64) for kernel in kernels)

  def queries(x):
    query = jnp.einsum("td,dhk->thk", x, w_in[0])
    query = query - query.mean(-1, keepdims=True)
    return query / jnp.sqrt((query**2).mean(-1, keepdims=True))

  def definition(x, near):
    query, value = queries(x), jnp.einsum("td,dhk->thk", x, w_in[2])
    key = jnp.pad(query, ((1, 0), (0, 0), (0, 0)))[:-1].at[5].set(0)
    rows = []
    for t, h in np.ndindex(11, heads):
      seen = [
        s for s in range(0 if t < 5 else 5, t + 1) if near(key[s, h], h) == near(query[t, h], h)
      ]
      seen = np.array(seen[-window:], int)
      weights = jax.nn.softmax(config.routing.scale * key[seen, h] @ query[t, h])
      rows.append(weights @ value[seen, h])
    return jnp.einsum("thk,hkd->td", jnp.stack(rows).reshape(value.shape), w_out)

  def centroid(vector, h):  # no gradient passes through who is near
    return int(np.argmax(means[h] @ np.asarray(jax.lax.stop_gradient(vector))))

  got, pull = jax.vjp(jax.jit(lambda x: mixer(x, segment_ids=jnp.asarray(ids))[0][0]), x)
  with jax.enable_x64(True):
    wide = np.asarray(x[0], np.float64)
    expected, pull_wide = jax.vjp(lambda x: definition(x, centroid), wide)
    close(got, expected, 1e-5)
    close(pull(jnp.asarray(cotangent, jnp.float32))[0][0], pull_wide(cotangent)[0], 1e-5)


def test_local_and_routed_heads_alone():
  x = inputs(rows=1, length=8)
  local, routed = (make(dataclasses.replace(OFFICIAL, routed_heads=n)) for n in (0, 4))
  notes = [jax.eval_shape(lambda x, m=mixer: m.with_note(x)[2], x) for mixer in (local, routed)]
  assert notes[0] is None
  assert notes[1].sums.count.shape == (4, 3)
  assert local.init_state(1).routed is None
  assert routed.init_state(1).local is None

  @jax.jit
  def both(x):
    for mixer in (local, routed):
      y, state = mixer(x, state=mixer.init_state(1))
      x = x.at[:, 0].set(mixer.step(y[:, 0], state)[0])
    return x

  assert np.all(np.isfinite(both(x)))


def test_state_does_not_grow():
  mixer = make(RECENT, dtype=jnp.bfloat16)
  sizes = [
    sum(leaf.size for leaf in jax.tree.leaves(mixer.init_state(2, length))) for length in (8, 800)
  ]
  assert sizes[0] == sizes[1]
  assert mixer.init_state(2).routed.key.dtype == jnp.bfloat16


def test_bad_configurations_are_refused():
  for change, message in (
    (dict(routed_heads=5), "routed_heads must lie between 0 and heads .4.; got 5"),
    (dict(positions="learned"), "positions must be one of"),
    (dict(routed_keys="next"), "routed_keys must be one of .*; got 'next'"),
    (dict(positions="shaw"), "positions must not be 'shaw' with membership 'causal_recent'"),
    (
      dict(routed_keys="own", routing=Routing(3, "topk_prefix")),
      "routed_keys must be 'queries' unless membership is 'causal_recent'; got 'own'",
    ),
    (dict(look_back=3), "look_back must be a multiple of block_size .2.; got 3"),
    (dict(block_size=0), "block_size must be at least 1; got 0"),
  ):
    with pytest.raises(ValueError, match=f"RoutedMixerConfig: {message}"):
      dataclasses.replace(RECENT, **change)
