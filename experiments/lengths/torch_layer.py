"""The layer of full attention as a PyTorch user would write it: the peer of ours.

Nothing here is imported before it is asked for.
"""

import importlib.util
from collections.abc import Callable

import jax

from attnzoo.experiments.lengths.layers import OutOfMemory, Sizes


def obstacle() -> str | None:
  """Why it cannot run, or None."""
  if importlib.util.find_spec("torch") is None:
    return "torch is not installed"
  import torch

  if jax.default_backend() == "gpu" and not torch.cuda.is_available():
    return "torch is installed without CUDA"
  return None if jax.default_backend() in ("cpu", "gpu") else "torch has no such device"


def prepare(pass_name: str, length: int, sizes: Sizes, *, calls: int) -> Callable[[], object]:
  """As `layers.prepare`, for causal `scaled_dot_product_attention` with rotary positions.

  Raises:
    OutOfMemory: on this device.
  """
  import torch

  device = "cuda" if jax.default_backend() == "gpu" else "cpu"
  try:
    run = _decode(length, sizes, calls, device) if pass_name == "decode" else None
    run = run or _whole(pass_name, length, sizes, device)
    run()
  except torch.OutOfMemoryError:
    raise OutOfMemory(f"torch, {pass_name} at {length} tokens") from None
  return run


def _make(length: int, sizes: Sizes, device: str):
  """(weights of query, key and value and of the output, tables of cosines and sines)."""
  import torch

  dtype, width = getattr(torch, sizes.dtype), sizes.features
  generator = torch.Generator(device).manual_seed(0)

  def noise(*shape):
    return 0.02 * torch.randn(shape, generator=generator, device=device)

  half = width // sizes.heads // 2
  rates = 10000.0 ** -(torch.arange(half, device=device) / half)
  angle = torch.arange(length, device=device)[:, None] * rates  # [T, K / 2]
  tables = tuple(x.to(dtype) for x in (angle.cos(), angle.sin()))
  return noise, (noise(3 * width, width), noise(width, width)), tables


def _heads(x, weights, sizes: Sizes, tables):
  """Query, key (both turned) and value of x [B, T, D], each [B, H, T, K]."""
  import torch

  projected = torch.nn.functional.linear(x, weights.to(x.dtype))
  q, k, v = (part.unflatten(-1, (sizes.heads, -1)).transpose(1, 2)
             for part in projected.chunk(3, -1))  # fmt: skip
  return _turned(q, tables), _turned(k, tables), v


def _turned(x, tables):
  import torch

  first, second = x.chunk(2, -1)
  cos, sin = tables
  return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _mixed(q, k, v, weights, causal: bool):
  import torch

  output = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
  merged = output.transpose(1, 2).flatten(-2)  # [B, T, D]
  return torch.nn.functional.linear(merged, weights.to(merged.dtype))


def _whole(pass_name: str, length: int, sizes: Sizes, device: str):
  import torch

  noise, weights, tables = _make(length, sizes, device)
  x = noise(sizes.tokens // length, length, sizes.features).to(getattr(torch, sizes.dtype))
  train = pass_name == "train"
  leaves = [leaf.requires_grad_(train) for leaf in (x, *weights)]

  def run():
    with torch.set_grad_enabled(train):
      y = _mixed(*_heads(x, weights[0], sizes, tables), weights[1], causal=True)
      result = torch.autograd.grad(y.float().mean(), leaves) if train else y
    _wait(device)
    return result

  return run


def _decode(length: int, sizes: Sizes, calls: int, device: str):
  import torch

  noise, weights, tables = _make(length, sizes, device)
  dtype, batch = getattr(torch, sizes.dtype), sizes.decode_batch
  x = noise(batch, 1, sizes.features).to(dtype)
  shape = (batch, sizes.heads, length, sizes.features // sizes.heads)
  keys, values = (torch.full(shape, 0.02, dtype=dtype, device=device) for _ in range(2))
  position = [length - calls]

  def run():
    with torch.no_grad():
      at = position[0]
      here = tuple(table[at] for table in tables)
      q, k, v = _heads(x, weights[0], sizes, here)
      keys[:, :, at : at + 1], values[:, :, at : at + 1] = k, v
      y = _mixed(q, keys[:, :, : at + 1], values[:, :, : at + 1], weights[1], causal=False)
    position[0] += 1
    _wait(device)
    return y

  return run


def _wait(device: str) -> None:
  if device == "cuda":
    import torch

    torch.cuda.synchronize()
