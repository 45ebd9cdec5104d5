"""Centroids: their update and the commitment loss, against the released code's goldens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnzoo.layers import Centroids, CentroidsConfig, ClusterSums, standardise
from attnzoo.layers.centroids import clusters_in_use
from attnzoo_testing.goldens import golden
from attnzoo_testing.mixers import close

FILES = ("attn_h1_causal", "attn_h3_causal_rel")


def load(name, counts):
  """(golden arrays, centroids in their state, standardised queries)."""
  g = golden(f"routing_official_{name}")
  heads, clusters, dim = g["param/means"].shape
  config = CentroidsConfig(heads, clusters, dim, counts=counts)
  centroids = Centroids(config, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
  centroids.means[...] = jnp.asarray(g["param/means"], jnp.float64)
  x = standardise(jnp.asarray(np.swapaxes(g["in/q"], 1, 2), jnp.float64))
  return g, centroids, x


@pytest.mark.parametrize("counts", ["official", "per_head"])
@pytest.mark.parametrize("name", FILES)
def test_update(name, counts):
  with jax.enable_x64(True):
    g, centroids, x = load(name, counts)
    distance, sums = centroids.spread(x, centroids.scores(x))
    close(2e-4 * distance, g["out/aux_loss"], 1e-12)
    close(sums.count, g[f"out/batch_count_{counts}"], 1e-12)
    close(sums.total, g["out/batch_sum"], 1e-12)
    first = nnx.clone(centroids)
    first.ema_means[...] = first.means[...]
    first.absorb(sums)
    close(first.means[...], g[f"out/first_update_means_{counts}"], 1e-12)
    for part in ("ema_count", "ema_means"):
      getattr(centroids, part)[...] = jnp.asarray(g[f"in/{part}"], jnp.float64)
    centroids.absorb(sums)
    close(centroids.means[...], g[f"out/means_after_{counts}"], 1e-12)
    close(centroids.ema_count[...], g[f"out/ema_count_after_{counts}"], 1e-12)
    close(centroids.ema_means[...], g["out/ema_means_after_official"], 1e-12)


def test_released_count_mixes_heads_up():
  """With one head both forms are the same; with three they are not."""
  with jax.enable_x64(True):
    for name, same in zip(FILES, (True, False), strict=True):
      counts = []
      for kind in ("official", "per_head"):
        _, centroids, x = load(name, kind)
        counts.append(np.asarray(centroids.spread(x, centroids.scores(x))[1].count))
      assert np.array_equal(*counts) == same
      assert counts[0].sum() == counts[1].sum()


def make(**more):
  return Centroids(CentroidsConfig(2, 4, 8, **more), rngs=nnx.Rngs(0))


def test_initial_centroids_have_the_length_of_standardised_vectors_and_keep_it():
  lengths = lambda centroids: np.linalg.norm(centroids.means[...], axis=-1)  # noqa: E731
  np.testing.assert_allclose(lengths(make()), 8**0.5, rtol=1e-3)
  x = standardise(jax.random.normal(jax.random.key(1), (2, 16, 2, 8)))
  kept, grown = make(initial_count=1.0), make()
  for centroids in (kept, grown):
    centroids.absorb(centroids.spread(x, centroids.scores(x))[1])
  np.testing.assert_allclose(lengths(kept), 8**0.5, rtol=0.02)
  assert lengths(grown).mean() > 10 * 8**0.5  # as published: by about 1000 over the count


def test_nothing_to_absorb_moves_nothing():
  centroids = make()
  before = centroids.means[...]
  centroids.absorb(ClusterSums(jnp.zeros((2, 4)), jnp.zeros((2, 4, 8))))
  np.testing.assert_array_equal(centroids.means[...], before)


def test_zero_vectors_do_not_count():
  centroids = make()
  x = jnp.zeros((1, 3, 2, 8)).at[0, 1].set(1.0)
  _, sums = centroids.spread(x, centroids.scores(x))
  np.testing.assert_array_equal(jnp.sum(sums.count, -1), [1, 1])


def test_gradient_goes_to_the_vectors_alone():
  centroids = make()
  x = jax.random.normal(jax.random.key(1), (1, 6, 2, 8))
  graph, tracked = nnx.split(centroids)

  def distance(x, tracked):
    centroids = nnx.merge(graph, tracked)
    return centroids.spread(x, centroids.scores(x))[0]

  dx, d_tracked = jax.grad(distance, (0, 1))(x, tracked)
  assert np.any(dx)
  for leaf in jax.tree.leaves(d_tracked):
    np.testing.assert_array_equal(leaf, 0)


def test_clusters_in_use():
  even, one = jnp.full((3, 2, 4), 5.0), jnp.zeros((2, 4)).at[:, 1].set(7.0)
  assert clusters_in_use(((ClusterSums(even, None), None),)) == pytest.approx(1)
  assert clusters_in_use(ClusterSums(one, None)) == pytest.approx(1 / 4)


def test_bad_configurations_are_refused():
  for change, message in (
    (dict(counts="all"), "counts must be one of"),
    (dict(decay=1.0), "decay must lie in"),
  ):
    with pytest.raises(ValueError, match=f"CentroidsConfig: {message}"):
      make(**change)
  with pytest.raises(ValueError, match="CentroidsConfig: clusters must be at least 1; got 0"):
    CentroidsConfig(1, 0, 8)
