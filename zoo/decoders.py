"""What configurations of language models have in common: checks, and the model around blocks."""

from collections.abc import Sequence
from typing import Any, NoReturn

import jax.numpy as jnp
from flax import nnx

from ..layers import Block, DecoderLM

DTYPES = ("float32", "bfloat16", "float16", "float64")


def refuse(config: Any, name: str, rule: str, hint: str) -> NoReturn:
  """Raises ValueError for a field of a configuration."""
  got = repr(getattr(config, name))
  raise ValueError(f"{type(config).__name__}: {name} must {rule}; got {got} ({hint})")


def check_sizes(config: Any, *names: str) -> None:
  for name in names:
    if getattr(config, name) < 1:
      refuse(config, name, "be at least 1", "a size")


def check_dtypes(config: Any) -> None:
  for name in ("dtype", "param_dtype"):
    if getattr(config, name) not in DTYPES:
      refuse(config, name, f"be one of {DTYPES}", "numbers are added up in float32 all the same")


def dtypes_of(config: Any) -> dict[str, Any]:
  """`dtype` and `param_dtype`, for layers."""
  return dict(dtype=jnp.dtype(config.dtype), param_dtype=jnp.dtype(config.param_dtype))


def decoder(
  config: Any, blocks: Sequence[Block], final_norm: nnx.Module, rngs: nnx.Rngs, **more
) -> DecoderLM:
  """The model around `blocks`, by the fields that all configurations have.

  With `residual_in_float32` the stream that layers add to is kept wide; `more` goes to `DecoderLM`.
  """
  wide = jnp.promote_types(config.dtype, jnp.float32)
  return DecoderLM(
    blocks,
    final_norm,
    vocab_size=config.vocab_size,
    features=config.features,
    init_stddev=getattr(config, "init_stddev", 0.02),
    remat=config.remat,
    loss_chunk=config.loss_chunk,
    residual_dtype=wide if getattr(config, "residual_in_float32", False) else None,
    rngs=rngs,
    **dtypes_of(config),
    **more,
  )
