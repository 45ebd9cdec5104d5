"""Trains a byte-level BPE tokenizer on the training split of a text, for --config.data.tokenizer.

    python -m attnzoo.experiments.make_tokenizer --vocab_size=1024 --out=tokenizer.json
    python -m attnzoo.experiments.make_tokenizer --path=texts --vocab_size=8192

Without --path the text is the Python standard library; that is where data/stdlib_bpe.json is from
(Python 3.12.1, 1024 ids), which is shipped, so that figures do not depend on the installed Python
more than they must. Any text can be encoded: no byte is unknown.
"""

import pathlib

from absl import flags

from attnzoo.experiments import command_line
from attnzoo.experiments.data import DataConfig
from attnzoo.experiments.data.tokenizer_training import train_tokenizer

_SOURCE = flags.DEFINE_string("source", "auto", "As --config.data.source; any one of text.")
_PATH = flags.DEFINE_string("path", "", "File or folder; empty = the Python standard library.")
_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 1024, "Ids, 256 bytes and the end of a document"
                                   " among them.", lower_bound=257)  # fmt: skip
_OUT = flags.DEFINE_string("out", "tokenizer.json", "File to write.")


def main(_) -> None:
  config = DataConfig(source=_SOURCE.value, path=_PATH.value)
  out = pathlib.Path(_OUT.value).expanduser()
  if not out.parent.is_dir():
    raise FileNotFoundError(f"--out: {out.parent} must be a folder; create it")
  tokenizer = train_tokenizer(config, _VOCAB_SIZE.value)
  tokenizer.save(str(out))
  ids = tokenizer.get_vocab_size()
  print(f"{out}: {ids} ids; set --config.data.tokenizer={out} --config.model.vocab_size={ids}")


if __name__ == "__main__":
  command_line.run(main)
