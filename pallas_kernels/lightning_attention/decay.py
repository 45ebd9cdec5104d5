"""The decay rates of the released TransNormerLLM models."""

import math

import numpy as np

LADDERS = ("alibi", "power", "geometric")


def decay_rates(
  heads: int,
  layer: int = 0,
  num_layers: int = 1,
  *,
  ladder: str = "alibi",
  layer_factor: bool = True,
) -> np.ndarray:
  """Rates s >= 0 of one layer, float32 [heads]; a token fades by exp(-s) per step.

      s = 2^(-8 (h + 1) / heads) (1 - layer / (num_layers - 1) + 1e-5)

  Args:
    heads, layer, num_layers: layers count from 0. With one layer the factor is 1 (the released code
      divides by 0).
    ladder: "alibi", the released TransNormerLLM: head counts that are not powers of two take the
      ladder of the next smaller power P, then every other rung of the ladder of 2 P. "power",
      MiniMax-Text-01: the formula above for every head count. "geometric": from 1/2 to 1/256.
    layer_factor: False gives every layer the rates of the first, without the factor.

  Paper: Various Lengths, Constant Speed (2024), equation 10 as the released code computes it.
  """
  if heads < 1 or not 0 <= layer < num_layers:
    raise ValueError(
      f"decay_rates: layer must lie in [0, num_layers) and heads be at least 1; got heads={heads}, "
      f"layer={layer}, num_layers={num_layers} (layers count from 0)"
    )
  if ladder not in LADDERS:
    raise ValueError(f"decay_rates: ladder must be one of {LADDERS}; got {ladder!r} (see the docs)")
  factor, last = 1.0, num_layers - 1
  if ladder == "alibi":
    whole = 2 ** int(math.log2(heads))
    rates = _ladder(whole) + _ladder(2 * whole)[0::2][: heads - whole]
  elif ladder == "power":
    rates = _ladder(heads)
    last += 1e-5  # as that model's code has it
  else:
    rates = np.geomspace(1 / 2, 1 / 256, heads)
  if layer_factor and num_layers > 1:
    factor = 1 - layer / last + 1e-5
  return np.asarray(rates, np.float32) * np.float32(factor)


def _ladder(count: int) -> list[float]:
  return [2.0 ** (-8.0 * (index + 1) / count) for index in range(count)]
