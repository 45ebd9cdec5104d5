"""Pictures: every format from files written here, their batches, a run on them, a grid of them."""

import dataclasses
import gzip
import io
import pickle
import sys

import numpy as np
import pytest
from PIL import Image

from attnzoo.experiments.data import (
  DataConfig,
  DataError,
  evaluation_batches,
  load_corpus,
  load_data,
  train_batches,
)
from attnzoo.experiments.image_grid import grid, write_grid

DRAW = np.random.default_rng(0)


def pictures(count, *shape):
  return DRAW.integers(256, size=(count, *shape), dtype=np.uint8)


def planar(x):
  """[N, H, W, C] as CIFAR and ImageNet store it: [N, C H W]."""
  return x.transpose(0, 3, 1, 2).reshape(len(x), -1)


def load(source, path="", **options):
  options = dict(sequence_length=0, batch_size=4, validation_fraction=0.3) | options
  return load_data(DataConfig(source=source, path=str(path), **options))


def values(images, split):
  return images.as_images(images.splits[split][:])


def same_pictures(found, expected):
  """Equal but for the order."""
  key = lambda x: sorted(picture.tobytes() for picture in x)  # noqa: E731
  assert found.shape == expected.shape
  assert key(found) == key(expected)


def write_cifar(folder, protocol=2):
  folder.mkdir(parents=True, exist_ok=True)
  files = {f"data_batch_{i}": pictures(5, 32, 32, 3) for i in range(1, 6)}
  files["test_batch"] = pictures(4, 32, 32, 3)
  for name, x in files.items():
    batch = {b"data": planar(x), b"labels": [1] * len(x), b"filenames": [b"a.png"] * len(x)}
    (folder / name).write_bytes(pickle.dumps(batch, protocol=protocol))
  return files


def text(value):
  short = len(value) < 256
  return (b"U" + bytes([len(value)]) if short else b"T" + len(value).to_bytes(4, "little")) + value


def python2_pickle(x):
  """What Python 2 wrote: text without encoding, the old name of numpy's module."""
  data = planar(x)
  shape = b"".join(b"J" + n.to_bytes(4, "little") for n in data.shape)
  dtype = b"cnumpy\ndtype\n(" + text(b"u1") + b"K\0K\1tR(K\3" + text(b"|") + b"NNNJ\xff\xff\xff\xff"
  dtype += b"J\xff\xff\xff\xffK\0tb"
  array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\0t" + text(b"b") + b"tR"
  array += b"(K\1(" + shape + b"t" + dtype + b"I00\n" + text(data.tobytes()) + b"tb"
  labels = b"(" + b"K\1" * len(x) + b"l"
  return b"\x80\2}(" + text(b"data") + array + text(b"labels") + labels + b"u."


def test_digits():
  images = load("digits", validation_fraction=0.06)
  assert images.shape == (8, 8, 1)
  assert images.vocab_size == 17
  counts = {name: len(split) for name, split in images.splits.items()}
  assert sum(counts.values()) == 1797
  assert 60 < counts["validation"] < 160
  found = np.concatenate([values(images, split) for split in counts])
  assert found.max() == 16
  assert images.describe().startswith("data digits, 8 x 8 x 1 = 64 values of 17 levels\n  train: ")
  assert load("digits", validation_fraction=0.06).fingerprint == images.fingerprint
  assert load("digits").fingerprint != images.fingerprint


def test_digits_without_the_package(monkeypatch):
  monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
  with pytest.raises(DataError, match="'digits' without `scikit-learn` .pip install"):
    load("digits")


