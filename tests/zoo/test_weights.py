"""Published checkpoints: what is read, what is refused, and that export and import lose nothing."""

import dataclasses
import json
import os
import pathlib
import pickle
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from attnzoo import zoo
from attnzoo.zoo import transnormer, transnormer_weights
from attnzoo.zoo.safetensors_file import read_safetensors
from attnzoo.zoo.torch_pickle import read_torch_file
from attnzoo.zoo.transnormer import TransNormerConfig
from attnzoo.zoo.transnormer_weights import export_weights, import_weights
from attnzoo.zoo.weights import read_tensors, write_safetensors

# tiny.bin and legacy.bin were written by torch.save: bfloat16, half, float and double tensors, a
# transposed one, one inside a larger storage, every other row, a Parameter, a head that shares the
# embedding's storage. tiny_expected.npz holds the same numbers as float32.
DATA = pathlib.Path(__file__).parent / "data"
TINY = TransNormerConfig(7, 4, 2, 2, 6)


@pytest.fixture(scope="module")
def expected():
  with np.load(DATA / "tiny_expected.npz") as arrays:
    return {name: np.ascontiguousarray(arrays[name]) for name in arrays.files}


@pytest.fixture(scope="module")
def model():
  return import_weights(DATA / "tiny.bin", TINY)


def assert_same(got, wanted):
  assert set(got) == set(wanted)
  for name, value in wanted.items():
    np.testing.assert_array_equal(np.asarray(got[name], np.float32), value, err_msg=name)


def without_head(tensors):
  return {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}


def test_torch_file(expected, model):
  tensors = read_torch_file(DATA / "tiny.bin")
  assert_same(tensors, expected)
  assert tensors["model.embed_tokens.weight"].dtype == ml_dtypes.bfloat16
  assert tensors["model.layers.0.channel_mixer.l3.weight"].dtype == np.float64
  assert not any(tensor.flags.owndata for tensor in tensors.values()), "loaded, not mapped"
  assert_same(export_weights(model, TINY), without_head(expected))


def test_safetensors_file_sharded_folder_and_mapping(expected, tmp_path):
  from safetensors.numpy import save_file

  single = tmp_path / "single" / "model.safetensors"
  single.parent.mkdir()
  save_file(expected, single)
  (tmp_path / "sharded").mkdir()
  names = sorted(expected)
  shards = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
  for shard, part in shards.items():
    save_file({name: expected[name] for name in part}, tmp_path / "sharded" / shard)
  index = {"weight_map": {name: shard for shard, part in shards.items() for name in part}}
  index_file = tmp_path / "sharded" / "model.safetensors.index.json"
  index_file.write_text(json.dumps(index))
  for source in (single, single.parent, tmp_path / "sharded", index_file, expected):
    assert_same(read_tensors(source), expected)
  (tmp_path / "sharded" / "model-00002-of-00002.safetensors").unlink()
  with pytest.raises(FileNotFoundError, match="missing model-00002-of-00002.safetensors"):
    read_tensors(index_file)
  index_file.write_text("{")
  with pytest.raises(ValueError, match=r"index.json must map names to shards"):
    read_tensors(tmp_path / "sharded")


def test_missing_folders_and_files(tmp_path):
  with pytest.raises(FileNotFoundError, match="source must exist; got .*nothing"):
    read_tensors(tmp_path / "nothing")
  with pytest.raises(FileNotFoundError, match="must hold .safetensors or .bin files"):
    read_tensors(tmp_path)


def test_all_misfits_are_listed_in_one_error(expected):
  tensors = dict(expected)
  del tensors["model.layers.1.channel_mixer.l2.weight"]
  tensors["model.layers.2.token_mixer.out_proj.weight"] = np.zeros((4, 4), np.float32)
  tensors["model.layers.0.token_mixer.lrpe.theta"] = np.zeros((2, 2), np.float32)
  with pytest.raises(ValueError, match="import_weights: the tensors must be those of") as caught:
    import_weights(tensors, TINY)
  for part in (
    "missing: model.layers.1.channel_mixer.l2.weight",
    "surplus: model.layers.2.token_mixer.out_proj.weight",
    "misshapen: model.layers.0.token_mixer.lrpe.theta has (2, 2), expected (2, 1, 2)",
  ):
    assert part in str(caught.value)


def test_a_head_that_is_not_the_embedding_is_refused(expected):
  head = expected["lm_head.weight"] + 1
  with pytest.raises(ValueError, match="lm_head.weight must equal model.embed_tokens.weight"):
    import_weights({**expected, "lm_head.weight": head}, TINY)


