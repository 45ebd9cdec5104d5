"""The routed mixer of the PyTorch port, and its centroids: goldens, protocol, devices, memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnzoo.layers import (
  ClusterSums,
  PortCentroids,
  PortRoutedMixer,
  PortRoutedMixerConfig,
  lloyd,
  unit,
)
from attnzoo_testing import mixers
from attnzoo_testing.goldens import golden, golden_config
from attnzoo_testing.mixers import close

RECENT = PortRoutedMixerConfig(
  12, heads=4, local_heads=2, head_dim=6, clusters=3, window_size=3, block_size=2,
  init=nnx.initializers.normal(0.5),
)  # fmt: skip
PREFIX = dataclasses.replace(RECENT, membership="topk_prefix")
OFFICIAL = dataclasses.replace(RECENT, membership="official")
UNSHARED = dataclasses.replace(OFFICIAL, heads=2, local_heads=0, memory_slots=1, shared=False)


def make(config, **kwargs):
  return PortRoutedMixer(config, rngs=nnx.Rngs(0), **kwargs)


def inputs(rows, length):
  return jax.random.normal(jax.random.key(1), (rows, length, 12))


def heads_last(x):
  return jnp.asarray(np.swapaxes(x, 1, 2), jnp.float64)


def test_centroids_of_the_port():
  """Loss and its gradient, the update after one pass, and ten rounds of k-means."""
  with jax.enable_x64(True):
    g, c = golden("routing_lucid_kmeans"), golden_config("routing_lucid_kmeans")
    centroids = PortCentroids(
      c["H"], c["k"], c["d"], decay=c["decay"], param_dtype=jnp.float64, rngs=nnx.Rngs(0)
    )
    means = jnp.asarray(g["param/means"])
    centroids.means[...] = means
    x = heads_last(g["in/x"])

    def loss(x):
      x = unit(x)
      scores = centroids.scores(x)
      distance, sums = centroids.spread(x, scores)
      return c["commit"] * distance, (scores, sums)

    (value, (scores, sums)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(x)
    close(scores, np.swapaxes(g["out/dists"], 1, 2), 1e-12)
    close(value, g["out/loss"], 1e-12)
    close(gradient, np.swapaxes(g["grad/x"], 1, 2), 1e-12)
    centroids.absorb(sums)
    close(centroids.means[...], c["decay"] * means + (1 - c["decay"]) * g["out/new_means_1"], 1e-12)
    # Two passes: the port averages directions, ours is the direction of all.
    _, (_, more) = loss(heads_last(g["in/x2"]))
    averaged = [jnp.where(s.count[..., None] > 0, unit(s.total), means) for s in (sums, more)]
    close(sum(averaged) / 2, g["out/new_means_avg_of_2"], 1e-12)
    rows = x.reshape(-1, c["H"], c["d"])[: c["k"]].swapaxes(0, 1)
    close(lloyd(x, rows), g["out/init_means_10_iters"], 1e-12)


def test_centroids_that_nothing_is_near_to_stay():
  centroids = PortCentroids(1, 2, 3, rngs=nnx.Rngs(0))
  before = centroids.means[0]
  total = np.asarray([[[0, 0, 5], [0, 0, 0]]], np.float32)
  centroids.absorb(ClusterSums(jnp.asarray([[7.0, 0.0]]), jnp.asarray(total)))
  close(centroids.means[0, 0], 0.999 * before[0] + 0.001 * np.asarray([0, 0, 1]))
  close(centroids.means[0, 1], before[1], 1e-7)
  assert np.isfinite(jax.grad(lambda x: jnp.sum(unit(x)))(jnp.zeros(3))).all()


def test_golden_of_the_module():
  """Output, gradients and loss; their angles are float32."""
  with jax.enable_x64(True):
    g, c = golden("routing_lucid_selfattn"), golden_config("routing_lucid_selfattn")
    local, dim, routed = c["local"], c["dh"], c["heads"] - c["local"]
    config = PortRoutedMixerConfig(
      c["dim"], c["heads"], local, dim, clusters=c["max_seq"] // c["w"], window_size=c["w"],
      block_size=c["lw"], membership="official",
    )  # fmt: skip
    mixer = make(config, dtype=jnp.float64, param_dtype=jnp.float64)
    mixer.centroids.means[...] = jnp.asarray(g["param/global_attn.kmeans.means"])

    def arrays(prefix):
      turned = lambda w, heads: np.moveaxis(w.reshape(-1, heads, dim, c["dim"]), -1, 1)  # noqa: E731
      q, v = (turned(g[f"{prefix}to_{name}.weight"], routed) for name in "qv")
      return dict(
        local_heads_in__kernel=turned(g[f"{prefix}local_to_qkv.weight"], local),
        local_heads_in__bias=g[f"{prefix}local_to_qkv.bias"].reshape(3, local, dim),
        routed_heads_in__kernel=np.concatenate([q, v]),
        heads_out__kernel=g[f"{prefix}to_out.weight"].T.reshape(c["heads"], dim, -1),
      )

    mixers.set_params(mixer, **arrays("param/"))
    graph, params, rest = nnx.split(mixer, nnx.Param, ...)

    def loss(params, x):
      y, _, note = nnx.merge(graph, params, rest).with_note(x)
      return jnp.sum(y * g["in/cotangent"]) + note.loss, (y, note)

    gradient = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    (d_params, dx), (y, note) = gradient(params, jnp.asarray(g["in/x"]))
    close(y, g["out/o"], 2e-6)
    close(note.loss, g["out/aux_loss"], 2e-6)
    close(dx, g["grad/x"], 1e-5)
    flat = {"__".join(map(str, p)): v.get_value() for p, v in nnx.to_flat_state(d_params)}
    for name, expected in arrays("grad/param/").items():
      close(flat[name], expected, 1e-5)


def test_steps_documents_and_rows_of_unequal_length():
  """All are as if every document were alone, read token by token: positions, too."""
  mixer = make(PREFIX)
  x, ids = inputs(rows=2, length=7), jnp.asarray([[0, 0, 0, 1, 1, 1, 1]] * 2)
  read = jax.jit(
    lambda x, ids, lengths, state: mixer(x, segment_ids=ids, lengths=lengths, state=state)
  )
  step = jax.jit(mixer.step)
  empty = mixer.init_state(2)

  def alone(x, state=empty):
    outputs = []
    for t in range(x.shape[1]):
      y, state = step(x[:, t], state)
      outputs.append(y)
    return np.stack(outputs, 1), state

  whole, _ = alone(x)
  full = jnp.asarray([7, 7])
  close(read(x, 0 * ids, full, empty)[0], whole)
  packed, after = read(x, ids, full, empty)
  first, second = alone(x[:, :3]), alone(x[:, 3:])
  close(packed, np.concatenate([first[0], second[0]], 1))
  close(step(x[:, 0], after)[0], step(x[:, 0], second[1])[0])
  # A prompt of 4 tokens in one row, 2 in the other, then three tokens more.
  lengths = np.asarray([4, 2])
  _, state = read(x, 0 * ids, jnp.asarray(lengths), empty)
  rest = x[np.arange(2)[:, None], lengths[:, None] + np.arange(3)]
  expected = whole[np.arange(2)[:, None], lengths[:, None] + np.arange(3)]
  close(alone(rest, state)[0], expected)
  # And the rest of the row in one call behind a state.
  _, state = read(x, 0 * ids, jnp.asarray([3, 3]), empty)
  rest = read(jnp.roll(x, -3, 1), 0 * ids, jnp.asarray([4, 4]), state)[0]
  close(rest[:, :4], whole[:, 3:])


def test_official_is_read_without_the_future_where_there_is_a_state():
  assert OFFICIAL.routing(with_state=True) == PREFIX.routing() == PREFIX.routing(with_state=True)
  assert OFFICIAL.routing().leaks
  assert OFFICIAL.routing().own_pair == "last_resort"
  assert RECENT.routing(with_state=True) == RECENT.routing()


def test_over_devices():
  """Output and what moves the centroids; documents are counted anew on every device."""
  graph, variables = nnx.split(make(dataclasses.replace(RECENT, heads=2, local_heads=0)))
  x = inputs(rows=2, length=12)
  ids = jnp.asarray(np.arange(12) >= 5, jnp.int32)[None].repeat(2, 0)

  def run(variables, x, ids):
    y, _, note = nnx.merge(graph, variables).with_note(x, segment_ids=ids)
    return y, note

  expected = jax.jit(run)(variables, x, ids)
  with jax.set_mesh(mixers.mesh_of(2, 2, 2)):
    got = jax.jit(lambda *args: run(*args))(variables, x, ids)
  jax.tree.map(lambda a, b: close(a, b, 1e-5), got, expected)


def test_memory_and_keys_of_their_own():
  """Both change the output; queries and keys are clustered together. There is no state."""
  mixer = make(UNSHARED)
  x = inputs(rows=2, length=8)
  graph, variables = nnx.split(mixer)
  run = jax.jit(lambda variables: nnx.merge(graph, variables).with_note(x))
  y, _, note = run(variables)
  assert note.sums.count.sum() == 2 * 8 * 2 * 2
  kernel = mixer.routed_heads_in.kernel
  for variable, part in ((mixer.memory, 0), (mixer.memory, 1), (kernel, 2)):
    before = variable[...]
    variable[...] = before.at[part].multiply(0.5)
    assert np.abs(run(nnx.state(mixer))[0] - y).max() > 1e-3
    variable[...] = before
  with pytest.raises(ValueError, match=r"memory_slots must be 0 for a state \(init_state\); got 1"):
    mixer.init_state(2)
  with pytest.raises(ValueError, match=r"memory_slots must be 0 for a state \(call\)"):
    mixer(x, state=make(OFFICIAL).init_state(2))


def test_bad_configurations_are_refused():
  for change, message in (
    (dict(local_heads=5), "local_heads must lie between 0 and heads .4.; got 5"),
    (dict(block_size=0), "block_size must be at least 1; got 0"),
    (dict(look_back=3), "look_back must be a multiple of block_size .2.; got 3"),
    (dict(memory_slots=-1), "memory_slots must be at least 0; got -1"),
    (dict(memory_slots=1), "memory_slots must be 0 with membership 'causal_recent'; got 1"),
    (dict(shared=False), "shared must be True but with membership 'official' and a memory"),
  ):
    with pytest.raises(ValueError, match=f"PortRoutedMixerConfig: {message}"):
      dataclasses.replace(RECENT, **change)
