"""The lightning mixer and its parts: against the published modules, and step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnzoo.layers import LRPE, LightningMixer, LightningMixerConfig, lrpe, srms_norm
from attnzoo.pallas_kernels.lightning_attention.decay import decay_rates
from attnzoo_testing.goldens import golden
from attnzoo_testing.mixers import close, set_params, value_and_grads


def hub_mixer(g, name_of_lrpe=True):
  """The released token mixer with a golden file's weights."""
  heads = g["in/slope"].size
  features = g["in/x"].shape[-1]
  use_lrpe = "param/lrpe.theta" in g
  config = LightningMixerConfig(
    features=features, heads=heads, head_dim=features // heads, lrpe=use_lrpe
  )
  mixer = LightningMixer(config, g["in/slope"], rngs=nnx.Rngs(0))
  params = dict(
    heads_in__kernel=qkvu(g["param/qkvu_proj.weight"], heads),
    heads_out__kernel=out(g["param/out_proj.weight"], heads),
  )
  if use_lrpe:
    params["lrpe__theta"] = g["param/lrpe.theta"][:, 0]
  set_params(mixer, **params)
  return mixer


def qkvu(weight, heads):
  return weight.reshape(4, heads, -1, weight.shape[1]).transpose(0, 3, 1, 2)


def out(weight, heads):
  return weight.T.reshape(heads, -1, weight.shape[0])


def test_srms_norm_matches_the_published_module():
  g = golden("transnormer_srmsnorm")
  y, vjp = jax.vjp(srms_norm, jnp.asarray(g["in/x"]))
  close(y, g["out/y"])
  close(vjp(jnp.asarray(g["in/dy"]))[0], g["grad/x"])


def test_srms_norm_computes_in_float32():
  x = jnp.full((4, 256), 300.0, jnp.bfloat16)
  np.testing.assert_array_equal(np.asarray(srms_norm(x), np.float32), 1.0)


def test_lrpe_matches_the_published_module():
  g = golden("transnormer_lrpe")
  x, dy = (jnp.asarray(np.moveaxis(g[f"in/{n}"], 1, 2)) for n in ("x", "dy"))
  theta = jnp.asarray(g["param/theta"][:, 0])
  positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
  y, vjp = jax.vjp(lambda x, theta: lrpe(x, theta, positions), x, theta)
  close(y, np.moveaxis(g["out/y"], 1, 2))
  dx, d_theta = vjp(dy)
  close(dx, np.moveaxis(g["grad/x"], 1, 2))
  close(d_theta, g["grad/theta"][:, 0])
  shifted = lrpe(x, theta, positions + int(g["in/offset"][0]))
  close(shifted, np.moveaxis(g["out/y_at_offset"], 1, 2))
  close(LRPE(4, 8).theta[...], g["out/theta_init"][:, 0])


def test_lrpe_phases_stay_exact_in_bfloat16():
  """The scores of far tokens depend on their distance alone, though 2047 is no bfloat16."""
  theta = jnp.asarray([[1.0, 0.3]])
  x = jnp.ones((1, 2, 1, 2), jnp.bfloat16)
  near = lrpe(x, theta, jnp.asarray([[0, 7]])).astype(jnp.float32)
  far = lrpe(x, theta, jnp.asarray([[2040, 2047]])).astype(jnp.float32)
  score = [jnp.sum(y[0, 0] * y[0, 1]) for y in (near, far)]
  assert abs(score[0] - score[1]) < 0.02


@pytest.mark.parametrize("name", ["transnormer_mixer_decay", "transnormer_mixer_lrpe"])
def test_hub_mixer_forward_and_gradients(name):
  g = golden(name)
  mixer = hub_mixer(g)
  heads = g["in/slope"].size
  y, dx, grads = value_and_grads(mixer, jnp.asarray(g["in/x"]), jnp.asarray(g["in/dy"]))
  close(y, g["out/y_f64"])
  close(dx, g["grad/x_f64"])
  close(grads["heads_in__kernel"], qkvu(g["grad/qkvu_proj.weight_f64"], heads))
  close(grads["heads_out__kernel"], out(g["grad/out_proj.weight_f64"], heads))
  if "grad/lrpe.theta_f64" in g:
    close(grads["lrpe__theta"], g["grad/lrpe.theta_f64"][:, 0])


