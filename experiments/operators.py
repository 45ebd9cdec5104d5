"""The table of operators that `benchmark` and `numerics` run. A new operator adds one entry."""

import dataclasses
import difflib
import types
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attnzoo.experiments.benchmarking import peers
from attnzoo.pallas_kernels import (
  lightning_attention,
  lightning_attention_step,
  rat_attention_step,
  routed_attention_step,
  sliding_window_attention_step,
  softplus_attention_step,
  taylor_attention,
  taylor_attention_step,
)
from attnzoo.pallas_kernels.cases import Case
from attnzoo.pallas_kernels.code_attention import cases as code_cases
from attnzoo.pallas_kernels.lightning_attention import cases as lightning_cases
from attnzoo.pallas_kernels.lightning_attention.xla import DEFAULT_CHUNK as LIGHTNING_CHUNK
from attnzoo.pallas_kernels.rat_attention import RatState
from attnzoo.pallas_kernels.rat_attention import cases as rat_cases
from attnzoo.pallas_kernels.routed_attention import RoutedState
from attnzoo.pallas_kernels.routed_attention import cases as routed_cases
from attnzoo.pallas_kernels.sliding_window_attention import WindowState
from attnzoo.pallas_kernels.sliding_window_attention import cases as window_cases
from attnzoo.pallas_kernels.sliding_window_attention.xla import DEFAULT_CHUNK as WINDOW_CHUNK
from attnzoo.pallas_kernels.softmax_attention import CacheState
from attnzoo.pallas_kernels.softplus_attention import cases as softplus_cases
from attnzoo.pallas_kernels.softplus_attention.xla import DEFAULT_CHUNK as SOFTPLUS_CHUNK
from attnzoo.pallas_kernels.taylor_attention import cases as taylor_cases
from attnzoo.pallas_kernels.taylor_attention.features import feature_count
from attnzoo.pallas_kernels.taylor_attention.xla import DEFAULT_CHUNK as TAYLOR_CHUNK

# The oracle keeps a float64 state per token; beyond this length errors are taken on a shorter case.
ORACLE_LENGTH = 1024


@dataclasses.dataclass(frozen=True)
class Operator:
  """What the harness needs to know of one operator.

  `function(**inputs, **options)` returns the arrays named in `results`; "reference" is the
  implementation that defines it and is run in float64 for the truth. `step` takes what
  `step_inputs(inputs, **static options)` returns, the state last, and the static options, and
  returns (output, state). `cases` is the module with CASES, make_inputs(case, dtype),
  static_options(case), flops(case, chunk, backward) and minimum_bytes(case, dtype, backward);
  `step_cost(case, dtype)` gives (FLOPs, bytes) of one step. `wrt`: the inputs by which a timed
  backward differentiates.
  """

  name: str
  function: Callable
  results: tuple[str, ...]
  cases: types.ModuleType
  chunk_size: int
  peers: tuple[peers.Peer, ...]
  step: Callable | None = None  # an operator without a state has none
  step_inputs: Callable[..., tuple] | None = None
  step_cost: Callable[[Case, np.dtype], tuple[int, int]] | None = None
  wrt: tuple[str, ...] = ("query", "key", "value")
  kernels: Mapping[str, str] = types.MappingProxyType({"tpu": "tpu", "cuda": "triton"})


def _lightning_step_inputs(inputs):
  query, key, value = (inputs[name][:, 0] for name in ("query", "key", "value"))
  state = np.random.default_rng(7).standard_normal((*query.shape, value.shape[2]))
  return query, key, value, inputs.get("log_decay"), state.astype(np.float32)


def _lightning_step_cost(case, dtype):
  size = case.sizes
  heads, k, v = size["batch"] * size["heads"], size["key_dim"], size["value_dim"]
  return 5 * heads * k * v, heads * (8 * k * v + np.dtype(dtype).itemsize * (2 * k + 2 * v))


