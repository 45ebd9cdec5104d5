"""How fast models read a prompt and generate, and what they remember, side by side.

  python -m attnzoo.experiments.generation_speed --models=based-tiny,attn-tiny
  python -m attnzoo.experiments.generation_speed --models=based-1b,attn-1b --batch_size=128 \
    --tokens=1024 --dtype=bfloat16             (the setting of the BASED paper's figure, on a GPU)

Weights are random: speed does not depend on them. Prompts are read in one piece; generation takes
the likeliest token again and again, in one compiled loop. The models run in turn, so that a busy
machine disturbs them alike; the table has medians. "state" is what one sequence needs after prompt
and generated tokens: a softmax model's grows with them.
"""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from attnzoo import zoo
from attnzoo.experiments import command_line
from attnzoo.experiments.benchmarking import report, timing
from attnzoo.zoo import models

DTYPES = ("float32", "bfloat16")
FLAGS = flags.FLAGS


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
  """Not done at import: other programs of this folder have flags of the same names."""
  number = functools.partial(flags.DEFINE_integer, flag_values=values)
  flags.DEFINE_list(
    "models", ["based-tiny", "attn-tiny"], "Presets; the first is compared with.",
    flag_values=values,
  )  # fmt: skip
  number("batch_size", 8, "Sequences at once.", lower_bound=1)
  number("prompt", 512, "Tokens to read first; 0 = generate from nothing.", lower_bound=0)
  number("tokens", 128, "Tokens to generate.", lower_bound=1)
  number("repeats", 5, "Most runs of each.", lower_bound=3)
  flags.DEFINE_enum(
    "dtype", None, DTYPES, "Default: float32 on a CPU, else bfloat16.", flag_values=values
  )
  flags.DEFINE_float("seconds", 20.0, "After 3 runs, stop when they took this.", flag_values=values)
  flags.DEFINE_string("json", None, "Write the results here.", flag_values=values)


def main(_) -> None:
  dtype = FLAGS.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
  for name in FLAGS.models:
    models.get_config(name)  # unknown names are told before anything is built
  env = report.environment()
  passes, facts = {}, {}
  for name in FLAGS.models:
    print(f"{name}: builds and compiles ...", file=sys.stderr, flush=True)
    facts[name] = prepare(name, dtype, passes)
  spreads = timing.interleaved(passes, FLAGS.repeats, FLAGS.seconds)
  rows = [_row(name, facts[name], spreads) for name in FLAGS.models]
  print(report.head_line(env))
  print(f"batch {FLAGS.batch_size}, prompt {FLAGS.prompt}, {FLAGS.tokens} generated, {dtype}")
  print(render(rows))
  if FLAGS.json:
    setting = {name: FLAGS[name].value for name in ("batch_size", "prompt", "tokens")}
    with open(FLAGS.json, "w") as file:
      json.dump(dict(environment=env, dtype=dtype, **setting, rows=rows), file, indent=1)


def prepare(name: str, dtype: str, passes: dict) -> dict:
  """Builds one model, adds its runs to `passes`, and tells parameters and bytes of state."""
  model = zoo.create(name, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype)
  graph, variables = nnx.split(model)
  batch, length = FLAGS.batch_size, FLAGS.prompt + FLAGS.tokens
  prompt = np.random.default_rng(0).integers(0, model.vocab_size, (batch, max(FLAGS.prompt, 1)))
  prompt = jax.device_put(prompt.astype(np.int32))

  @jax.jit
  def read(variables):
    model = nnx.merge(graph, variables)
    hidden, state = model.hidden(prompt, state=model.init_state(batch, length))
    return model.logits(hidden[:, -1]), state

  @jax.jit
  def write(variables, logits, state):
    model = nnx.merge(graph, variables)

    def token(carry, _):
      logits, state = carry
      drawn = jnp.argmax(logits, -1).astype(jnp.int32)
      return model.step(drawn, state), drawn

    return jax.lax.scan(token, (logits, state), length=FLAGS.tokens)[1]

  start = jnp.zeros((batch, model.vocab_size), jnp.float32), model.init_state(batch, length)
  if FLAGS.prompt:
    start = jax.block_until_ready(read(variables))
    passes[name, "read"] = lambda: jax.block_until_ready(read(variables))
  passes[name, "write"] = lambda: jax.block_until_ready(write(variables, *start))
  passes[name, "write"]()  # compiles
  state = sum(leaf.nbytes for leaf in jax.tree.leaves(start[1]))
  return dict(parameters=models.parameter_count(models.get_config(name)), state=state // batch)


def _row(name: str, facts: dict, spreads: dict) -> dict:
  row = dict(model=name, parameters=facts["parameters"], state_bytes=facts["state"])
  for what, tokens in (("read", FLAGS.prompt), ("write", FLAGS.tokens)):
    if (name, what) in spreads:
      spread = spreads[name, what]
      row |= {
        f"{what}_s": spread.median,
        f"{what}_p20_s": spread.p20,
        f"{what}_p80_s": spread.p80,
        f"{what}_tokens_per_s": tokens * FLAGS.batch_size / spread.median,
      }
  return row


def render(rows: list[dict]) -> str:
  """A Markdown table; "x" compares with the first model."""
  lines = [("model", "parameters", "state", "read, tokens/s", "x", "written, tokens/s", "x")]
  lines.append(("---",) * len(lines[0]))
  for row in rows:
    cells = [row["model"], f"{row['parameters']:,}", f"{row['state_bytes'] / 2**20:.3g} MiB"]
    for what in ("read", "write"):
      speed = row.get(f"{what}_tokens_per_s")
      first = rows[0].get(f"{what}_tokens_per_s")
      cells += ["-", "-"] if speed is None else [f"{speed:,.0f}", f"{speed / first:.2f}"]
    lines.append(tuple(cells))
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
  define_flags()
  command_line.run(main)
