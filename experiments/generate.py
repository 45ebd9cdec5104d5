"""Writes text with a trained run.

    python -m attnzoo.experiments.generate --workdir=runs/stdlib_small --prompt="def main("
    python -m attnzoo.experiments.generate --prompt="import " --prompt="class " --top_p=0.9
    cat prompts.txt | python -m attnzoo.experiments.generate --prompts_file=-

With one prompt the text appears as it is drawn; several are drawn together and printed at the end.
The state does not grow, so neither does memory, however long the text.
"""

import sys

from absl import flags

from attnzoo.experiments import command_line
from attnzoo.experiments.data import NOTE_SOURCES, Tokenizer
from attnzoo.experiments.generation import Sampling, generate
from attnzoo.experiments.training import runs, state

_WORKDIR = flags.DEFINE_string("workdir", "runs/stdlib_small", "Folder of the run.")
_STEP = flags.DEFINE_string("step", "best", "Checkpoint: best, last or the number of a step.")
_MODEL_FIELDS = flags.DEFINE_string(
  "model_fields",
  "{}",
  'Fields of the model to run it with, as JSON: {"variant": "softmax_rw_p15"}.',
)
_TOKENIZER = flags.DEFINE_string("tokenizer", "", "Where the run's tokenizer.json is now.")
_PROMPT = flags.DEFINE_multi_string("prompt", [], "Text to go on from; may be given repeatedly.")
_PROMPTS_FILE = flags.DEFINE_string("prompts_file", "", "A prompt per line; - reads the terminal.")
_TOKENS = flags.DEFINE_integer("tokens", 400, "New tokens at most.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 takes the likeliest token.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Draw among the k likeliest only; 0 = all.")
_TOP_P = flags.DEFINE_float(
  "top_p", 0.95, "Of what top_k left, drop tokens behind more than this mass; 1 = none."
)
_SEED = flags.DEFINE_integer("seed", 0, "The same seed draws the same text.")
_IGNORE_END = flags.DEFINE_bool("ignore_end", False, "Go on after the end of a document.")


def main(_) -> None:
  sampling = Sampling(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value)
  texts = _prompts()
  fields = command_line.json_object("model_fields", _MODEL_FIELDS.value)
  run = runs.load(_WORKDIR.value, _STEP.value, fields)
  if run.experiment.data.source in NOTE_SOURCES:
    raise ValueError(
      f"--workdir must hold a model that writes; got {_WORKDIR.value}, whose model codes notes (use"
      " explain)"
    )
  tokenizer = runs.the_tokenizer(run, _TOKENIZER.value)
  opening = runs.opening(run.experiment.data, tokenizer)
  drawn = generate(
    state.merge(run.parts, run.params),
    [opening + tokenizer.encode(text).tolist() for text in texts],
    max_new_tokens=_TOKENS.value,
    sampling=sampling,
    seed=_SEED.value,
    end_id=None if _IGNORE_END.value else tokenizer.end_id,
  )
  if len(texts) == 1:
    _stream(texts[0], (int(token[0]) for token in drawn), tokenizer)
    return
  columns = list(zip(*([int(t) for t in tokens] for tokens in drawn), strict=True))
  for text, ids in zip(texts, columns, strict=True):
    print(f"=== {text}{tokenizer.decode(ids)}\n")


def _prompts() -> list[str]:
  texts = list(_PROMPT.value)
  if _PROMPTS_FILE.value == "-":
    texts += sys.stdin.read().splitlines()
  elif _PROMPTS_FILE.value:
    with open(_PROMPTS_FILE.value, encoding="utf-8") as file:
      texts += file.read().splitlines()
  return texts or [""]


def _stream(prompt: str, ids, tokenizer: Tokenizer) -> None:
  """Prints as it comes; a character of several bytes waits until it is whole."""
  print(prompt, end="", flush=True)
  decoder = tokenizer.decoder()
  for token in ids:
    print(decoder.push(token), end="", flush=True)
  print(decoder.finish())


if __name__ == "__main__":
  command_line.run(main)
