"""Argument checks shared by the operators. Everything is raised at trace time.

Message form: `<function>: <argument> must <rule>; got <value> (<hint>)`.
"""

import jax
import jax.numpy as jnp
import numpy as np

IMPLEMENTATIONS = ("reference", "xla", "tpu", "triton")


def fail(function: str, argument: str, rule: str, got: object, hint: str) -> None:
  raise ValueError(f"{function}: {argument} must {rule}; got {got} ({hint})")


def check_sequence(function: str, **arrays: jax.Array) -> None:
  """Every array is float [B, T, H, D] with equal B, T and H, and nothing is empty."""
  _check_tokens(function, ("batch", "length", "heads"), arrays)


def check_grouped_sequence(
  function: str, query: jax.Array, key: jax.Array, value: jax.Array
) -> None:
  """As `check_sequence`, for key and value with fewer heads: those of query are a multiple."""
  _check_tokens(function, ("batch", "length"), dict(query=query, key=key, value=value))
  _check_tokens(function, ("batch", "length", "heads"), dict(key=key, value=value))
  heads, kv_heads = query.shape[2], key.shape[2]
  if heads % kv_heads:
    fail(function, "query", f"have a multiple of the {kv_heads} heads of key", heads,
         "every key head serves equally many query heads")  # fmt: skip
  check_shape(function, "key", key, (*key.shape[:3], query.shape[3]),
              "query and key have the same head_dim")  # fmt: skip


def check_store(function, state, key, value, slots, hint) -> None:
  """`state` (key, value, count) has `slots` slots for keys and values as they are given."""
  for name, array, given in (("key", state.key, key), ("value", state.value, value)):
    batch, _, heads, dim = given.shape
    name = f"initial_state.{name}"
    check_shape(function, name, array, (batch, slots, heads, dim), hint)
    if array.dtype != given.dtype:
      fail(function, name, f"have the dtype of the call's, {given.dtype}", array.dtype,
           "cast one of them")  # fmt: skip
  check_shape(function, "initial_state.count", state.count, key.shape[:1], "one count per row")
  check_integer(function, "initial_state.count", state.count)


def _check_tokens(function, shared, arrays):
  """Checks of `check_sequence`; `shared` names the leading axes that all arrays have alike."""
  first_name, first = next(iter(arrays.items()))
  alike = len(shared)
  named = ", ".join(shared[:-1]) + " and " + shared[-1]
  order = "check the axis order [batch, length, heads, head_dim]"
  for name, array in arrays.items():
    if array.ndim != 4:
      fail(function, name, "have 4 axes [batch, length, heads, head_dim]", array.shape,
           "add or split axes")  # fmt: skip
    if not jnp.issubdtype(array.dtype, jnp.floating):
      fail(function, name, "be floating point", array.dtype, "cast it to float32 or bfloat16")
    if 0 in array.shape:
      fail(function, name, "have no empty axis", array.shape, "length must be at least 1")
    if array.shape[:alike] != first.shape[:alike]:
      fail(function, name, f"agree with {first_name} in {named} {first.shape[:alike]}",
           array.shape[:alike], order)  # fmt: skip
    if array.dtype != first.dtype:
      fail(function, name, f"have the dtype of {first_name}, {first.dtype}", array.dtype,
           "cast all of them to one dtype")  # fmt: skip


def check_linear_attention(
  function, query, key, value, log_decay, segment_ids, lengths, initial_state, state_shape,
  state_hint, chunk_size, implementation,
):  # fmt: skip
  """What the linear operators check alike; `state_hint` names the axes of `state_shape`."""
  check_implementation(function, implementation)
  check_sequence(function, query=query, key=key, value=value)
  batch, length, heads = query.shape[:3]
  check_shape(function, "key", key, query.shape, "query and key have the same head_dim")
  check_segments(function, segment_ids, batch, length)
  check_shape(function, "lengths", lengths, (batch,), "one length per row")
  check_integer(function, "lengths", lengths)
  check_shape(function, "log_decay", log_decay, (heads,), "one rate per head")
  check_not_positive(function, "log_decay", log_decay, "pass minus the decay rate")
  check_shape(function, "initial_state", initial_state, state_shape(query, value), state_hint)
  if chunk_size is not None and chunk_size < 1:
    fail(function, "chunk_size", "be at least 1", chunk_size, "None picks the measured best")


def check_shape(function: str, name: str, array: jax.Array | None, shape: tuple, hint: str) -> None:
  if array is not None and array.shape != shape:
    fail(function, name, f"have shape {shape}", array.shape, hint)


def check_segments(function: str, segment_ids: jax.Array | None, batch: int, length: int) -> None:
  check_shape(function, "segment_ids", segment_ids, (batch, length), "one id per token")
  check_integer(function, "segment_ids", segment_ids)


def check_integer(function: str, name: str, array: jax.Array | None) -> None:
  if array is not None and not jnp.issubdtype(array.dtype, jnp.integer):
    fail(function, name, "be integers", array.dtype, "cast to int32")


def check_not_positive(function: str, name: str, array: jax.Array | None, hint: str) -> None:
  """Refuses positive entries where the values are known at trace time."""
  if array is None or isinstance(array, jax.core.Tracer):
    return
  largest = float(np.max(np.asarray(array, np.float64)))
  if not largest <= 0:
    fail(function, name, "be <= 0 everywhere", f"a largest value of {largest:g}", hint)


def check_implementation(
  function: str, implementation: str | None, choices: tuple[str, ...] = IMPLEMENTATIONS
) -> None:
  if implementation is not None and implementation not in choices:
    named = ", ".join(map(repr, choices))
    fail(function, "implementation", f"be None or one of {named}", repr(implementation),
         "None chooses by platform")  # fmt: skip
