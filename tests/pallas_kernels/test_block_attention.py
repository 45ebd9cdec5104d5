"""Block attention: goldens of both published codes, the definition, pieces and steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo.layers.positions import rotary
from attnzoo.pallas_kernels import (
  block_attention,
  block_attention_step,
  block_window,
  empty_window,
)
from attnzoo_testing.goldens import golden, golden_config
from attnzoo_testing.mixers import close


def heads_last(x):
  return jnp.asarray(np.swapaxes(x, 1, 2), jnp.float64)


def check(f, arrays, g, output="out/o"):
  """Output and gradients of `f(arrays)` against a golden file's."""
  y, pull = jax.vjp(jax.jit(f), arrays)
  close(y, heads_last(g[output]), 1e-12)
  (grads,) = pull(heads_last(g["in/cotangent"]))
  for name, gradient in grads.items():
    expected = g[f"grad/{name}"]
    close(gradient, heads_last(expected) if expected.ndim == 4 else expected, 1e-11)


@pytest.mark.parametrize("name", ["local_b8", "local_b8_f16_clip"])
def test_official_local_heads(name):
  """With the matrix that follows the heads; keys whose value is 0 are masked."""
  g, c = golden(f"routing_official_{name}"), golden_config(f"routing_official_{name}")
  with jax.enable_x64(True):
    arrays = {n: heads_last(g[f"in/{n}"]) for n in "qkv"}
    arrays |= {n: jnp.asarray(g[f"param/{n}"], jnp.float64) for n in ("rel_k", "rel_v", "mix")}

    def f(arrays):
      output, _ = block_attention(
        arrays["q"], arrays["k"], arrays["v"],
        block_size=c["block"],
        look_back=c["flange"],
        scale=1.0,
        relative_keys=arrays["rel_k"],
        relative_values=arrays["rel_v"],
        key_seen=jnp.any(arrays["v"] != 0, axis=-1),
      )  # fmt: skip
      return output @ arrays["mix"]

    check(f, arrays, g)


@pytest.mark.parametrize("name", ["local_causal", "local_bidir_mask"])
def test_local_heads_of_the_port(name):
  """Rotary positions of its keys begin anew in every window, and queries stand at its end: that is
  by how far a key is away, and where the window looks ahead `look_back` too far."""
  g, c = golden(f"routing_lucid_{name}"), golden_config(f"routing_lucid_{name}")
  with jax.enable_x64(True):
    arrays = {n: heads_last(g[f"in/{n}"]) for n in "qkv"}
    back = c["back"] * c["win"]
    places = jnp.arange(c["T"])[None]
    seen = jnp.asarray(g["in/mask"])[..., None] if "in/mask" in g else None
    ahead = 0 if c["causal"] else back
    # Their tables are float32.
    turn = lambda x, ahead: rotary(x, places + ahead)  # noqa: E731

    def f(arrays):
      output, _ = block_attention(
        turn(arrays["q"], ahead), turn(arrays["k"], 0), arrays["v"],
        block_size=c["win"],
        look_back=back,
        causal=c["causal"],
        key_seen=None if seen is None else jnp.broadcast_to(seen, arrays["k"].shape[:3]),
      )[:2]  # fmt: skip
      return output

    y, pull = jax.vjp(jax.jit(f), arrays)
    close(y, heads_last(g["out/o"]), 2e-6)
    (grads,) = pull(heads_last(g["in/cotangent"]))
    for n in "qkv":
      close(grads[n], heads_last(g[f"grad/{n}"]), 3e-6)


