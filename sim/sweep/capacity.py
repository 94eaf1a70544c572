"""The search for the highest load at which something still holds: what to try next, and where it ends.

It knows factors and answers alone. Whoever asks does the trying, one factor at a time.
"""

import math
from collections.abc import Generator
from typing import NamedTuple

from pagellm.engine.errors import ConfigError

# The factors tried at most, each way from 1.
LOWEST, HIGHEST = 2.0**-10, 2.0**10


class Bracket(NamedTuple):
    """holds: the highest factor found at which it holds; fails: the lowest above that at which it does not.

    None: it holds nowhere down to `LOWEST`, or fails nowhere up to `HIGHEST`.
    """

    holds: float | None
    fails: float | None


def search(tolerance: float) -> Generator[float, bool | None, Bracket]:
    """Yields factors, is sent whether it holds at each, and returns a bracket no wider than the tolerance.

    From 1 on the factor is doubled or halved until the answer changes; then the bracket is bisected, in
    proportion, until `fails <= holds * (1 + tolerance)`. Where what holds at a load holds at every lower one,
    the answer is exact to that; where it does not, it is one load of several at which the answer changes.
    None is sent where it does not hold, nor would at any lower load.

    Raises `ConfigError` for a tolerance that is not between 0.0001 and 1.
    """
    if not 1e-4 <= tolerance <= 1:
        raise ConfigError(f"tolerance: found {tolerance!r}, expected a number from 0.0001 to 1")
    holds = fails = 1.0
    answer = yield 1.0
    if answer is None:
        return Bracket(None, fails)
    if answer:
        while (yield (fails := 2 * holds)):
            holds = fails
            if holds >= HIGHEST:
                return Bracket(holds, None)
    else:
        while not (answer := (yield (holds := fails / 2))):
            fails = holds
            if answer is None or fails <= LOWEST:
                return Bracket(None, fails)
    while fails > holds * (1 + tolerance):
        middle = math.sqrt(holds * fails)
        if (yield middle):
            holds = middle
        else:
            fails = middle
    return Bracket(holds, fails)
