"""Keys of their own with membership "causal_recent", in plain XLA: definition, seeded faults."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo.pallas_kernels import Routing, routed_attention
from attnzoo.pallas_kernels.routed_attention import recent, recent_band
from attnzoo_testing.mixers import close


@functools.cache
def arrays():
  """(differentiated arrays, the others, cotangent): packed and padded rows, ties in the scores."""
  rng = np.random.default_rng(3)
  learned = [rng.standard_normal((2, 37, 2, 8)) for _ in range(3)]
  scores = [np.round(rng.standard_normal((2, 37, 2, 5)), 1).astype(np.float32) for _ in range(2)]
  ids = np.repeat([0, 1, 0], [12, 9, 16])[None].repeat(2, 0)
  fixed = dict(scores=scores[0], key_scores=scores[1], segment_ids=ids, lengths=np.array([37, 20]))
  return learned, fixed, rng.standard_normal(learned[0].shape)


def results(window, implementation):
  """(loss, output), gradients."""
  learned, fixed, cotangent = arrays()

  def loss(learned):
    output, _ = routed_attention(
      *learned, **fixed, options=Routing(window), implementation=implementation
    )
    return jnp.sum(output * cotangent), output

  with jax.enable_x64(True):
    return jax.jit(jax.value_and_grad(loss, has_aux=True))(learned)


truth = functools.cache(functools.partial(results, implementation="reference"))


def compare(window):
  jax.tree.map(lambda a, b: close(a, b, 1e-12), results(window, "xla"), truth(window))


@pytest.mark.parametrize("window", [4, 2, 40])
def test_keys_with_centroids_of_their_own(window):
  compare(window)


@pytest.mark.parametrize("window", [1, 3, 40])
def test_band_does_not_fall_and_blocks_have_tiles(window):
  """What the kernels rely on, for labels of every kind: few, many, one, none in common."""
  rng = np.random.default_rng(0)
  for query, key in (
    rng.integers(0, 4, (2, 50)), rng.integers(0, 60, (2, 50)), np.zeros((2, 50), int),
    np.stack([np.zeros(50, int), np.ones(50, int)]), np.sort(rng.integers(0, 9, (2, 50))),
  ):  # fmt: skip
    query = query[20:]  # tokens before the first query
    band = recent_band._band(jnp.asarray(query), jnp.asarray(key), window)
    start, stop = np.asarray(band.start), np.asarray(band.stop)
    assert np.all(np.diff(start) >= 0)
    assert np.all(np.diff(stop) >= 0)
    for place, one in enumerate(band.query_order):
      same = [n for n in range(20 + one + 1) if key[n] == query[one]][-window:]
      assert band.key_order[start[place] : stop[place]].tolist() == same
    tiles = recent_band.find_tiles(band, window, 8, blocks := -(-50 // window) + 1)
    assert np.array_equal(np.unique(tiles.block), np.arange(blocks))
    assert np.all(np.diff(tiles.block) >= 0)
    assert np.array_equal(tiles.slot_query[tiles.query_slot], np.arange(30))


# --- Seeded faults: every one of them must fail the comparison ------------------------------------


def bounds_moved(start, stop):
  def plant(patch):
    right = recent.find_band

    def wrong(*args):
      band = right(*args)
      return band._replace(
        start=jnp.maximum(band.start + start, 0), stop=jnp.minimum(band.stop + stop, 37)
      )

    patch.setattr(recent, "find_band", wrong)

  return plant


def documents_forgotten(patch):
  right = recent_band.labels
  patch.setattr(recent_band, "labels", lambda scores, documents: right(scores, None))


def next_block(patch):
  right = recent.find_tiles

  def wrong(*args):
    tiles = right(*args)
    return tiles._replace(block=jnp.maximum(tiles.block - 1, 0))

  patch.setattr(recent, "find_tiles", wrong)


def gradient_not_sorted_back(patch):
  @jax.custom_vjp
  def wrong(x, index, inverse):
    return jnp.take_along_axis(x, index[..., None], axis=2, mode="fill", fill_value=0)

  def back(saved, dy):
    index, inverse = saved
    return jnp.take_along_axis(dy, jnp.sort(inverse)[..., None], axis=2), None, None

  wrong.defvjp(lambda x, index, inverse: (wrong(x, index, inverse), (index, inverse)), back)
  patch.setattr(recent, "move", wrong)


FAULTS = dict(
  one_key_more=bounds_moved(-1, 0),
  later_key_seen=bounds_moved(0, 1),
  own_key_hidden=bounds_moved(0, -1),
  documents_forgotten=documents_forgotten,
  another_block=next_block,
  gradient_not_sorted_back=gradient_not_sorted_back,
)


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_found(fault, monkeypatch):
  truth(4)
  FAULTS[fault](monkeypatch)
  with pytest.raises(AssertionError):
    compare(4)
