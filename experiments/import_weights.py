"""Makes a workdir of a published checkpoint, for generate, evaluate and train.

    python -m attnzoo.experiments.import_weights --source=TransNormerLLM-385M \\
        --tokenizer=tokenizer.json --workdir=runs/tnl-385m --prompt="The weather"
    python -m attnzoo.experiments.generate --workdir=runs/tnl-385m --prompt="The weather"

The source is a folder with shards and their index, or a .bin, .pth or .safetensors file. Its sizes
are those of --model, or of the config.json beside it; checkpoints of RAT have no such file and tell
which preset they are by their shapes, where those say it. Files are mapped, not loaded: memory is
needed for the parameters once (4 bytes each; 2 with --param_dtype=bfloat16) and for the largest
stack of matrices, a quarter of them or so, a second time.
To train on, use --config=lm:<model> and the same workdir; the optimizer starts anew. TransICD codes
notes: its workdir is for evaluate and explain, with the tables in --data_path.
"""

import contextlib
import dataclasses
import pathlib

import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from attnzoo.experiments import command_line
from attnzoo.experiments.data import DataConfig, Tokenizer, describe_tokenizer, load_tokenizer
from attnzoo.experiments.generation import Sampling, generate
from attnzoo.experiments.training import checkpoints, config, state
from attnzoo.layers import DecoderLM
from attnzoo.zoo import models, published
from attnzoo.zoo.transicd import TransICDConfig

_SOURCE = flags.DEFINE_string("source", "", "A folder, or a .bin, .pth or .safetensors file.")
_MODEL = flags.DEFINE_string("model", "", "Preset of the zoo; empty = the checkpoint says it.")
_TOKENIZER = flags.DEFINE_string("tokenizer", "", "Its tokenizer.json (or: bytes).")
_END_TOKEN = flags.DEFINE_string("end_token", "", "Token between documents; empty = usual names.")
_WORKDIR = flags.DEFINE_string("workdir", "", "Folder to make.")
_PARAM_DTYPE = flags.DEFINE_enum("param_dtype", "float32", ["float32", "bfloat16"], "As stored.")
_PROMPT = flags.DEFINE_string("prompt", None, "Text to check the result with.")
_DATA_PATH = flags.DEFINE_string("data_path", "mimic3", "TransICD: folder with MIMIC-III's tables.")


def main(_) -> None:
  for flag in (_SOURCE, _WORKDIR):
    if not flag.value:
      raise ValueError(f"--{flag.name} must be given; got '' (see --help)")
  if checkpoints.has_checkpoints(_WORKDIR.value):
    raise ValueError(
      f"--workdir must not hold a run yet; got {_WORKDIR.value} with one (choose another)"
    )
  tokenizer = load_tokenizer(_TOKENIZER.value, _END_TOKEN.value) if _TOKENIZER.value else None
  if _PROMPT.value is not None and tokenizer is None:
    raise ValueError("--tokenizer must be given with --prompt; got '' (see --help)")
  model_config = _model_config()
  if isinstance(model_config, TransICDConfig) and tokenizer is not None:
    raise ValueError(
      f"--tokenizer must not be given for TransICD; got {_TOKENIZER.value} (its words are those of"
      " the notes in --data_path)"
    )
  if tokenizer is not None and tokenizer.vocab_size > model_config.vocab_size:
    raise ValueError(
      f"--tokenizer must have at most the model's {model_config.vocab_size} ids; got"
      f" {tokenizer.vocab_size} in {_TOKENIZER.value} (is it the model's?)"
    )
  model = published.import_weights(_SOURCE.value, model_config)
  _save(model, model_config, tokenizer)
  count = models.parameter_count(model_config)
  print(f"{models.family_of(model_config)}, {count:,} parameters, now in {_WORKDIR.value}")
  if _PROMPT.value is not None:
    _check(model, tokenizer, _PROMPT.value)


def _model_config():
  found = published.find_config(_SOURCE.value, _MODEL.value)
  return dataclasses.replace(found, param_dtype=_PARAM_DTYPE.value)


def _save(model: nnx.Module, model_config, tokenizer: Tokenizer | None) -> None:
  data = DataConfig(tokenizer=_TOKENIZER.value or "bytes", end_token=_END_TOKEN.value)
  if isinstance(model_config, TransICDConfig):  # its vocabulary and codes are those of the notes
    labels = "50" if model_config.labels == 50 else "full"
    length = model_config.max_length
    data = DataConfig(source="mimic3", path=_DATA_PATH.value, labels=labels, sequence_length=length,
                      batch_size=8)  # fmt: skip
  record = dict(
    experiment=config.to_json_dict(config.Experiment(model=model_config, data=data)),
    tokenizer=None if tokenizer is None else describe_tokenizer(tokenizer),
  )
  _, params = state.take_apart(model)
  weights = state.TrainState(jnp.zeros((), jnp.int32), params, None)
  pathlib.Path(_WORKDIR.value).expanduser().mkdir(parents=True, exist_ok=True)
  checkpoints.write_config(_WORKDIR.value, record)
  with contextlib.closing(checkpoints.Checkpoints(_WORKDIR.value)) as saved:
    saved.save(0, weights, {"data": None}, None)
    saved.wait()


def _check(model: DecoderLM, tokenizer: Tokenizer, prompt: str) -> None:
  """Prints what a wrong import would get wrong: the likeliest next tokens, and a continuation."""
  ids = [tokenizer.end_id, *tokenizer.encode(prompt).tolist()]
  logits = np.asarray(model(np.array([ids], np.int32))[0][0, -1])
  likeliest = np.argsort(-logits)[:5]
  shown = ", ".join(f"{tokenizer.decode([i])!r} {logits[i]:.4f}" for i in likeliest)
  print(f"largest logits after {prompt!r}: {shown}")
  drawn = generate(model, [ids], max_new_tokens=20, sampling=Sampling(temperature=0))
  print(f"greedy: {prompt}{tokenizer.decode([int(token[0]) for token in drawn])}")


if __name__ == "__main__":
  command_line.run(main)
