"""The choices that make up one kind of routed attention."""

import dataclasses

MEMBERSHIPS = ("causal_recent", "topk_prefix", "official")
MASKS = ("position", "rank")
OWN_PAIRS = ("seen", "last_resort")


@dataclasses.dataclass(frozen=True)
class Routing:
  """Which tokens meet in a cluster, and what they see of each other; see `routed_attention`.

  `membership`:
    "causal_recent": a token belongs to its nearest centroid, and sees the most recent
      `window_size` tokens of the same. Nothing depends on later tokens. Not of the paper.
    "topk_prefix": a cluster's members are, for every token anew, the `window_size` tokens up to it
      that are nearest to the centroid. Nothing depends on later tokens. It is the honest way to
      evaluate a model that was trained with "official", and what decoding computes.
    "official": a cluster's members are the nearest of the whole row, as published. LEAKS: which of
      the earlier tokens are members depends on later tokens, so a loss computed with it is no
      likelihood, although no token sees a later one. (Random bits can be predicted better than by
      chance.)
  """

  window_size: int  # w, members of a cluster
  membership: str = "causal_recent"
  causal: bool = True
  mask: str = "position"  # "rank": by the order in the cluster, as published; same if q and k share
  scale: float = 1.0  # of query . key
  own_pair: str = "seen"  # "last_resort": a token sees itself only where it sees nothing else
  combine_eps: float = 0.01  # outputs of m clusters are added and divided by m + this
  # False: keys whose value is exactly 0 are masked. As published: padding with such values is
  # nowhere seen, but takes places in the clusters, where `lengths` makes room.
  zero_values_seen: bool = True

  def __post_init__(self):
    for name, known in (("membership", MEMBERSHIPS), ("mask", MASKS), ("own_pair", OWN_PAIRS)):
      if getattr(self, name) not in known:
        self._fail(name, f"be one of {known}", "see Routing")
    if self.window_size < 1:
      self._fail("window_size", "be at least 1", "members of a cluster")
    if self.combine_eps <= 0:
      self._fail("combine_eps", "be above 0", "0.01 as published; some tokens are in no cluster")
    if self.membership != "official":
      if not self.causal:
        self._fail("membership", "be 'official' where causal is False", "the others are causal")
      if self.mask != "position":
        self._fail("mask", f"be 'position' with {self.membership!r}", "'rank' is for 'official'")
      if not self.zero_values_seen:
        self._fail("zero_values_seen", f"be True with {self.membership!r}", "it is for 'official'")
    if self.membership == "causal_recent" and self.own_pair != "seen":
      self._fail("own_pair", "be 'seen' with 'causal_recent'", "the other is the port's")

  def _fail(self, name, rule, hint):
    raise ValueError(f"Routing: {name} must {rule}; got {getattr(self, name)!r} ({hint})")

  @property
  def leaks(self) -> bool:
    """Whether earlier outputs depend on later tokens."""
    return self.membership == "official"
