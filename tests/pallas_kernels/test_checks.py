"""Every argument that an operator must not be given is refused in one line that says what to do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo.pallas_kernels import checks, compat, lightning_attention
from attnzoo.pallas_kernels.cases import Case
from attnzoo.pallas_kernels.lightning_attention import api

B, T, H, K, V = 2, 6, 3, 4, 5


def arguments(**changed):
  base = dict(
    query=jnp.zeros((B, T, H, K)),
    key=jnp.zeros((B, T, H, K)),
    value=jnp.zeros((B, T, H, V)),
    log_decay=jnp.full((H,), -0.5),
    segment_ids=jnp.zeros((B, T), jnp.int32),
    lengths=jnp.full((B,), T),
    initial_state=jnp.zeros((B, H, K, V)),
  )
  return base | changed


def zeros(*shape, dtype=jnp.float32):
  return jnp.zeros(shape, dtype)


INT, HALF = jnp.int32, jnp.bfloat16
# argument, its bad value, rule, what is shown, hint
REFUSED = [
  ("query", zeros(B, T, H * K), "have 4 axes [batch, length, heads, head_dim]", "(2, 6, 12)",
   "add or split axes"),
  ("value", zeros(B, T, H * V), "have 4 axes [batch, length, heads, head_dim]", "(2, 6, 15)",
   "add or split axes"),
  ("query", zeros(B, T, H, K, dtype=INT), "be floating point", "int32",
   "cast it to float32 or bfloat16"),
  ("key", zeros(B, T, H, K, dtype=INT), "be floating point", "int32",
   "cast it to float32 or bfloat16"),
  ("query", zeros(B, 0, H, K), "have no empty axis", "(2, 0, 3, 4)", "length must be at least 1"),
  ("key", zeros(B, T, 1, K), "agree with query in batch, length and heads (2, 6, 3)", "(2, 6, 1)",
   "check the axis order [batch, length, heads, head_dim]"),
  ("value", zeros(B, H, T, V), "agree with query in batch, length and heads (2, 6, 3)",
   "(2, 3, 6)", "check the axis order [batch, length, heads, head_dim]"),
  ("key", zeros(B, T, H, K, dtype=HALF), "have the dtype of query, float32", "bfloat16",
   "cast all of them to one dtype"),
  ("key", zeros(B, T, H, K + 1), "have shape (2, 6, 3, 4)", "(2, 6, 3, 5)",
   "query and key have the same head_dim"),
  ("segment_ids", zeros(B, T + 1, dtype=INT), "have shape (2, 6)", "(2, 7)", "one id per token"),
  ("segment_ids", zeros(B, T), "be integers", "float32", "cast to int32"),
  ("lengths", zeros(B, 1, dtype=INT), "have shape (2,)", "(2, 1)", "one length per row"),
  ("lengths", zeros(B), "be integers", "float32", "cast to int32"),
  ("log_decay", zeros(H + 1), "have shape (3,)", "(4,)", "one rate per head"),
  ("log_decay", np.array([-1.0, 0.25, -1.0], np.float32), "be <= 0 everywhere",
   "a largest value of 0.25", "pass minus the decay rate"),
  ("log_decay", np.array([-1.0, np.nan, -1.0], np.float32), "be <= 0 everywhere",
   "a largest value of nan", "pass minus the decay rate"),
  ("initial_state", zeros(B, H, V, K), "have shape (2, 3, 4, 5)", "(2, 3, 5, 4)", "[B, H, K, V]"),
  ("chunk_size", 0, "be at least 1", "0", "None picks the measured best"),
  ("implementation", "cuda", "be None or one of 'reference', 'xla', 'tpu', 'triton'", "'cuda'",
   "None chooses by platform"),
]  # fmt: skip


# Under jit only shapes and dtypes are known; values and options are refused when called directly.
CALLS = [(row, False) for row in REFUSED]
CALLS += [(row, True) for row in REFUSED if isinstance(row[1], jax.Array)]


@pytest.mark.parametrize(
  ("row", "jitted"), CALLS, ids=[f"{row[0]}-{row[2][:12]}-jit={jitted}" for row, jitted in CALLS]
)
def test_refused(row, jitted):
  argument, bad, rule, got, hint = row
  function = jax.jit(lambda x: lightning_attention(**x)) if jitted else None
  given = arguments(**{argument: bad})
  with pytest.raises(ValueError, match="lightning_attention") as error:
    function(given) if jitted else lightning_attention(**given)
  assert str(error.value) == f"lightning_attention: {argument} must {rule}; got {got} ({hint})"


def test_accepted():
  output, state = lightning_attention(**arguments())
  assert output.shape == (B, T, H, V)
  assert state.shape == (B, H, K, V)


def test_unknown_argument_is_refused():
  with pytest.raises(TypeError, match="segments"):
    lightning_attention(**arguments(), segments=None)


def test_tpu_kernel_off_a_tpu():
  with pytest.raises(NotImplementedError) as error:
    lightning_attention(**arguments(), implementation="tpu")
  assert str(error.value) == (
    'lightning_attention: implementation="tpu" compiles only for a TPU and the target is cpu '
    '(use "xla", or interpret=True to test the kernel)'
  )


@pytest.mark.parametrize("installed", [True, False])
def test_triton_kernel_off_a_gpu(installed, monkeypatch):
  monkeypatch.setattr(compat, "has_jax_triton", lambda: installed)
  wanted = "compiles only for an NVIDIA GPU" if installed else "needs the packages jax-triton"
  with pytest.raises(NotImplementedError, match=f'implementation="triton" {wanted}') as error:
    lightning_attention(**arguments(), implementation="triton")
  assert '"xla"' in str(error.value)
  assert "\n" not in str(error.value)


def test_traced_decay_is_not_looked_at():
  """Its values are unknown under jit; everything else about it is still checked."""
  positive = jnp.ones((H,))
  assert checks.check_not_positive("f", "log_decay", None, "") is None
  jax.jit(lambda x: lightning_attention(**arguments(log_decay=x)))(positive)


def test_case_tags_are_known():
  with pytest.raises(ValueError, match=r"Case: tags must be among .* got \['fast'\] in x"):
    Case("x", ("ci", "fast"), {})


@pytest.mark.parametrize(
  ("platform", "dtype", "dim", "chunk_size", "chosen"),
  [
    ("cpu", jnp.float32, 4, None, "xla"),
    ("tpu", jnp.bfloat16, 4, None, "tpu"),
    ("tpu", jnp.float16, 4, None, "xla"),
    ("cuda", jnp.float16, 4, 64, "triton"),
    ("cuda", jnp.float32, 4, 128, "xla"),
    ("cuda", jnp.float32, 513, None, "xla"),
    ("rocm", jnp.float32, 4, None, "xla"),
  ],
)
def test_choice_of_the_implementation(platform, dtype, dim, chunk_size, chosen, monkeypatch):
  """The kernel of the platform, unless it cannot take the arguments."""
  monkeypatch.setattr(compat, "target_platform", lambda: platform)
  monkeypatch.setattr(compat, "has_jax_triton", lambda: True)
  query, value = zeros(1, 2, 1, 3, dtype=dtype), zeros(1, 2, 1, dim, dtype=dtype)
  assert api._choose(query, value, chunk_size) == chosen