@pytest.mark.parametrize("pattern", transnormer.LRPE_LAYERS)
@pytest.mark.parametrize("use_bias", [False, True], ids=["plain", "biases"])
def test_export_then_import_is_bit_for_bit(pattern, use_bias):
  config = dataclasses.replace(TINY, num_layers=3, lrpe_layers=pattern, use_bias=use_bias)
  shapes = nnx.state(nnx.eval_shape(lambda: zoo.build(config, nnx.Rngs(0))), nnx.Param)
  rng = np.random.default_rng(0)  # biases are drawn as well, unlike at the start of training
  slots = list(transnormer_weights._slots(config))
  tensors = {slot.name: rng.standard_normal(slot.shape, np.float32) for slot in slots}
  model = import_weights(tensors, config)
  count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
  assert count == sum(tensor.size for tensor in tensors.values())
  exported = export_weights(model, config)
  assert_same(exported, tensors)
  names = [name for name in exported if name.endswith("theta")]
  layers = [layer for layer in range(3) if config.has_lrpe(layer)]
  assert names == [f"model.layers.{layer}.token_mixer.lrpe.theta" for layer in layers]


def test_constants_are_those_of_a_built_model(model):
  built = zoo.build(TINY, nnx.Rngs(0))
  _, _, ours = nnx.split(model, nnx.Param, ...)
  _, _, theirs = nnx.split(built, nnx.Param, ...)
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)
  tokens = jnp.asarray([[1, 2, 3]])
  assert np.isfinite(model(tokens)[0]).all()


def test_dtypes(model, tmp_path):
  """bfloat16 weights are widened without loss, and can be kept narrow."""
  narrow = import_weights(DATA / "tiny.bin", TINY, param_dtype="bfloat16")
  assert narrow.embedding[...].dtype == jnp.bfloat16
  np.testing.assert_array_equal(narrow.embedding[...].astype(jnp.float32), model.embedding[...])
  file = tmp_path / "narrow.safetensors"
  tensors = export_weights(narrow, dataclasses.replace(TINY, param_dtype="bfloat16"), file)
  assert_same(read_safetensors(file), {n: np.asarray(t, np.float32) for n, t in tensors.items()})
  again = read_safetensors(file)["model.embed_tokens.weight"]
  assert again.dtype == ml_dtypes.bfloat16
  half = export_weights(model, TINY, dtype="float16")
  assert {tensor.dtype for tensor in half.values()} == {np.dtype(np.float16)}
  with pytest.raises(ValueError, match="path must end in .safetensors"):
    export_weights(model, TINY, tmp_path / "x.bin")


def test_presets_without_a_published_layout():
  with pytest.raises(ValueError, match="'transnormer3-15b' cannot be imported: the code and the"):
    import_weights({}, "transnormer3-15b")
  with pytest.raises(ValueError, match="did you mean 'transnormer-1b'"):
    import_weights({}, "transnormer-1bb")
  with pytest.raises(ValueError, match="gate must be 'full'.*got 'low_rank'"):
    import_weights({}, "transnormer-xmixers-385m")
  with pytest.raises(ValueError, match="norm must be 'srms'"):
    import_weights({}, dataclasses.replace(TINY, norm="layer"))
  with pytest.raises(ValueError, match="config must be given for a mapping"):
    import_weights({})


PUBLISHED = dict(
  vocab_size=7, decoder_embed_dim=4, decoder_layers=2, decoder_attention_heads=2, glu_dim=6,
  linear_use_lrpe_list=[1, 0], hidden_dim=4, no_scale_embedding=True, pad_token_id=3,
  linear_act_fun="swish", norm_type="simplermsnorm", bias=False,
)  # fmt: skip


def test_config_json(tmp_path, expected):
  write_safetensors(tmp_path / "model.safetensors", expected)
  file = tmp_path / "config.json"
  with pytest.raises(FileNotFoundError, match="config.json must exist when no config is given"):
    import_weights(tmp_path)
  file.write_text(json.dumps(PUBLISHED))
  config = transnormer_weights.config_beside(tmp_path / "model.safetensors")
  assert config == dataclasses.replace(TINY, scale_embedding=False, pad_id=3)
  assert_same(export_weights(import_weights(tmp_path), config), without_head(expected))
  variants = [
    (dict(linear_use_lrpe_list=[1, 1]), dict(lrpe_layers="all")),
    (dict(linear_use_lrpe_list=[0, 1]), dict(lrpe_layers="all_but_first")),
    (dict(linear_act_fun="none"), dict(activation="identity")),
    (dict(glu_dim=-1), dict(glu_dim=4)),
    (dict(bias=True), dict(use_bias=True)),
  ]
  for theirs, ours in variants:
    file.write_text(json.dumps(PUBLISHED | theirs))
    assert transnormer_weights.config_beside(tmp_path) == dataclasses.replace(config, **ours)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(decoder_layers=3, linear_use_lrpe_list=[1, 0, 1]), "is not a known pattern"),
    (dict(linear_use_lrpe_list=[1]), "must have 2 entries; got 1"),
    (dict(gate_dim=16), "has gate_dim and cannot be imported"),
    (dict(hidden_dim=8), "hidden_dim of .* must equal"),
    (dict(linear_act_fun="swich"), "did you mean 'silu'|must be a known function"),
    (dict(decoder_attention_heads=3), "must be a multiple of heads"),
  ],
  ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_config_json_of_other_models(tmp_path, change, message):
  (tmp_path / "config.json").write_text(json.dumps(PUBLISHED | change))
  with pytest.raises(ValueError, match=message):
    transnormer_weights.config_beside(tmp_path)


