"""Other people's code for the same job. Nothing here is imported before a peer is asked for."""

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping

import numpy as np

from attnzoo.experiments.benchmarking import torch_peers
from attnzoo.pallas_kernels.cases import Case


@dataclasses.dataclass(frozen=True)
class Peer:
  """One peer.

  `prepare(inputs, cotangent, pass_name, device)` returns a function that runs the pass once, waits
  for the device and returns {"output": array, "d_query": array, ...}. `same_function` is False for
  softmax attention: it is timed on the same arrays and its error is not comparable. `scratch` is
  the number of [length, length] buffers per row and head that a pass holds at once. `options` are
  the static options of a case that `prepare` takes as keywords.
  """

  name: str
  package: str
  platforms: tuple[str, ...]
  passes: tuple[str, ...]
  same_function: bool
  quadratic: bool
  prepare: Callable
  scratch: Mapping[str, int] = dataclasses.field(default_factory=dict)
  dtypes: tuple[str, ...] = ("float32", "bfloat16")
  options: tuple[str, ...] = ()

  def obstacle(self, platform: str, pass_name: str, dtype: str) -> str | None:
    """Why it cannot run at all, or None."""
    if platform not in self.platforms:
      return f"runs on {' and '.join(self.platforms)} only"
    if pass_name not in self.passes:
      return f"has no {pass_name} pass"
    if dtype not in self.dtypes:
      return f"takes {' and '.join(self.dtypes)} only"
    if importlib.util.find_spec(self.package.partition(".")[0]) is None:
      return f"not installed ({self.package})"
    return None

  def memory(self, case: Case, pass_name: str, dtype: np.dtype) -> int:
    """Bytes of its [length, length] buffers."""
    size = case.sizes
    buffers = self.scratch.get(pass_name, 0) * size["batch"] * size["heads"]
    return buffers * size["length"] ** 2 * np.dtype(dtype).itemsize


def to_numpy(results: Mapping) -> dict[str, np.ndarray]:
  """What a prepared peer returned, as float32 arrays."""
  return {
    name: np.asarray(x.detach().float().cpu() if hasattr(x, "detach") else x, np.float32)
    for name, x in results.items()
  }


def _softmax_inputs(inputs):
  """Query and key as wide as the values and of as many heads: what softmax attention of the same
  model would have. [..., H, K]; head h has the query and key of group h mod their number.
  """
  heads, width = inputs["value"].shape[-2:]

  def widened(x):
    copies = -(-width // x.shape[-1])
    groups = max(1, heads // x.shape[-2])
    return np.concatenate([np.concatenate([x] * groups, -2)] * copies, -1)[..., :width]

  shared = dict(key=inputs["query"]) | inputs  # where no keys are given, the queries are the keys
  return {name: widened(shared[name]) for name in ("query", "key", "value")}


def _torch_softmax(inputs, cotangent, pass_name, device):
  import torch

  if pass_name == "step":
    return _torch_softmax_step(inputs, device)
  heads_first = {n: np.swapaxes(x, 1, 2) for n, x in _softmax_inputs(inputs).items()}
  tensors = torch_peers.torch_tensors(heads_first, device)
  do = np.swapaxes(cotangent[0].astype(inputs["value"].dtype), 1, 2)
  (do,) = torch_peers.torch_tensors(dict(do=do), device).values()

  def attention(query, key, value):
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)

  return torch_peers.torch_pass(attention, tensors, do, pass_name, device)


def _torch_softmax_step(inputs, device):
  """One query over a cache of keys and values as long as the state's position, new ones written."""
  import torch

  token = _softmax_inputs(dict(zip(("query", "key", "value"), inputs, strict=False)))
  tokens = torch_peers.torch_tensors(
    {n: x[:, :, None] for n, x in token.items()}, device
  )  # [B, H, 1, K]
  q, k, v = tokens.values()
  state = inputs[-1]
  position = int((state.position if hasattr(state, "position") else state.count).max())
  batch, heads, _, dim = v.shape
  keys, values = (
    torch.randn((batch, heads, position + 1, dim), device=device).to(v.dtype) for _ in range(2)
  )

  def run():
    with torch.no_grad():
      keys[:, :, position:], values[:, :, position:] = k, v
      output = torch.nn.functional.scaled_dot_product_attention(q, keys, values)
    if device == "cuda":
      torch.cuda.synchronize()
    return {"output": output}

  return run


def _fla_simple_gla(inputs, cotangent, pass_name, device):
  from fla.ops.simple_gla import chunk_simple_gla

  tensors = torch_peers.torch_tensors(inputs, device)
  (do,) = torch_peers.torch_tensors(
    dict(do=cotangent[0].astype(inputs["value"].dtype)), device
  ).values()

  def attention(query, key, value):
    rate = tensors.get("log_decay")
    output, _ = chunk_simple_gla(
      query, key, value, g_gamma=rate, scale=1.0, output_final_state=True
    )  # fmt: skip
    return output

  return torch_peers.torch_pass(attention, tensors, do, pass_name, device)


def _fla_based(name):
  def prepare(inputs, cotangent, pass_name, device):
    from fla.ops import based

    tensors = torch_peers.torch_tensors(inputs, device)
    (do,) = torch_peers.torch_tensors(
      dict(do=cotangent[0].astype(inputs["value"].dtype)), device
    ).values()

    def attention(query, key, value):
      return getattr(based, name)(query, key, value, scale=None, use_norm=True)

    return torch_peers.torch_pass(attention, tensors, do, pass_name, device)

  return prepare


def _jax_softmax(implementation):
  def prepare(inputs, cotangent, pass_name, device):
    del device
    import jax

    def attention(q, k, v):
      return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)

    return _jax_pass(attention, inputs, cotangent, pass_name)

  return prepare


