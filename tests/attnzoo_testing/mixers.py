"""What every token mixer is tested for: against published modules, and against itself."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh


def close(got, expected, relative=1e-5):
  """Largest error relative to the largest entry."""
  expected = np.asarray(expected, np.float64)
  scale = np.abs(expected).max()
  np.testing.assert_allclose(
    np.asarray(got, np.float64) / scale, expected / scale, atol=relative, rtol=0
  )


def set_params(module, **values):
  """Overwrites parameters given as path__like__this=array; all of them must be named."""
  flat = dict(nnx.to_flat_state(nnx.state(module, nnx.Param)))
  assert {"__".join(map(str, path)) for path in flat} == set(values)
  for path, variable in flat.items():
    like = variable.get_value()
    value = np.asarray(values["__".join(map(str, path))])
    assert value.shape == like.shape, path
    variable.set_value(jnp.asarray(value, like.dtype))
  nnx.update(module, nnx.from_flat_state(flat.items()))


def value_and_grads(mixer, x, dy):
  """y, dL/dx and dL/dparams for L = sum(y * dy)."""
  graph, params, rest = nnx.split(mixer, nnx.Param, ...)

  def loss(params, x):
    y, _ = nnx.merge(graph, params, rest)(x)
    return jnp.sum(y * dy), y

  (_, y), (d_params, dx) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x)
  flat = {"__".join(map(str, p)): v.get_value() for p, v in nnx.to_flat_state(d_params)}
  return y, dx, flat


def run(mixer, x, **options):
  """`mixer(x, **options)` as one program; operation by operation it takes much longer."""
  return jax.jit(lambda x, options: mixer(x, **options))(x, options)


def check_protocol(mixer, x, cuts, relative=1e-5):
  """What every mixer promises, for x [B, T, D]: see the parts below. Few programs are compiled."""
  rows, length, _ = x.shape
  empty = mixer.init_state(rows, 3 * length)
  read = jax.jit(lambda x, lengths, state: mixer(x, lengths=lengths, state=state))
  step = jax.jit(mixer.step)
  whole, state = read(x, jnp.full((rows,), length), empty)
  close(run(mixer, x)[0], whole, relative)
  _every_prompt(mixer, read, step, x, empty, whole, relative)
  _rows_of_unequal_length(read, step, x, state, relative)
  _documents(mixer, read, step, x, cuts, empty, state, relative)


def _every_prompt(mixer, read, step, x, empty, whole, relative):
  """Any part first, then the rest in one call or step by step, is the whole in one call."""
  rows, length, _ = x.shape
  for count in range(length):
    real = jnp.full((rows,), count)
    prompt, state = read(x, real, empty)
    close(prompt[:, :count], whole[:, :count], relative) if count else None
    rest, _ = read(jnp.roll(x, -count, 1), length - real, state)
    close(rest[:, : length - count], whole[:, count:], relative)
    for t in range(count, length):
      y, state = step(x[:, t], state)
      close(y, whole[:, t], relative)

  @jax.jit
  def in_parts(x):
    first, state = mixer(x[:, :3], state=empty)
    return jnp.concatenate([first, mixer(x[:, 3:], state=state)[0]], 1)

  close(in_parts(x), whole, relative)  # and without padding


def _rows_of_unequal_length(read, step, x, state, relative):
  """Padded rows of one batch, and the states after them, are as if each row were alone."""
  rows, length, _ = x.shape
  lengths = np.arange(rows) * 3 % length  # the first has no token at all
  y, after = read(x, jnp.asarray(lengths), state)
  following, _ = step(x[:, 0], after)
  for row, count in enumerate(lengths):
    alone, after = read(x, jnp.full((rows,), count), state)
    if count:
      close(y[row, :count], alone[row, :count], relative)
    close(following[row], step(x[:, 0], after)[0][row], relative)


def _documents(mixer, read, step, x, cuts, empty, state, relative):
  """Packed documents are as if alone: `state` is of the first, what comes after is of the last."""
  rows, length, _ = x.shape
  ids = np.searchsorted(cuts, np.arange(length), side="right") % 2  # an id may come again
  ids = jnp.broadcast_to(jnp.asarray(ids, jnp.int32), (rows, length))
  packed, after = jax.jit(lambda x, ids: mixer(x, segment_ids=ids, state=state))(x, ids)
  alone_after = state
  for start, stop in zip([0, *cuts], [*cuts, length], strict=True):
    count, before = jnp.full((rows,), stop - start), state if start == 0 else empty
    alone, alone_after = read(jnp.roll(x, -start, 1), count, before)
    close(packed[:, start:stop], alone[:, : stop - start], relative)
  close(step(x[:, 0], after)[0], step(x[:, 0], alone_after)[0], relative)


def mesh_of(data: int, seq: int, model: int) -> Mesh:
  devices = np.asarray(jax.devices()[: data * seq * model]).reshape(data, seq, model)
  return Mesh(devices, ("data", "seq", "model"), axis_types=(AxisType.Auto,) * 3)


def check_sharded(mixer, x, *sizes, relative=1e-5):
  """Output, next step and gradients over a mesh (data, seq, model) are those of one device."""
  graph, params, rest = nnx.split(mixer, nnx.Param, ...)
  ids = jnp.asarray(np.arange(x.shape[1]) >= x.shape[1] // 3, jnp.int32)
  ids = jnp.broadcast_to(ids, x.shape[:2])

  def run(params, x, ids):
    def loss(params, x):
      mixer = nnx.merge(graph, params, rest)
      y, state = mixer(x, segment_ids=ids, state=mixer.init_state(x.shape[0], x.shape[1] + 1))
      return jnp.sum(jnp.sin(y)), (y, mixer.step(x[:, 0], state)[0])

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)

  expected = jax.jit(run)(params, x, ids)
  with jax.set_mesh(mesh_of(*sizes)):
    got = jax.jit(lambda *args: run(*args))(params, x, ids)
  jax.tree.map(lambda a, b: close(a, b, relative), got, expected)
