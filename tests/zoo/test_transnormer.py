"""TransNormerLLM against the published model, and its configurations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnzoo import zoo
from attnzoo.zoo import transnormer, transnormer_weights
from attnzoo.zoo.transnormer import TransNormerConfig
from attnzoo_testing.goldens import golden

TINY = TransNormerConfig(97, 32, 3, 4, 48)


def close(got, expected, relative):
  scale = np.abs(expected).max()
  np.testing.assert_allclose(np.asarray(got) / scale, expected / scale, atol=relative, rtol=0)


def published(g, prefix="param/"):
  return {k.removeprefix(prefix): v for k, v in g.items() if k.startswith(prefix + "model")}


@pytest.fixture(scope="module")
def lm():
  g = golden("transnormer_lm")
  return transnormer_weights.import_weights(published(g), TINY), g


def test_logits_hidden_and_loss(lm):
  model, g = lm
  ids = jnp.asarray(g["in/input_ids"], jnp.int32)
  logits, _ = model(ids)
  close(logits, g["out/logits_f64"], 1e-5)
  hidden, _ = model.hidden(ids)
  close(hidden, g["out/hidden_3"], 1e-5)
  sums = model.loss(ids[:, :-1], ids[:, 1:])
  np.testing.assert_allclose(sums.loss / sums.weight, g["out/loss_f64"][0], rtol=1e-6)


@pytest.mark.parametrize(
  "remat", ["none", *(pytest.param(name, marks=pytest.mark.slow) for name in ("full", "dots"))]
)
def test_gradients_of_every_parameter(remat):
  g = golden("transnormer_lm")
  config = dataclasses.replace(TINY, remat=remat, loss_chunk=7)
  model = transnormer_weights.import_weights(published(g), config)
  ids = jnp.asarray(g["in/input_ids"], jnp.int32)
  graph, params, rest = nnx.split(model, nnx.Param, ...)

  def loss(params):
    sums = nnx.merge(graph, params, rest).loss(ids[:, :-1], ids[:, 1:])
    return sums.loss / sums.weight

  gradient = jax.jit(jax.grad(loss))(params)
  as_model = nnx.merge(graph, gradient, rest)
  named = transnormer_weights.export_weights(as_model, config)
  expected = {k: v for k, v in published(g, "grad/").items() if not k.endswith("_f64")}
  assert set(named) == set(expected)
  for name, value in expected.items():
    close(named[name], g.get(f"grad/{name}_f64", value), 1e-5)


def test_prefill_decode_and_greedy_continuation(lm):
  model, g = lm
  ids = jnp.asarray(g["in/input_ids"], jnp.int32)
  prompt = ids[:, : ids.shape[1] - g["out/logits_decode"].shape[1]]
  logits, state = model(prompt)
  for layer, memory in enumerate(states_by_layer(state)):
    close(memory, g[f"out/state_prefill_layer{layer}"], 1e-5)
  step = jax.jit(model.step)
  decode_state = state
  for t in range(g["out/logits_decode"].shape[1]):
    one, decode_state = step(ids[:, prompt.shape[1] + t], decode_state)
    close(one, g["out/logits_decode"][:, t], 1e-5)
  tokens = [*prompt.T]
  last = logits[:, -1]
  for _ in range(g["out/greedy_ids"].shape[1] - prompt.shape[1]):
    tokens.append(jnp.argmax(last, -1))
    last, state = step(tokens[-1], state)
  np.testing.assert_array_equal(jnp.stack(tokens, 1), g["out/greedy_ids"])


def test_left_padded_prompts(lm):
  model, g = lm
  mask = g["in/mask_leftpadded"]
  logits, _ = model(jnp.asarray(g["in/ids_leftpadded"], jnp.int32), segment_ids=jnp.asarray(mask))
  real = mask.astype(bool)
  close(np.asarray(logits)[real], g["out/logits_leftpadded"][real], 1e-5)


def test_packed_documents_do_not_see_each_other(lm):
  model, g = lm
  ids = jnp.asarray(g["in/input_ids"][:1], jnp.int32)
  segments = jnp.asarray([[0] * 11 + [1] * 29])
  packed, _ = model(ids, segment_ids=segments)
  separate = jnp.concatenate([model(ids[:, :11])[0], model(ids[:, 11:])[0]], axis=1)
  close(packed, np.asarray(separate), 1e-5)


def test_parameter_counts_are_the_published_ones():
  counts = {
    "transnormer-385m": 398_984_192,
    "transnormer-385m-10b": 384_926_720,
    "transnormer-1b": 1_020_266_496,
    "transnormer-7b": 6_836_719_616,
    "transnormer2-3b": 2_911_111_680,
    "transnormer3-15b": 14_833_382_400,
  }
  for name, count in counts.items():
    assert transnormer.parameter_count(zoo.get_config(name)) == count, name


def test_initial_weights_have_the_published_spread():
  model = zoo.create("transnormer-tiny", rngs=nnx.Rngs(0))
  for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
    value = np.asarray(variable.get_value())
    if "theta" not in path and value.size > 10_000:
      assert abs(value.std() - 0.02) < 5e-4, path
  padded = zoo.build(TINY, nnx.Rngs(0))
  np.testing.assert_array_equal(padded.embedding[...][0], 0)


@pytest.mark.slow
@pytest.mark.parametrize(
  "overrides",
  [
    dict(lrpe_layers="all"),
    dict(lrpe_layers="none", decay=False),
    dict(layer_factor=False, gate="none"),
    dict(norm="layer", activation="1+elu", use_bias=True),
    dict(norm="rms", glu_activation="silu", gate="low_rank", gate_rank=2),
    dict(lrpe_layers="all_but_first", scale_embedding=False, decay_ladder="geometric"),
  ],
  ids=lambda o: "-".join(o),
)
def test_ablations_train_and_decode_alike(overrides):
  """Each published ablation is a working model: finite gradients, and step = parallel."""
  model = zoo.create("transnormer-tiny", rngs=nnx.Rngs(0), features=16, num_layers=3, heads=2,
                     glu_dim=24, init_stddev=0.3, **overrides)  # fmt: skip
  tokens = jax.random.randint(jax.random.key(0), (2, 9), 0, 257)
  logits, _ = model(tokens)
  state = model.init_state(2)
  for t in range(9):
    one, state = model.step(tokens[:, t], state)
    close(one, np.asarray(logits[:, t]), 1e-4)
  graph, params, rest = nnx.split(model, nnx.Param, ...)
  gradient = jax.grad(lambda p: nnx.merge(graph, p, rest).loss(tokens, tokens).loss)(params)
  for leaf in jax.tree.leaves(gradient):
    assert np.isfinite(leaf).all()
    assert np.any(leaf != 0)


def test_bfloat16_activations_keep_float32_parameters_and_state():
  model = zoo.create("transnormer-tiny", rngs=nnx.Rngs(0), dtype="bfloat16")
  logits, state = model(jnp.zeros((1, 5), jnp.int32))
  assert logits.dtype == jnp.float32
  assert model.embedding[...].dtype == jnp.float32
  assert state.groups[0][0].memory.dtype == jnp.float32


def test_unknown_names_suggest_the_nearest():
  with pytest.raises(ValueError, match="did you mean 'transnormer-1b'"):
    zoo.create("transnormer-1B", rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="did you mean 'num_layers'"):
    zoo.get_config("transnormer-1b", num_layer=3)
  with pytest.raises(ValueError, match=r"features must be a multiple of heads \(5\); got 32"):
    dataclasses.replace(TINY, heads=5)
  with pytest.raises(ValueError, match="remat must be one of.*got 'some'"):
    zoo.build(dataclasses.replace(TINY, remat="some"), nnx.Rngs(0))


def states_by_layer(state):
  for (group,) in state.groups:
    yield from group.memory
