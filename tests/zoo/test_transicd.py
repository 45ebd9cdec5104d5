"""TransICD: against the released code's model, its training steps and layout; facts and sizes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from attnzoo import zoo
from attnzoo.experiments.training.config import OptimizerConfig
from attnzoo.experiments.training.optimizers import make_optimizer
from attnzoo.layers import LabelClassifier, binary_cross_entropy, label_margins, ldam_logits
from attnzoo.layers.partitioning import MESH_AXES
from attnzoo.zoo import models, published, transicd_weights
from attnzoo.zoo.transicd import PRESETS, TransICDConfig
from attnzoo_testing.goldens import golden, golden_config
from attnzoo_testing.mixers import mesh_of

WIDE = dict(dtype="float64", param_dtype="float64")
FILES = ("a", "b")
SMALL = TransICDConfig(40, 6, features=16, heads=2, max_length=30)
# Of the released code's arrays, how they begin -> our positions.
MODES = {"": "batch_row", "seqpe_": "sequence", "nope_": "none"}


def tensors_of(g):
  return {k.removeprefix("param/"): v for k, v in g.items() if k.startswith("param/")}


def weights_of(g):
  """Names of what is trained."""
  names = [n for n in tensors_of(g) if n not in ("class_margin", "pos_encoder.pe")]
  assert len(names) > 20
  return names


def golden_model(file, **fields):
  """(arrays, configuration, model with the published weights, batch)."""
  g, c = golden(f"transicd_{file}"), golden_config(f"transicd_{file}")
  config = TransICDConfig(
    c["vocab"], c["num_codes"], features=c["embed_size"], num_layers=c["num_layers"],
    heads=c["num_heads"], max_length=c["max_len"], dropout=0.0, margin=c["C"],
    positions="batch_row",
  )  # fmt: skip
  config = dataclasses.replace(config, **fields)
  batch = dict(tokens=jnp.asarray(g["in/tokens"]), targets=jnp.asarray(g["in/targets"]))
  batch["weights"] = jnp.ones((len(batch["tokens"]), 1))
  return g, config, transicd_weights.import_weights(tensors_of(g), config), batch


def near(got, expected, tolerance):
  np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=0, atol=tolerance)


def at_once(function):
  """The results of `function()` as one program."""
  return jax.jit(function)()


def compiled(model):
  """The model's call as a program of its tokens."""
  graph, variables = nnx.split(model)
  return functools.partial(jax.jit(lambda v, tokens: nnx.merge(graph, v)(tokens)), variables)


def value_and_gradients(model, batch):
  """Loss (mean over documents), and gradients as a model."""
  graph, params, rest = nnx.split(model, nnx.Param, ...)

  def loss(params):
    sums = nnx.merge(graph, params, rest).loss(**batch)
    return sums.loss / sums.weight

  value, gradient = jax.jit(jax.value_and_grad(loss))(params)
  return value, nnx.merge(graph, gradient, rest)


@pytest.mark.parametrize("mode", ["", "seqpe_"])
@pytest.mark.parametrize("file", FILES)
def test_released_model_in_float64(file, mode):
  """Positions by row of the batch, and by place; all gradients."""
  with jax.enable_x64(True):
    g, config, model, batch = golden_model(file, positions=MODES[mode], **WIDE)
    exact = f"out64/{mode}"
    if model.position_table is not None:  # the published one was rounded to float32
      model.position_table.set_value(jnp.asarray(g["param/pos_encoder.pe"][:, 0], jnp.float64))
    tokens, labels = batch["tokens"], jnp.arange(config.labels)
    logits, encoded, weights = at_once(
      lambda: (model(tokens), model.encode(tokens), model.weights(tokens, labels))
    )
    near(encoded, g[f"{exact}encoder"], 1e-12)
    near(logits, g[f"{exact}logits"], 1e-12)
    near(weights, g[f"{exact}attn_weights"], 1e-12)
    loss, gradient = value_and_gradients(model, batch)
    near(loss, g[f"{exact}loss"], 1e-7)  # documents are weighted in float32
    plain = binary_cross_entropy(logits, batch["targets"])
    near(plain.mean(), g[f"{exact}loss_bce"], 1e-12)
    tensors = transicd_weights.export_weights(gradient, config)
    for name in weights_of(g):
      if mode:  # given in float32
        near(tensors[name], g[f"grad/{mode}{name}"], 1e-6)
      else:
        near(tensors[name], g[f"grad64/{name}"], 1e-8)


