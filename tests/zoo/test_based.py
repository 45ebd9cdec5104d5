"""BASED and its attention baseline against the published models, and their configurations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnzoo import zoo
from attnzoo.experiments.generation import Sampling, generate
from attnzoo.layers import TaylorState
from attnzoo.zoo import based, based_weights
from attnzoo.zoo.based import BasedConfig
from attnzoo_testing.goldens import golden
from attnzoo_testing.mixers import close, mesh_of, run

LM = BasedConfig(
  96, 32, 8, 2, 256, linear_layers=(1, 6), sliding_layers=(2, 7), feature_dim=8, window_size=16
)
ATTENTION = BasedConfig(96, 32, 3, 2, 256, other_layers="attention", rotary_fraction=0.5)
MODELS = {"based_lm": (LM, 24), "based_attn_lm": (ATTENTION, 13)}  # and tokens of the prompt
WIDE = dict(dtype="float64", param_dtype="float64")
# All three mixers, three layers, and weights large enough for rounding to be seen.
SMALL = BasedConfig(
  32, 16, 3, 2, 24, linear_layers=(1,), sliding_layers=(2,), feature_dim=4, window_size=6,
  init_stddev=0.3, chunk_size=4,
)  # fmt: skip


def published(g, prefix="param/"):
  return {k.removeprefix(prefix): v for k, v in g.items() if k.startswith(f"{prefix}transformer")}


@pytest.fixture(scope="module", params=MODELS)
def lm(request):
  g = golden(request.param)
  config, prompt = MODELS[request.param]
  return config, prompt, based_weights.import_weights(published(g), config), g


def test_loss_and_gradients(lm):
  config, _, model, g = lm
  graph, params, rest = nnx.split(model, nnx.Param, ...)
  ids, labels = jnp.asarray(g["in/input_ids"]), jnp.asarray(g["in/labels"])

  def mean_loss(params):
    sums = nnx.merge(graph, params, rest).loss(ids, labels)
    return sums.loss / sums.weight

  loss, gradient = jax.jit(jax.value_and_grad(mean_loss))(params)
  np.testing.assert_allclose(loss, g["out64/loss"], rtol=2e-6)
  named = based_weights.export_weights(nnx.merge(graph, gradient, rest), config)
  expected = published(g, "grad/")
  assert set(named) == set(expected)
  for name, value in expected.items():
    close(named[name], value, 1e-4)


def test_float64_to_rounding(lm):
  config, _, _, g = lm
  with jax.enable_x64(True):
    model = based_weights.import_weights(published(g), config, **WIDE)
    logits, _ = run(model, jnp.asarray(g["in/input_ids"]))
    # Theirs adds 1e-12 to the denominators of linear attention.
    close(logits, g["out64/logits"], 1e-13 if config is ATTENTION else 2e-12)


def test_logits_prompt_steps_and_greedy_continuation(lm):
  _, count, model, g = lm
  ids = jnp.asarray(g["in/input_ids"])
  whole, _ = run(model, ids)
  np.testing.assert_allclose(whole, g["out/logits"], rtol=5e-5, atol=5e-5)
  logits, state = run(model, ids[:, :count], state=model.init_state(2, ids.shape[1]))
  np.testing.assert_allclose(logits, g["out/logits_recurrent"][:, :count], rtol=5e-5, atol=5e-5)
  step, last = jax.jit(model.step), logits[:, -1]
  ongoing = state
  for t in range(count, ids.shape[1]):
    one, ongoing = step(ids[:, t], ongoing)
    np.testing.assert_allclose(one, g["out/logits_recurrent"][:, t], rtol=5e-5, atol=5e-5)
  tokens = [*ids[:, :count].T]
  for _ in range(8):
    tokens.append(jnp.argmax(last, -1))
    last, state = step(tokens[-1], state)
  np.testing.assert_array_equal(jnp.stack(tokens, 1), g["out/greedy_sequence"])


def test_stream_between_the_layers():
  """Conv, linear and sliding: the stream after each block is their residual plus their output."""
  g = golden("based_lm")
  model = based_weights.import_weights(published(g), LM)
  x = model.embedding[...][g["in/input_ids"]]
  for layer, block in enumerate(model.layers()[:3]):
    x, _ = block(x)
    close(x, g[f"out/layer{layer}_residual"] + g[f"out/layer{layer}_hidden"], 2e-5)


def test_parameter_counts_are_the_published_ones():
  counts = {"based-360m": 362_620_928, "based-1b": 1_349_453_056, "attn-360m": 359_810_048}
  for name, count in counts.items():
    assert based.parameter_count(zoo.get_config(name)) == count, name
  tiny = [based.parameter_count(zoo.get_config(name)) for name in ("based-tiny", "attn-tiny")]
  assert abs(tiny[0] / tiny[1] - 1) < 0.01


def test_mixers_of_the_layers():
  config = zoo.get_config("based-360m")
  kinds = [config.mixer_of(layer) for layer in range(27)]
  assert {kind: kinds.count(kind) for kind in set(kinds)} == dict(linear=5, sliding=5, conv=17)
  assert dataclasses.replace(LM, linear_layers=(2,)).mixer_of(2) == "sliding"  # in both lists
  assert config.sliding().left == 128
  assert zoo.get_config("based-1.3b").sliding().left == 64


def test_initial_weights_have_the_published_spread():
  config = zoo.get_config("based-tiny", num_layers=3)
  model = zoo.build(config, nnx.Rngs(0))
  scaled = ("heads_out", "out", "down")  # back into the residual stream
  for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
    value = np.asarray(variable.get_value())
    if path[-1] == "taps":
      np.testing.assert_allclose(value.std(), 1 / 3, rtol=0.05)
    elif path[-1] in ("kernel", "embedding"):
      expected = 0.02 / np.sqrt(6) if set(path) & set(scaled) else 0.02
      np.testing.assert_allclose(value.std(), expected, rtol=0.03, err_msg=str(path))
    else:
      np.testing.assert_array_equal(value, path[-1] == "scale")


@pytest.fixture(scope="module")
def small():
  return zoo.build(SMALL, nnx.Rngs(0))


def test_packed_padded_and_continued(small):
  model = small
  tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 32)
  empty, one = model.init_state(2), jnp.zeros((2, 12), jnp.int32)

  @jax.jit
  def read(tokens, count, state=empty, ids=one):
    return model(tokens, lengths=jnp.full((2,), count), segment_ids=ids, state=state)

  whole, _ = read(tokens, 12)
  for count in (1, 2, 7):  # shorter than the taps, than the window, and longer
    prompt, state = read(tokens, count)
    close(prompt[:, :count], whole[:, :count], 2e-5)
    rest, _ = read(jnp.roll(tokens, -count, 1), 12 - count, state)
    close(rest[:, : 12 - count], whole[:, count:], 2e-5)
  packed, _ = read(tokens, 12, ids=jnp.asarray([[0] * 5 + [1] * 7] * 2))
  close(packed[:, :5], whole[:, :5], 2e-5)
  close(packed[:, 5:], read(jnp.roll(tokens, -5, 1), 7)[0][:, :7], 2e-5)


@pytest.mark.slow
def test_over_devices(small):
  """Loss and gradients on 8 devices (data, seq, model) are those of one."""
  graph, params, rest = nnx.split(small, nnx.Param, ...)
  tokens = jax.random.randint(jax.random.key(1), (4, 16), 0, 32)
  segments = jnp.asarray([[0] * 9 + [1] * 7] * 4)

  def loss(params):
    return nnx.merge(graph, params, rest).loss(tokens, tokens, segment_ids=segments).loss

  expected = jax.jit(jax.value_and_grad(loss))(params)
  with jax.set_mesh(mesh_of(2, 2, 2)):
    got = jax.jit(jax.value_and_grad(lambda params: loss(params)))(params)
  jax.tree.map(lambda a, b: close(a, b, 5e-5), got, expected)


def test_generation_keeps_caches_of_the_right_size():
  """Prompts are padded to pieces; full attention has slots for prompt and continuation alone."""
  model = zoo.build(dataclasses.replace(SMALL, other_layers="attention"), nnx.Rngs(0))
  rows = [[1, 2, 3, 4, 5], [7, 8]]
  drawn = np.stack([*generate(model, rows, max_new_tokens=4, sampling=Sampling(0.0))], 1)
  whole = jax.jit(lambda tokens: model(tokens)[0])
  for row, continuation in zip(rows, drawn, strict=True):
    text = np.pad(np.concatenate([row, continuation]), (0, 5 - len(row)))  # [9]
    likeliest = np.argmax(whole(text[None])[0], -1)
    np.testing.assert_array_equal(likeliest[len(row) - 1 :][:4], continuation)


def test_residual_stream_is_float32_under_bfloat16():
  config = dataclasses.replace(SMALL, dtype="bfloat16")
  tokens = jnp.zeros((1, 5), jnp.int32)
  for wide, dtype in ((True, jnp.float32), (False, jnp.bfloat16)):
    model = zoo.build(dataclasses.replace(config, residual_in_float32=wide), nnx.Rngs(0))
    x = model._embed(tokens, jnp.arange(tokens.shape[1])[None])
    assert x.dtype == dtype
    assert jax.eval_shape(model.layers()[0], x)[0].dtype == dtype
    hidden, state = jax.eval_shape(model.hidden, tokens)
    assert hidden.dtype == jnp.bfloat16
    linear = [s for group in state.groups for s in group if isinstance(s, TaylorState)]
    assert [s.memory.dtype for s in linear] == [jnp.float32]


def test_bad_configurations_are_refused():
  for change, message in (
    (dict(sliding_layers=(8,)), r"sliding_layers must lie in \[0, 8\); got \(8,\)"),
    (dict(other_layers="hyena"), "other_layers must be one of.*got 'hyena'"),
    (dict(linear_heads=3), "linear_heads must divide features; got 3"),
    (dict(window_convention="both"), "convention must be one of"),
    (dict(glu_activation="sillu"), "did you mean 'silu'"),
    (dict(output_norm="none"), "output_norm must be one of"),
    (dict(conv_kernel_size=0), "kernel_size must be at least 1"),
  ):
    with pytest.raises(ValueError, match=message):
      dataclasses.replace(LM, **change)
  with pytest.raises(ValueError, match="did you mean 'based-1b'"):
    zoo.get_config("base-1b")
