"""Times the operators: implementation by implementation, and beside other people's code.

  python -m attnzoo.experiments.benchmark
  python -m attnzoo.experiments.benchmark --case=length --passes=forward_backward --plot=speed.png
  python -m attnzoo.experiments.benchmark --json=new.json --compare=old.json

All candidates of a case run in turn in one process, so that a busy machine disturbs them alike; the
table has medians with the 20th and 80th percentile. forward_backward differentiates by query, key
and value (the decay of the released models is a constant), and by RAT's gates. A step updates its
state in place; where its cost depends on the position, that is the length of the case. GB/s and
GFLOP/s divide the operator's least traffic and its own operations by the time, for whoever computes
the same function. The error is relative to the definition in float64; the oracle stores a state per
token, so it is measured on a case cut to one row, one head and at most 1024 tokens, which the
column "of" spells out.
"""

import dataclasses
import functools
import importlib.util
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from attnzoo.experiments import operators
from attnzoo.experiments.benchmarking import report, timing
from attnzoo.experiments.benchmarking.peers import to_numpy
from attnzoo.pallas_kernels import compat
from attnzoo.pallas_kernels.cases import tagged

PASSES = ("forward", "forward_backward", "step")
DTYPES = ("float32", "bfloat16")
FLAGS = flags.FLAGS


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
  """Not done at import: other programs of this folder have flags of the same names."""
  string = functools.partial(flags.DEFINE_string, flag_values=values)
  several = functools.partial(flags.DEFINE_list, flag_values=values)
  number = functools.partial(flags.DEFINE_float, flag_values=values)
  string("operator", "lightning_attention", "Name in the operators' table.")
  string("case", "", "Regular expression: only cases whose name it is found in.")
  several("passes", list(PASSES), f"Among {', '.join(PASSES)}.")
  several("implementations", None, "Of the operator; by default xla and this platform's kernel.")
  flags.DEFINE_enum(
    "dtype", None, DTYPES, "Default: float32 on a CPU, else bfloat16.", flag_values=values
  )
  flags.DEFINE_integer(
    "repeats", 7, "Most runs of each candidate.", lower_bound=3, flag_values=values
  )
  number(
    "seconds", 4.0, "A candidate stops after 3 runs when they took this long; a peer whose one run "
    "would take longer, by its time at a shorter length, is skipped.",
  )  # fmt: skip
  number("memory_gb", 4.0, "Peers with larger [T, T] buffers are skipped.")
  flags.DEFINE_bool("peers", True, "Time other people's code too.", flag_values=values)
  string("json", None, "Write the results here.")
  string("compare", None, "JSON of an earlier run to compare with.")
  string("plot", None, "Write a plot of time against length here (PNG).")


@dataclasses.dataclass
class Session:
  """What is the same for the whole run, and what is learnt on the way."""

  operator: operators.Operator
  platform: str  # as the peers call it: cpu, cuda, tpu
  dtype: np.dtype
  implementations: tuple[str, ...]
  seconds: float
  memory: float
  repeats: int
  with_peers: bool = True
  # (peer, pass) -> seconds per unit of quadratic work, from its last case.
  pace: dict = dataclasses.field(default_factory=dict)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"flags begin with --; got {argv[1]!r} (see --help)")
  session = make_session()
  cases = choose_cases(session, FLAGS.case)
  if unknown := set(FLAGS.passes) - set(PASSES):
    raise app.UsageError(f"--passes must be among {PASSES}; got {sorted(unknown)}")
  old = None
  if FLAGS.compare:
    with open(FLAGS.compare) as file:
      old = json.load(file)
  env = report.environment()
  log(report.head_line(env))
  rows, skipped = [], {}
  for case in cases:
    for pass_name in FLAGS.passes:
      rows += measure(session, case, pass_name, skipped)
  print(report.head_line(env))
  print(f"{session.operator.name}, {session.dtype}\n{report.table(rows)}")
  print(report.not_run(skipped))
  if FLAGS.json:
    entries = [dict(zip(("case", "pass", "by"), key, strict=True), reason=reason)
               for key, reason in skipped.items()]  # fmt: skip
    with open(FLAGS.json, "w") as file:
      json.dump(dict(environment=env, operator=session.operator.name, rows=rows, not_run=entries),
                file, indent=1)  # fmt: skip
  if FLAGS.plot:
    title = f"{session.operator.name}, {session.dtype}, {env['device']}"
    report.plot(rows, FLAGS.plot, title)
  if old is not None:
    print(report.compare(rows, old, env)[0])