def definition(q, k, v, ids, block, back, tables):
  """One query after the other, float64."""
  batch, length, heads, dim = q.shape
  output = np.zeros(v.shape)
  reach = len(tables[0]) // 2
  for b, i, h in np.ndindex(batch, length, heads):
    start = i
    while start and ids[b, start - 1] == ids[b, i]:
      start -= 1
    first = max(start + (i - start) // block * block - back, start)
    keys = np.arange(first, i + 1)
    rows = np.clip(keys - i, -reach, reach) + reach
    logits = (k[b, keys, h] * dim**-0.5 + tables[0][rows]) @ q[b, i, h]
    weights = np.exp(logits - logits.max())
    output[b, i, h] = weights / weights.sum() @ (v[b, keys, h] + tables[1][rows])
  return output


def draw(rows=2, length=23, heads=2, dim=4):
  keys = jax.random.split(jax.random.key(0), 5)
  q, k, v = (jax.random.normal(key, (rows, length, heads, dim)) for key in keys[:3])
  tables = [jax.random.normal(key, (2 * 6 + 1, dim)) for key in keys[3:]]
  return q, k, v, tables


@pytest.mark.parametrize(("block", "back"), [(4, 8), (5, 0), (1, 3)])
def test_definition_pieces_and_steps(block, back):
  """Documents, a call that continues another, padded rows, and one token at a time."""
  q, k, v, tables = draw()
  rows, length = q.shape[:2]
  ids = np.repeat([0, 1, 0], [6, 1, 16])[None].repeat(rows, 0)
  options = dict(block_size=block, look_back=back)
  options |= dict(zip(("relative_keys", "relative_values"), tables, strict=True))
  arrays = [np.asarray(x, np.float64) for x in (q, k, v)]
  call = jax.jit(lambda q, k, v, **more: block_attention(q, k, v, **options, **more))
  output, _ = call(q, k, v, segment_ids=jnp.asarray(ids))
  close(output, definition(*arrays, ids, block, back, tables), 1e-6)
  whole, _ = call(q, k, v)
  close(whole, definition(*arrays, 0 * ids, block, back, tables), 1e-6)
  # The first 10 tokens of one row, 7 of the other, then what follows in rows of equal length.
  lengths = jnp.asarray([10, 7])
  padded, state = call(q, k, v, lengths=lengths)
  assert not np.any(padded[1, 7:])
  follow = lengths[:, None] + jnp.arange(11)
  pick = lambda x: x[jnp.arange(rows)[:, None], follow]  # noqa: E731
  rest, after = call(pick(q), pick(k), pick(v), initial_state=state)
  close(rest, pick(whole), 1e-6)
  step = jax.jit(lambda q, k, v, state: block_attention_step(q, k, v, state, **options))
  state = empty_window(rows, block_window(block, back), 2, 4, 4, jnp.float32)
  for t in range(length):
    got, state = step(q[:, t], k[:, t], v[:, t], state)
    close(got, whole[:, t], 1e-6)
  # One token more after the pieces is one token more after as many steps.
  token = [x[:, 0] for x in (q, k, v)]
  every = jax.jit(lambda *x: block_attention(*x, **options)[0][:, -1])
  close(
    step(*token, after)[0][0],
    every(*(jnp.concatenate([x[:, :21], x[:, :1]], 1) for x in (q, k, v)))[0],
    1e-6,
  )


def test_gradients_are_finite_where_nothing_is_seen():
  q, k, v, _ = draw()
  seen = jnp.zeros(k.shape[:3], bool)
  loss = lambda q: jnp.sum(block_attention(q, k, v, block_size=4, key_seen=seen)[0])  # noqa: E731
  value, gradient = jax.value_and_grad(loss)(q)
  assert value == 0
  np.testing.assert_array_equal(gradient, 0)


def test_dropped_weights_average_to_all_of_them():
  """Over many keys; both kinds of heads drop alike."""
  q, k, v, _ = draw(rows=1, length=8)
  call = lambda key: block_attention(q, k, v, block_size=4, dropout_rate=0.3, dropout_key=key)[0]  # noqa: E731
  outputs = jax.jit(jax.vmap(call))(jax.random.split(jax.random.key(0), 4000))
  error = np.std(outputs, axis=0) / 4000**0.5
  plain = block_attention(q, k, v, block_size=4)[0]
  assert np.abs((np.mean(outputs, axis=0) - plain) / error).max() < 5
  assert np.std(outputs) > 0.1


def test_bad_arguments_are_refused():
  q, k, v, tables = draw()
  state = empty_window(2, 3, 2, 4, 4, jnp.float32)
  for more, message in (
    (dict(block_size=0), "block_size must be at least 1; got 0"),
    (dict(look_back=6), "look_back must be a multiple of block_size .4.; got 6"),
    (dict(relative_keys=tables[0]), "relative_keys must be given with relative_values"),
    (dict(relative_keys=tables[0][1:], relative_values=tables[1][1:]), "an odd number of rows"),
    (dict(initial_state=state), "initial_state"),
    (dict(causal=False, segment_ids=jnp.zeros((2, 23), jnp.int32)), "segment_ids must be None"),
  ):
    with pytest.raises(ValueError, match=f"block_attention: .*{message}"):
      block_attention(q, k, v, **dict(dict(block_size=4), **more))
  with pytest.raises(ValueError, match="block_attention_step: state must have .* = 7 slots; got 3"):
    block_attention_step(q[:, 0], k[:, 0], v[:, 0], state, block_size=4)
