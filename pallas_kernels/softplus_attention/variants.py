"""The choices that make up one member of the family, and the names of those in the paper."""

import dataclasses

SCORES = (
  "softplus", "exp", "relu", "relu_power", "sigmoid", "elu1", "identity", "silu", "gelu", "tanh",
  "abs",
)  # fmt: skip
SCALES = ("logd_logn", "logn", "logd", "inv_sqrt_d", "logn_inv_sqrt_d", "one")
COUNTS = ("seen", "total")
NORMALIZATIONS = ("l1", "mean", "none")
EPSILONS = ("none", "add", "clamp")


@dataclasses.dataclass(frozen=True)
class Variant:
  """Which function of the scores becomes a weight; see `softplus_attention` for the symbols.

  The defaults are LSSA. `power` switches the re-weighting on (LSSAR).
  """

  score: str = "softplus"  # f, one of SCORES
  score_power: float = 2.0  # exponent of "relu_power"
  score_bias: bool = False  # f is taken of s - ln N
  unit: bool = True  # queries and keys are divided by their l2 norm, or by unit_eps if that is more
  unit_eps: float = 1e-12
  scale: str | float = "logd_logn"  # c: one of SCALES, or a number
  count: str = "seen"  # N: keys that the query sees, or all of its document ("total")
  normalization: str = "l1"  # first stage: divided by the sum, by N, or not at all
  power: float | None = None  # p of the second stage; None: there is none
  offset: float = 1.0  # O, what is taken off before the power
  skip_rows: int = 3  # rows with N up to this have O = 0
  epsilon: str = "none"  # "add" to the denominators, or "clamp" them from below
  eps_first: float = 0.0  # of the first stage
  eps_second: float = 0.0
  flat_tolerance: float = 1e-5  # without epsilon: rows whose largest excess is below are all 0

  def __post_init__(self):
    choices = dict(score=SCORES, count=COUNTS, normalization=NORMALIZATIONS, epsilon=EPSILONS)
    for name, known in choices.items():
      if getattr(self, name) not in known:
        self._fail(name, f"be one of {known}", "see Variant")
    if isinstance(self.scale, str) and self.scale not in SCALES:
      self._fail("scale", f"be a number or one of {SCALES}", "the paper's is 'logd_logn'")
    if self.power is not None and self.power < 1:
      self._fail("power", "be at least 1", "the paper has 3 and 15; None leaves it out")
    for name in ("unit_eps", "eps_first", "eps_second", "flat_tolerance", "skip_rows"):
      if getattr(self, name) < 0:
        self._fail(name, "be at least 0", "see Variant")
    if self.epsilon == "clamp" and not self.eps_second and self.power is not None:
      self._fail("eps_second", "be above 0 to clamp with", "or epsilon='none'")

  def _fail(self, name, rule, hint):
    raise ValueError(f"Variant: {name} must {rule}; got {getattr(self, name)!r} ({hint})")

  @property
  def shifted(self) -> bool:
    """f may be taken relative to the row's largest score, because the sum is divided out."""
    exact = self.normalization == "l1" and self.epsilon == "none"
    return exact and self.score in ("softplus", "exp")


_DOT = dict(unit=False, scale="inv_sqrt_d")
LSSA = Variant()
LSSAR = Variant(power=15.0)
VARIANTS: dict[str, Variant] = {
  "lssa": LSSA,
  "lssar_p15": LSSAR,
  "lssar_p3": Variant(power=3.0),
  # What the paper compares with, and its studies of f.
  "softmax": Variant(score="exp", **_DOT),
  "softmax_lssa_scale": Variant(score="exp"),
  "softmax_rw_p15": Variant(score="exp", power=15.0, **_DOT),
  "softmax_rw_p3": Variant(score="exp", power=3.0, **_DOT),
  "sigmoid_bias": Variant(
    score="sigmoid", score_bias=True, count="total", normalization="none", **_DOT
  ),
  "sigmoid_l1": Variant(score="sigmoid", **_DOT),
  "sigmoid_l1_rw_p15": Variant(score="sigmoid", power=15.0, **_DOT),
  "sigmoid_lssa_scale_rw_p15": Variant(score="sigmoid", power=15.0),
  "relu_mean": Variant(score="relu", count="total", normalization="mean", **_DOT),
  "relu_l1": Variant(score="relu", **_DOT),
}