def make_session() -> Session:
  try:
    operator = operators.find(FLAGS.operator)
  except ValueError as error:
    raise app.UsageError(f"--{error}") from None
  platform = compat.target_platform()
  own = [operator.kernels[platform]] if platform in operator.kernels else []
  if own == ["triton"] and not compat.has_jax_triton():
    own = []
  return Session(
    operator=operator,
    platform=platform,
    dtype=jnp.dtype(FLAGS.dtype or ("float32" if platform == "cpu" else "bfloat16")),
    implementations=tuple(FLAGS.implementations or ("xla", *own)),
    seconds=FLAGS.seconds,
    memory=FLAGS.memory_gb * 1e9,
    repeats=FLAGS.repeats,
    with_peers=FLAGS.peers,
  )


def choose_cases(session: Session, pattern: str) -> list:
  """The bench cases of this platform whose name has the pattern, short ones first."""
  every = tagged(session.operator.cases.CASES, "bench")
  here = [c for c in every if session.platform != "cpu" or not c.options.get("gpu")]
  chosen = [case for case in here if re.search(pattern, case.name)]
  if not chosen:
    names = ", ".join(case.name for case in here)
    raise app.UsageError(f"--case must match a case; got {pattern!r} (there are: {names})")
  return sorted(chosen, key=lambda case: case.sizes["length"])


def measure(session: Session, case, pass_name: str, skipped: dict) -> list[dict]:
  """Times all candidates of one case and pass; adds what did not run, and why, to `skipped`."""
  if pass_name == "step" and session.operator.step is None:
    skipped[case.name, pass_name, session.operator.name] = "has no state, and so no step"
    return []
  log(f"{case.name} {pass_name} ...")
  inputs = session.operator.cases.make_inputs(case, session.dtype)
  static = session.operator.cases.static_options(case)
  candidates = dict(own_candidates(session, inputs, static, pass_name))
  for run in candidates.values():
    run()  # compiles
  if session.with_peers:
    cotangent = random_cotangents(session.operator, inputs, static)
    for peer in session.operator.peers:
      reason = peer_obstacle(session, peer, case, pass_name)
      if reason is None:
        arguments = inputs
        if pass_name == "step" and session.operator.step_inputs is not None:
          arguments = session.operator.step_inputs(inputs, **static)
        own = {name: static[name] for name in peer.options}
        run = peer.prepare(arguments, cotangent, pass_name, session.platform, **own)
        run()  # fills caches
        candidates[peer.name] = run
      else:
        skipped[case.name, pass_name, peer.name] = reason
        log(f"  {peer.name}: {reason}")
  spreads = timing.interleaved(candidates, session.repeats, session.seconds)
  errors = measure_errors(session, case, pass_name, candidates)
  rows = [row(session, case, pass_name, by, spreads[by], errors[by]) for by in candidates]
  for by, spread in spreads.items():
    session.pace[by, pass_name] = spread.median / quadratic_work(case)
    log(f"  {by}: {spread.median * 1e3:.3g} ms")
  return rows


def own_candidates(session, inputs, static, pass_name):
  operator = session.operator
  if pass_name == "step":
    yield "step", own_step(operator, inputs, static)
    return
  cotangent = jax.device_put(random_cotangents(operator, inputs, static))
  inputs = jax.device_put(inputs)
  for name in session.implementations:
    if pass_name == "forward":
      run = operators.forward(operator, implementation=name, **static)
      yield name, lambda run=run: jax.block_until_ready(run(inputs))
    else:
      by = wrt(operator, inputs)
      run = operators.forward_backward(operator, by, implementation=name, **static)
      yield name, lambda run=run: jax.block_until_ready(run(inputs, cotangent))


def own_step(operator, inputs, static):
  """Runs one step more of the same token each time it is called, as decoding does."""
  *token, state = jax.device_put(operator.step_inputs(inputs, **static))
  step = jax.jit(functools.partial(operator.step, **static), donate_argnums=len(token))

  def run():
    nonlocal state
    output, state = jax.block_until_ready(step(*token, state))
    return output

  return run


def wrt(operator, inputs):
  return tuple(name for name in operators.differentiable(inputs) if name in operator.wrt)


def random_cotangents(operator, inputs, static):
  """A standard normal cotangent of the output; the final state, which peers drop, gets zeros."""
  output, *others = operators.cotangents(operator, inputs, **static)
  return (output, *(np.zeros_like(other) for other in others))


def quadratic_work(case) -> int:
  size = case.sizes
  return size["batch"] * size["heads"] * size["length"] ** 2 * size["key_dim"]


