"""The decoder around any block, and the same modules inside a Linen model."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnzoo import zoo
from attnzoo.layers import (
  Block,
  DecoderLM,
  GatedLinearUnit,
  LightningMixer,
  LightningMixerConfig,
  SRMSNorm,
)
from attnzoo.layers.stacking import find_groups
from attnzoo.pallas_kernels.lightning_attention.decay import decay_rates

MIXER = LightningMixerConfig(8, 2, 4, lrpe=True, init_stddev=0.3)


def block(rngs, *, lrpe=False, layer=0):
  config = LightningMixerConfig(8, 2, 4, lrpe=lrpe, init_stddev=0.3)
  mixer = LightningMixer(config, decay_rates(2, layer, 4), rngs=rngs)
  feed_forward = GatedLinearUnit(8, 12, init=nnx.initializers.normal(0.3), rngs=rngs)
  return Block(mixer, feed_forward, SRMSNorm(), SRMSNorm())


def close(got, expected, atol=2e-6):
  np.testing.assert_allclose(got, expected, atol=atol * np.abs(expected).max())


def test_stacked_layers_are_the_layers_one_after_the_other():
  rngs = nnx.Rngs(0)
  blocks = [block(rngs, lrpe=layer in (0, 3), layer=layer) for layer in range(4)]
  model = DecoderLM(blocks, SRMSNorm(), vocab_size=11, features=8, rngs=rngs)
  assert [nnx.state(g)[0].mixer.log_decay.get_value().shape[0] for g in model.groups] == [1, 2, 1]
  tokens = jnp.asarray([[1, 5, 3, 9, 2]])
  x = model.embedding[...][tokens]
  for one in blocks:
    x, _ = one(x)
  close(model.hidden(tokens)[0], SRMSNorm()(x))
  logits, _ = model(tokens)
  close(logits, SRMSNorm()(x) @ model.embedding[...].T)


def test_fewest_blocks_are_compiled():
  for pattern, groups in (
    ("aaaa", [(1, 4)]),
    ("abab", [(2, 2)]),
    ("aabaabc", [(3, 2), (1, 1)]),
    ("abc", [(3, 1)]),
    ("a" + "bcaaa" * 4 + "bc", [(5, 4), (3, 1)]),
    ("", []),
  ):
    found = find_groups(pattern)
    assert (sum(p for p, _ in found), len(found)) <= (sum(p for p, _ in groups), len(groups))
    assert "".join(_layers(pattern, found)) == pattern
  based = zoo.get_config("based-360m")
  kinds = [based.mixer_of(layer) for layer in range(based.num_layers)]
  assert sum(period for period, _ in find_groups(kinds)) == 6


def _layers(pattern, groups):
  """What the groups stand for, written out again."""
  start = 0
  for period, repeats in groups:
    yield pattern[start : start + period] * repeats
    start += period * repeats


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_pattern_of_layers_is_one_group(remat):
  rngs = nnx.Rngs(0)
  blocks = [block(rngs, lrpe=layer % 2 == 0, layer=layer) for layer in range(4)]
  model = DecoderLM(blocks, SRMSNorm(), vocab_size=11, features=8, remat=remat, rngs=rngs)
  assert [len(group) for group in model.groups] == [2]
  tokens = jnp.asarray([[1, 5, 3, 9, 2]])
  x, states = model.embedding[...][tokens], []
  for one, same in zip(blocks, model.layers(), strict=True):
    jax.tree.map(np.testing.assert_array_equal, nnx.state(one), nnx.state(same))
    x, state = one(x)
    states.append(state)
  hidden, after = model.hidden(tokens)
  close(hidden, SRMSNorm()(x))
  for layer, state in enumerate(states):
    close(after.groups[0][layer % 2].memory[layer // 2], state.memory)
  logits, _ = model.step(jnp.asarray([7]), after)
  longer = jnp.asarray([[1, 5, 3, 9, 2, 7]])
  close(logits, model(longer)[0][:, -1], 2e-5)

  graph, params, rest = nnx.split(model, nnx.Param, ...)
  gradient = jax.grad(lambda p: nnx.merge(graph, p, rest).loss(tokens, tokens).loss)(params)
  for leaf in jax.tree.leaves(gradient):
    assert np.any(leaf != 0)


def test_a_head_of_its_own():
  rngs = nnx.Rngs(0)
  model = DecoderLM(
    [block(rngs)], SRMSNorm(), vocab_size=11, features=8, tied_head=False, rngs=rngs
  )
  hidden, _ = model.hidden(jnp.asarray([[1, 2]]))
  close(model.logits(hidden), hidden @ model.head[...].T)
  assert not np.array_equal(model.head[...], model.embedding[...])


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [[7, 3], [1, 7]])
def test_prefill_in_pieces_then_steps(lengths):
  """Rows of unequal length in one batch: each is as if it were alone."""
  model = zoo.create("transnormer-tiny", rngs=nnx.Rngs(0), features=16, heads=2, num_layers=2,
                     glu_dim=24, init_stddev=0.3)  # fmt: skip
  tokens = jax.random.randint(jax.random.key(1), (2, 7), 0, 257)
  lengths = jnp.asarray(lengths)
  _, state = model(tokens[:, :4], lengths=jnp.minimum(lengths, 4))
  _, state = model(tokens[:, 4:], lengths=jnp.maximum(lengths - 4, 0), state=state)
  following = jnp.asarray([42, 43])
  logits, _ = model.step(following, state)
  for row, length in enumerate(lengths.tolist()):
    whole = jnp.concatenate([tokens[row, :length], following[row : row + 1]])[None]
    close(logits[row], model(whole)[0][0, -1], 2e-5)


class LinenModel(nn.Module):
  """A user's model: a Linen layer, one of ours, and another Linen layer."""

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(8)(x)
    x, _ = nnx.bridge.to_linen(LightningMixer, MIXER, decay_rates(2), name="mixer")(x)
    return nn.Dense(1)(x)


