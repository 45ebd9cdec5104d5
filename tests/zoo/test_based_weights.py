"""BASED's published layout: what is read, what is refused, and that a round trip loses nothing."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

from attnzoo import zoo
from attnzoo.zoo import based_weights, published
from attnzoo.zoo.based import BasedConfig
from attnzoo.zoo.based_weights import EMBEDDING, config_beside, export_weights, import_weights
from attnzoo.zoo.weights import read_tensors, write_safetensors

TINY = BasedConfig(
  8, 8, 5, 2, 256, linear_layers=(1, 3), sliding_layers=(3,), feature_dim=3, window_size=4
)
FULL = BasedConfig(16, 8, 2, 2, 256, other_layers="attention", rotary_fraction=0.5)
RMS = dataclasses.replace(TINY, output_norm="rms", linear_head_dim=5, conv_bias=False)


def random_tensors(config, seed=0):
  rng = np.random.default_rng(seed)  # biases and norms are drawn as well
  slots = {slot.name: slot.shape for slot in based_weights._slots(config)}
  return {name: rng.standard_normal(shape, np.float32) for name, shape in slots.items()}


def assert_same(got, wanted):
  assert set(got) == set(wanted)
  for name, value in wanted.items():
    np.testing.assert_array_equal(got[name], value, err_msg=name)


@pytest.mark.parametrize("config", [TINY, FULL, RMS], ids=["based", "attention", "rms"])
def test_import_then_export_is_bit_for_bit(config):
  tensors = random_tensors(config)
  model = import_weights(tensors, config)
  assert_same(export_weights(model, config), tensors)
  shapes = nnx.state(nnx.eval_shape(lambda: zoo.build(config, nnx.Rngs(0))), nnx.Param)
  count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
  assert count == sum(tensor.size for tensor in tensors.values())


@pytest.mark.parametrize(
  ("name", "entries"), [("based-360m", 226), ("based-1b", 299), ("attn-360m", 147)]
)
def test_names_and_shapes_of_the_released_files(name, entries):
  """The published table has also lm_head, and for based-1b an unused decay."""
  config = zoo.get_config(name)
  shapes = {slot.name: slot.shape for slot in based_weights._slots(config)}
  assert len(shapes) + 1 == entries
  d, layers = config.features, "transformer.layers"
  if name == "attn-360m":
    assert shapes[f"{layers}.3.mlp.fc1.weight"] == (2 * 2816, d)
    return
  expected = {
    EMBEDDING: (50264, d),
    f"{layers}.0.mlp.fc1.weight": (4 * d, d),
    f"{layers}.0.mlp.fc2.weight": (d, 2 * d),
    f"{layers}.0.mixer.in_proj.bias": (4 * d,),
    f"{layers}.0.mixer.conv.conv.weight": (2 * d, 1, 3),
    f"{layers}.0.mixer.out_proj.weight": (d, 2 * d),
    f"{layers}.1.mixer.proj_k.weight": (256, d),
    f"{layers}.1.mixer.proj_v.weight": (d, d),
    f"{layers}.2.mixer.Wqkv.weight": (3 * d, d),
    "transformer.ln_f.weight": (d,),
  }
  assert {name: shapes[name] for name in expected} == expected


def as_saved(tensors):
  """With what the trainer's files have beside the weights."""
  saved = {f"model.{name}": tensor for name, tensor in tensors.items()}
  saved["model.lm_head.weight"] = tensors[EMBEDDING]
  saved["train_metrics.num-tokens.count"] = np.zeros(1, np.float32)
  saved["model.transformer.decay.decay"] = np.zeros(2, np.float32)
  saved["model.transformer.layers.3.mixer.rotary_emb.inv_freq"] = np.zeros(2, np.float32)
  return saved


def test_what_is_no_weight_is_left_out():
  tensors = random_tensors(TINY)
  assert_same(export_weights(import_weights(as_saved(tensors), TINY), TINY), tensors)


def test_misfits_are_refused():
  tensors = random_tensors(TINY)
  with pytest.raises(ValueError, match="lm_head.weight must equal transformer.embeddings"):
    import_weights({**tensors, "lm_head.weight": tensors[EMBEDDING] + 1}, TINY)
  with pytest.raises(ValueError, match="vocab_size must be the 8 rows of .*; got 7 .*padded"):
    import_weights(tensors, TINY, vocab_size=7)
  wrong = {name: tensor for name, tensor in tensors.items() if "layers.4.mixer.in" not in name}
  wrong["transformer.layers.1.mixer.proj_q.weight"] = np.zeros((4, 8), np.float32)
  wrong["transformer.layers.1.mixer.Wqkv.weight"] = np.zeros((24, 8), np.float32)
  with pytest.raises(ValueError, match="import_weights: the tensors must be those of") as caught:
    import_weights(wrong, TINY)
  for part in (
    "missing: transformer.layers.4.mixer.in_proj.bias, transformer.layers.4.mixer.in_proj.weight",
    "surplus: transformer.layers.1.mixer.Wqkv.weight",
    "misshapen: transformer.layers.1.mixer.proj_q.weight has (4, 8), expected (6, 8)",
  ):
    assert part in str(caught.value)