def peer_obstacle(session, peer, case, pass_name) -> str | None:
  if reason := peer.obstacle(session.platform, pass_name, str(session.dtype)):
    return reason
  if (memory := peer.memory(case, pass_name, session.dtype)) > session.memory:
    return f"its [T, T] buffers take {memory / 1e9:.1f} GB (--memory_gb={session.memory / 1e9:g})"
  seconds = session.pace.get((peer.name, pass_name), 0) * quadratic_work(case)
  if peer.quadratic and pass_name != "step" and seconds > session.seconds:
    return f"one run would take about {seconds:.0f} s (--seconds={session.seconds:g})"
  return None


def measure_errors(session, case, pass_name, candidates) -> dict[str, tuple]:
  """candidate -> (relative error or None, which array and which part of the case)."""
  operator = session.operator
  small, words = operators.oracle_case(case)
  inputs = operator.cases.make_inputs(small, session.dtype)
  static = operator.cases.static_options(small)
  exact = truth(session, inputs, static, pass_name)
  peers = {peer.name: peer for peer in operator.peers}
  errors = {}
  for by in candidates:
    if by in peers and not peers[by].same_function:
      errors[by] = None, None
      continue
    if by in peers:
      arguments = operator.step_inputs(inputs, **static) if pass_name == "step" else inputs
      cotangent = random_cotangents(operator, inputs, static)
      own = {name: static[name] for name in peers[by].options}
      run = peers[by].prepare(arguments, cotangent, pass_name, session.platform, **own)
      got = to_numpy(run())
    else:
      got = own_results(session, inputs, static, pass_name, by)
    error, name = operators.largest_error(got, exact)
    errors[by] = error, f"{name}; {words}"
  return errors


def own_results(session, inputs, static, pass_name, by) -> dict[str, np.ndarray]:
  operator = session.operator
  if pass_name == "step":
    step = jax.jit(functools.partial(operator.step, **static))
    return step_results(step(*operator.step_inputs(inputs, **static)))
  if pass_name == "forward":
    results, gradients = operators.forward(operator, implementation=by, **static)(inputs), {}
  else:
    run = operators.forward_backward(operator, wrt(operator, inputs), implementation=by, **static)
    results, gradients = run(inputs, random_cotangents(operator, inputs, static))
  results = jax.device_get((dict(zip(operator.results, results, strict=True)), gradients))
  return results[0] | {f"d_{name}": gradient for name, gradient in results[1].items()}


def step_results(results) -> dict[str, np.ndarray]:
  """The output and every array of the state: "state", or "state.key" and so on."""
  output, state = jax.device_get(results)
  leaves = jax.tree_util.tree_leaves_with_path(state)
  return {"output": output} | {f"state{jax.tree_util.keystr(p)}": leaf for p, leaf in leaves}


def truth(session, inputs, static, pass_name) -> dict[str, np.ndarray]:
  """The same arrays from float64 arithmetic on the CPU."""

  def wide(x):
    return x if np.issubdtype(x.dtype, np.integer) else np.asarray(x, np.float64)

  with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
    if pass_name == "step":
      arguments = jax.tree.map(wide, session.operator.step_inputs(inputs, **static))
      step = jax.jit(functools.partial(session.operator.step, **static))
      return step_results(step(*arguments))
    floats = {name: wide(inputs[name]) for name in operators.differentiable(inputs)}
    return own_results(session, {**inputs, **floats}, static, pass_name, "reference")


def row(session, case, pass_name, by, spread, error) -> dict:
  operator, step = session.operator, pass_name == "step"
  backward = pass_name == "forward_backward"
  if step:
    flops, traffic = operator.step_cost(case, session.dtype)
  else:
    flops = operator.cases.flops(case, operator.chunk_size, backward)
    traffic = operator.cases.minimum_bytes(case, session.dtype, backward)
  comparable = error[0] is not None
  return {
    "case": case.name,
    "sizes": dict(case.sizes),
    "pass": pass_name,
    "by": by,
    "dtype": str(session.dtype),
    "median_s": spread.median,
    "p20_s": spread.p20,
    "p80_s": spread.p80,
    "runs": spread.runs,
    "tokens": case.sizes["batch"] * (1 if step else case.sizes["length"]),
    "bytes_per_s": traffic / spread.median if comparable else None,
    "flops_per_s": flops / spread.median if comparable else None,
    "error": error[0],
    "error_of": error[1],
  }


def log(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


def run() -> None:
  """The console entry: torch gets as many threads as XLA has before anything is timed."""
  if importlib.util.find_spec("torch") is not None:
    import torch

    torch.set_num_threads(timing.cpu_threads())
    torch.set_flush_denormal(True)  # as XLA does; torch is slower by multiples without
  define_flags()
  app.run(main)


if __name__ == "__main__":
  run()