@pytest.mark.parametrize("file", FILES)
def test_released_model_in_float32(file):
  g, config, model, batch = golden_model(file)
  tokens = batch["tokens"]
  embedded, encoded, logits, weights = at_once(
    lambda: (
      model.embed(tokens), model.encode(tokens), model(tokens),
      model.weights(tokens, jnp.array([2, 0])),
    )
  )  # fmt: skip
  near(embedded, g["out/pos_encoded"], 1e-5)
  near(encoded, g["out/encoder"], 1e-5)
  near(logits, g["out/logits"], 1e-5)
  near(jax.nn.sigmoid(logits), g["out/probs"], 2e-6)
  near(weights, g["out/attn_weights"][:, [2, 0]], 2e-6)
  margins = label_margins(g["in/label_freq"])
  near(margins, g["param/class_margin"], 1e-7)
  near(ldam_logits(logits, batch["targets"], margins, 3.0), g["out/ldam_logits"], 1e-5)
  loss, gradient = value_and_gradients(model, batch)
  near(loss, g["out/loss"], 1e-6)
  tensors = transicd_weights.export_weights(gradient, config)
  for name in weights_of(g):
    near(tensors[name], g[f"grad/{name}"], 1e-6)


def test_released_model_without_positions():
  g, _, model, batch = golden_model("b", positions="none")
  near(compiled(model)(batch["tokens"]), g["out/nope_logits"], 1e-5)
  loss, _ = value_and_gradients(model, batch)
  near(loss, g["out/nope_loss"], 1e-6)


@pytest.mark.parametrize("file", FILES)
def test_released_ablation(file):
  """The mean over all positions, padding included."""
  g, config, _, batch = golden_model(file)
  config = dataclasses.replace(config, pool="mean_of_all", margin=0.0)
  tensors = {n: x for n, x in tensors_of(g).items() if not n.startswith(("attn.", "class_"))}
  model = transicd_weights.import_weights(tensors, config)
  logits, sums = at_once(lambda: (model(batch["tokens"]), model.loss(**batch)))
  near(logits, g["out/baseline_logits"], 1e-5)
  near(sums.loss / sums.weight, g["out/baseline_loss"], 1e-6)


@pytest.mark.parametrize("file", FILES)
def test_released_training_steps(file):
  """Five steps of the released AdamW, which decays everything; the embedding is frozen."""
  with jax.enable_x64(True):
    g, config, model, batch = golden_model(file, freeze_embedding=True, **WIDE)
    optimizer = make_optimizer(
      OptimizerConfig(
        learning_rate=1e-3, schedule="constant", warmup_steps=0, weight_decay=0.01,
        decayed="everything", beta2=0.999, clip_norm=0.0,
      ),
      5,
    )  # fmt: skip
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    names = ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(params)]
    flat = lambda s: dict(zip(names, jax.tree.leaves(s), strict=True))  # noqa: E731

    @jax.jit
    def step(params, state):
      def loss(params):
        sums = nnx.merge(graph, params, rest).loss(**batch)
        return sums.loss / sums.weight

      value, gradient = jax.value_and_grad(loss)(params)
      updates, state = optimizer.update(flat(gradient), state, flat(params))
      after = optax.apply_updates(flat(params), updates)
      return jax.tree.unflatten(jax.tree.structure(params), list(after.values())), state, value

    state, losses = optimizer.init(flat(params)), []
    for _ in range(5):
      params, state, value = step(params, state)
      losses.append(value)
    near(losses, g["train/loss"], 1e-6)
    model = nnx.merge(graph, params, rest)
    near(compiled(model)(batch["tokens"]), g["train/logits_after"], 5e-6)
    tensors = transicd_weights.export_weights(model, config)
    after = {k.removeprefix("train/param_after/"): v for k, v in g.items() if "param_after" in k}
    # What a softmax ignores has a gradient of rounding noise, of which Adam makes large steps.
    noise = [n for n in after if n == "attn.l2.bias" or n.endswith("in_proj_bias")]
    assert len(after) - len(noise) >= 6
    for name in set(after) - set(noise):
      near(tensors[name], after[name], 5e-5)