def _taylor_step_inputs(inputs, normalize):
  del normalize
  query, key, value = (inputs[name][:, 0] for name in ("query", "key", "value"))
  batch, heads, value_dim = value.shape
  rng = np.random.default_rng(7)
  state = taylor_cases.random_state(rng, batch, heads, value_dim, key.shape[2])
  return query, key, value, inputs.get("log_decay"), state


def _taylor_step_cost(case, dtype):
  size = case.sizes
  heads, f, v = size["batch"] * size["heads"], size["key_dim"], size["value_dim"]
  state = feature_count(f) * (v + 1)
  return 4 * heads * state, heads * (8 * state + np.dtype(dtype).itemsize * (2 * f + 2 * v))


def _window_step_inputs(inputs, left):
  """The first token of each row, and a full ring."""
  tokens = [inputs[name][:, 0] for name in ("query", "key", "value")]
  rng, rings = np.random.default_rng(7), []
  for x in tokens[1:]:
    shape = (x.shape[0], left, *x.shape[1:])
    rings.append(rng.standard_normal(shape).astype(x.dtype))
  key, value = rings
  return *tokens, WindowState(key, value, np.full(len(tokens[0]), 10 * left, np.int32))


def _window_step_cost(case, dtype):
  size = case.sizes
  rows, seen, dims = size["batch"], size["left"] + 1, size["key_dim"] + size["value_dim"]
  width = np.dtype(dtype).itemsize
  return 2 * rows * size["heads"] * seen * dims, rows * size["kv_heads"] * seen * dims * width


def _softplus_step_inputs(inputs, variant):
  """The first token of each row, and a cache of as many tokens as the case is long."""
  del variant
  tokens = [inputs[name][:, 0] for name in ("query", "key", "value")]
  batch, length, groups, _ = inputs["key"].shape
  rng, room = np.random.default_rng(7), 4  # for the tokens to come
  key, value = (
    rng.standard_normal((batch, length + room, groups, x.shape[-1])).astype(x.dtype)
    for x in tokens[1:]
  )
  key /= np.linalg.norm(key.astype(np.float32), axis=-1, keepdims=True).astype(key.dtype)
  return *tokens, CacheState(key, value, np.full(batch, length, np.int32))


def _softplus_step_cost(case, dtype):
  size = case.sizes
  read = size["batch"] * size["length"] * (size["key_dim"] + size["value_dim"])
  return 2 * read * size["heads"], read * size["kv_heads"] * np.dtype(dtype).itemsize


def _rat_step_inputs(inputs, chunk_size, rotary_base):
  """The first token of each row, and a state of as many tokens as the case is long."""
  del rotary_base
  names = ("query", "key", "value", "gate_logits", "gate_bias", "output_logits")
  tokens = [x if (x := inputs.get(n)) is None or n == "gate_bias" else x[:, 0] for n in names]
  batch, length, heads, dim = inputs["value"].shape
  rng, dtype = np.random.default_rng(7), inputs["value"].dtype
  slots = length // chunk_size + 4  # with some for the tokens to come
  key, value = rng.standard_normal((2, batch, slots, heads, dim)).astype(dtype)
  running_key, running_value = rng.standard_normal((2, batch, heads, dim)).astype(np.float32)
  position = np.full(batch, length, np.int32)
  return *tokens, RatState(key, value, running_key, running_value, position)


def _rat_step_cost(case, dtype):
  size, width = case.sizes, np.dtype(dtype).itemsize
  heads, seen = size["heads"], size["length"] // size["chunk"]
  channels = size["batch"] * size["key_dim"]
  tokens = 4 * heads + 2 * size["kv_heads"]  # value, gates and output; query and key
  traffic = 2 * heads * seen * width + tokens * width + 16 * heads  # running sums in and out
  return channels * heads * (4 * seen + 12), channels * traffic


def _routed_step_inputs(inputs, options):
  """The first token of each row, and full lists."""
  query, value, scores = (inputs[name][:, 0] for name in ("query", "value", "scores"))
  key = inputs["key"][:, 0] if "key" in inputs else query
  rng = np.random.default_rng(7)
  shape = (*scores.shape, options.window_size)  # [B, H, C, w]
  lists = [rng.standard_normal((*shape, x.shape[-1])).astype(x.dtype) for x in (key, value)]
  return query, key, value, scores, RoutedState(rng.random(shape, np.float32), *lists)


