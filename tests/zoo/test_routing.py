"""The Routing Transformer: against the released code's models, its sizes, and honesty."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnzoo import zoo
from attnzoo.experiments.generation import Sampling, generate
from attnzoo.layers import ImageEmbedding
from attnzoo.zoo import routing, routing_weights
from attnzoo.zoo.routing import PRESETS, RoutingConfig
from attnzoo_testing.goldens import golden, golden_config
from attnzoo_testing.marks import slow_but
from attnzoo_testing.mixers import close

MODELS = ("lm_geglu", "lm_geglu_ties", "lm_relu_pg19like")
OFFICIAL = dict(membership="official", routing_scale=1.0, positions="shaw", initial_count=0.0)
WIDE = dict(dtype="float64", param_dtype="float64")
SMALL = RoutingConfig(
  32, 24, 2, heads=4, routed_heads=2, hidden=32, block_size=4, clusters=3, window_size=4
)


def golden_model(name):
  """(golden arrays, configuration, model, tokens in and out)."""
  g, c = golden(f"routing_official_{name}"), golden_config(f"routing_official_{name}")
  config = RoutingConfig(
    vocab_size=c["V"], features=c["D"], num_layers=c["layers"], heads=c["n_local"] + c["n_route"],
    routed_heads=c["n_route"], hidden=c["F"], block_size=c["block"], look_back=c["flange"],
    clusters=c["k"], window_size=c["w"], skip_first=c["skip_first"], max_distance=c["maxrel"],
    embedding_features=None if c["E"] == c["D"] else c["E"], feed_forward=c["ffn"],
    **OFFICIAL, **WIDE,
  )  # fmt: skip
  model = routing_weights.import_weights(published(g, "param/"), config)
  targets = jnp.asarray(g["in/tokens"])
  return g, config, model, jnp.pad(targets[:, :-1], ((0, 0), (1, 0))), targets


def published(g, prefix):
  return {k.removeprefix(prefix): v for k, v in g.items() if k.startswith(prefix)}


@pytest.mark.parametrize("name", slow_but(MODELS, "lm_geglu_ties"))
def test_released_model(name):
  """Logits, loss, gradients, and the centroids after a step by both ways of counting.

  `lm_geglu_ties` has tokens whose scores are equal. Losses are added up in float32.
  """
  with jax.enable_x64(True):
    g, config, model, tokens, targets = golden_model(name)
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params):
      model = nnx.merge(graph, params, rest)
      sums, notes = model.loss_and_notes(tokens, targets, (targets != 0).astype(jnp.float64))
      entropy = sums.loss / sums.weight
      return entropy + notes.loss, (entropy, notes, model(tokens)[0])

    gradient, (entropy, notes, logits) = jax.jit(jax.grad(loss, has_aux=True))(params)
    close(logits, g["out/logits"], 1e-12)
    close(entropy, g["out/xent"], 1e-6)
    close(notes.loss, g["out/aux_loss"], 1e-9)
    got = routing_weights.export_weights(nnx.merge(graph, gradient, rest), config)
    expected = published(g, "grad/")
    assert {n for n in got if "ema_" not in n and not n.endswith("means")} == set(expected)
    for tensor, value in expected.items():
      np.testing.assert_allclose(got[tensor], value, atol=1e-6 * max(np.abs(value).max(), 1e-2))
    # One way of counting a model: each is a program of its own.
    for counts in ("official",) if name == "lm_geglu" else ("per_head",):
      centroids = published(g, f"out/after_step_{counts}/")
      counted = dataclasses.replace(config, counts=counts)
      other = routing_weights.import_weights(published(g, "param/"), counted)
      _, notes = jax.jit(lambda m=other: m.loss_and_notes(tokens, targets))()
      other.absorb(notes.sums)
      after = routing_weights.export_weights(other, counted)
      assert centroids
      for tensor, value in centroids.items():
        close(after[tensor], value, 1e-12)


def test_layout_and_back_are_the_same_bits(tmp_path):
  for config in (
    dataclasses.replace(SMALL, embedding_features=8, **OFFICIAL),
    dataclasses.replace(SMALL, feed_forward="relu", skip_first=1),
  ):
    model = routing.build(config, nnx.Rngs(0))
    path = tmp_path / "weights.safetensors"
    tensors = routing_weights.export_weights(model, config, path)
    again = routing_weights.export_weights(routing_weights.import_weights(path, config), config)
    assert set(again) == set(tensors)
    for name, value in tensors.items():
      np.testing.assert_array_equal(again[name], value)
    # What TensorFlow's reader gives, stored: other prefixes, the optimiser's variables.
    bare = {n.removeprefix(routing_weights.PREFIX): t for n, t in tensors.items()}
    bare["training/Adafactor/x_vr"] = np.zeros(3)
    bare["global_step"] = np.zeros(())
    np.savez(tmp_path / "weights.npz", **bare)
    third = routing_weights.import_weights(tmp_path / "weights.npz", config)
    np.testing.assert_array_equal(third.head[...], model.head[...])


def test_bad_sources_are_refused(tmp_path):
  (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 no zip")
  with pytest.raises(ValueError, match=r"bad.npz must be a .npz file of arrays"):
    routing_weights.import_weights(tmp_path / "bad.npz", SMALL)
  with pytest.raises(FileNotFoundError):
    routing_weights.import_weights(tmp_path / "none.npz", SMALL)
  with pytest.raises(ValueError, match="missing: sparse_transformer/body/decoder_layer_0"):
    routing_weights.import_weights({}, SMALL)
  with pytest.raises(ValueError, match="config must be that of a text model"):
    routing_weights.import_weights({}, "routing-cifar10")


# In millions, as graphs of the released code have them, centroids counted as weights.
COUNTS = {
  "routing-wikitext103-4k": 332.6,
  "routing-wikitext103-1k": 415.9,
  "routing-enwik8-8k": 171.8,
  "routing-enwik8-12k": 168.9,
  "routing-pg19-code": 583.3,
  "routing-pg19": 490.7,
  "routing-pg19-local-8k": 617.5,
  "routing-imagenet64": 203.1,
  "routing-cifar10": 102.2,
}


@pytest.mark.parametrize("name", COUNTS)
def test_published_sizes(name):
  c = PRESETS[name]
  routed = (c.num_layers - c.skip_first) * c.routed_heads
  centroids = routed * c.clusters * c.features // c.heads
  assert round((routing.parameter_count(c) + centroids) / 1e6, 1) == COUNTS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_count(name):
  config = PRESETS[name]
  model = nnx.eval_shape(lambda: routing.build(config, nnx.Rngs(0)))
  params = jax.tree.leaves(nnx.state(model, nnx.Param))
  assert sum(x.size for x in params) == routing.parameter_count(config)


@pytest.mark.parametrize(
  ("membership", "leaks"), [("causal_recent", False), ("topk_prefix", False), ("official", True)]
)
def test_who_sees_the_future(membership, leaks):
  """Logits before a token that changes are the same bits, but in the published mode."""
  config = dataclasses.replace(SMALL, membership=membership)
  model = routing.build(config, nnx.Rngs(0))
  tokens = jax.random.randint(jax.random.key(0), (4, 32), 1, 32)
  changed = tokens.at[:, 20:].set(jax.random.randint(jax.random.key(1), (4, 12), 1, 32))
  call = jax.jit(lambda tokens: model(tokens)[0][:, :20])
  assert np.array_equal(call(tokens), call(changed)) != leaks


def test_generation_is_what_the_honest_model_says():
  """Greedy tokens from prompts of unequal length are those of whole passes without the future."""
  for membership in ("causal_recent", "official"):
    config = dataclasses.replace(SMALL, membership=membership)
    model = routing.build(config, nnx.Rngs(0))
    honest = "topk_prefix" if membership == "official" else membership
    whole = routing.build(dataclasses.replace(config, membership=honest), nnx.Rngs(0))
    logits = jax.jit(lambda tokens, m=whole: m(tokens)[0])
    prompts = [[3, 1, 4, 1, 5, 9, 2], [6, 5]]
    drawn = np.stack(
      list(generate(model, prompts, max_new_tokens=8, sampling=Sampling(temperature=0))), 1
    )
    for prompt, tokens in zip(prompts, drawn, strict=True):
      row = jnp.asarray([*prompt, *tokens, *[0] * (16 - len(prompt) - 8)])[None]
      said = np.argmax(logits(row)[0], -1)[len(prompt) - 1 : len(prompt) + 7]
      np.testing.assert_array_equal(tokens, said)


def test_image_embedding():
  """Tables for each channel's values, for rows and for columns; the golden has float64."""
  g = golden("routing_official_image_embed")
  image = g["in/image"]
  batch, height, width, channels = image.shape
  with jax.enable_x64(True):
    sizes = dict(height=height, width=width, channels=channels)
    embedder = ImageEmbedding(256, 8, param_dtype=jnp.float64, rngs=nnx.Rngs(0), **sizes)
    for ours, theirs in (("rows", "pos_emb_0"), ("columns", "pos_emb_1")):
      getattr(embedder, ours)[...] = jnp.asarray(g[f"param/{theirs}"].reshape(-1, channels, 8))
    embedder.table[...] = jnp.asarray(g["param/rgb_target_emb_channel"], jnp.float64)
    tokens = np.pad(image.reshape(batch, -1)[:, :-1], ((0, 0), (1, 0)))
    close(embedder(tokens, np.arange(tokens.shape[1])[None]), g["out/o"], 1e-12)
    assert np.all(np.isnan(embedder(tokens[:, :1], np.asarray([[tokens.shape[1]]]))))


