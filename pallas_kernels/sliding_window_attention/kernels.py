"""Which implementation runs softmax attention where: shared with `softmax_attention`.

`function` is the name of the public function that errors are raised for; `left` None is no window.
"""

from typing import Any

import jax
import jax.numpy as jnp

from .. import checks, compat
from .history import Tokens

IMPLEMENTATIONS = ("reference", "xla", "tpu", "cudnn")
TPU_DTYPES = (jnp.float32, jnp.bfloat16)


def check_tokens(function, query, key, value, segment_ids, lengths, implementation):
  """Raises ValueError for tokens that neither operator takes."""
  checks.check_implementation(function, implementation, IMPLEMENTATIONS)
  checks.check_grouped_sequence(function, query, key, value)
  batch, length = query.shape[:2]
  checks.check_segments(function, segment_ids, batch, length)
  checks.check_shape(function, "lengths", lengths, (batch,), "one length per row")
  checks.check_integer(function, "lengths", lengths)


def choose(query, key, value, segments, initial_state) -> str:
  """The kernel of the platform where it takes these arguments, else the portable path."""
  platform = compat.target_platform()
  if platform == "tpu" and query.dtype in TPU_DTYPES:
    return "tpu"
  if platform == "cuda":
    from .cudnn import reason_against

    return "xla" if reason_against(query, key, value, segments, initial_state) else "cudnn"
  return "xla"


def attend_tpu(
  function: str,
  query: jax.Array,
  tokens: Tokens,
  left: int | None,
  scale: float,
  block_size: int | None,
  interpret: Any,
) -> jax.Array:
  from .tpu import attention_tpu  # Pallas' TPU half is loaded only where it is used.

  if query.dtype not in TPU_DTYPES:
    raise NotImplementedError(
      f'{function}: implementation="tpu" takes float32 or bfloat16; got {query.dtype} (use "xla")'
    )
  if not interpret and compat.target_platform() != "tpu":
    raise NotImplementedError(
      f'{function}: implementation="tpu" compiles only for a TPU and the target is '
      f'{compat.target_platform()} (use "xla", or interpret=True to test the kernel)'
    )
  return attention_tpu(query, tokens, left, scale, block_size, interpret)


def attend_cudnn(function, query, key, value, left, segments, initial_state, scale) -> jax.Array:
  from .cudnn import attention_cudnn, reason_against

  if reason := reason_against(query, key, value, segments, initial_state):
    raise NotImplementedError(f'{function}: implementation="cudnn" {reason} (use "xla")')
  if compat.target_platform() != "cuda":
    raise NotImplementedError(
      f'{function}: implementation="cudnn" runs only on an NVIDIA GPU and the target is '
      f'{compat.target_platform()} (use "xla")'
    )
  return attention_cudnn(query, key, value, left, scale)
