"""The decay rates against the published ones."""

import numpy as np
import pytest

from attnzoo.pallas_kernels.lightning_attention.decay import decay_rates
from attnzoo_testing.goldens import golden

GOLDEN = "transnormer_slopes"


@pytest.mark.parametrize("heads", [1, 2, 4, 8, 12, 16, 20, 32, 40])
def test_heads(heads):
  np.testing.assert_array_equal(decay_rates(heads), golden(GOLDEN)[f"out/slopes_H{heads}"])


@pytest.mark.parametrize("layers", [2, 12, 16, 24, 30, 32, 42])
def test_layers(layers):
  rates = [decay_rates(8, layer, layers) for layer in range(layers)]
  np.testing.assert_array_equal(np.stack(rates), golden(GOLDEN)[f"out/slopes_H8_L{layers}"])


def test_one_layer_and_no_layer_factor_are_the_first_ladder():
  np.testing.assert_array_equal(decay_rates(8, 0, 1), 2.0 ** -np.arange(1, 9))
  np.testing.assert_array_equal(decay_rates(8, 5, 9, layer_factor=False), decay_rates(8))


def test_other_ladders():
  np.testing.assert_allclose(decay_rates(6, ladder="power"), 2.0 ** (-8 * np.arange(1, 7) / 6))
  rates = decay_rates(5, ladder="geometric")
  np.testing.assert_allclose([rates[0], rates[-1]], [1 / 2, 1 / 256])
  np.testing.assert_allclose(rates[1:] / rates[:-1], (1 / 128) ** 0.25, rtol=1e-6)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (dict(heads=0), "heads be at least 1; got heads=0"),
    (dict(heads=4, layer=3, num_layers=3), "got heads=4, layer=3, num_layers=3"),
    (dict(heads=4, ladder="alibbi"), "ladder must be one of .*got 'alibbi'"),
  ],
)
def test_bad_arguments(arguments, message):
  with pytest.raises(ValueError, match=message):
    decay_rates(**arguments)