@pytest.mark.parametrize("name", ["transnormer_mixer_decay", "transnormer_mixer_lrpe"])
def test_hub_mixer_prefill_and_decode(name):
  g = golden(name)
  mixer = hub_mixer(g)
  x = jnp.asarray(g["in/x"])
  split = g["out/y_prefill"].shape[1]
  y, state = mixer(x[:, :split])
  close(y, g["out/y_prefill"])
  close(state.memory, g["out/state_prefill"])
  step = jax.jit(mixer.step)
  for t in range(split, x.shape[1]):
    y, state = step(x[:, t], state)
    close(y, g["out/y_decode"][:, t - split], 2e-5)
  close(state.memory, g["out/state_final"], 2e-5)


@pytest.mark.parametrize("name", ["transnormer_mixer_decay", "transnormer_mixer_lrpe"])
def test_left_padding_as_a_document_of_its_own(name):
  g = golden(name)
  mask = g["in/mask_leftpadded"]
  y, state = hub_mixer(g)(jnp.asarray(g["in/x_leftpadded"]), segment_ids=jnp.asarray(mask))
  real = mask.astype(bool)
  close(np.asarray(y)[real], g["out/y_leftpadded"][real])
  if name.endswith("decay"):  # under LRPE states hold absolute phases
    close(state.memory, g["out/state_leftpadded"])


def test_example_module_of_the_operator_repository():
  """silu on value too, affine LayerNorm, low-rank sigmoid gate, separate projections."""
  g = golden("transnormer_mixer_la_example")
  heads, features = g["in/slope"].size, g["in/x"].shape[-1]
  config = LightningMixerConfig(
    features=features,
    heads=heads,
    head_dim=features // heads,
    value_activation="silu",
    gate="low_rank",
    gate_rank=g["param/output_gate.0.weight"].shape[0],
    gate_activation="sigmoid",
    norm="layer",
    norm_eps=1e-5,
  )
  mixer = LightningMixer(config, g["in/slope"], rngs=nnx.Rngs(0))

  def ours(prefix, suffix=""):
    w = {k.removeprefix(prefix): v for k, v in g.items() if k.startswith(prefix)}
    parts = [w[f"{n}_proj.weight{suffix}"].T.reshape(features, heads, -1) for n in "qkv"]
    return dict(
      heads_in__kernel=np.stack(parts),
      heads_out__kernel=out(w[f"o_proj.weight{suffix}"], heads),
      norm__scale=w[f"norm.weight{suffix}"],
      norm__bias=w[f"norm.bias{suffix}"],
      gate_down__kernel=w[f"output_gate.0.weight{suffix}"].T,
      gate_up__kernel=w[f"output_gate.1.weight{suffix}"].T,
    )

  set_params(mixer, **ours("param/"))
  y, dx, grads = value_and_grads(mixer, jnp.asarray(g["in/x"]), jnp.asarray(g["in/dy"]))
  close(y, g["out/y_f64"])
  close(dx, g["grad/x_f64"])
  for name, expected in ours("grad/", "_f64").items():
    close(grads[name], expected)