def _pallas_softmax(inputs, cotangent, pass_name, device):
  """The FlashAttention that comes with jax, for GPUs in Triton."""
  del device
  from jax.experimental.pallas.ops.gpu.attention import mha

  scale = inputs["value"].shape[-1] ** -0.5

  def attention(q, k, v):
    return mha(q, k, v, segment_ids=None, sm_scale=scale, causal=True)

  return _jax_pass(attention, inputs, cotangent, pass_name)


def _jax_pass(attention, inputs, cotangent, pass_name):
  import jax

  qkv = tuple(jax.device_put(x) for x in _softmax_inputs(inputs).values())
  do = jax.device_put(cotangent[0].astype(inputs["value"].dtype))

  @jax.jit
  def both(qkv, do):
    output, pull = jax.vjp(attention, *qkv)
    return (output, *pull(do))

  run = both if pass_name == "forward_backward" else jax.jit(lambda qkv, do: (attention(*qkv),))
  names = ("output", "d_query", "d_key", "d_value")
  return lambda: dict(zip(names, jax.block_until_ready(run(qkv, do)), strict=False))


_WHOLE = ("forward", "forward_backward")
TORCH_DECAYED_LINEAR = Peer(
  "torch masked formula", "torch", ("cpu", "cuda"), (*_WHOLE, "step"), same_function=True,
  quadratic=True, prepare=torch_peers.torch_decayed_linear,
  scratch=dict(forward=3, forward_backward=5),
)  # fmt: skip
TORCH_SOFTMAX = Peer(
  "torch softmax (sdpa)", "torch", ("cpu", "cuda"), _WHOLE, same_function=False, quadratic=True,
  prepare=_torch_softmax,
)  # fmt: skip
# Where the state has a position, which says how long a cache would be.
TORCH_SOFTMAX_AND_STEP = dataclasses.replace(TORCH_SOFTMAX, passes=(*_WHOLE, "step"))
TORCH_TAYLOR = Peer(
  "torch quadratic formula", "torch", ("cpu", "cuda"), _WHOLE, same_function=True, quadratic=True,
  prepare=torch_peers.torch_taylor, scratch=dict(forward=4, forward_backward=7),
)  # fmt: skip
TORCH_ROUTED = Peer(
  "torch routed formula", "torch", ("cpu", "cuda"), _WHOLE, same_function=True, quadratic=False,
  prepare=torch_peers.torch_routed, options=("options",),
)  # fmt: skip
TORCH_LABELS = Peer(
  "torch softmax formula", "torch", ("cpu", "cuda"), _WHOLE, same_function=True, quadratic=False,
  prepare=torch_peers.torch_labels,
)  # fmt: skip
FLA_FUSED_CHUNK_BASED = Peer(
  "fla fused_chunk_based", "fla", ("cuda",), _WHOLE, same_function=True, quadratic=False,
  prepare=_fla_based("fused_chunk_based"),
)  # fmt: skip
FLA_PARALLEL_BASED = Peer(
  "fla parallel_based", "fla", ("cuda",), _WHOLE, same_function=True, quadratic=True,
  prepare=_fla_based("parallel_based"),
)  # fmt: skip
FLA_SIMPLE_GLA = Peer(
  "fla chunk_simple_gla", "fla", ("cuda",), _WHOLE, same_function=True, quadratic=False,
  prepare=_fla_simple_gla,
)  # fmt: skip
CUDNN_SOFTMAX = Peer(
  "cudnn softmax", "jax", ("cuda",), _WHOLE, same_function=False, quadratic=True,
  prepare=_jax_softmax("cudnn"), dtypes=("bfloat16",),
)  # fmt: skip
JAX_SOFTMAX = Peer(
  "jax.nn softmax", "jax", ("cpu",), _WHOLE, same_function=False, quadratic=True,
  prepare=_jax_softmax("xla"), scratch=dict(forward=2, forward_backward=4),
)  # fmt: skip
PALLAS_SOFTMAX = Peer(
  "pallas flash softmax", "jax", ("cuda",), _WHOLE, same_function=False, quadratic=True,
  prepare=_pallas_softmax,
)  # fmt: skip