def test_damaged_config_json(tmp_path):
  for text, message in (("{", "must be a JSON object"), ("{}", "must have the fields vocab_size")):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
      transnormer_weights.config_beside(tmp_path)


def zip_with_pickle(path, data, **members):
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("archive/data.pkl", data)
    for name, content in members.items():
      archive.writestr(f"archive/data/{name}", content)
  return path


class Malicious:
  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.system, (f"touch {self.path}",)


def test_pickled_code_is_not_run(tmp_path):
  trace = tmp_path / "ran"
  file = zip_with_pickle(tmp_path / "x.bin", pickle.dumps({"a": Malicious(trace)}))
  with pytest.raises(ValueError, match="refers to (posix|nt).system, which is not allowed"):
    read_torch_file(file)
  assert not trace.exists()


def tensor_pickle(offset, shape, strides, count):
  """What torch.save writes for one float tensor, by hand: some opcodes torch never combines so."""
  lines = [
    b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n((",
    b"X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu",
    pickle.dumps(count, 2)[2:-1] + b"tQ" + pickle.dumps(offset, 2)[2:-1],
    pickle.dumps(shape, 2)[2:-1] + pickle.dumps(strides, 2)[2:-1] + b"\x89NtRs.",
  ]
  return b"".join(lines)


def test_tensors_cannot_reach_past_their_storage(tmp_path):
  numbers = np.arange(6, dtype="<f4").tobytes()
  good = zip_with_pickle(
    tmp_path / "good.bin", tensor_pickle(1, (2, 2), (2, 1), 6), **{"0": numbers}
  )
  np.testing.assert_array_equal(read_torch_file(good)["a"], [[1, 2], [3, 4]])
  for name, (offset, shape, strides, count) in dict(
    past=(1, (2, 3), (3, 1), 6), far=(0, (2,), (1 << 40,), 6), negative=(-4, (2,), (1,), 6),
    backwards=(5, (2,), (-1,), 6), short=(0, (2,), (1,), 600),
  ).items():  # fmt: skip
    data = tensor_pickle(offset, shape, strides, count)
    file = zip_with_pickle(tmp_path / f"{name}.bin", data, **{"0": numbers})
    with pytest.raises(ValueError, match="must be an intact PyTorch file of plain tensors"):
      read_torch_file(file)


def test_damaged_and_legacy_torch_files(tmp_path):
  whole = (DATA / "tiny.bin").read_bytes()
  cut = tmp_path / "cut.bin"
  for size in (0, 100, len(whole) // 2, len(whole) - 30):
    cut.write_bytes(whole[:size])
    with pytest.raises(ValueError, match="must be a PyTorch file in zip format.*complete"):
      read_torch_file(cut)
  with pytest.raises(ValueError, match="files from before PyTorch 1.6"):
    read_torch_file(DATA / "legacy.bin")
  for data in (b"", b"\x80\x02}.", b"garbage", pickle.dumps([1, 2])):
    with pytest.raises(ValueError, match="import_weights: .*cut.bin must"):
      read_torch_file(zip_with_pickle(cut, data))
  with zipfile.ZipFile(cut, "w") as archive:
    archive.writestr("readme", "no pickle")
  with pytest.raises(ValueError, match="0 files called data.pkl"):
    read_torch_file(cut)


def test_damaged_safetensors_files(tmp_path):
  file = tmp_path / "x.safetensors"
  write_safetensors(file, {"a": np.arange(4.0, dtype=np.float32)})
  whole = file.read_bytes()
  np.testing.assert_array_equal(read_safetensors(file)["a"], np.arange(4.0))
  wrong = {
    "empty": b"",
    "cut": whole[:-1],
    "cut header": whole[:20],
    "huge header": b"\xff" * 8 + whole[8:],
    "dtype": whole.replace(b'"F32"', b'"F99"'),
    "shape": whole.replace(b"[4]", b"[5]"),
    "offsets": whole.replace(b"[0,16]", b"[8,24]"),
    "not JSON": whole[:8] + b"?" + whole[9:],
  }
  for name, data in wrong.items():
    assert data != whole, name
    file.write_bytes(data)
    with pytest.raises(ValueError, match="must be a safetensors file.*complete"):
      read_safetensors(file)
