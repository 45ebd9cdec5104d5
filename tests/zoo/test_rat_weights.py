"""RAT's published layout: what is read, what is refused, and that a round trip loses nothing."""

import collections
import dataclasses
import os
import pickle
import sys
import types
import zipfile

import jax
import numpy as np
import pytest
from flax import nnx

from attnzoo import zoo
from attnzoo.zoo import published, rat_weights
from attnzoo.zoo.rat import RatConfig
from attnzoo.zoo.rat_weights import EMBEDDING, export_weights, import_weights
from attnzoo.zoo.torch_pickle import read_torch_file
from attnzoo.zoo.weights import read_tensors, write_safetensors

TINY = RatConfig(7, 8, 3, 4, other_mixer="local", hidden=12)
CONFIGS = {
  "hybrid": TINY,
  "grouped": dataclasses.replace(TINY, other_mixer=None, groups=4),
  "rnn": dataclasses.replace(TINY, mixer="rnn", interleave_step=3),
  "attention": dataclasses.replace(TINY, mixer="attention"),
}


def random_tensors(config, seed=0):
  rng = np.random.default_rng(seed)  # gates and norms are drawn as well
  slots = {slot.name: slot.shape for slot in rat_weights._slots(config)}
  return {name: rng.standard_normal(shape, np.float32) for name, shape in slots.items()}


def assert_same(got, wanted):
  assert set(got) == set(wanted)
  for name, value in wanted.items():
    np.testing.assert_array_equal(got[name], value, err_msg=name)


@pytest.mark.parametrize("name", CONFIGS)
def test_import_then_export_is_bit_for_bit(name):
  config = CONFIGS[name]
  tensors = random_tensors(config)
  assert_same(export_weights(import_weights(tensors, config), config), tensors)
  shapes = nnx.state(nnx.eval_shape(lambda: zoo.build(config, nnx.Rngs(0))), nnx.Param)
  count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
  assert count == sum(tensor.size for tensor in tensors.values())


def test_order_of_the_rows():
  """z, v, g, q, k of RAT, with a row per channel of each head; v, q, k of attention."""
  tensors = random_tensors(TINY)
  first, second, third = (block.mixer for block in import_weights(tensors, TINY).layers())
  rows = tensors["backbone.layers.2.seq_layer.in_proj.weight"]  # [3 * 8 + 2 * 2 * 2, 8]
  np.testing.assert_array_equal(third.gated_heads_in.kernel[1, :, 3], rows[8 + 6 : 8 + 8].T)
  np.testing.assert_array_equal(third.query_key_heads_in.kernel[0, :, 1], rows[26:28].T)
  np.testing.assert_array_equal(third.query_key_heads_in.kernel[1, :, 0], rows[28:30].T)
  bias = tensors["backbone.layers.0.seq_layer.gate_bias"]
  np.testing.assert_array_equal(first.gate_bias[2], bias[4:6])
  rows = tensors["backbone.layers.1.seq_layer.in_proj.weight"]
  for part, start in enumerate((8, 16, 0)):
    np.testing.assert_array_equal(second.heads_in.kernel[part, :, 0], rows[start : start + 2].T)


def test_names_and_shapes_of_the_released_files():
  d, layers = 2048, "backbone.layers"
  shapes = {
    name: {slot.name: slot.shape for slot in rat_weights._slots(zoo.get_config(name))}
    for name in ("rat-xl", "rat-swa-xl", "rat-rnn-xl", "rat-attention-xl")
  }
  assert [len(table) for table in shapes.values()] == [170, 158, 170, 146]
  assert shapes["rat-xl"][f"{layers}.23.seq_layer.in_proj.weight"] == (6656, d)
  for name in ("rat-rnn-xl", "rat-attention-xl"):
    assert shapes[name][f"{layers}.23.seq_layer.in_proj.weight"] == (3 * d, d)
  hybrid = shapes["rat-swa-xl"]
  assert hybrid[f"{layers}.22.seq_layer.in_proj.weight"] == (6656, d)
  expected = {
    EMBEDDING: (32000, d),
    "backbone.ln.weight": (d,),
    f"{layers}.22.seq_layer.gate_bias": (d,),
    f"{layers}.23.seq_layer.input_norm.weight": (d,),
    f"{layers}.23.seq_layer.in_proj.weight": (6144, d),
    f"{layers}.23.seq_layer.out_proj.weight": (d, d),
    f"{layers}.23.hidden_layer.ln.weight": (d,),
    f"{layers}.23.hidden_layer.fc1.weight": (8192, d),
    f"{layers}.23.hidden_layer.fc2.weight": (d, 8192),
  }
  assert {name: hybrid[name] for name in expected} == expected


