"""Softmax attention of every token to every real token: what encoders run."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from .. import checks, compat
from ..dots import einsum_f32
from ..mesh import Mesh, axis_names, check_mesh, run_on_mesh
from ..sliding_window_attention.kernels import IMPLEMENTATIONS, TPU_DTYPES

NAME = "bidirectional_attention"
_STRIP_BYTES = 32 << 20  # scores of the queries that "xla" works on together


def bidirectional_attention(
  query: Float[Array, "B T H K"],
  key: Float[Array, "B T H K"],
  value: Float[Array, "B T H V"],
  *,
  lengths: Int[Array, " B"] | None = None,
  scale: float | None = None,
  dropout_rate: float = 0.0,
  dropout_key: jax.Array | None = None,
  implementation: str | None = None,
  interpret: Any = False,
) -> Float[Array, "B T H V"]:
  """o_i = sum over j of softmax_j(scale q_i . k_j) v_j, over the real tokens j of i's row.

  Padding has queries like any token, as in the encoders of common libraries: what it reads is
  meant to be left alone. A row without real tokens gives zeros.

  Args:
    lengths: how many tokens of each row are real, the first ones; None: all.
    scale: of the scores; None: K ** -0.5.
    dropout_rate, dropout_key: weights are zeroed with this probability, the others divided by what
      is left of 1; nothing without a key.
    implementation: "xla" (queries in strips, linear memory), "tpu" (splash attention), "cudnn"
      (through jax.nn; 16-bit), "reference" (whole rows in the dtype of the arguments), or None:
      the kernel of the platform that is compiled for where it takes the arguments, else "xla".
      Dropout of weights is offered by "xla" and "reference" alone.

  Returns:
    [B, T, H, V] in the dtype of value. Scores and sums are float32 (or wider).

  Cost of a forward pass: 2 B T H T (K + V) FLOPs.

  Raises:
    ValueError: wrong rank, shape or dtype, an empty axis, a rate outside [0, 1).
    NotImplementedError: an explicit `implementation` that cannot run here.
  """
  check_arguments(NAME, query, key, value, lengths, dropout_rate, implementation)
  scale = query.shape[-1] ** -0.5 if scale is None else scale
  rate = dropout_rate if dropout_key is not None else 0.0
  if implementation is None:
    implementation = _choose(query, key, value, rate)
  if implementation in ("tpu", "cudnn"):
    _check_kernel(implementation, query, key, value, rate, interpret)
    attend = _attend_tpu if implementation == "tpu" else _attend_cudnn
    output = attend(query, key, value, lengths, scale, interpret)
  else:
    chunk = _chunk(query) if implementation == "xla" else query.shape[1]
    output = _attend_rows(query, key, value, lengths, scale, rate, dropout_key, chunk)
  if lengths is None:
    return output
  return jnp.where((lengths > 0)[:, None, None, None], output, 0)


def sharded_bidirectional_attention(
  query: Float[Array, "B T H K"],
  key: Float[Array, "B T H K"],
  value: Float[Array, "B T H V"],
  *,
  mesh: Mesh | None = None,
  batch_axes: str | Sequence[str] = ("data",),
  head_axes: str | Sequence[str] = ("model",),
  lengths: Int[Array, " B"] | None = None,
  dropout_rate: float = 0.0,
  dropout_key: jax.Array | None = None,
  **options: Any,
) -> Float[Array, "B T H V"]:
  """`bidirectional_attention` with batch and heads over mesh axes; nothing is communicated.

  Each device draws its own dropout. `options` are those of `bidirectional_attention`.

  Raises:
    ValueError: as `bidirectional_attention`; also for an unknown or repeated mesh axis, and for a
      batch or number of heads that its mesh axes do not divide.
  """
  name = "sharded_bidirectional_attention"
  check_arguments(name, query, key, value, lengths, dropout_rate, options.get("implementation"))
  mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
  batch_axes, head_axes = axis_names(batch_axes), axis_names(head_axes)
  check_mesh(name, mesh, batch_axes, head_axes, (), key.shape)
  tokens = PartitionSpec(batch_axes or None, None, head_axes or None, None)
  specs = dict(query=tokens, key=tokens, value=tokens, dropout_key=PartitionSpec(),
               lengths=PartitionSpec(batch_axes or None))  # fmt: skip
  arrays = dict(query=query, key=key, value=value, lengths=lengths, dropout_key=dropout_key)

  def local(inputs):
    if dropout_key is not None:
      for axis in (*batch_axes, *head_axes):
        number = jax.lax.axis_index(axis)
        inputs = inputs | dict(dropout_key=jax.random.fold_in(inputs["dropout_key"], number))
    return bidirectional_attention(**inputs, dropout_rate=dropout_rate, **options)

  return run_on_mesh(local, mesh, arrays, specs, tokens)


def check_arguments(function, query, key, value, lengths, dropout_rate, implementation) -> None:
  """Raises ValueError, in the name of `function`, for arguments the operator does not take."""
  checks.check_implementation(function, implementation, IMPLEMENTATIONS)
  checks.check_sequence(function, query=query, key=key, value=value)
  checks.check_shape(function, "key", key, query.shape, "query and key have the same head_dim")
  checks.check_shape(function, "lengths", lengths, query.shape[:1], "one length per row")
  checks.check_integer(function, "lengths", lengths)
  if not 0 <= dropout_rate < 1:
    checks.fail(function, "dropout_rate", "lie in [0, 1)", dropout_rate, "a probability")


def _choose(query, key, value, rate) -> str:
  platform = compat.target_platform()
  if rate:
    return "xla"
  if platform == "tpu" and query.dtype in TPU_DTYPES:
    return "tpu"
  if platform == "cuda":
    from ..sliding_window_attention.cudnn import reason_against

    return "xla" if reason_against(query, key, value, None, None) else "cudnn"
  return "xla"


def _check_kernel(implementation, query, key, value, rate, interpret):
  """Raises NotImplementedError where the library's kernel does not take these arguments."""
  reason = "has no dropout of weights" if rate else None
  if implementation == "tpu":
    if query.dtype not in TPU_DTYPES:
      reason = f"takes float32 or bfloat16; got {query.dtype}"
    if not reason:
      compat.require_tpu(NAME, interpret)
  else:
    from ..sliding_window_attention.cudnn import reason_against

    reason = reason or reason_against(query, key, value, None, None)
    if not reason and compat.target_platform() != "cuda":
      reason = f"runs only on an NVIDIA GPU and the target is {compat.target_platform()}"
  if reason:
    raise NotImplementedError(f'{NAME}: implementation="{implementation}" {reason} (use "xla")')


