"""Which layers of a model are run as one loop: groups of layers whose structure repeats."""

from collections.abc import Hashable, Sequence
from typing import NamedTuple


class Place(NamedTuple):
  """Where a layer is: a group is `period` stacked blocks that take turns."""

  group: int
  block: int  # which of the group's blocks
  index: int  # which of the layers stacked in that block


def find_groups(structures: Sequence[Hashable]) -> list[tuple[int, int]]:
  """(period, repeats) of each group, in order: the fewest different blocks to compile in all.

  Four equal layers are [(1, 4)], a b a b is [(2, 2)], a a b a a b c is [(3, 2), (1, 1)].
  """
  count = len(structures)
  cheapest = [(0, 0, [])] * (count + 1)  # from a layer on: blocks, groups, which groups
  for start in range(count - 1, -1, -1):
    options = []
    for period in range(1, count - start + 1):
      pattern, repeats = structures[start : start + period], 1
      while True:
        end = start + repeats * period
        blocks, groups, rest = cheapest[end]
        options.append((blocks + period, groups + 1, [(period, repeats), *rest]))
        if list(structures[end : end + period]) != list(pattern):
          break
        repeats += 1
    # Of equally cheap ways the one with the shortest blocks first: neighbours before patterns.
    cheapest[start] = min(options, key=lambda option: (option[0], option[1]))
  return cheapest[0][2]


def layer_places(structures: Sequence[Hashable]) -> list[Place]:
  """The place of each layer."""
  places = []
  for group, (period, repeats) in enumerate(find_groups(structures)):
    places += [Place(group, n % period, n // period) for n in range(period * repeats)]
  return places