def test_presets_and_variants_that_were_not_published():
  with pytest.raises(ValueError, match="'based-1b-throughput' cannot be imported: it was timed"):
    import_weights({}, "based-1b-throughput")
  with pytest.raises(ValueError, match="did you mean 'based-1b'"):
    import_weights({}, "based-1bb")
  with pytest.raises(ValueError, match="decay_offset must be None in the published layout"):
    import_weights({}, dataclasses.replace(TINY, decay_offset=-3.0))
  with pytest.raises(ValueError, match="key_heads must be None in the published layout"):
    import_weights({}, dataclasses.replace(TINY, key_heads=1))
  with pytest.raises(ValueError, match="'mqar-tiny' cannot be imported: no checkpoint of family"):
    published.find_config("anywhere", "mqar-tiny")


_MIXERS = "based.models.mixers"
PUBLISHED = dict(
  vocab_size=5, pad_vocab_size_multiple=8, n_embd=8, n_layer=5, n_head=2, n_inner=64,
  rotary_emb_fraction=1, activation_function="swiglu", rms_norm=True, n_positions=0,
  alt_mixer_layers=[1, 3], alt_mixer_2_layers=[3], special_initializer=True, fixed_decay=True,
  mixer={"_target_": f"{_MIXERS}.convolution.BaseConv", "expand_proj": 4, "kernel_sizes": 5,
         "use_bias": True},
  alt_mixer={"_target_": f"{_MIXERS}.linear_attention.LinearAttention", "feature_dim": 3,
             "num_heads": 2, "parallel_implementation": "fla_parallel"},
  alt_mixer_2={"_target_": f"{_MIXERS}.slide_attention.SlidingAttention", "window_size": 4,
               "num_heads": 2},
)  # fmt: skip
BASELINE = dict(
  vocab_size=5, pad_vocab_size_multiple=16, n_embd=8, n_layer=2, n_head=2, n_inner=None,
  rotary_emb_fraction=0.5, activation_function="swiglu",
)  # fmt: skip


def write_config(folder, raw):
  (folder / "config.json").write_text(json.dumps(raw))
  return folder


def test_config_json(tmp_path):
  tensors = random_tensors(TINY)
  write_safetensors(tmp_path / "model.safetensors", as_saved(tensors))
  config = config_beside(write_config(tmp_path, PUBLISHED))
  assert dataclasses.replace(config, linear_heads=None) == TINY
  assert_same(export_weights(import_weights(tmp_path), config), tensors)
  assert published.find_config(tmp_path) == config
  assert published.find_config(tmp_path, "based-1b") == zoo.get_config("based-1b")
  assert config_beside(write_config(tmp_path, BASELINE)) == FULL
  wider = dict(n_inner=300, activation_function="geglu", mlp_multiple_of=128)
  config = config_beside(write_config(tmp_path, BASELINE | wider))
  assert (config.glu_dim, config.glu_activation) == (384, "gelu")
  kernel = PUBLISHED["alt_mixer"] | {"parallel_implementation": "tk"}
  config = config_beside(write_config(tmp_path, PUBLISHED | {"alt_mixer": kernel}))
  assert config.output_norm == "rms"


def test_exported_file_is_read_back(tmp_path):
  model = import_weights(random_tensors(TINY), TINY)
  exported = export_weights(model, TINY, tmp_path / "x.safetensors")
  assert_same(read_tensors(tmp_path / "x.safetensors"), exported)
  with pytest.raises(ValueError, match="path must end in .safetensors"):
    export_weights(model, TINY, tmp_path / "x.bin")


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(mlp_type="alt"), "mlp_type of .* must be None; got 'alt'"),
    (dict(qkv_proj_bias=True), "qkv_proj_bias of .* must be False; got True"),
    (dict(activation_function="relu"), "activation_function of .* must be one of .*got 'relu'"),
    (dict(mixer={"_target_": "x.Hyena"}), "mixer of .* must be a BaseConv; got 'x.Hyena'"),
    (dict(alt_mixer_2={"num_heads": 2}), "alt_mixer_2 of .* must have the field window_size"),
    (dict(n_head=3, alt_mixer_2={"window_size": 4}), r"features must be a multiple of heads \(3\)"),
  ],
  ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_config_json_of_other_models(tmp_path, change, message):
  with pytest.raises(ValueError, match=message):
    config_beside(write_config(tmp_path, PUBLISHED | change))


def test_unknown_config_json(tmp_path):
  with pytest.raises(ValueError, match="must be that of a model of the zoo, with a field"):
    published.find_config(write_config(tmp_path, dict(hidden_size=3)))
  raw = {name: value for name, value in PUBLISHED.items() if name != "n_layer"}
  with pytest.raises(ValueError, match="must have the fields n_layer"):
    published.find_config(write_config(tmp_path, raw))
