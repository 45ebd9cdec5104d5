"""Multi-query associative recall (MQAR): key-value pairs, then some of the keys again.

An example of length T with n pairs over a vocabulary of V ids is

  k1 v1 k2 v2 ... kn vn | x x ... k3 x ... k1 x ...

keys from 1..V/2-1, values from V/2..V-1, everything else random ids (or 0). Each key comes once
more behind the context, and there, only there, the target is its value; the value itself does not
follow. Of the S = (T - 2n) / 2 places behind the context, place i (from 1) is drawn with weight
i^(power - 1), without replacement: small powers ask early, 1 asks everywhere alike.

Paper: Zoology (2023), section 4; the examples are those of its code, number for number: it draws
with numpy's legacy generator, and the random ids with PyTorch's. Both are the Mersenne Twister
seeded alike, so no PyTorch is needed here.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from attnzoo.experiments.data.config import DataConfig
from attnzoo.experiments.data.documents import digest
from attnzoo.experiments.data.errors import refuse
from attnzoo.experiments.data.examples import NO_TARGET, ExampleBlock, ExampleSet


class Segment(NamedTuple):
  """Examples of one shape."""

  length: int  # tokens T, even
  pairs: int  # n; 4 n <= T
  examples: int


def parse_segments(text: str, argument: str) -> tuple[Segment, ...]:
  """`64:4:1000,128:8:500`: length, pairs and number of examples of each segment.

  Raises:
    DataError: no segments, or one that is not three numbers.
  """
  segments = []
  for part in text.split(","):
    numbers = part.strip().split(":")
    if len(numbers) != 3 or not all(number.isdigit() for number in numbers):
      raise refuse(argument, "be length:pairs:examples,... in whole numbers", repr(text),
                   "such as 64:4:1000,128:8:1000")  # fmt: skip
    segments.append(Segment(*map(int, numbers)))
  return tuple(segments)


def segment_seeds(seed: int, train: int, test: int) -> tuple[list[int], list[int]]:
  """The seeds of so many training and test segments; 123 gives those of the paper's figures."""
  draw = np.random.RandomState(seed)
  train_seeds = draw.randint(0, 2**31, size=train)
  test_seeds = draw.randint(2**31, 2**32, size=test)
  return train_seeds.tolist(), test_seeds.tolist()


def draw_examples(
  segment: Segment,
  vocab_size: int,
  *,
  seed: int,
  power: float = 0.01,
  fillers: np.random.RandomState | None = None,
) -> tuple[Int[np.ndarray, "N T"], Int[np.ndarray, "N T"]]:
  """(tokens, labels) int32; a label is NO_TARGET where nothing is asked.

  Args:
    segment: shape and number of the examples.
    vocab_size: V, ids altogether.
    seed: of keys, values and places, 0..2^32-1.
    power: of the places, see above.
    fillers: generator of the random ids; a segment takes N T numbers from it. None: zeros.

  Raises:
    DataError: sizes that do not go together.
  """
  _check(segment, vocab_size, power)
  length, pairs, count = segment
  draw = np.random.RandomState(seed)
  # Each example is a permutation of its own: these draws cannot be made at once.
  choose = lambda pool: np.stack([draw.choice(pool, pairs, replace=False) for _ in range(count)])  # noqa: E731
  keys = choose(np.arange(1, vocab_size // 2))  # [N, n]
  values = choose(np.arange(vocab_size // 2, vocab_size))
  slots = (length - 2 * pairs) // 2
  weights = power * np.arange(1, slots + 1) ** (power - 1)
  weights /= weights.sum()
  places = np.stack(
    [draw.choice(slots, pairs, replace=False, p=weights) for _ in range(count)]
  )  # [N, n], counted from 0
  tokens = np.zeros((count, length), np.int32)
  labels = np.full((count, length), NO_TARGET, np.int32)
  tokens[:, 0 : 2 * pairs : 2] = keys
  tokens[:, 1 : 2 * pairs : 2] = values
  asked = 2 * pairs + 2 * places
  np.put_along_axis(tokens, asked, keys.astype(np.int32), axis=1)
  np.put_along_axis(labels, asked, values.astype(np.int32), axis=1)
  if fillers is not None:
    ids = fillers.randint(0, 2**32, size=tokens.shape, dtype=np.uint32) % np.uint32(vocab_size)
    tokens = np.where(tokens == 0, ids.astype(np.int32), tokens)
  return tokens, labels


def _check(segment: Segment, vocab_size: int, power: float) -> None:
  length, pairs, count = segment
  if length % 2 or length < 2:
    raise refuse("length", "be even", length, "keys and values alternate")
  if pairs < 1 or 4 * pairs > length:
    raise refuse("pairs", f"lie in 1..{length // 4}, a quarter of the length", pairs,
                 "pairs take half of it, what is asked the other half")  # fmt: skip
  if count < 1:
    raise refuse("examples", "be at least 1", count, "a count")
  if vocab_size <= length:
    raise refuse("mqar_vocab_size", f"be above the length {length}", vocab_size,
                 "keys and values are drawn without repetition")  # fmt: skip
  if not 0 < power <= 1:
    raise refuse("mqar_power", "lie in (0, 1]", power, "0.01 asks early, 1 everywhere alike")


def segments_of(config: DataConfig) -> dict[str, tuple[Segment, ...]]:
  """The checked segments of each split.

  Raises:
    DataError: segments that cannot be read, or sizes that do not go together.
  """
  parts = dict(
    train=parse_segments(config.mqar_train, "mqar_train"),
    validation=parse_segments(config.mqar_test, "mqar_test"),
  )
  for segment in (*parts["train"], *parts["validation"]):
    _check(segment, config.mqar_vocab_size, config.mqar_power)
  return parts


def load_mqar(config: DataConfig) -> ExampleSet:
  """The segments that the config names; `config.seed` decides all of their numbers.

  The random ids of all segments, training first, are one stream.

  Raises:
    DataError: segments that cannot be read, or sizes that do not go together.
  """
  parts = segments_of(config)
  seeds = segment_seeds(config.seed, len(parts["train"]), len(parts["validation"]))
  fillers = np.random.RandomState(config.seed) if config.mqar_random_fillers else None
  splits = {}
  for (name, segments), split_seeds in zip(parts.items(), seeds, strict=True):
    blocks = []
    for segment, seed in zip(segments, split_seeds, strict=True):
      arrays = draw_examples(
        segment, config.mqar_vocab_size, seed=seed, power=config.mqar_power, fillers=fillers
      )
      blocks.append(ExampleBlock(f"{segment.length} tokens, {segment.pairs} pairs", *arrays))
    splits[name] = tuple(blocks)
  key = digest("mqar", config.seed, config.mqar_vocab_size, config.mqar_power,
               config.mqar_random_fillers, *(str(part) for part in parts.values()))  # fmt: skip
  return ExampleSet("mqar", splits, config.mqar_vocab_size, key)


def distances(block: ExampleBlock) -> Int[np.ndarray, "N n"]:
  """Tokens from each query back to its key in the context, in the order of `targets_of`."""
  places, _ = block.targets_of()
  pairs = places.shape[1]
  asked = np.take_along_axis(block.tokens, places, axis=1)  # [N, n]
  keys = block.tokens[:, 0 : 2 * pairs : 2]
  return places - 2 * np.argmax(asked[:, :, None] == keys[:, None, :], axis=2)
