"""The PyTorch port of the Routing Transformer: its models, its layout, its first centroids."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnzoo.zoo import published, routing_port, routing_port_weights, routing_weights
from attnzoo.zoo.routing import RoutingConfig
from attnzoo.zoo.routing_port import RoutingPortConfig
from attnzoo.zoo.routing_port_weights import config_of, export_weights, import_weights
from attnzoo_testing.goldens import golden, golden_config
from attnzoo_testing.mixers import close

WIDE = dict(dtype="float64", param_dtype="float64")
SMALL = RoutingPortConfig(
  11, 12, 3, heads=3, local_heads=(2, 3, 0), window_size=4, max_length=16, head_dim=4
)
OFFICIAL = dataclasses.replace(SMALL, membership="official")


def part(g, prefix):
  return {name.removeprefix(prefix): x for name, x in g.items() if name.startswith(prefix)}


@pytest.mark.parametrize("name", ["lm", "lm_plain_tied"])
def test_model_of_the_port(name):
  """Logits, losses, all gradients, and the centroids after a step. Their angles are float32."""
  with jax.enable_x64(True):
    g, c = golden(f"routing_lucid_{name}"), golden_config(f"routing_lucid_{name}")
    tensors = part(g, "param/")
    found = config_of(tensors)
    config = RoutingPortConfig(
      c["V"], c["dim"], c["depth"], c["heads"], local_heads=c["local"], window_size=c["w"],
      max_length=c["max_seq"], head_dim=c["dh"], block_size=c["lw"], membership="official",
      embedding_features=c.get("emb_dim"), feed_forward="geglu" if c["glu"] else "gelu",
      tied_head=c.get("tie", False), **WIDE,
    )  # fmt: skip
    assert dataclasses.replace(found, block_size=c["lw"], **WIDE) == config
    model = import_weights(tensors, config)
    tokens, targets = g["in/tokens"][:, :-1], g["in/tokens"][:, 1:]
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params):
      model = nnx.merge(graph, params, rest)
      x, _, notes = model._hidden(tokens, None, None, None, None, None, notes=True)
      logits = model.logits(x)
      entropies = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
      entropy = jnp.mean(entropies, where=targets != 0)
      aux = sum(jnp.sum(note.loss) for group in notes for note in group if note is not None)
      sums = tuple(tuple(None if n is None else n.sums for n in group) for group in notes)
      return entropy + aux, (logits, entropy, aux, sums)

    gradient, (logits, entropy, aux, sums) = jax.jit(jax.grad(loss, has_aux=True))(params)
    close(logits, g["out/logits"], 1e-6)
    close(entropy, g["out/xent"], 1e-6)
    close(aux, g["out/aux_loss"][0], 1e-6)
    got = export_weights(nnx.merge(graph, gradient, rest), config)
    expected = part(g, "grad/")
    learned = {
      name for name, x in tensors.items() if x.dtype == np.float64 and "kmeans" not in name
    }
    assert learned - {"out.tensor"} == set(expected)
    for tensor, value in expected.items():
      np.testing.assert_allclose(got[tensor], value, atol=2e-6 * max(np.abs(value).max(), 1e-2))
    model.absorb(sums)
    after = export_weights(model, config)
    for tensor, value in part(g, "out/after_backward/").items():
      close(after[tensor], value, 1e-8)


CONFIGS = {
  "plain": OFFICIAL,
  "much": dataclasses.replace(
    OFFICIAL, embedding_features=6, feed_forward="geglu", shared=False, memory_slots=1
  ),
  "rezero": dataclasses.replace(OFFICIAL, norm="rezero", tied_head=True, local_heads=(1, 1, 1)),
  "scale": dataclasses.replace(
    OFFICIAL, norm="scale", tied_head=True, embedding_features=6, feed_forward="geglu"
  ),
}


def random_tensors(layout, config):
  rng = np.random.default_rng(0)
  slots = {slot.name: slot.shape for slot in layout._slots(config)}
  return {name: rng.standard_normal(shape, np.float32) for name, shape in slots.items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_layout_and_back_are_the_same_bits(name, tmp_path):
  """What is fixed is written, too: the shapes say the configuration."""
  config = CONFIGS[name]
  tensors = random_tensors(routing_port_weights, config)
  path = tmp_path / "model.safetensors"
  written = export_weights(import_weights(tensors, config), config, path)
  for tensor, value in tensors.items():
    np.testing.assert_array_equal(written[tensor], value, err_msg=tensor)
  assert published.find_config(path) == config_of(written) == config
  again = export_weights(published.import_weights(path, config), config)
  assert set(again) == set(written)
  for tensor, value in written.items():
    np.testing.assert_array_equal(again[tensor], value, err_msg=tensor)


def test_names_and_fixed_tables():
  config = CONFIGS["much"]
  written = export_weights(
    import_weights(random_tensors(routing_port_weights, config), config), config
  )
  layers = "routing_transformer.fn.layers.layers"
  shapes = {
    "sinu_pos_emb.emb": (16, 4),
    "routing_transformer.project_out.weight": (6, 12),
    f"{layers}.0.0.fn.local_to_qkv.weight": (24, 12),
    f"{layers}.0.0.fn.to_k.weight": (4, 12),
    f"{layers}.1.0.fn.to_k.weight": (0, 12),
    f"{layers}.2.0.fn.global_attn.mem_key": (3, 4, 1, 4),
    f"{layers}.2.0.fn.global_attn.kmeans.initted": (),
    f"{layers}.0.0.fn.local_attn.rel_pos.inv_freq": (2,),
    f"{layers}.2.1.fn.fn.w1.weight": (96, 12),
    "out.bias": (11,),
  }
  assert {name: written[name].shape for name in shapes} == shapes
  np.testing.assert_allclose(
    written["sinu_pos_emb.emb"][3], [*np.sin([3, 0.03]), *np.cos([3, 0.03])]
  )
  plain = random_tensors(routing_port_weights, OFFICIAL)
  assert not any("project_in" in name or ".fn.layers" in name for name in plain)
  wrapped = {f"module.net.net.{name}": value for name, value in plain.items()}
  model = import_weights(wrapped, OFFICIAL, membership="topk_prefix")
  np.testing.assert_array_equal(model.head[...], plain["out.weight"])


def test_size_of_the_example():
  """As the port's model has it."""
  config = routing_port.PRESETS["routing-port-enwik8"]
  assert routing_port.parameter_count(config) == 18_779_136


