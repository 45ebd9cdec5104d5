"""Training a Routing Transformer: what follows the data, honest figures, pictures, the page."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnzoo import zoo
from attnzoo.experiments import clusters_page
from attnzoo.experiments.configs import routing_digits, routing_published, routing_small
from attnzoo.experiments.data import DataConfig
from attnzoo.experiments.training import config, honesty, loop, runs, state, summary
from attnzoo.zoo.routing import PRESETS, RoutingConfig
from attnzoo_testing.mixers import close, mesh_of

MODEL = RoutingConfig(
  17, 16, 2, heads=2, routed_heads=1, hidden=16, block_size=4, clusters=3, window_size=4,
  membership="official", positions="shaw", max_distance=3,
)  # fmt: skip


def experiment(model=MODEL, **train):
  return config.Experiment(
    model=model,
    data=DataConfig(source="digits", sequence_length=0, batch_size=8),
    optimizer=config.OptimizerConfig(learning_rate=1e-2, warmup_steps=0),
    train=config.TrainConfig(**dict(dict(steps=2, eval_tokens=64, sample_tokens=8), **train)),
  )


def two_steps(setup, sizes=(1, 1, 1)):
  """Parameters and metrics after each of two steps on random tokens, over a mesh."""
  parts, _ = state.abstract_state(setup)
  parts = parts._replace(constants=state.constants(setup))
  mesh, after = mesh_of(*sizes), []
  with jax.set_mesh(mesh):
    _, current, _ = state.initial_state(setup, mesh)
    step = jax.jit(state.make_train_step(setup, parts))
    for number in range(2):
      tokens = jax.random.randint(jax.random.key(number), (8, 16), 1, 17)
      batch = dict(tokens=tokens, targets=tokens, weights=jnp.ones(tokens.shape))
      batch = {n: jax.device_put(x, state.batch_sharding(mesh)) for n, x in batch.items()}
      current, metrics = step(current, batch)
      after.append(jax.device_get((current.params, metrics)))
  return after


@pytest.mark.slow
def test_centroids_follow_the_whole_batch_however_it_is_cut():
  """Four devices, gradient accumulation and recomputation of layers change nothing."""
  (first, _), (expected, metrics) = two_steps(experiment())
  means = "groups.0.0.mixer.centroids.means"
  assert 0 < metrics.extra["clusters_in_use"] <= 1
  assert metrics.extra["auxiliary_loss"] > 0
  assert np.abs(first[means] - expected[means]).max() > 0
  cut = experiment(dataclasses.replace(MODEL, remat="full"), grad_accumulation=2)
  _, (params, other) = two_steps(cut, (4, 1, 1))
  assert set(params) == set(expected)
  close(other.loss, metrics.loss, 1e-5)
  for name in (means, "groups.0.0.mixer.centroids.ema_count"):
    close(params[name], expected[name], 2e-4)


def test_the_optimizer_does_not_know_the_centroids():
  setup = experiment()
  parts, abstract = state.abstract_state(setup)
  names = state.trained(parts, abstract.params)
  tracked = set(abstract.params) - set(names)
  assert {n.rpartition(".")[2] for n in tracked} == {"means", "ema_means", "ema_count"}
  paths = jax.tree_util.tree_leaves_with_path(abstract.opt_state)
  assert not [path for path, _ in paths if "centroids" in jax.tree_util.keystr(path)]


@pytest.mark.slow
def test_a_run_on_pictures_has_both_figures_and_samples(tmp_path, capsys):
  outcome = loop.train(experiment(), tmp_path)
  summary.finish(outcome)
  said = capsys.readouterr()
  assert f"{honesty.LEAKY}  loss" in said.err
  assert f"this model, {honesty.HONEST}, validation  loss" in said.out
  record = json.loads((tmp_path / summary.RESULT_FILE).read_text())
  assert record[honesty.HONEST]["loss"] != record[honesty.LEAKY]["loss"]
  assert (tmp_path / summary.SAMPLES_FILE).read_bytes().startswith(b"\x89PNG")
  # The centroids are in the checkpoint, and a run that goes on has them.
  loaded = runs.load(tmp_path)
  for name, value in outcome.state.params.items():
    np.testing.assert_array_equal(loaded.params[name], value)
  honest = runs.load(tmp_path, model_fields=dict(membership="topk_prefix"))
  assert not honesty.leaks(honest.experiment.model)


@pytest.mark.slow
def test_the_port_starts_from_the_centroids_of_its_first_batch(tmp_path):
  """Not from noise; the first step still has that batch."""
  port = zoo.get_config(
    "routing-port-tiny", features=16, num_layers=1, heads=2, local_heads=(1,), head_dim=8,
    window_size=16, max_length=64, block_size=8,
  )  # fmt: skip
  text = tmp_path / "text.txt"
  text.write_text("".join(f"{number} times {number} is {number**2}. " for number in range(999)))
  data = DataConfig(path=str(text), sequence_length=64, batch_size=8)
  setup = dataclasses.replace(experiment(port, steps=1), data=data)
  outcome = loop.train(setup, tmp_path / "run")
  assert json.loads(outcome.run.batches.get_state())["position"] == 1
  _, noise, _ = state.initial_state(setup, mesh_of(1, 1, 1))
  means = [name for name in noise.params if name.endswith("centroids.means")]
  assert means

  def of_length_one(params, name):
    return np.mean(np.abs(np.linalg.norm(params[name], axis=-1) - 1) < 1e-2)

  for name in means:
    assert of_length_one(noise.params, name) < 0.2
    assert of_length_one(outcome.state.params, name) > 0.8


@pytest.mark.slow
def test_random_tokens_cannot_be_predicted_without_a_leak():
  """300 steps on fresh fair coins: at least ln 2, but for three standard errors of the mean."""
  model = dataclasses.replace(
    PRESETS["routing-tiny"], vocab_size=2, features=32, hidden=32, num_layers=2, block_size=4,
    clusters=4, window_size=4, positions="none",
  )  # fmt: skip
  setup = experiment(model, steps=300)
  parts, _ = state.abstract_state(setup)
  parts = parts._replace(constants=state.constants(setup))
  mesh = mesh_of(1, 1, 1)
  with jax.set_mesh(mesh):
    _, current, _ = state.initial_state(setup, mesh)

    def step(current, key):
      tokens = jax.random.bernoulli(key, 0.5, (32, 17)).astype(jnp.int32)
      batch = dict(tokens=tokens[:, :-1], targets=tokens[:, 1:], weights=jnp.ones((32, 16)))
      current, metrics = state.make_train_step(setup, parts)(current, batch)
      return current, metrics.loss

    keys = jax.random.split(jax.random.key(5), 300)
    _, losses = jax.jit(lambda current: jax.lax.scan(step, current, keys))(current)
  last = np.asarray(losses)[-100:]
  assert np.mean(last) > np.log(2) - 3 * np.std(last) / 10
  assert np.mean(last) < 0.72  # and it has learned that much


@pytest.mark.parametrize("keys", ["queries", "own", "previous"])
def test_clusters_by_head(keys):
  """Every token is in one cluster by its query; by its key, too, where that is another vector."""
  small = dataclasses.replace(
    PRESETS["routing-tiny"], vocab_size=17, features=16, hidden=16, num_layers=2, routed_keys=keys
  )
  found = clusters_page.clusters_by_head(zoo.build(small, nnx.Rngs(0)), np.arange(12))
  kinds = [""] if keys == "queries" else [", queries", ", keys"]
  assert list(found) == [f"layer 2, head 1{kind}" for kind in kinds]
  for clusters in found.values():
    assert clusters.shape == (12, small.clusters)
    np.testing.assert_array_equal(clusters.sum(1), 1)
  if keys == "own":
    assert np.any(found["layer 2, head 1, queries"] != found["layer 2, head 1, keys"])
  if keys == "previous":
    queries, later = (found[f"layer 2, head 1, {kind}"] for kind in ("queries", "keys"))
    np.testing.assert_array_equal(later[1:], queries[:-1])


def test_page_of_clusters():
  clusters = {"layer 1, head 1": np.asarray([[1, 0], [0, 1], [1, 1]], bool)}
  text = clusters_page.page(["a<b", "\n", "</script>"], clusters)
  assert "a&lt;b" in text
  assert '{"layer 1, head 1": [[0], [1], [0, 1]]}' in text
  assert text.count("</script>") == 1


@pytest.mark.parametrize("record", [routing_small, routing_digits])
def test_small_recipes(record):
  setup = config.from_config_dict(record.get_config())
  assert not honesty.leaks(setup.model)
  local = config.from_config_dict(record.get_config(f"{setup_name(setup)}-local"))
  assert local.model.routed_heads == 0
  assert dataclasses.replace(local, model=setup.model) == setup


def setup_name(setup):
  return "routing-digits" if setup.model.is_image else "routing-tiny"


@pytest.mark.parametrize("name", [n for n in PRESETS if "tiny" not in n and "digits" not in n])
def test_published_recipes(name):
  setup = config.from_config_dict(routing_published.get_config(name))
  assert honesty.leaks(setup.model)
  honest = honesty.honest(setup)
  assert honest.model.membership == "topk_prefix"
  assert honest.model.attention_dropout == 0
