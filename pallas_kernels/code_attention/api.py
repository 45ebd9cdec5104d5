"""The public functions: checks, choice of implementation."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .. import checks, compat
from .reference import attention_weights, code_attention_reference
from .xla import code_attention_xla

NAME = "code_attention"


def code_attention(
  query: Float[Array, "L K"],
  key: Float[Array, "B T K"],
  value: Float[Array, "B T V"],
  *,
  mask: Bool[Array, "B T"] | None = None,
  scale: float = 1.0,
  chunk_size: int | None = None,
  implementation: str | None = None,
  interpret: Any = False,
) -> Float[Array, "B L V"]:
  """What each label reads from each document.

      r_bl = sum over t of softmax_t(scale q_l . k_bt) v_bt        over the real tokens t of b

  The L queries belong to labels and are shared by the batch; a document has no heads. A document
  without real tokens gives zeros, and no gradient. No array of labels x tokens is kept, forward or
  backward: for the weights of chosen labels see `code_attention_weights`.

  Args:
    query: [L, K], one per label.
    key, value: [B, T, K] and [B, T, V], of one dtype with query.
    mask: True for real tokens, anywhere in a row; None: all are.
    scale: factor of the scores, fixed.
    chunk_size: labels that "xla" works on together; None: as many as fill 32 MiB with scores.
    implementation: "xla" (portable), "tpu" (Pallas), "triton", "reference", or None: the kernel of
      the platform that is compiled for where it takes the arguments, else "xla".
    interpret: True, or parameters of Pallas' TPU interpreter, runs the TPU kernel on a CPU.

  Returns:
    [B, L, V] in the dtype of value. Scores and sums are float32 (or wider).

  Cost of a forward pass: 2 B L T (K + V) FLOPs; reads of L K + B T (K + V) numbers and writes of
  B L V at least.

  Raises:
    ValueError: wrong rank, shape or dtype, or an empty axis.
    NotImplementedError: an explicit `implementation` that cannot run here.

  Paper: TransICD: Transformer Based Code-wise Attention Model for Explainable ICD Coding (2021).
  """
  check_arguments(NAME, query, key, value, mask, chunk_size, implementation)
  if implementation is None:
    implementation = _choose(query, key, value)
  if implementation == "reference":
    return code_attention_reference(query, key, value, mask, scale)
  if implementation == "tpu":
    compat.require_tpu(NAME, interpret)
    from .tpu_vjp import code_attention_tpu  # Pallas' TPU half is loaded only where it is used.

    return code_attention_tpu(query, key, value, mask, scale, interpret)
  if implementation == "triton":
    compat.require_triton(NAME)
    from .triton_vjp import code_attention_triton

    return code_attention_triton(query, key, value, mask, scale)
  return code_attention_xla(query, key, value, mask, scale, chunk_size)


def code_attention_weights(
  query: Float[Array, "L K"],
  key: Float[Array, "B T K"],
  *,
  mask: Bool[Array, "B T"] | None = None,
  scale: float = 1.0,
) -> Float[Array, "B L T"]:
  """softmax_t(scale q_l . k_bt), the weights of `code_attention`, for explaining some labels.

  Pass the queries of those alone. Float32 (or wider); 0 where `mask` is False, and rows of zeros
  for documents without real tokens. Arguments and errors are those of `code_attention`.
  """
  check_arguments("code_attention_weights", query, key, key, mask, None, None)
  wide = jnp.promote_types(key.dtype, jnp.float32)
  return attention_weights(query.astype(wide), key.astype(wide), mask, scale)


def _choose(query, key, value) -> str:
  """The kernel of the platform where it takes these arguments, else the portable path."""
  platform = compat.target_platform()
  if platform == "cuda" and compat.has_jax_triton():
    from .triton import fits

    return "triton" if fits(query, key, value) is None else "xla"
  if platform == "tpu":
    from .tpu_vjp import fits

    return "tpu" if fits(query, key, value) is None else "xla"
  return "xla"


def check_arguments(function, query, key, value, mask, chunk_size, implementation) -> None:
  """Raises ValueError, in the name of `function`, for arguments the operator does not take."""
  checks.check_implementation(function, implementation)
  axes = dict(query="[labels, K]", key="[batch, length, K]", value="[batch, length, V]")
  for name, array in zip(axes, (query, key, value), strict=True):
    if array.ndim != axes[name].count(",") + 1:
      checks.fail(function, name, f"have the axes {axes[name]}", array.shape, "there are no heads")
    if not jnp.issubdtype(array.dtype, jnp.floating):
      checks.fail(function, name, "be floating point", array.dtype, "cast it to float32")
    if 0 in array.shape:
      checks.fail(function, name, "have no empty axis", array.shape, "at least one of each")
    if array.dtype != query.dtype:
      checks.fail(function, name, f"have the dtype of query, {query.dtype}", array.dtype,
                  "cast all of them to one dtype")  # fmt: skip
  checks.check_shape(function, "key", key, (*key.shape[:2], query.shape[1]), "the K of query")
  checks.check_shape(function, "value", value, (*key.shape[:2], value.shape[2]), "key's tokens")
  checks.check_shape(function, "mask", mask, key.shape[:2], "one entry per token")
  if mask is not None and mask.dtype != jnp.bool_:
    checks.fail(function, "mask", "be boolean", mask.dtype, "True for real tokens")
  if chunk_size is not None and chunk_size < 1:
    checks.fail(function, "chunk_size", "be at least 1", chunk_size, "None picks one")