def test_minimax_mixer():
  """A second, independent source: weighted RMSNorm, full sigmoid gate, other decay ladder."""
  g = golden("transnormer_minimax_mixer")
  heads, features = 4, g["in/x"].shape[-1]
  rates = decay_rates(heads, layer=1, num_layers=4, ladder="power")
  np.testing.assert_allclose(rates, g["in/slope_rate"].reshape(-1), rtol=1e-6)
  config = LightningMixerConfig(
    features=features,
    heads=heads,
    head_dim=8,
    value_activation="silu",
    gate_activation="sigmoid",
    norm="rms",
  )
  mixer = LightningMixer(config, rates, rngs=nnx.Rngs(0))

  def ours(prefix):
    # Stored head by head as [query, key, value]; the gate is a matrix of its own.
    qkv = g[f"{prefix}qkv_proj.weight"].reshape(heads, 3, 8, features).transpose(1, 3, 0, 2)
    gate = g[f"{prefix}output_gate.weight"].T.reshape(1, features, heads, 8)
    return dict(
      heads_in__kernel=np.concatenate([qkv, gate]),
      heads_out__kernel=out(g[f"{prefix}out_proj.weight"], heads),
      norm__scale=g[f"{prefix}norm.weight"],
    )

  set_params(mixer, **ours("param/"))
  x = jnp.asarray(g["in/x"])
  y, dx, grads = value_and_grads(mixer, x, jnp.asarray(g["in/dy"]))
  close(y, g["out/y"])
  close(dx, g["grad/x"])
  for name, expected in ours("grad/").items():
    close(grads[name], expected)
  prefill = x.shape[1] - g["out/y_decode"].shape[1]
  _, state = mixer(x[:, :prefill])
  for t in range(prefill, x.shape[1]):
    y, state = mixer.step(x[:, t], state)
    close(y, g["out/y_decode"][:, t - prefill], 2e-5)
  close(state.memory, g["out/state"], 2e-5)


@pytest.mark.parametrize("use_lrpe", [False, True])
def test_parallel_is_chunked_is_recurrent(use_lrpe):
  mixer = random_mixer(use_lrpe)
  x = jax.random.normal(jax.random.key(1), (2, 21, 12))
  y, state = mixer(x)
  first, middle = mixer(x[:, :8])
  second, last = mixer(x[:, 8:], state=middle)
  close(jnp.concatenate([first, second], 1), y)
  close(last.memory, state.memory)
  token_state, outputs = mixer.init_state(2), []
  for t in range(21):
    output, token_state = mixer.step(x[:, t], token_state)
    outputs.append(output)
  close(jnp.stack(outputs, 1), y)
  close(token_state.memory, state.memory)
  np.testing.assert_array_equal(token_state.position, state.position)


@pytest.mark.parametrize("use_lrpe", [False, True])
def test_packed_is_separate(use_lrpe):
  mixer = random_mixer(use_lrpe)
  x = jax.random.normal(jax.random.key(2), (1, 20, 12))
  ids = jnp.asarray([[0] * 7 + [1] + [2] * 12])
  packed, state = mixer(x, segment_ids=ids)
  parts = [mixer(x[:, a:b]) for a, b in ((0, 7), (7, 8), (8, 20))]
  close(packed, jnp.concatenate([y for y, _ in parts], 1))
  if not use_lrpe:
    close(state.memory, parts[-1][1].memory)


@pytest.mark.parametrize("use_lrpe", [False, True])
def test_right_padding_leaves_the_state_alone(use_lrpe):
  mixer = random_mixer(use_lrpe)
  x = jax.random.normal(jax.random.key(3), (3, 16, 12))
  lengths = jnp.asarray([16, 5, 0])
  y, state = mixer(x, lengths=lengths)
  for row, length in enumerate([16, 5]):
    alone, after = mixer(x[row : row + 1, :length])
    close(y[row, :length], alone[0])
    close(state.memory[row], after.memory[0])
    assert state.position[row] == length
  np.testing.assert_array_equal(state.memory[2], 0)
  assert state.position[2] == 0


def test_bad_configurations_are_refused():
  with pytest.raises(ValueError, match="gate must be 'full'.*got 'half'"):
    LightningMixerConfig(8, 2, 4, gate="half")
  with pytest.raises(ValueError, match="gate_rank must be at least 1"):
    LightningMixerConfig(8, 2, 4, gate="low_rank")
  with pytest.raises(ValueError, match="decay_rates must be 2 numbers >= 0.*-1"):
    LightningMixer(LightningMixerConfig(8, 2, 4), np.array([1.0, -1.0]), rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="did you mean 'silu'"):
    LightningMixer(
      LightningMixerConfig(8, 2, 4, query_key_activation="sillu"), None, rngs=nnx.Rngs(0)
    )(jnp.zeros((1, 3, 8)))


def random_mixer(use_lrpe):
  config = LightningMixerConfig(12, 3, 4, lrpe=use_lrpe, init_stddev=0.5, chunk_size=8)
  return LightningMixer(config, decay_rates(3), rngs=nnx.Rngs(0))