def test_order_matters_by_place_only():
  """With positions by row, or none, a document is a bag of words; by row, its neighbours count."""
  for positions in MODES.values():
    _, _, model, batch = golden_model("b", positions=positions)
    tokens = np.asarray(batch["tokens"])
    shuffled = tokens.copy()
    for row in shuffled:
      n = (row != 0).sum()
      row[:n] = np.random.default_rng(0).permutation(row[:n])
    predict = compiled(model)
    logits, other = predict(batch["tokens"]), predict(jnp.asarray(shuffled))
    moved = np.abs(logits - other).max()
    assert (moved > 0.1) == (positions == "sequence"), (positions, moved)
    rolled = np.roll(predict(jnp.asarray(np.roll(tokens, 1, axis=0))), -1, axis=0)
    moved = np.abs(logits - rolled).max()
    assert (moved > 0.1) == (positions == "batch_row"), (positions, moved)


def test_padding_changes_nothing():
  _, _, model, batch = golden_model("b", positions="sequence")
  tokens = batch["tokens"]
  predict, empty = compiled(model), tokens.at[1].set(0)
  near(predict(jnp.pad(tokens, ((0, 0), (0, 9)))), predict(tokens), 2e-6)
  near(predict(empty)[1], model.head_bias[...], 0)
  loss, gradient = value_and_gradients(model, batch | dict(tokens=empty))
  leaves = jax.tree.leaves(nnx.state(gradient, nnx.Param))
  assert np.isfinite(loss) and all(np.isfinite(x).all() for x in leaves)  # noqa: PT018
  assert not np.any(gradient.embedding[0])


def test_layout_goes_out_and_in_again(tmp_path):
  g, config, model, _ = golden_model("a")
  file = tmp_path / "model.safetensors"
  tensors = transicd_weights.export_weights(model, config, file)
  expected = tensors_of(g)
  assert set(tensors) == set(expected)
  for name, value in expected.items():
    near(tensors[name], value, 1e-6 if name == "pos_encoder.pe" else 0)
  found = published.find_config(file)
  assert (found.labels, found.vocab_size, found.positions) == (7, 61, "batch_row")
  again = published.import_weights(file, dataclasses.replace(found, heads=4))
  near(compiled(again)(jnp.asarray(g["in/tokens"])), g["out/logits"], 1e-5)


def test_what_an_import_refuses():
  g, config, _, _ = golden_model("a")
  tensors = tensors_of(g)
  del tensors["attn.l1.bias"]
  tensors["fcs.9.weight"] = tensors["fcs.0.weight"]
  tensors["fcs.1.weight"] = tensors["fcs.1.weight"][:, :3]
  with pytest.raises(ValueError, match=r"missing: attn.l1.bias; surplus: fcs.9.weight; misshapen"):
    transicd_weights.import_weights(tensors, config)
  with pytest.raises(ValueError, match="tensors must be those of TransICD; got none called"):
    transicd_weights.import_weights({"x": np.zeros(3)})
  gru = dataclasses.replace(config, encoder="gru", pool="last")
  with pytest.raises(ValueError, match="encoder must be 'transformer' for the published layout"):
    transicd_weights.import_weights(tensors, gru)


@pytest.mark.parametrize("name", [n for n in PRESETS if n.endswith("small")])
def test_presets_train(name):
  """Shapes, the count of weights, and a gradient for every one of them (but the useless bias)."""
  config = zoo.get_config(name, vocab_size=40, labels=6, features=16, max_length=30)
  model = zoo.build(config, nnx.Rngs(0))
  assert isinstance(model, LabelClassifier)
  sizes = [x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))]
  assert sum(sizes) == models.parameter_count(config)
  rng = np.random.default_rng(0)
  tokens = jnp.asarray(rng.integers(1, 40, (3, 12)) * (np.arange(12) < [[12], [7], [0]]))
  batch = dict(tokens=tokens, targets=jnp.asarray(rng.random((3, 6)) < 0.3, jnp.float32))
  model.margins.set_value(label_margins(np.array([0, 1, 5, 10, 100, 1000])))
  assert model.margins[0] == 1
  loss, gradient = value_and_gradients(model, batch | dict(weights=jnp.ones((3, 1))))
  assert np.isfinite(loss)
  for path, value in nnx.to_flat_state(nnx.state(gradient, nnx.Param)):
    useless = path[-1] == "label_bias"
    assert np.any(value.get_value()) != useless, path
  predict = compiled(model)
  near(predict(jnp.pad(tokens, ((0, 0), (0, 5)))), predict(tokens), 2e-6)


