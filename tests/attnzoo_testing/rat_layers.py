"""The published layers of RAT, norm and residual included, around our mixers."""

import jax
import jax.numpy as jnp
from flax import nnx

from attnzoo.layers import RMSNorm
from attnzoo.zoo.weights import from_heads, into_heads
from attnzoo_testing import mixers
from attnzoo_testing.mixers import close


class Published(nnx.Module):
  """x + mixer(norm(x)), which is what the published code calls a layer."""

  def __init__(self, mixer, features, dtype):
    self.mixer, self.norm = mixer, RMSNorm(features, param_dtype=dtype)

  def init_state(self, batch, max_length):
    return self.mixer.init_state(batch, max_length)

  def __call__(self, x, **options):
    y, state = self.mixer(self.norm(x), **options)
    return x + y, state

  def step(self, x, state):
    y, state = self.mixer.step(self.norm(x), state)
    return x + y, state


def module_of(g, name):
  """The arrays of one of a file's modules, without its name."""
  return {key.replace(f"/{name}.", "/"): v for key, v in g.items() if f"/{name}." in key}


def gated_params(g, prefix, heads, groups=0):
  """Our parameters of a gated layer: rows z, v, g of all heads, then q, k of the groups."""
  rows, out = g[f"{prefix}in_proj.weight"], g[f"{prefix}out_proj.weight"]
  d = rows.shape[1]
  params = dict(
    norm__scale=g[f"{prefix}input_norm.weight"],
    mixer__gated_heads_in__kernel=into_heads(heads, 3)[0](rows[: 3 * d]),
    mixer__gate_bias=g[f"{prefix}gate_bias"].reshape(heads, -1),
    mixer__heads_out__kernel=from_heads(heads)[0](out),
  )
  if groups:
    params["mixer__query_key_heads_in__kernel"] = into_heads(groups, 2)[0](rows[3 * d :])
  return params


def attention_params(g, prefix, heads):
  """Our parameters of a softmax layer: rows v, q, k."""
  rows, out = g[f"{prefix}in_proj.weight"], g[f"{prefix}out_proj.weight"]
  return dict(
    norm__scale=g[f"{prefix}input_norm.weight"],
    mixer__heads_in__kernel=into_heads(heads, 3)[0](rows)[[1, 2, 0]],
    mixer__heads_out__kernel=from_heads(heads)[0](out),
  )


def check_layer(make, g, params):
  """Output and gradients of `make(dtype)`, a mixer, in float64; float32 is left to the steps.

  `params(g, prefix)` are ours of theirs. The published rotary tables are float32 all the same.
  """
  with jax.enable_x64(True):
    x, dy = (jnp.asarray(g[f"in/{name}"], jnp.float64) for name in ("x", "dy"))
    layer = Published(make("float64"), x.shape[-1], "float64")
    mixers.set_params(layer, **params(g, "param/"))
    y, dx, grads = mixers.value_and_grads(layer, x, dy)
    close(y, g["out64/y"], 1e-6)
    close(dx, g["grad64/in.x"], 1e-6)
    for name, expected in params(g, "grad64/").items():
      close(grads[name], expected, 1e-6)


def check_steps(mixer, g, params, prompt=None):
  """Steps from the empty state, and after a prompt; (states at the end, after the prompt)."""
  x = jnp.asarray(g["in/x"])
  layer = Published(mixer, x.shape[-1], "float32")
  mixers.set_params(layer, **params(g, "param/"))
  step, empty = jax.jit(layer.step), layer.init_state(x.shape[0], x.shape[1])
  outputs, state = _steps(step, x, empty)
  close(outputs, g["out/step_y"], 3e-6)
  if prompt is None:
    return state, None
  y, read = mixers.run(layer, x[:, :prompt], state=empty)
  close(y, g["out/y"][:, :prompt], 3e-6)
  close(_steps(step, x[:, prompt:], read)[0], g["out/prefill_step_y"], 3e-6)
  return state, read


def _steps(step, x, state):
  outputs = []
  for t in range(x.shape[1]):
    y, state = step(x[:, t], state)
    outputs.append(y)
  return jnp.stack(outputs, 1), state