def _attend_tpu(query, key, value, lengths, scale, interpret):
  from ..sliding_window_attention.tpu import attention_to_all_tpu

  return attention_to_all_tpu(query, key, value, lengths, scale, interpret)


def _attend_cudnn(query, key, value, lengths, scale, interpret):
  from ..sliding_window_attention.cudnn import attention_to_all_cudnn

  del interpret
  return attention_to_all_cudnn(query, key, value, lengths, scale)


def _chunk(query):
  batch, length, heads, _ = query.shape
  return max(1, min(length, _STRIP_BYTES // (4 * batch * heads * length)))


def _attend_rows(query, key, value, lengths, scale, rate, dropout_key, chunk):
  """Strips of `chunk` queries against all keys; each is made again in the backward pass."""
  batch, length, heads, _ = query.shape
  real = None
  if lengths is not None:
    lengths = jnp.where(lengths == 0, length, lengths)  # set to 0 by the caller
    real = (jnp.arange(length) < lengths[:, None])[:, None, None, :]
  # Wide where they are closed over, so that their gradient is summed over strips in float32.
  wide = jnp.promote_types(key.dtype, jnp.float32)
  keys, values = key.astype(wide), value.astype(wide)
  count = -(-length // chunk)

  @jax.checkpoint
  def strip(number, q):  # q [B, C, H, K]
    scores = scale * einsum_f32("bihk,bjhk->bhij", q, keys.astype(key.dtype))
    if real is not None:
      scores = jnp.where(real, scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)
    if rate:
      kept = jax.random.bernoulli(jax.random.fold_in(dropout_key, number), 1 - rate, weights.shape)
      weights = jnp.where(kept, weights / (1 - rate), 0)
    output = einsum_f32("bjhv,bhij->bihv", values.astype(value.dtype), weights)
    return output.astype(value.dtype)

  if count == 1:
    return strip(0, query)
  queries = jnp.pad(query, ((0, 0), (0, count * chunk - length), (0, 0), (0, 0)))
  queries = jnp.moveaxis(queries.reshape(batch, count, chunk, heads, -1), 1, 0)
  output = jax.lax.map(lambda x: strip(*x), (jnp.arange(count), queries))
  return jnp.moveaxis(output, 0, 1).reshape(batch, count * chunk, heads, -1)[:, :length]