def test_dropout_is_drawn_by_its_key():
  model = zoo.build(SMALL, nnx.Rngs(0))
  tokens = jnp.ones((2, 9), jnp.int32)
  predict = jax.jit(lambda key: model(tokens, dropout_key=key))
  one, two, again = (predict(jax.random.key(n)) for n in (0, 1, 0))
  assert np.abs(one - two).max() > 1e-3
  near(one, again, 0)


def test_layers_start_alike_unless_told_otherwise():
  for independent in (False, True):
    model = zoo.build(dataclasses.replace(SMALL, independent_layers=independent), nnx.Rngs(0))
    first, second = (block.feed_forward.fc1.kernel[...] for block in model.encoder)
    assert bool(np.any(first != second)) == independent
  kernel = model.encoder[0].mixer.heads_in.kernel[...]
  bound = (6 / (4 * 16)) ** 0.5
  assert 0.95 * bound < np.abs(kernel).max() <= bound


def test_published_sizes():
  """48 parameters beyond what the paper's code counts would be a wrong layer."""
  assert models.parameter_count(PRESETS["transicd-50"]) == 448_868
  frozen = nnx.eval_shape(lambda: zoo.build(PRESETS["transicd-50"], nnx.Rngs(0)))
  sizes = [np.prod(x.shape) for x in jax.tree.leaves(nnx.state(frozen, nnx.Param))]
  assert sum(sizes) == 448_868
  assert frozen.embedding.shape == (123_918, 128)


def test_mesh():
  """Batch, heads and labels over 8 devices; 6 labels on 4 devices are padded."""
  config = dataclasses.replace(SMALL, heads=4, **WIDE)
  tokens = jnp.asarray(np.random.default_rng(0).integers(1, 40, (4, 12)))
  targets = jnp.asarray(np.random.default_rng(1).random((4, 6)) < 0.3, jnp.float32)
  batch = dict(tokens=tokens, targets=targets, weights=jnp.ones((4, 1)))
  assert MESH_AXES == ("data", "seq", "model")
  with jax.enable_x64(True):
    model = zoo.build(config, nnx.Rngs(0))
    expected = value_and_gradients(model, batch)
    with jax.set_mesh(mesh_of(2, 1, 4)):
      got = value_and_gradients(model, batch)
    near(got[0], expected[0], 1e-7)
    leaves = [jax.tree.leaves(nnx.state(x, nnx.Param)) for _, x in (got, expected)]
    for one, other in zip(*leaves, strict=True):
      near(one, other, 1e-9)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(pool="max"), "pool must be one of"),
    (dict(encoder="gru", pool="mean_of_all"), "pool must be one of .* with 'gru'"),
    (dict(encoder="lstm"), "encoder must be one of"),
    (dict(positions="rotary"), "positions must be one of"),
    (dict(heads=3), "features must be even and a multiple of heads"),
    (dict(dropout=1.0), "dropout must lie in"),
    (dict(margin=-1.0), "margin must be at least 0"),
    (dict(hidden=0), "hidden must be at least 1"),
  ],
)
def test_what_a_configuration_refuses(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(SMALL, **change)


def test_too_long_a_document():
  model = zoo.build(SMALL, nnx.Rngs(0))
  with pytest.raises(ValueError, match=r"at most max_length \(30\) length .* got 31"):
    model(jnp.ones((1, 31), jnp.int32))
  with pytest.raises(ValueError, match="pool must be 'labels' for weights; got 'mean'"):
    zoo.build(dataclasses.replace(SMALL, pool="mean"), nnx.Rngs(0)).weights(
      jnp.ones((1, 3), jnp.int32), jnp.array([0])
    )
