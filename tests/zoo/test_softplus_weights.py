"""GPT-2's published layout: a file of another library, round trips, re-weighting what was trained.

data/gpt2 was written by GPT2LMHeadModel.save_pretrained of transformers 5.23 for random weights
(width 16, 2 layers, 2 heads, 12 positions); expected.npz has tokens, logits and loss in float64.
"""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo import zoo
from attnzoo.zoo import published, softplus_weights
from attnzoo.zoo.softplus import SoftplusConfig
from attnzoo.zoo.softplus_weights import export_weights, import_weights
from attnzoo.zoo.weights import read_tensors
from attnzoo_testing.mixers import close

GPT2 = pathlib.Path(__file__).parent / "data" / "gpt2"
ROTARY = SoftplusConfig(7, 8, 2, 2, hidden=12)
WIDE = dict(dtype="float64", param_dtype="float64")


@pytest.fixture(scope="module")
def expected():
  return np.load(GPT2 / "expected.npz")


def random_tensors(config, transposed=False):
  rng = np.random.default_rng(0)
  slots = softplus_weights._slots(config, transposed)
  return {slot.name: rng.standard_normal(slot.shape, np.float32) for slot in slots}


def assert_same(got, wanted):
  assert set(got) == set(wanted)
  for name, value in wanted.items():
    np.testing.assert_array_equal(got[name], value, err_msg=name)


def test_another_librarys_file(expected):
  config = published.find_config(GPT2)
  assert config == SoftplusConfig(
    13, 16, 2, 2, variant="softmax", learned_positions=12, init_stddev=0.2
  )
  with jax.enable_x64(True):
    model = import_weights(GPT2, **WIDE)
    tokens = jnp.asarray(expected["ids"])
    logits, _ = model(tokens)
    close(logits, expected["logits"], 1e-12)
    sums = model.loss(tokens[:, :-1], tokens[:, 1:])
    np.testing.assert_allclose(sums.loss / sums.weight, expected["loss"], rtol=1e-6)
    # Prompts of unequal length, then a token each: positions are counted per row.
    prompts = tokens[:, :8]
    state = model.init_state(2, 12)
    _, state = model(prompts, state=state, lengths=jnp.array([8, 3]))
    after, state = model.step(jnp.array([tokens[0, 8], tokens[1, 3]]), state)
    close(after, expected["logits"][[0, 1], [8, 3]], 1e-12)
    np.testing.assert_array_equal(state.position, [9, 4])


def test_reweighting_what_was_trained_with_softmax(expected):
  """The same parameters, by the formulas of the paper in numpy for the first layer's mixer."""
  with jax.enable_x64(True):
    model = import_weights(GPT2, variant="softmax_rw_p3", **WIDE)
    block = model.layers()[0]
    x = np.random.default_rng(0).standard_normal((1, 9, 16))
    got, _ = block.mixer(jnp.asarray(x))
  tensors = {
    name.removeprefix("transformer."): np.asarray(array, np.float64)
    for name, array in read_tensors(GPT2).items()
  }
  qkv = x[0] @ tensors["h.0.attn.c_attn.weight"] + tensors["h.0.attn.c_attn.bias"]
  q, k, v = (part.reshape(9, 2, 8) for part in np.split(qkv, 3, axis=1))
  scores = np.einsum("thk,shk->hts", q, k) / np.sqrt(8)
  weights = np.exp(scores) * np.tri(9)
  weights /= weights.sum(-1, keepdims=True)
  count = np.arange(1, 10)[:, None]
  weights = np.maximum(0, weights * count - (count > 3)) ** 3 * np.tri(9)
  weights /= weights.sum(-1, keepdims=True)
  mixed = np.einsum("hts,shv->thv", weights, v).reshape(9, 16)
  close(got[0], mixed @ tensors["h.0.attn.c_proj.weight"] + tensors["h.0.attn.c_proj.bias"], 1e-12)


def test_positions_end(expected):
  model = import_weights(GPT2)
  with pytest.raises(ValueError, match="at most the 12 positions that were learned; got 13"):
    model(jnp.zeros((1, 13), jnp.int32))
  state = model.init_state(1, 13)
  _, state = model(jnp.zeros((1, 11), jnp.int32), state=state)
  last, state = model.step(jnp.zeros((1,), jnp.int32), state)
  past, _ = model.step(jnp.zeros((1,), jnp.int32), state)
  assert np.isfinite(last).all()
  assert np.isnan(past).all()


@pytest.mark.parametrize("config", [ROTARY, dataclasses.replace(ROTARY, learned_positions=5)])
def test_import_then_export_is_bit_for_bit(config, tmp_path):
  tensors = random_tensors(config)
  model = import_weights(tensors, config)
  assert_same(export_weights(model, config, tmp_path / "x.safetensors"), tensors)
  assert_same(read_tensors(tmp_path), tensors)
  # What a trainer in PyTorch saves: matrices the other way around, prefixes, masks, the head.
  theirs = {name: x.T if name.startswith("h.") else x for name, x in tensors.items()}
  theirs = {f"_orig_mod.transformer.{name}": x for name, x in theirs.items()}
  theirs |= {"transformer.h.0.attn.bias": np.tri(5), "lm_head.weight": tensors["wte.weight"]}
  assert_same(export_weights(import_weights(theirs, config), config), tensors)
  shapes = {slot.name: slot.shape for slot in softplus_weights._slots(config, True)}
  assert shapes == {name: tensors[name].shape[::-1] if "h." in name else tensors[name].shape
                    for name in tensors}  # fmt: skip


def test_published_sizes():
  for name, count in (("gpt2", 124_439_808), ("gpt2-xl", 1_557_611_200)):
    config = zoo.get_config(name)
    slots = softplus_weights._slots(config, False)
    assert sum(np.prod(slot.shape) for slot in slots) == count
    assert zoo.models.parameter_count(config) == count


def test_misfits_are_refused(tmp_path):
  tensors = random_tensors(ROTARY)
  wrong = {name: x for name, x in tensors.items() if name != "h.1.ln_2.bias"}
  wrong |= {"wpe.weight": np.zeros((3, 8)), "ln_f.bias": np.zeros(3)}
  with pytest.raises(
    ValueError, match=r"missing: h.1.ln_2.bias; surplus: wpe.weight; misshapen: ln_f.bias has \(3,"
  ):
    import_weights(wrong, ROTARY)
  with pytest.raises(ValueError, match="norm must be 'layer' in GPT-2's layout; got 'rms'"):
    import_weights(tensors, ROTARY, norm="rms")
  with pytest.raises(ValueError, match="did you mean 'gpt2-large'"):
    import_weights(tensors, "gpt2-larg")
  folder = shutil.copytree(GPT2, tmp_path / "gpt2")
  raw = json.loads((GPT2 / "config.json").read_text())
  for change, message in (
    (dict(model_type="gpt_neo"), "model_type of .* must be gpt2; got 'gpt_neo'"),
    (dict(activation_function="relu"), "activation_function of .* got 'relu'"),
  ):
    (folder / "config.json").write_text(json.dumps(raw | change))
    with pytest.raises(ValueError, match=message):
      import_weights(folder)