def test_dropout_is_for_training():
  plain = dataclasses.replace(SMALL, membership="official")
  config = dataclasses.replace(plain, **dict.fromkeys(routing.DROPOUTS, 0.2))
  model = routing.build(config, nnx.Rngs(0))
  plain = routing.build(plain, nnx.Rngs(0))
  tokens = jnp.arange(32)[None] % 7
  loss = jax.jit(lambda key, m=model: m.loss(tokens, tokens, dropout_key=key).loss)
  assert loss(None) == jax.jit(lambda: plain.loss(tokens, tokens).loss)()
  one, same, other = (loss(jax.random.key(n)) for n in (0, 0, 1))
  assert one == same
  assert len({float(one), float(other), float(loss(None))}) == 3


def test_bad_configurations_are_refused():
  for change, message in (
    (dict(routed_heads=5), "routed_heads must lie between 0 and heads"),
    (dict(features=25), "features must be a multiple of heads .4.; got 25"),
    (dict(feed_forward="glu"), "feed_forward must be one of"),
    (dict(skip_first=3), "skip_first must lie between 0 and 2; got 3"),
    (dict(image_width=8), "image_height must be given with image_width"),
    (dict(attention_dropout=0.1), "attention_dropout must be 0 unless membership is 'official'"),
    (dict(dropout=1.0), "dropout must lie in"),
    (dict(positions="shaw"), "positions must not be 'shaw' with membership 'causal_recent'"),
    (dict(membership="leaky"), "membership must be one of"),
  ):
    with pytest.raises(ValueError, match=message):
      dataclasses.replace(SMALL, **change)


def test_names_are_listed():
  assert "routing-tiny" in zoo.list_models()
