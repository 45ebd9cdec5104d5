"""The public function: checks, choice of implementation."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .. import checks, compat
from ..segments import run_index, zero_padding
from .attend import Drop, Extras
from .members import only
from .options import Routing
from .recent import attend_recent
from .reference import routed_reference
from .state import RoutedState, extend, state_after
from .xla import attend_clusters, attend_prefix

NAME = "routed_attention"


def routed_attention(
  query: Float[Array, "B T H K"],
  key: Float[Array, "B T H K"],
  value: Float[Array, "B T H V"],
  scores: Float[Array, "B T H C"],
  *,
  options: Routing,
  key_scores: Float[Array, "B T H C"] | None = None,
  relative_keys: Float[Array, "R K"] | None = None,
  relative_values: Float[Array, "R V"] | None = None,
  memory_key: Float[Array, "H C M K"] | None = None,
  memory_value: Float[Array, "H C M V"] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
  lengths: Int[Array, " B"] | None = None,
  initial_state: RoutedState | None = None,
  dropout_rate: float = 0.0,
  dropout_key: jax.Array | None = None,
  implementation: str | None = None,
  interpret: Any = False,
) -> tuple[Float[Array, "B T H V"], RoutedState]:
  """Attention among the tokens that are near the same centroid.

      S_c = the w tokens with the largest scores s_c           (ties to the earlier token)
      O_c[i] = sum_{j in S_c, j <= i} softmax_j(scale q_i . k_j + q_i . A[r]) (v_j + B[r])
      o_i = sum_{c with i in S_c} O_c[i] / (m_i + combine_eps)  m_i = number of such c

  r is by how many members of S_c the key lies behind the query, clipped to the tables A
  (`relative_keys`) and B (`relative_values`), whose middle row is the token itself. That is
  `membership="official"`, in which S_c depends on the whole row: THE PAST SEES THE FUTURE through
  who its neighbours are. `Routing` describes the two memberships that do not leak. With
  "causal_recent" the softmax is over the w latest tokens of i's nearest centroid, without division.
  Paper: Efficient Content-Based Sparse Attention with Routing Transformers (2021), section 4.

  Args:
    query, key: float [B, T, H, K]; the published model has the same normalised vectors as both.
      value: [B, T, H, V] of the same dtype.
    scores: [B, T, H, C], how near each token is to each centroid; float32 at least, or rounding
      changes the members. No gradient passes through them.
    options: see `Routing`.
    key_scores: of the keys, where queries and keys have members of their own; not with
      "topk_prefix". With "causal_recent" a query then sees the w latest keys up to its own that are
      nearest to its centroid, if there are any.
    relative_keys, relative_values: [2 R + 1, K] and [2 R + 1, V], or neither; not with
      "causal_recent".
    memory_key, memory_value: [H, C, M, ...], keys and values that every member of a cluster sees;
      not with "causal_recent".
    segment_ids: int [B, T]. A change of id starts a new document; not with "official".
    lengths: int [B]. Tokens at or past a row's length are padding: they are no members, their
      output is 0, and the final state is the one after the last real token.
    initial_state: `RoutedState` of the tokens before; not with "official", not with a memory.
    dropout_rate, dropout_key: with a key, weights are dropped with this probability; only with
      "official", in XLA.
    implementation: "xla", "tpu", "triton", "reference", or None: the kernel of the platform that is
      compiled for where it takes the arguments, else "xla". "topk_prefix" has no kernels.
    interpret: run the Pallas TPU kernels in their CPU interpreter (tests).

  Returns:
    (output [B, T, H, V] in the dtype of `value`, final `RoutedState`). Tokens of no cluster have
    output 0.

  Scores, softmax and sums are float32 (or wider). Gradients exist for query, key, value, tables,
  memory and the keys and values of the state. Cost: B H C w^2 (K + V) FLOPs; with "causal_recent" 2
  B T H w (K + V); "topk_prefix" is for evaluation, O(T^2 C).

  Raises:
    ValueError: wrong rank, shape or dtype, or arguments that do not go together.
    NotImplementedError: an explicit `implementation` that cannot run here.
  """
  relative = _pair("relative_keys", relative_keys, "relative_values", relative_values)
  memory = _pair("memory_key", memory_key, "memory_value", memory_value)
  check_arguments(
    query, key, value, scores, options, key_scores, relative, memory, segment_ids, lengths,
    initial_state, implementation,
  )  # fmt: skip
  batch, length = query.shape[:2]
  segments = None if segment_ids is None else run_index(segment_ids)
  real = None if lengths is None else jnp.arange(length) < lengths[:, None]
  scores = _ranking(scores, real)
  key_scores = None if key_scores is None else _ranking(key_scores, real)
  own = scores if key_scores is None else key_scores
  tokens = extend(key, value, own, segments, initial_state)
  extras = Extras(relative, memory, _drop(dropout_rate, dropout_key, options, implementation))
  if implementation is None:
    implementation = _choose(query, tokens, scores, options, extras, key_scores is None)
  if implementation == "reference":
    if initial_state is not None or extras.drop is not None:
      raise NotImplementedError(
        f'{NAME}: implementation="reference" takes no initial_state and no dropout (use "xla")'
      )
    wide = jnp.promote_types(jnp.asarray(query).dtype, jnp.float32)
    q, k, v = (jnp.asarray(x).astype(wide) for x in (query, key, value))
    output = routed_reference(
      q, k, v, scores, key_scores, options, relative, memory, real, segments
    ).astype(value.dtype)
  elif options.membership == "official":
    output = _attend(implementation, interpret)(query, tokens, scores, options, extras)
  elif options.membership == "causal_recent":
    other = None if key_scores is None else scores
    output = attend_recent(query, tokens, other, options, implementation, interpret)
  elif implementation != "xla":
    raise NotImplementedError(
      f'{NAME}: implementation must be "xla" with membership="{options.membership}"; got'
      f' "{implementation}" (it has no kernels; None picks "xla")'
    )
  else:
    output = attend_prefix(query, tokens, options, extras)
  return zero_padding(output, lengths), state_after(tokens, options, segments, lengths)


def _ranking(scores, real):
  """Scores to rank tokens by: float32 at least, without a gradient, -inf for what is no token."""
  scores = jnp.asarray(scores, jnp.promote_types(scores.dtype, jnp.float32))
  scores = jnp.where(scores == 0, 0, scores)  # `top_k` would rank -0 below 0
  return only(jax.lax.stop_gradient(scores), real)


def _drop(rate, key, options, implementation) -> Drop | None:
  if not 0 <= rate < 1:
    checks.fail(NAME, "dropout_rate", "lie in [0, 1)", rate, "a probability")
  if key is None or not rate:
    return None
  if options.membership != "official":
    checks.fail(NAME, "dropout_key", 'be None but with membership="official"', "a key",
                "the others have no dropout of weights")  # fmt: skip
  if implementation not in (None, "xla"):
    raise NotImplementedError(
      f'{NAME}: implementation must be "xla" with dropout; got "{implementation}" (None picks it)'
    )
  return Drop(rate, key)


def _choose(query, tokens, scores, options, extras, shared) -> str:
  """The kernel of the platform where it takes these arguments, else the portable path.

  `shared`: keys have the scores of the queries.
  """
  platform = compat.target_platform()
  if options.membership == "topk_prefix" or extras.drop is not None:
    return "xla"
  if platform == "cuda" and compat.has_jax_triton():
    from .triton import fits

    return "xla" if fits(query, tokens, scores, options, extras) else "triton"
  if platform == "tpu":
    if options.membership == "official":
      from .tpu_vjp import fits

      return "xla" if fits(query, tokens, scores, options, extras) else "tpu"
    from .tpu_recent import fits

    return "xla" if fits(query, tokens, shared, options) else "tpu"
  return "xla"


def _attend(implementation, interpret):
  """Attention with membership "official" by one implementation."""
  if implementation == "xla":
    return attend_clusters
  if implementation == "triton":
    compat.require_triton(NAME)
    from .triton_vjp import attend_clusters_triton

    return attend_clusters_triton
  compat.require_tpu(NAME, interpret)
  from .tpu_vjp import attend_clusters_tpu  # Pallas' TPU half is loaded only where it is used.

  return functools.partial(attend_clusters_tpu, interpret=interpret)


def _pair(name, one, other_name, other):
  if (one is None) != (other is None):
    checks.fail(NAME, other_name if other is None else name, "be given with the other", None,
                f"{name} and {other_name} go together")  # fmt: skip
  return None if one is None else (jnp.asarray(one), jnp.asarray(other))


def check_arguments(
  query, key, value, scores, options, key_scores, relative, memory, segment_ids, lengths, state,
  implementation,
):  # fmt: skip
  """Raises ValueError for arguments the operator does not take."""
  checks.check_implementation(NAME, implementation)
  checks.check_grouped_sequence(NAME, query, key, value)
  batch, length, heads, dim = query.shape
  if key.shape[2] != heads:
    checks.fail(NAME, "key", f"have the {heads} heads of query", key.shape, "one per head")
  if scores.ndim != 4 or scores.shape[:3] != (batch, length, heads):
    checks.fail(NAME, "scores", f"be [{batch}, {length}, {heads}, C]", scores.shape, "per centroid")
  if jnp.dtype(scores.dtype).itemsize < 4:
    checks.fail(NAME, "scores", "be float32 or wider", scores.dtype, "rounding changes the members")
  checks.check_shape(NAME, "key_scores", key_scores, scores.shape, "like scores")
  clusters, width = scores.shape[3], value.shape[3]
  if relative is not None:
    rows = relative[0].shape[0]
    if rows % 2 == 0:
      checks.fail(NAME, "relative_keys", "have an odd number of rows", rows, "-R .. R")
    checks.check_shape(NAME, "relative_keys", relative[0], (rows, dim), "[2 R + 1, K]")
    checks.check_shape(NAME, "relative_values", relative[1], (rows, width), "[2 R + 1, V]")
  if memory is not None:
    count = memory[0].shape[2]
    shape = (heads, clusters, count)
    checks.check_shape(NAME, "memory_key", memory[0], (*shape, dim), "[H, C, M, K]")
    checks.check_shape(NAME, "memory_value", memory[1], (*shape, width), "[H, C, M, V]")
  checks.check_segments(NAME, segment_ids, batch, length)
  checks.check_shape(NAME, "lengths", lengths, (batch,), "one length per row")
  checks.check_integer(NAME, "lengths", lengths)
  if state is not None:
    lists = (batch, heads, clusters, options.window_size)
    checks.check_shape(NAME, "initial_state.score", state.score, lists, "[B, H, C, w]")
    checks.check_shape(NAME, "initial_state.key", state.key, (*lists, dim), "[B, H, C, w, K]")
    checks.check_shape(NAME, "initial_state.value", state.value, (*lists, width), "[B, H, C, w, V]")
  _check_membership(options, key_scores, relative, memory, segment_ids, state)


def _check_membership(options, key_scores, relative, memory, segment_ids, state):
  """Not everything goes with every membership."""
  official, recent = (options.membership == name for name in ("official", "causal_recent"))
  for name, given, rule in (
    ("segment_ids", segment_ids is not None and official, "official"),
    ("initial_state", state is not None and official, "official"),
    ("key_scores", key_scores is not None and not (official or recent), options.membership),
    ("relative_keys", relative is not None and recent, "causal_recent"),
    ("memory_key", memory is not None and recent, "causal_recent"),
  ):
    if given:
      checks.fail(NAME, name, f'be None with membership="{rule}"', "an array", "see Routing")
  if memory is not None and state is not None:
    checks.fail(NAME, "initial_state", "be None with a memory", "a state", "read the row whole")
