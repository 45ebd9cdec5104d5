"""Batches of the host as arrays over the mesh."""

import jax
import numpy as np
from jax.sharding import Mesh

from attnzoo.experiments.training import state


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """This host's rows, whole in length, as arrays over the whole mesh."""
  sharding = state.batch_sharding(mesh)
  _, parts = state.data_part(mesh)
  return {
    name: jax.make_array_from_process_local_data(
      sharding, rows, (rows.shape[0] * parts, *rows.shape[1:])
    )
    for name, rows in batch.items()
  }
