"""What a run carries from step to step, where it lies on the devices, and the step itself."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from attnzoo import zoo
from attnzoo.experiments.training.config import Experiment, MeshConfig
from attnzoo.experiments.training.optimizers import make_optimizer
from attnzoo.layers import Tracked
from attnzoo.layers.centroids import clusters_in_use
from attnzoo.layers.partitioning import MESH_AXES, parameter_shardings
from attnzoo.layers.variables import SAVED

Params = dict[str, jax.Array]  # path with dots -> array, such as "groups.0.0.mixer.log_decay"


class TrainState(NamedTuple):
  """Saved in every checkpoint."""

  step: jax.Array  # int32 scalar, steps done
  params: Params
  opt_state: Any


class Parts(NamedTuple):
  """A model taken apart: `merge(parts, params)` puts it together again, inside jit or out."""

  graph: nnx.GraphDef
  template: nnx.State  # of the parameters and of what is `Tracked`
  constants: nnx.State


class Metrics(NamedTuple):
  """Of one step or one evaluation, float32 scalars."""

  loss: jax.Array  # nats per target
  accuracy: jax.Array
  grad_norm: jax.Array
  extra: dict[str, jax.Array]  # what the model's layers note, by name


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
  """The device mesh (data, seq, model) of a run; on TPUs neighbours are linked directly.

  Raises:
    ValueError: the axes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  fixed = config.seq * config.model
  data = config.data or max(len(devices) // fixed, 1)
  if data * fixed != len(devices):
    raise ValueError(
      f"make_mesh: data x seq x model must be the {len(devices)} devices; got"
      f" {data} x {config.seq} x {config.model} = {data * fixed} (mesh.data=0 takes what is left)"
    )
  shape = (data, config.seq, config.model)
  array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  return Mesh(array, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


@functools.cache
def data_part(mesh: Mesh) -> tuple[int, int]:
  """(index, count) of the block of each batch's rows that this process loads.

  Processes whose devices lie at the same places of the axis "data", because "seq" or "model" goes
  across them, load the same rows.

  Raises:
    ValueError: the places of two processes overlap in part.
  """
  places: dict[int, set[int]] = {}
  for place, row in enumerate(mesh.devices):
    for device in row.flat:
      places.setdefault(device.process_index, set()).add(place)
  blocks = sorted({tuple(sorted(block)) for block in places.values()})
  if len(blocks) * len(blocks[0]) != len(mesh.devices) or len({*map(len, blocks)}) > 1:
    raise ValueError(
      f"mesh: data must be split over the {len(places)} hosts in equal blocks; got"
      f" {dict(mesh.shape)} (let seq x model be devices of one host, or of whole hosts)"
    )
  return blocks.index(tuple(sorted(places[jax.process_index()]))), len(blocks)


def check_divides(experiment: Experiment, mesh: Mesh) -> None:
  """Raises ValueError where the mesh does not divide the batch, the length or the heads."""
  rows = experiment.data.batch_size // experiment.train.grad_accumulation
  sizes = dict(
    data=("rows of a batch part", rows),
    seq=("data.sequence_length", experiment.data.sequence_length),
    model=("model.heads", experiment.model.heads),
  )
  for axis, (name, size) in sizes.items():
    if size % mesh.shape[axis]:
      raise ValueError(
        f"mesh: {name} must be a multiple of the mesh axis {axis!r} ({mesh.shape[axis]}); got"
        f" {size} (change either)"
      )


def take_apart(model: nnx.Module) -> tuple[Parts, Params]:
  graph, template, constants = nnx.split(model, SAVED, ...)
  return Parts(graph, template, constants), flatten(template)


def trained(parts: Parts, params: Params) -> Params:
  """Those that the optimiser changes; the others follow the data (`Tracked`)."""
  flat = nnx.to_flat_state(parts.template)
  tracked = {_name(path) for path, variable in flat if isinstance(variable, Tracked)}
  return {name: value for name, value in params.items() if name not in tracked}


def flatten(state: nnx.State) -> Params:
  """Path with dots -> value."""
  return {_name(path): variable.get_value() for path, variable in nnx.to_flat_state(state)}


def merge(parts: Parts, params: Params) -> nnx.Module:
  flat = [
    (path, variable.replace(params[_name(path)]))
    for path, variable in nnx.to_flat_state(parts.template)
  ]
  return nnx.merge(parts.graph, nnx.from_flat_state(flat), parts.constants)


def abstract_state(experiment: Experiment) -> tuple[Parts, TrainState]:
  """The shapes of the model's parts and of its training state; nothing is allocated."""
  model = nnx.eval_shape(lambda: zoo.build(experiment.model, nnx.Rngs(0)))
  parts, params = take_apart(model)
  optimizer = make_optimizer(experiment.optimizer, experiment.train.steps)
  opt_state = jax.eval_shape(optimizer.init, trained(parts, params))
  return parts, TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, opt_state)


def model_constants(experiment: Experiment) -> nnx.State:
  """What a model holds beside its parameters, as arrays of the host; weights are not drawn.

  Small, and part of every program that is compiled: devices of other hosts could not be.
  """
  make = jax.jit(lambda: take_apart(zoo.build(experiment.model, nnx.Rngs(0)))[0].constants)
  return jax.device_get(make())


def constants(experiment: Experiment) -> nnx.State:
  """What a model holds beside its parameters; those are not drawn for it."""
  build = lambda: take_apart(zoo.build(experiment.model, nnx.Rngs(0)))[0].constants  # noqa: E731
  return jax.jit(build)()


def state_shardings(parts: Parts, state: TrainState, mesh: Mesh) -> TrainState:
  """Parameters over "data" and "model" by the names of their axes; moments like their parameter."""
  params = flatten(parameter_shardings(parts.template, mesh))
  whole = NamedSharding(mesh, P())

  def of_leaf(path, leaf):
    for key in reversed(path):  # moments are dictionaries with the parameters' names
      name = getattr(key, "key", None)
      if name in params and leaf.shape == state.params[name].shape:
        return params[name]
    return whole

  return TrainState(whole, params, jax.tree_util.tree_map_with_path(of_leaf, state.opt_state))


def initial_state(experiment: Experiment, mesh: Mesh) -> tuple[Parts, TrainState, TrainState]:
  """(parts, state with fresh weights, its shardings); each device makes only its own part."""
  parts, abstract = abstract_state(experiment)
  parts = parts._replace(constants=model_constants(experiment))
  shardings = state_shardings(parts, abstract, mesh)
  optimizer = make_optimizer(experiment.optimizer, experiment.train.steps)
  seed = experiment.train.seed

  def make():
    fresh, params = take_apart(zoo.build(experiment.model, nnx.Rngs(seed)))
    opt_state = optimizer.init(trained(fresh, params))
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state)

  return parts, jax.jit(make, out_shardings=shardings)(), shardings


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Of every array of a batch, [B, T]."""
  return NamedSharding(mesh, P("data", "seq"))


def make_train_step(
  experiment: Experiment, parts: Parts
) -> Callable[..., tuple[TrainState, Metrics]]:
  """One step on one batch, as a pure function to be jitted. Donate the state.

  Its third argument multiplies the learning rate, so that one program can train several models
  at rates of their own (`jax.vmap`).
  """
  optimizer = make_optimizer(experiment.optimizer, experiment.train.steps)
  z_weight = experiment.optimizer.z_loss
  pieces = experiment.train.grad_accumulation
  drops = getattr(experiment.model, "has_dropout", False)

  def summed_loss(learned, params, batch, key):
    model = merge(parts, params | learned)
    sums, notes = model.loss_and_notes(**batch, dropout_key=key)
    notes = notes._replace(loss=notes.loss * sums.weight)  # a mean, to be added up like the sums
    return sums.loss + z_weight * sums.z_loss + notes.loss, (sums, notes)

  gradient = jax.grad(summed_loss, has_aux=True)

  def accumulate(params, batch, key):
    """(gradient, (sums, notes)) of the batch, in pieces; one key each."""
    learned = trained(parts, params)
    if pieces == 1:
      return gradient(learned, params, batch, key)
    batch = {  # [B, T] -> [pieces, B / pieces, T]; interleaved, so that each device keeps its rows
      name: jnp.moveaxis(x.reshape(-1, pieces, *x.shape[1:]), 1, 0) for name, x in batch.items()
    }
    keys = None if key is None else jax.random.split(key, pieces)

    def add(total, piece):
      return jax.tree.map(jnp.add, total, gradient(learned, params, *piece)), None

    one = jax.tree.map(lambda x: x[0], (batch, keys))
    shapes = jax.eval_shape(gradient, learned, params, *one)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(add, zeros, (batch, keys))[0]

  def train_step(
    state: TrainState, batch: dict, rate: jax.Array | None = None
  ) -> tuple[TrainState, Metrics]:
    key = jax.random.fold_in(jax.random.key(experiment.train.seed), state.step) if drops else None
    grads, (sums, notes) = accumulate(state.params, batch, key)
    count = jnp.maximum(sums.weight, 1)
    grads = jax.tree.map(lambda g: g / count.astype(g.dtype), grads)
    learned = trained(parts, state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, learned)
    if rate is not None:  # every update is proportional to it, weight decay included
      updates = jax.tree.map(lambda u: (u * rate).astype(u.dtype), updates)
    params = state.params | optax.apply_updates(learned, updates)
    extra = {}
    if jax.tree.leaves(notes.sums):
      params = _absorbed(parts, params, notes.sums)
      extra = dict(auxiliary_loss=notes.loss / count, clusters_in_use=clusters_in_use(notes.sums))
    norm = optax.tree.norm(grads)
    metrics = Metrics(sums.loss / count, sums.correct / count, norm, extra)
    return TrainState(state.step + 1, params, opt_state), metrics

  return train_step


def _absorbed(parts: Parts, params: Params, sums) -> Params:
  """The parameters after what is tracked has followed a batch."""
  model = merge(parts, params)
  model.absorb(sums)
  return take_apart(model)[1]


def make_eval_step(parts: Parts) -> Callable[[Params, dict], Any]:
  """Loss sums of one batch, as a pure function to be jitted."""
  return lambda params, batch: _loss_sums(parts, params, batch)


def _loss_sums(parts, params, batch):
  return merge(parts, params).loss(**batch)


def _name(path: tuple) -> str:
  return ".".join(map(str, path))