def _routed_step_cost(case, dtype):
  """Every list is looked at, with "causal_recent" one per head."""
  size = case.sizes
  recent = routed_cases.static_options(case)["options"].membership == "causal_recent"
  lists = size["batch"] * size["heads"] * (1 if recent else size["clusters"])
  dims, members = size["key_dim"] + size["value_dim"], lists * size["window"]
  return 2 * members * dims, members * (dims * np.dtype(dtype).itemsize + 4)


OPERATORS = {
  operator.name: operator
  for operator in (
    Operator(
      name="lightning_attention",
      function=lightning_attention,
      results=("output", "final_state"),
      cases=lightning_cases,
      chunk_size=LIGHTNING_CHUNK,
      step=lightning_attention_step,
      step_inputs=_lightning_step_inputs,
      step_cost=_lightning_step_cost,
      peers=(
        peers.TORCH_DECAYED_LINEAR,
        peers.TORCH_SOFTMAX,
        peers.FLA_SIMPLE_GLA,
        peers.CUDNN_SOFTMAX,
      ),
    ),
    Operator(
      name="taylor_attention",
      function=taylor_attention,
      results=("output", "final_state"),
      cases=taylor_cases,
      chunk_size=TAYLOR_CHUNK,
      step=taylor_attention_step,
      step_inputs=_taylor_step_inputs,
      step_cost=_taylor_step_cost,
      peers=(
        peers.TORCH_TAYLOR,
        peers.TORCH_SOFTMAX,
        peers.FLA_FUSED_CHUNK_BASED,
        peers.FLA_PARALLEL_BASED,
        peers.CUDNN_SOFTMAX,
      ),
    ),
    Operator(
      name="sliding_window_attention",
      function=window_cases.operator,
      results=("output", "stored_key", "stored_value"),
      cases=window_cases,
      chunk_size=WINDOW_CHUNK,
      step=sliding_window_attention_step,
      step_inputs=_window_step_inputs,
      step_cost=_window_step_cost,
      peers=(peers.TORCH_SOFTMAX, peers.CUDNN_SOFTMAX),
      kernels=types.MappingProxyType({"tpu": "tpu", "cuda": "cudnn"}),
    ),
    Operator(
      name="rat_attention",
      function=rat_cases.operator,
      results=rat_cases.RESULTS,
      cases=rat_cases,
      chunk_size=16,
      step=rat_attention_step,
      step_inputs=_rat_step_inputs,
      step_cost=_rat_step_cost,
      peers=(peers.TORCH_SOFTMAX_AND_STEP, peers.CUDNN_SOFTMAX),
      wrt=("query", "key", "value", "gate_logits", "gate_bias", "output_logits"),
    ),
    Operator(
      name="softplus_attention",
      function=softplus_cases.operator,
      results=softplus_cases.RESULTS,
      cases=softplus_cases,
      chunk_size=SOFTPLUS_CHUNK,
      step=softplus_attention_step,
      step_inputs=_softplus_step_inputs,
      step_cost=_softplus_step_cost,
      peers=(
        peers.TORCH_SOFTMAX_AND_STEP,
        peers.JAX_SOFTMAX,
        peers.CUDNN_SOFTMAX,
        peers.PALLAS_SOFTMAX,
      ),
    ),
    Operator(
      name="routed_attention",
      function=routed_cases.operator,
      results=routed_cases.RESULTS,
      cases=routed_cases,
      chunk_size=1,
      step=routed_attention_step,
      step_inputs=_routed_step_inputs,
      step_cost=_routed_step_cost,
      peers=(peers.TORCH_ROUTED, peers.TORCH_SOFTMAX, peers.CUDNN_SOFTMAX),
    ),
    Operator(
      name="code_attention",
      function=code_cases.operator,
      results=code_cases.RESULTS,
      cases=code_cases,
      chunk_size=1,
      peers=(peers.TORCH_LABELS,),
    ),
  )
}


