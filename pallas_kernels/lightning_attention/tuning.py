"""Block sizes of the TPU kernels."""
import jax.numpy as jnp

def choose_blocks(length, key_dim, value_dim, dtype, chunk_size):
  import os
  chunk = chunk_size or int(os.environ.get("CH", 256))
  unroll = int(os.environ.get("UN", 1))
  if length < chunk:
    chunk = -(-length // 16) * 16; unroll=1
  return chunk, unroll