@pytest.fixture
def save_as_torch(monkeypatch):
  """Writes what torch.save makes of dictionaries of float32 arrays, without torch."""
  torch, utils, easydict = (types.ModuleType(n) for n in ("torch", "torch._utils", "easydict"))
  torch.FloatStorage = type("FloatStorage", (), {"__module__": "torch"})
  utils._rebuild_tensor_v2 = types.FunctionType((lambda: 0).__code__, {}, "_rebuild_tensor_v2")
  utils._rebuild_tensor_v2.__module__ = "torch._utils"
  utils._rebuild_tensor_v2.__qualname__ = "_rebuild_tensor_v2"

  class EasyDict(dict):  # the real one keeps its items as attributes, too
    def __init__(self, items):
      super().__init__(items)
      self.__dict__.update(items)

  EasyDict.__module__, EasyDict.__qualname__ = "easydict", "EasyDict"
  easydict.EasyDict = EasyDict
  for module in (torch, utils, easydict):
    monkeypatch.setitem(sys.modules, module.__name__, module)

  class Pickler(pickle.Pickler):
    def persistent_id(self, value):
      return value if type(value) is tuple and value[:1] == ("storage",) else None

    def reducer_override(self, value):
      if not isinstance(value, np.ndarray):
        return NotImplemented
      key = str(len(members))
      members[key] = value.tobytes()
      storage = ("storage", torch.FloatStorage, key, "cpu", value.size)
      strides = tuple(stride // value.itemsize for stride in value.strides)
      arguments = (storage, 0, value.shape, strides, False, collections.OrderedDict())
      return utils._rebuild_tensor_v2, arguments

  members = {}

  def save(path, contents):
    members.clear()
    with zipfile.ZipFile(path, "w") as archive:
      with archive.open("archive/data.pkl", "w") as stream:
        Pickler(stream, protocol=2).dump(contents)
      for key, numbers in members.items():
        archive.writestr(f"archive/data/{key}", numbers)
    return path

  save.EasyDict = EasyDict
  return save


def checkpoint(tensors, config):
  """All that the authors' trainer saves."""
  task = {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}
  task["_orig_mod.head.lm_head.weight"] = tensors[EMBEDDING]
  moments = {0: {"step": np.ones((), np.float32), "exp_avg": np.zeros((2, 3), np.float32)}}
  return dict(
    task=task,
    config=config,
    step=52452,
    optimizer=dict(state=moments, param_groups=[dict(lr=8e-4, betas=(0.9, 0.95))]),
    lr_scheduler=dict(last_epoch=3, lr_lambdas=[None]),
    resume_kwargs={},
  )


def test_checkpoint_of_the_trainer(save_as_torch, tmp_path):
  tensors = random_tensors(zoo.get_config("rat-tiny"))
  config = save_as_torch.EasyDict(
    dict(model=save_as_torch.EasyDict(dict(chunk_size=16)), betas=[0.9])
  )
  file = save_as_torch(tmp_path / "ratl16.pth", checkpoint(tensors, config))
  read = read_torch_file(file)
  assert set(read) == {f"_orig_mod.{name}" for name in (*tensors, "head.lm_head.weight")}
  assert not any(tensor.flags.owndata for tensor in read.values()), "loaded, not mapped"
  assert published.find_config(file) == zoo.get_config("rat-tiny")
  assert published.find_config(file, "rat-swa-xl") == zoo.get_config("rat-swa-xl")
  model = published.import_weights(file, published.find_config(file))
  assert_same(export_weights(model, zoo.get_config("rat-tiny")), tensors)
  with pytest.raises(FileNotFoundError, match="of .pth files, each a model of its own, name one"):
    read_tensors(tmp_path)


class Malicious:
  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.system, (f"touch {self.path}",)


def test_code_in_the_configuration_is_not_run(save_as_torch, tmp_path):
  trace = tmp_path / "ran"
  contents = checkpoint(random_tensors(TINY), save_as_torch.EasyDict(dict(a=Malicious(trace))))
  file = save_as_torch(tmp_path / "x.pth", contents)
  with pytest.raises(ValueError, match=r"refers to \w+.system, which is not allowed \(save the"):
    import_weights(file, TINY)
  assert not trace.exists()


def test_safetensors_file_and_preset(tmp_path):
  config = zoo.get_config("rat-swa-tiny")
  tensors = random_tensors(config)
  model = import_weights(tensors, "rat-swa-tiny", param_dtype="bfloat16")
  exported = export_weights(model, config, tmp_path / "x.safetensors", dtype="float32")
  assert_same(read_tensors(tmp_path), exported)
  assert published.find_config(tmp_path) == config
  with pytest.raises(ValueError, match="did you mean 'rat-swa-tiny'"):
    import_weights(tensors, "rat-swa-tinyy")


def test_a_preset_that_the_tensors_do_not_tell():
  tensors = random_tensors(zoo.get_config("rat-attention-tiny"))
  pair = "one of rat-attention-tiny, rat-attention-swa-tiny; got None"
  with pytest.raises(ValueError, match=f"config must be given, {pair}"):
    import_weights(tensors)
  with pytest.raises(ValueError, match="not those of a preset; got None .*rat-xl"):
    import_weights(random_tensors(TINY))


def test_names_of_other_models_still_need_a_config_json(tmp_path):
  write_safetensors(tmp_path / "x.safetensors", {"a": np.zeros(3, np.float32)})
  with pytest.raises(FileNotFoundError, match="config.json must exist"):
    published.find_config(tmp_path)


def test_misfits_are_refused():
  tensors = random_tensors(TINY)
  with pytest.raises(ValueError, match=r"head.lm_head.weight must equal embedding.wte.weight"):
    import_weights({**tensors, "head.lm_head.weight": tensors[EMBEDDING] + 1}, TINY)
  wrong = {name: tensor for name, tensor in tensors.items() if "layers.2.seq_layer.g" not in name}
  wrong["backbone.layers.1.seq_layer.gate_bias"] = np.zeros(8, np.float32)
  wrong["backbone.layers.0.seq_layer.in_proj.weight"] = np.zeros((24, 8), np.float32)
  with pytest.raises(ValueError, match="import_weights: the tensors must be those of") as caught:
    import_weights(wrong, TINY)
  for part in (
    "missing: backbone.layers.2.seq_layer.gate_bias",
    "surplus: backbone.layers.1.seq_layer.gate_bias",
    "misshapen: backbone.layers.0.seq_layer.in_proj.weight has (24, 8), expected (32, 8)",
  ):
    assert part in str(caught.value)