def test_cifar10(tmp_path):
  files = write_cifar(tmp_path / "cifar-10-batches-py")
  (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(
    python2_pickle(files["data_batch_3"])
  )
  images = load("cifar10", tmp_path)
  assert images.shape == (32, 32, 3)
  np.testing.assert_array_equal(values(images, "test"), files.pop("test_batch"))
  both = np.concatenate([values(images, split) for split in ("train", "validation")])
  same_pictures(both, np.concatenate(list(files.values())))
  again = load("auto", tmp_path / "cifar-10-batches-py", sequence_length=3072)
  np.testing.assert_array_equal(again.splits["validation"][:], images.splits["validation"][:])
  write_cifar(tmp_path, protocol=0)
  assert load("cifar10", tmp_path).fingerprint == images.fingerprint  # the inner folder is read


def test_equal_pictures_stay_together(tmp_path):
  files = write_cifar(tmp_path)
  batch = {b"data": planar(files["data_batch_1"]), b"labels": [1] * 5}
  (tmp_path / "data_batch_2").write_bytes(pickle.dumps(batch, protocol=2))
  images = load("cifar10", tmp_path)
  sides = [{x.tobytes() for x in images.splits[split][:]} for split in ("train", "validation")]
  assert not sides[0] & sides[1]


def test_mnist(tmp_path):
  train, test = pictures(9, 28, 28, 1), pictures(3, 28, 28, 1)
  header = lambda x: b"\0\0\x08\x03" + np.array(x.shape[:3], ">u4").tobytes()  # noqa: E731
  packed = gzip.compress(header(train) + train.tobytes())
  (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(packed)
  (tmp_path / "t10k-images.idx3-ubyte").write_bytes(header(test) + test.tobytes())
  images = load("mnist", tmp_path)
  assert images.dims == 784
  np.testing.assert_array_equal(values(images, "test"), test)
  both = np.concatenate([values(images, split) for split in ("train", "validation")])
  same_pictures(both, train)


def test_imagenet64_in_memory_and_from_the_cache(tmp_path, monkeypatch):
  parts = [pictures(2, 64, 64, 3) for _ in range(11)]
  for i, x in enumerate(parts):
    name = f"train_data_batch_{i}.npz" if i else "val_data.npz"
    save = np.savez_compressed if i % 2 else np.savez
    save(tmp_path / name, data=planar(x), labels=np.ones(2, int))
  images = load("imagenet64", tmp_path)
  assert set(images.splits) == {"train", "validation"}
  assert "box filter" in images.describe()
  np.testing.assert_array_equal(values(images, "train"), np.concatenate(parts[1:]))
  np.testing.assert_array_equal(values(images, "validation"), parts[0])
  monkeypatch.setattr("attnzoo.experiments.data.images._LARGE_BYTES", 1000)
  for _ in range(2):  # written, then found
    mapped = load("imagenet64", tmp_path, cache=str(tmp_path / "cache"))
    for split in images.splits:
      assert isinstance(mapped.splits[split].values, np.memmap)
      np.testing.assert_array_equal(mapped.splits[split][:], images.splits[split][:])
    assert mapped.fingerprint == images.fingerprint
  (file,) = (tmp_path / "cache").rglob("train.values")
  file.write_bytes(b"short")
  with pytest.raises(DataError, match="cache must hold 245,760 bytes in train.values; got 5"):
    load("imagenet64", tmp_path, cache=str(tmp_path / "cache"))


@pytest.mark.parametrize("channels", [1, 3])
def test_folders_of_png(tmp_path, channels):
  parts = {name: pictures(7, 6, 5, channels) for name in ("train_6x5", "valid_6x5", "test")}
  for name, x in parts.items():
    (tmp_path / name).mkdir()
    for i, picture in enumerate(x):
      Image.fromarray(picture.squeeze()).save(tmp_path / name / f"{i}.png")
  images = load("auto", tmp_path)
  assert images.name == "images"
  for split, x in zip(("train", "validation", "test"), parts.values(), strict=True):
    np.testing.assert_array_equal(values(images, split), x)
  alone = load("images", tmp_path / "train_6x5")
  both = np.concatenate([values(alone, split) for split in ("train", "validation")])
  same_pictures(both, parts["train_6x5"])


def test_png_of_few_colours(tmp_path):
  x = pictures(4, 4, 4, 3)
  for i, picture in enumerate(x):
    Image.fromarray(picture).quantize(16).save(tmp_path / f"{i}.png")
  images = load("images", tmp_path)
  both = np.concatenate([values(images, split) for split in ("train", "validation")])
  same_pictures(both, x)


def test_batches_are_shifted_scans(tmp_path):
  write_cifar(tmp_path)
  config = DataConfig(
    source="cifar10", path=str(tmp_path), sequence_length=0, batch_size=3, workers=2
  )
  images = load_data(config)
  batches = train_batches(images, config)
  count = len(images.splits["train"])
  seen = []
  for _ in range(count):
    batch = next(batches)
    assert set(batch) == {"tokens", "targets", "weights"}
    assert {x.shape for x in batch.values()} == {(3, 3072)}
    np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    assert not batch["tokens"][:, 0].any()
    assert batch["weights"].min() == 1
    seen += [row.astype(np.uint8).tobytes() for row in batch["targets"]]
  epochs = [seen[i * count : (i + 1) * count] for i in range(3)]
  everything = sorted(row.tobytes() for row in images.splits["train"][:])
  assert [sorted(epoch) for epoch in epochs] == [everything] * 3
  assert epochs[0] != epochs[1]
  assert batches.tokens_per_step == 3 * 3072
  # Position 4 W C + 1 C + 2 of the scan is the last channel of the second pixel of the fifth row.
  picture = images.as_images(batch["targets"])[1]
  assert batch["targets"][1, 4 * 96 + 3 + 2] == picture[4, 1, 2]

  state = batches.get_state()
  expected = next(batches)
  again = train_batches(images, dataclasses.replace(config, workers=2))
  again.set_state(state)
  np.testing.assert_array_equal(next(again)["targets"], expected["targets"])
  other = train_batches(images, dataclasses.replace(config, seed=1))
  with pytest.raises(DataError, match="set_state must get a state of these data"):
    other.set_state(state)
  hosts = [train_batches(images, config, process_index=i, process_count=3) for i in range(3)]
  first = next(train_batches(images, config))["targets"]
  np.testing.assert_array_equal(np.concatenate([next(host)["targets"] for host in hosts]), first)


def test_evaluation_covers_each_picture_once(tmp_path):
  write_cifar(tmp_path)
  config = DataConfig(source="cifar10", path=str(tmp_path), sequence_length=0, batch_size=3)
  images = load_data(config)
  batches = evaluation_batches(images, config, split="test")
  rows = {
    name: np.concatenate([batch[name] for batch in batches]) for name in ("targets", "weights")
  }
  np.testing.assert_array_equal(rows["weights"], np.repeat([1, 1, 1, 1, 0, 0], 3072).reshape(6, -1))
  np.testing.assert_array_equal(rows["targets"][:4], images.splits["test"][:])
  part = evaluation_batches(images, config, split="test", max_tokens=3073)
  assert sum(batch["weights"].sum() for batch in part) == 2 * 3072
  with pytest.raises(DataError, match="split must be one of"):
    evaluation_batches(images, config, split="tset")
  with pytest.raises(DataError, match="overlap must be 0"):
    evaluation_batches(images, config, overlap=1)


def png(x, mode=None):
  file = io.BytesIO()
  Image.fromarray(x, mode).save(file, "PNG")
  return file.getvalue()


class Harmful:
  def __reduce__(self):
    return print, ("this must not be printed",)


ERRORS = {
  "missing": ("cifar10", {}, "folder with data_batch_1; got {path} (unpack cifar-10-python.tar.gz"),
  "truncated": ("cifar10", {"data_batch_2": lambda x: x[:-500]}, "{path}/data_batch_2: no whole"),
  "no pickle": ("cifar10", {"test_batch": b"GIF89a"}, "{path}/test_batch: no whole pickle"),
  "function": ("cifar10", {"data_batch_1": pickle.dumps({"data": Harmful()})},
               "{path}/data_batch_1: a pickle of builtins.print, which is refused"),
  "objects": ("cifar10", {"data_batch_1": pickle.dumps({"data": np.array([None])}, 2)},
              "{path}/data_batch_1: a pickled array of type 'O8', which is refused"),
  "no labels": ("cifar10", {"data_batch_1": pickle.dumps({"data": np.zeros(9, np.uint8)}, 2)},
                "{path}/data_batch_1: no 'labels' among ['data']"),
  "other shape": ("cifar10", {"data_batch_1": pickle.dumps(
    {"data": np.zeros((1, 784), np.uint8), "labels": [0]}, 2)},
                  "data [1, 784] with 1 labels, not [n, 3072]"),
  "no npz": ("imagenet64", {}, "be a folder with train_data_batch_1.npz; got {path}"),
  "bad npz": ("imagenet64", dict.fromkeys([f"train_data_batch_{i}.npz" for i in range(1, 11)]
                                          + ["val_data.npz"], b"x"),
              "{path}/train_data_batch_1.npz: "),
  "no idx": ("mnist", {}, "be a folder with train-images-idx3-ubyte or train-images-idx3-ubyte.gz"),
  "bad gz": ("mnist", {"train-images-idx3-ubyte.gz": b"x", "t10k-images-idx3-ubyte": b"x"},
             "{path}/train-images-idx3-ubyte.gz: "),
  "short idx": ("mnist", {"train-images-idx3-ubyte": b"\0\0\x08\x03" + bytes(13),
                          "t10k-images-idx3-ubyte": b"x"},
                "{path}/train-images-idx3-ubyte with 17 bytes"),
  "no png": ("images", {"a.txt": b"x"}, "hold PNG files; got {path} without any"),
  "no training": ("images", {"test/a.png": b"x"}, "hold a folder 'train' beside its other splits"),
  "bad png": ("images", {"a.png": b"x"}, "{path}/a.png: cannot identify image file"),
  "cut png": ("images", {"a.png": png(np.zeros((9, 9, 3), np.uint8))[:-30]}, "{path}/a.png: "),
  "sizes": ("images", {"a.png": png(np.zeros((9, 9), np.uint8)),
                       "b.png": png(np.zeros((9, 8), np.uint8))},
            "one shape, [9, 9, 1] as a.png; got {path}/b.png of [9, 8, 1] (L)"),
  "alpha": ("images", {"a.png": png(np.zeros((9, 9, 4), np.uint8))}, "mode RGBA: only 8 bits"),
  "alike": ("images", {f"{i}.png": png(np.zeros((2, 2), np.uint8)) for i in range(3)},
            "leave a non-empty train split; got 3 pictures, all alike"),
  "path": ("images", None, "path must name an existing file or folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_file(tmp_path, case, capsys):
  source, files, message = ERRORS[case]
  if source == "cifar10" and files:
    write_cifar(tmp_path)
  for name, content in (files or {}).items():
    (tmp_path / name).parent.mkdir(exist_ok=True)
    old = (tmp_path / name).read_bytes() if callable(content) else b""
    (tmp_path / name).write_bytes(content(old) if callable(content) else content)
  path = tmp_path / "absent" if files is None else tmp_path
  with pytest.raises(DataError) as caught:
    load(source, path)
  assert message.format(path=path) in str(caught.value)
  assert capsys.readouterr().out == ""


def test_lengths_and_sources_that_do_not_fit():
  with pytest.raises(DataError, match=r"sequence_length must be 0 or 64, .*\(8, 8, 1\); got 512"):
    load("digits", sequence_length=512)
  with pytest.raises(DataError, match="path must be empty for source 'digits'"):
    load("digits", "x")
  with pytest.raises(DataError, match="sequence_length must be at least 1 for text; got 0"):
    load("auto", __file__)
  with pytest.raises(DataError, match="got 'digits' .pictures have no text"):
    load_corpus(DataConfig(source="digits", sequence_length=64))


def test_grid(tmp_path):
  x = np.arange(5 * 32 * 32 * 3).reshape(5, 32, 32, 3) % 17
  pixels = grid(x, levels=17)
  assert pixels.shape == (2 * 64 + 2, 3 * 64 + 4, 3)  # 3 columns, doubled, with gaps
  np.testing.assert_array_equal(pixels[0:64:2, 66:130:2], np.round(x[1] * 255 / 16))
  np.testing.assert_array_equal(pixels[66::2, 67:130:2], np.round(x[4] * 255 / 16))
  assert pixels[64:66].min() == pixels[66:, 132:].min() == 255
  path = write_grid(tmp_path / "grid.png", x[..., :1], levels=17, columns=5)
  with Image.open(path) as image:
    np.testing.assert_array_equal(image, grid(x[..., :1], levels=17, columns=5)[..., 0])
  for wrong, message in (
    (x[0], r"must be \[N, H, W, C\] with 1 or 3 channels; got \[32, 32, 3\]"),
    (x / 16, r"must hold whole numbers in \[0, 17\); got float64"),
    (x + 1, r"got int64, 1..17"),
  ):
    with pytest.raises(ValueError, match=message):
      grid(wrong, levels=17)
