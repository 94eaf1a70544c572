"""The search for the fewest replicas that serve something, of one group, or the cheapest counts of two.

It knows counts and answers alone. Whoever asks does the trying. What serves with some replicas is taken to
serve with more.
"""

import math
from collections.abc import Callable, Generator

MAX_REPLICAS = 4096  # of a group, that are tried

Counts = tuple[int, ...]
_Search = Generator[Counts, bool, Counts | None]


def search_counts(num_groups: int, weigh: Callable[[], tuple[list[float], int]]) -> _Search:
    """Yields counts, one for each group, is sent whether they serve, and returns the cheapest that do.

    From one of each on all are doubled until they serve; then one group's count is bisected. Of two groups,
    for each count of the first the fewest of the second are sought among those that are cheaper than the best
    so far. weigh: what a replica of each of two groups costs, and how few of each there may be, 0 or 1; asked
    for once something serves. None is returned where not even `MAX_REPLICAS` of each serve, and of no group
    where what there is does not.
    """
    counts: Counts = (1,) * num_groups
    while not (yield counts):
        if num_groups == 0 or 2 * counts[0] > MAX_REPLICAS:
            return None
        counts = tuple(2 * count for count in counts)
    if num_groups == 1:
        return (yield from _fewest((), counts[0] // 2, counts[0]))
    return (yield from _cheapest(counts, *weigh())) if num_groups else counts


def _fewest(first: Counts, fails: int, serves: int) -> Generator[Counts, bool, Counts]:
    """The fewest of the last group beside so many of the first, more than `fails`, at most `serves`."""
    while serves - fails > 1:
        middle = (serves + fails) // 2
        if (yield (*first, middle)):
            serves = middle
        else:
            fails = middle
    return (*first, serves)


def _cheapest(best: Counts, costs: list[float], least: int) -> Generator[Counts, bool, Counts]:
    first = least
    while True:
        spent = sum(cost * count for cost, count in zip(costs, best, strict=True))
        # The most of the second group with which it is still cheaper.
        most = min(MAX_REPLICAS, math.ceil((spent - first * costs[0]) / costs[1] - 1e-9) - 1)
        if most < least:
            return best
        if first + most > 0 and (yield (first, most)):
            best = yield from _fewest((first,), max(least, 1 - first) - 1, most)
        first += 1
