"""Passkey retrieval: a number somewhere in a long text of no interest, and the question for it.

A text of N bytes is

  <filler> The pass key is 48213. <filler> The pass key is 48213

The filler is five sentences again and again, from a random byte of them on, without digits. The
sentence with the key stands at a depth drawn uniformly from all bytes of the filler; the digits of
a key are drawn without repetition. Answered are the digits at the end.

As tokens a text has the end id in front, as documents have in training, and behind it: N + 2 ids.
The task is that of Landmark Attention (2023). The paper of softplus attention pins neither wording
nor depths nor the number of trials; those here are ours.
"""

import json
import pathlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from attnzoo.experiments.data.errors import refuse
from attnzoo.experiments.data.examples import NO_TARGET, ExampleBlock
from attnzoo.experiments.data.tokenizers import ByteTokenizer

FILLER = (
  "Rain fell on the old roof. A dog slept by the stove. Nobody came. The clock went on and on. "
)
KEY = "The pass key is {}. "
QUESTION = "The pass key is "


class Passkeys(NamedTuple):
  """Texts of one length, without their ids in front and behind."""

  length: int  # tokens, both ids included
  prompts: tuple[str, ...]  # up to the answer
  answers: tuple[str, ...]  # digits
  depths: Int[np.ndarray, "N"]  # bytes of filler before the sentence with the key


def shortest(digits: int) -> int:
  """Tokens of a text with so many digits and one byte of filler."""
  return len(KEY.format("0" * digits)) + len(QUESTION) + digits + 3


def draw_passkeys(length: int, count: int, digits: int, *, seed: int) -> Passkeys:
  """Texts of exactly `length` tokens; the same seed gives the same ones.

  Raises:
    DataError: they do not fit, or a number that is not positive.
  """
  for name, value in (("count", count), ("digits", digits)):
    if value < 1:
      raise refuse(f"passkey {name}", "be at least 1", value, "such as 100 texts of 5 digits")
  if digits > 10:
    raise refuse("passkey digits", "be at most 10", digits, "no digit comes twice in a key")
  least = shortest(digits)
  if length < least:
    raise refuse("passkey length", f"be at least {least} for {digits} digits", length,
                 "the sentence with the key and the question must fit")  # fmt: skip
  draw = np.random.default_rng([seed, length, digits])
  room = length - least + 1  # bytes of filler
  filler = FILLER * (room // len(FILLER) + 2)
  depths = draw.integers(0, room + 1, count)
  phases = draw.integers(0, len(FILLER), count)
  prompts, answers = [], []
  keys = draw.permuted(np.tile(np.arange(10), (count, 1)), axis=1)[:, :digits]
  for depth, phase, key in zip(depths, phases, keys, strict=True):
    around, answer = filler[phase : phase + room], "".join(map(str, key))
    prompts.append(around[:depth] + KEY.format(answer) + around[depth:] + QUESTION)
    answers.append(answer)
  return Passkeys(length, tuple(prompts), tuple(answers), depths)


def draw_up_to(longest: int, tokens: int, digits: int, *, seed: int) -> list[Passkeys]:
  """Texts of up to `longest` tokens, so many tokens in all or a few more; short ones come often.

  The logarithm of the length is uniform: as many texts have 50 to 60 tokens as have 100 to 120.
  """
  least = shortest(digits)
  draw = np.random.default_rng([seed, longest, tokens, digits])
  most = tokens // least + 1
  lengths = np.exp(draw.uniform(np.log(least), np.log(longest + 1), most)).astype(int)
  lengths = lengths[: 1 + np.searchsorted(np.cumsum(lengths), tokens)]
  found = zip(*np.unique(lengths, return_counts=True), strict=True)
  return [draw_passkeys(int(length), int(count), digits, seed=seed) for length, count in found]


def as_examples(passkeys: Passkeys) -> ExampleBlock:
  """Tokens [N, T] of the texts, labels where the next token is a digit of the answer."""
  tokenizer = ByteTokenizer()
  end = np.full((len(passkeys.prompts), 1), tokenizer.end_id, np.int32)
  pairs = zip(passkeys.prompts, passkeys.answers, strict=True)
  text = np.array([list((prompt + answer).encode()) for prompt, answer in pairs], np.int32)
  tokens = np.concatenate([end, text, end], axis=1)  # [N, T]
  labels = np.full_like(tokens, NO_TARGET)
  first = len(passkeys.answers[0])
  labels[:, -first - 2 : -2] = tokens[:, -first - 1 : -1]
  return ExampleBlock(f"passkey, {passkeys.length} tokens", tokens, labels)


def write_pairs(file: pathlib.Path, groups: Iterable[Passkeys]) -> None:
  """The texts as prompts with answers, a line each: what `source="sft"` learns from.

  With `sft_open` it makes the tokens of `as_examples` of them.
  """
  pairs = (pair for group in groups for pair in zip(group.prompts, group.answers, strict=True))
  lines = [json.dumps(dict(prompt=prompt, answer=answer)) + "\n" for prompt, answer in pairs]
  file.write_text("".join(lines))
