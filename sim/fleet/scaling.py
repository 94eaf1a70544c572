"""How many replicas a group shall have: the rule of an autoscaler, of what it sees of them."""

import math
from collections import deque

from pagellm.sim.fleet.fleet import Autoscale
from pagellm.sim.fleet.instance import Instance
from pagellm.sim.fleet.replica import Replica


class Scaler:
    """Decides for one group; see `Autoscale`."""

    def __init__(self, settings: Autoscale) -> None:
        self._settings = settings
        self._wanted: deque[tuple[float, int]] = deque()  # when, and how many, as long as that matters

    def wanted(self, now: float, instances: list[Instance], num_held_back: int) -> int:
        """How many there shall be. instances: that are up. num_held_back: requests that wait for one."""
        settings = self._settings
        figure = sum(sum(map(self._figure, instance.replicas)) for instance in instances)
        if settings.rule != "kv_usage":
            figure += num_held_back
        count = math.ceil(figure / settings.target - 1e-9)
        if num_held_back and not instances:
            count = max(1, count)
        count = min(settings.max, max(settings.min, count))
        while self._wanted and self._wanted[0][0] < now - settings.down_after_s:
            self._wanted.popleft()
        self._wanted.append((now, count))
        return count

    def most_wanted(self) -> int:
        """The most that were wanted lately: there shall be no fewer."""
        return max(count for _, count in self._wanted)

    def _figure(self, replica: Replica) -> float:
        if self._settings.rule == "concurrency":
            return replica.num_unfinished
        if self._settings.rule == "waiting":
            return replica.scheduler.num_waiting + len(replica.inbox)
        manager = replica.scheduler.block_manager
        return (1 - manager.num_free_blocks / manager.num_blocks) / replica.costs.num_engines
