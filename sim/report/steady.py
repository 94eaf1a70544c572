"""Whether a run was at a steady state: a figure of one that was not says nothing of the next hour.

Requests that came during the warm-up are left out, and the time from there to the last arrival is looked at.
What is in the system then, waiting or running, must not grow from its first half to its second, or as many
more tokens must be given out: a load that comes and goes is no overload. And it must be long enough to see it
grow: a queue that has had no time to is no queue that does not.
"""

import math
from typing import Literal

from pagellm.sim.report.schema import Steady
from pagellm.sim.report.timeline import Bucket, Timeline

WARM_UP = 0.2  # of the time from the first arrival to the last
# The window must hold so many requests, and be so many times as long as a request is in the system.
MIN_REQUESTS, MIN_TURNOVERS = 50, 10.0
_GROWTH = 1.25  # from half to half, which load that comes and goes does not make
_SERVED = 0.9  # of what came
# With twice as many requests in the system, one that keeps up gives out at least 2 ** (1 / 3) = 1.26 times as
# many tokens: less than twice, as its steps take longer. One that is overloaded gives out what it did before.
_ROOT = 3


def steady_state(timeline: Timeline, *, has_slo: bool) -> Steady:
    """What the run's timeline shows."""
    buckets, width = timeline.buckets, timeline.width_s
    last = max((index for index, bucket in enumerate(buckets) if bucket.arrivals), default=0)
    first = min(math.ceil(WARM_UP * (last + 1)), last)
    window = buckets[first : last + 1]
    window_s = max(len(window) * width, 1e-9)
    half = max(1, len(window) // 2)
    halves = window[:half], window[-half:]
    in_system = [_in_system(part, width) for part in halves]
    # Of each request its first token counts when it ends.
    tokens = [sum(bucket.decode_tokens + bucket.finished for bucket in part) for part in halves]
    num_measured = sum(bucket.arrivals for bucket in window)
    offered = num_measured / window_s
    served = sum(bucket.finished for bucket in window) / window_s
    mean = _in_system(window, width)
    turnover_s = mean / offered if offered else 0.0  # Little's law
    verdict, reason = _verdict(in_system, tokens, offered, served, num_measured, window_s, turnover_s)
    good = sum(bucket.good_arrived for bucket in window)
    return {
        "verdict": verdict,
        "reason": reason,
        "offered_per_s": offered,
        "served_per_s": served,
        "warm_up_s": first * width,
        "window_s": window_s,
        "num_measured": num_measured,
        "attainment": good / num_measured if has_slo and num_measured else None,
        "in_system": in_system,
    }


def _verdict(
    in_system: list[float],
    tokens: list[int],
    offered: float,
    served: float,
    count: int,
    window_s: float,
    turnover_s: float,
) -> tuple[Literal["steady", "overloaded", "short"], str]:
    before, after = in_system
    keeps_up = tokens[1] ** _ROOT * before >= tokens[0] ** _ROOT * after
    grows = after > _GROWTH * before + 1 and not keeps_up
    rates = f"{offered:.4g} requests/s came and {served:.4g} ended"
    queue = f"from {before:.4g} to {after:.4g} requests in the system from half to half"
    if grows and served < _SERVED * offered:
        return "overloaded", f"{rates}: {queue}"
    if count < MIN_REQUESTS:
        return "short", f"{count} requests came after the warm-up, expected at least {MIN_REQUESTS}"
    if window_s < MIN_TURNOVERS * turnover_s:
        return "short", (
            f"{window_s:.4g} s after the warm-up are less than {MIN_TURNOVERS:g} times the "
            f"{turnover_s:.4g} s that a request takes: a longer trace is needed"
        )
    # What is there varies like the number of independent requests in so much time.
    noise = 3 * math.sqrt((before + after) * turnover_s / (window_s / 2)) if turnover_s else 0.0
    if grows and after - before > noise:
        return "overloaded", f"{rates}: {queue}"
    return "steady", f"{rates}"


def _in_system(buckets: list[Bucket], width: float) -> float:
    total = sum(b.running_time + b.waiting_time + b.swapped_time for b in buckets)
    return total / (len(buckets) * width) if buckets else 0.0