def test_other_models_of_the_port_are_refused():
  tensors = random_tensors(routing_port_weights, OFFICIAL)
  layers = "routing_transformer.layers"
  extra = np.zeros(2, np.float32)
  for name, what in (
    (f"{layers}.blocks.0.f.net.norm.weight", "reversible layers"),
    (f"{layers}.layers.0.0.fn.fn.to_q.weight", "token shift"),
    (f"{layers}.layers.0.1.fn.fn.fn.w1.weight", "token shift"),
    (f"{layers}.layers.0.1.fn.keys", "product-key memories or experts"),
  ):
    with pytest.raises(ValueError, match=f"must be built without {what}; got {name}"):
      import_weights(tensors | {name: extra}, OFFICIAL)
    with pytest.raises(ValueError, match=f"must be built without {what}"):
      config_of(tensors | {name: extra})
  with pytest.raises(ValueError, match="config must be given for tensors without sinu_pos_emb.emb"):
    import_weights(tensors)
  flag = f"{layers}.layers.0.0.fn.global_attn.kmeans.initted"
  with pytest.raises(ValueError, match=f"centroids must have seen data; got {flag} = False"):
    import_weights(tensors | {flag: np.asarray(False)}, OFFICIAL)
  with pytest.raises(ValueError, match="surplus: out.extra"):
    import_weights(tensors | {"out.extra": extra}, OFFICIAL)


def test_published_families(tmp_path):
  """The released model has no configuration beside it, only names of presets."""
  config = RoutingConfig(
    11, 8, 1, heads=2, routed_heads=1, hidden=8, block_size=4, clusters=2, window_size=4,
    membership="official",
  )  # fmt: skip
  tensors = random_tensors(routing_weights, config)
  np.savez(tmp_path / "weights.npz", **tensors)
  model = published.import_weights(tmp_path / "weights.npz", config)
  means = model.layers()[0].mixer.centroids.means[...]
  (name,) = (name for name in tensors if name.endswith("/means"))
  np.testing.assert_array_equal(means, tensors[name])
  assert published.find_config(tmp_path, "routing-pg19").skip_first == 20
  assert published.find_config(tmp_path, "routing-port-enwik8").clusters == 32
  with pytest.raises(FileNotFoundError, match="config.json must exist"):
    published.find_config(tmp_path / "weights.npz")


def test_first_centroids():
  """They are directions of queries, nearer to these than the noise before."""
  config = dataclasses.replace(OFFICIAL, local_heads=(0, 0, 0))
  model = import_weights(random_tensors(routing_port_weights, config), config)
  tokens = jax.random.randint(jax.random.key(0), (2, 16), 1, 11)
  graph, variables = nnx.split(model)
  distance = jax.jit(lambda v: nnx.merge(graph, v).loss_and_notes(tokens, tokens)[1].loss)
  before = distance(variables)
  routing_port.start_centroids(model, tokens, jax.random.key(1))
  means = model.groups[0][0].mixer.centroids.means[...]
  # But for those that nothing is near to: they are queries as they were.
  assert np.mean(np.abs(np.linalg.norm(means, axis=-1) - 1) < 1e-6) > 0.9
  assert distance(nnx.state(model)) < before / 3


def test_bad_configurations_are_refused():
  for change, message in (
    (dict(local_heads=(2, 3)), "local_heads must have 3 numbers; got .2, 3."),
    (dict(local_heads=(2, 3, 4)), "local_heads must lie between 0 and heads .3.; got 4"),
    (dict(max_length=18), "max_length must be a multiple of window_size .4.; got 18"),
    (dict(norm="rms"), "norm must be one of"),
    (dict(feed_forward="relu"), "feed_forward must be one of"),
    (dict(memory_slots=1), "memory_slots must be 0 with membership 'causal_recent'"),
    (dict(hidden_dropout=1.0), "hidden_dropout must lie in"),
  ):
    with pytest.raises(ValueError, match=message):
      dataclasses.replace(SMALL, **change)