def test_mixer_inside_a_linen_model():
  x = jax.random.normal(jax.random.key(0), (2, 6, 8))
  model = LinenModel()
  variables = model.init(jax.random.key(1), x)
  assert set(variables["params"]) == {"Dense_0", "Dense_1", "mixer"}
  assert {"heads_in", "heads_out", "lrpe"} == set(variables["params"]["mixer"])
  assert "Constant" in variables, "the decay is no parameter"

  def loss(params):
    return jnp.mean(model.apply({**variables, "params": params}, x) ** 2)

  gradients = jax.jit(jax.grad(loss))(variables["params"])
  for leaf in jax.tree.leaves(gradients["mixer"]):
    assert np.isfinite(leaf).all()
    assert np.any(leaf != 0)


def test_block_in_linen_computes_what_it_computes_in_nnx():
  def make(rngs):
    return block(rngs, lrpe=True)

  wrapped = nnx.bridge.ToLinen(make)
  x = jax.random.normal(jax.random.key(0), (2, 6, 8))
  variables = wrapped.init(jax.random.key(1), x)
  y, state = wrapped.apply(variables, x)
  ours = make(nnx.Rngs(0))
  boxes = variables["params"]
  flat = [
    (path, variable.replace(find(boxes, path)))
    for path, variable in nnx.to_flat_state(nnx.state(ours, nnx.Param))
  ]
  nnx.update(ours, nnx.from_flat_state(flat))
  expected, after = ours(x)
  close(y, expected)
  close(state.memory, after.memory)
  one, _ = wrapped.apply(variables, x[:, 0], state, nnx_method=Block.step)
  close(one, ours.step(x[:, 0], after)[0])


def find(tree, path):
  for key in path:
    tree = tree[key]
  return tree.value if hasattr(tree, "value") else tree