def find(name: str) -> Operator:
  if name not in OPERATORS:
    near = difflib.get_close_matches(name, OPERATORS, n=1)
    hint = f"did you mean {near[0]}?" if near else "see experiments/operators.py"
    raise ValueError(f"operator must be one of {sorted(OPERATORS)}; got {name!r} ({hint})")
  return OPERATORS[name]


def cotangents(operator: Operator, inputs: Mapping, **options) -> tuple[np.ndarray, ...]:
  """Standard normal cotangents of the results, float32."""
  options |= dict(implementation="reference")
  function = lambda: operator.function(**inputs, **options)  # noqa: E731
  rng = np.random.default_rng(1)
  return tuple(rng.standard_normal(r.shape).astype(np.float32) for r in jax.eval_shape(function))


def forward(operator: Operator, **options) -> Callable:
  """The jitted function from inputs to results."""
  return jax.jit(lambda inputs: operator.function(**inputs, **options))


def forward_backward(operator: Operator, wrt: tuple[str, ...], **options) -> Callable:
  """The jitted function from (inputs, cotangents) to (results, gradients of the inputs `wrt`)."""

  def run(inputs, cotangent):
    varied = {name: inputs[name] for name in wrt}
    function = lambda varied: operator.function(**(inputs | varied), **options)  # noqa: E731
    results, pull = jax.vjp(function, varied)
    cotangent = jax.tree.map(lambda c, r: c.astype(r.dtype), cotangent, results)
    return results, pull(cotangent)[0]

  return jax.jit(run)


def differentiable(inputs: Mapping) -> tuple[str, ...]:
  return tuple(n for n, x in inputs.items() if jnp.issubdtype(x.dtype, jnp.floating))


def named_results(operator: Operator, inputs: Mapping, **options) -> dict[str, np.ndarray]:
  """Every result and, as `d_<input>`, every gradient of one implementation."""
  run = forward_backward(operator, differentiable(inputs), **options)
  results, gradients = jax.device_get(run(dict(inputs), cotangents(operator, inputs, **options)))
  named = dict(zip(operator.results, results, strict=True))
  return named | {f"d_{name}": gradient for name, gradient in gradients.items()}


def truth(operator: Operator, inputs: Mapping, **options) -> dict[str, np.ndarray]:
  """The same from the definition in float64, on the CPU."""
  options |= dict(implementation="reference")
  with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
    wide = {name: inputs[name].astype(np.float64) for name in differentiable(inputs)}
    return named_results(operator, {**inputs, **wide}, **options)


def oracle_case(case: Case) -> tuple[Case, str]:
  """(the case that errors are measured on, in words what was cut off it)."""
  length = min(case.sizes["length"], ORACLE_LENGTH)
  cut = {name: 1 if name.endswith("heads") else size for name, size in case.sizes.items()}
  cut |= dict(batch=1, length=length)
  if "clusters" in cut:  # as full as they were
    cut["clusters"] = max(1, case.sizes["clusters"] * length // case.sizes["length"])
  words = ", ".join(f"{n} {cut[n]} of {case.sizes[n]}" for n in cut if cut[n] != case.sizes[n])
  return dataclasses.replace(case, sizes=cut), words or "all of it"


def relative_error(got, exact) -> float:
  """RMS error over the RMS of the truth; not divided where that is 0, or 0 but for rounding."""
  got, exact = np.asarray(got, np.float64), np.asarray(exact, np.float64)
  scale = np.sqrt(np.mean(exact**2))
  scale = 1.0 if scale < 64 * np.finfo(np.float64).eps else scale
  return float(np.sqrt(np.mean((got - exact) ** 2)) / scale)


def largest_error(got: Mapping, exact: Mapping) -> tuple[float, str]:
  """(the worst relative error among the arrays that both have, its name)."""
  return max((relative_error(got[name], exact[name]), name) for name in exact if name in got)
