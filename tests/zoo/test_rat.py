"""RAT, its hybrids and its baselines: against the published models, and their configurations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from attnzoo import zoo
from attnzoo.experiments.generation import Sampling, generate
from attnzoo.zoo import rat, rat_weights
from attnzoo.zoo.rat import RatConfig
from attnzoo_testing.goldens import golden
from attnzoo_testing.mixers import close, run

SIZES = dict(vocab_size=97, features=48, heads=4, chunk_size=4, residual_in_float32=False)
# Golden file -> configuration, tokens of the prompt.
MODELS = {
  "rat_lm_a": (RatConfig(num_layers=3, **SIZES), 14),
  "rat_lm_hybrid_a": (RatConfig(num_layers=4, other_mixer="local", window_size=10, **SIZES), 15),
}
WIDE = dict(dtype="float64", param_dtype="float64")
# Weights large enough for rounding to be seen.
SMALL = RatConfig(32, 16, 2, 2, chunk_size=4, window_size=3, other_mixer="local", init_stddev=0.3)


def published(g, prefix="param/"):
  return {k.removeprefix(prefix): v for k, v in g.items() if k.startswith(prefix)}


@pytest.fixture(scope="module", params=MODELS)
def lm(request):
  g = golden(request.param)
  config, prompt = MODELS[request.param]
  return config, prompt, rat_weights.import_weights(published(g), config), g


def loss_and_gradients(model, config, g):
  """(mean loss over the labels that count, gradients under their published names)."""
  graph, params, rest = nnx.split(model, nnx.Param, ...)
  ids, labels = jnp.asarray(g["in/input_ids"]), jnp.asarray(g["in/labels"])

  def mean_loss(params):
    counted = (labels != -100).astype(config.dtype)
    sums = nnx.merge(graph, params, rest).loss(ids, jnp.maximum(labels, 0), counted)
    return sums.loss / sums.weight

  loss, gradient = jax.jit(jax.value_and_grad(mean_loss))(params)
  return loss, rat_weights.export_weights(nnx.merge(graph, gradient, rest), config)


def test_float64(lm):
  """Theirs has rotary tables in float32 all the same."""
  config, _, _, g = lm
  with jax.enable_x64(True):
    wide = dataclasses.replace(config, **WIDE)
    model = rat_weights.import_weights(published(g), wide)
    loss, gradients = loss_and_gradients(model, wide, g)
    np.testing.assert_allclose(loss, g["out64/loss"], rtol=1e-6)
    expected = published(g, "grad64/")
    assert set(gradients) == set(expected)
    for name, value in expected.items():
      close(gradients[name], value, 1e-6)


def test_logits_prompt_steps_and_greedy_continuation(lm):
  _, count, model, g = lm
  ids = jnp.asarray(g["in/input_ids"])
  rows, length = ids.shape
  empty = model.init_state(rows, length)
  read = jax.jit(lambda count: model(ids, lengths=jnp.full((rows,), count), state=empty))
  close(read(length)[0], g["out/logits"], 1e-5)
  step, state = jax.jit(model.step), empty
  for t in range(length):  # from the first token on
    logits, state = step(ids[:, t], state)
    close(logits, g["out/step_logits"][:, t], 1e-5)
  logits, state = read(count)
  close(logits[:, :count], g["out/prefill_logits"], 1e-5)
  last, ongoing, drawn = logits[:, count - 1], state, []
  for t in range(count, length):
    one, ongoing = step(ids[:, t], ongoing)
    close(one, g["out/prefill_step_logits"][:, t - count], 1e-5)
  for _ in range(8):
    drawn.append(jnp.argmax(last, -1))
    last, state = step(drawn[-1], state)
  np.testing.assert_array_equal(jnp.stack(drawn, 1), g["out/greedy_tokens"])


def test_stream_between_the_blocks():
  g = golden("rat_lm_hybrid_a")
  model = rat_weights.import_weights(published(g), MODELS["rat_lm_hybrid_a"][0])
  x = model.embedding[...][g["in/input_ids"]]
  for layer, block in enumerate(model.layers()):
    close(x, g[f"out/h{layer}"], 1e-5)
    x, _ = run(block, x)
  close(model.final_norm(x), g["out/h_final_norm"], 1e-5)


def test_parameter_counts_are_the_published_ones():
  """Of the models as they are built, `test_models` counts the shapes."""
  counts = {
    "rat-xl": 1_298_810_880,
    "rat-swa-xl": 1_286_203_392,
    "rat-rnn-xl": 1_273_645_056,
    "rat-attention-xl": 1_273_595_904,
    "rat-attention-swa-xl": 1_273_595_904,
  }
  for name, count in counts.items():
    assert rat.parameter_count(zoo.get_config(name)) == count, name


def test_mixers_of_the_blocks():
  config = zoo.get_config("rat-swa-xl")
  assert [config.mixer_of(layer) for layer in range(4)] == ["rat", "local"] * 2
  assert config.local().left == 1024
  third = dataclasses.replace(config, interleave_step=3)
  assert [third.mixer_of(layer) for layer in range(4)] == ["rat", "local", "local", "rat"]
  plain = dataclasses.replace(config, rotary_base=None)
  assert (plain.local().rotary_fraction, plain.rat().rotary_base) == (0.0, None)


def test_initial_weights_have_the_published_spread():
  model = zoo.create("rat-swa-tiny", num_layers=2, rngs=nnx.Rngs(0))
  for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
    value = np.asarray(variable.get_value())
    if path[-1] in ("kernel", "embedding"):
      np.testing.assert_allclose(value.std(), 0.02, rtol=0.03, err_msg=str(path))
    elif path[-1] == "gate_bias":
      assert 0 <= value.min() < value.max() <= np.log(15)
    else:
      np.testing.assert_array_equal(value, 1, err_msg=str(path))


def test_generation_continues_with_the_likeliest_tokens():
  """Prompts of unequal length are padded to pieces, which are no multiples of a chunk."""
  model = zoo.build(SMALL, nnx.Rngs(0))
  rows = [[1, 2, 3, 4, 5], [7, 8]]
  drawn = np.stack([*generate(model, rows, max_new_tokens=5, sampling=Sampling(0.0))], 1)
  whole = jax.jit(lambda tokens: model(tokens)[0])
  for row, continuation in zip(rows, drawn, strict=True):
    text = np.pad(np.concatenate([row, continuation]), (0, 5 - len(row)))  # [10]
    likeliest = np.argmax(whole(text[None])[0], -1)
    np.testing.assert_array_equal(likeliest[len(row) - 1 :][:5], continuation)


def test_a_step_of_training_lowers_the_loss():
  model = zoo.create("rat-tiny", rngs=nnx.Rngs(0), num_layers=2, remat="full")
  graph, params, rest = nnx.split(model, nnx.Param, ...)
  tokens = jax.random.randint(jax.random.key(1), (2, 40), 0, 257)

  @jax.jit
  def step(params):
    def loss(params):
      sums = nnx.merge(graph, params, rest).loss(tokens[:, :-1], tokens[:, 1:])
      return sums.loss / sums.weight

    value, gradient = jax.value_and_grad(loss)(params)
    adam = optax.adam(1e-3)
    return value, optax.apply_updates(params, adam.update(gradient, adam.init(params))[0])

  first, params = step(params)
  second, _ = step(params)
  np.testing.assert_allclose(first, np.log(257), rtol=0.02)
  assert second < first - 0.1


def test_residual_stream_is_float32_under_bfloat16():
  tokens = jnp.zeros((1, 5), jnp.int32)
  for wide, dtype in ((True, jnp.float32), (False, jnp.bfloat16)):
    config = dataclasses.replace(SMALL, dtype="bfloat16", residual_in_float32=wide)
    model = zoo.build(config, nnx.Rngs(0))
    assert model._embed(tokens, jnp.arange(tokens.shape[1])[None]).dtype == dtype
    hidden, _ = jax.eval_shape(model.hidden, tokens)
    assert hidden.dtype == jnp.bfloat16


def test_bad_configurations_are_refused():
  for change, message in (
    (dict(heads=3), r"features must be a multiple of heads \(3\); got 16"),
    (dict(mixer="mamba"), "mixer must be one of.*got 'mamba'"),
    (dict(other_mixer="rat"), "other_mixer must be one of.*got 'rat'"),
    (dict(window_size=0), "window_size must be at least 1; got 0"),
    (dict(hidden=0), "hidden must be at least 1; got 0"),
    (dict(groups=3), "groups must divide the 2 heads; got 3"),
    (dict(dtype="int8"), "dtype must be one of"),
  ):
    with pytest.raises(ValueError, match=message):
      dataclasses.replace(SMALL, **change)
  with pytest.raises(ValueError, match="did you mean 'rat-xl'"):
    zoo.get_config("rat-xxl")
