"""An instance: devices that start, fail and are paid for together, with the replicas on them."""

import math

from pagellm.sim.fleet.fleet import Group
from pagellm.sim.fleet.replica import Replica


class Instance:
    """One of a group: whether it is up, since when it is paid for, and how its engines share its devices.

    replicas: its engines. place: in its group. spans: of time in which it was up; paid_spans: in which it was
    paid for, from its start on. generation: how often it was started or failed, which tells old events from
    new ones.
    """

    def __init__(self, group: Group, place: int, replicas: list[Replica]) -> None:
        self.group = group
        self.place = place
        self.replicas = replicas
        self.is_up = self.is_paid = False
        self.is_draining = False  # takes no more requests, and stops when it has none
        self.generation = 0
        self.spans: list[tuple[float, float]] = []
        self.paid_spans: list[tuple[float, float]] = []
        self._up_since_s = self._paid_since_s = 0.0
        # Where engines have their steps together: those that have one under way, and until when.
        self.stepping: set[Replica] = set()
        self.step_end_s = -math.inf
        self._stages_free_s = [[-math.inf] * group.costs.num_stages for _ in range(group.costs.data_parallel)]
        self.busy_s = 0.0  # of all its devices, where engines share them

    @property
    def shares_devices(self) -> bool:
        """Whether a step of one of its engines has to wait for those of others."""
        return self.group.costs.num_stages > 1 or self.group.costs.is_lockstep

    def free_s(self, replica: Replica) -> float:
        """When the first stage of an engine's pipeline is free."""
        return self._stages(replica)[0]

    def through_stages(self, now: float, replica: Replica, times: list[float]) -> float:
        """Sends a batch through the stages, behind those that are in them; returns when it is through."""
        free_s = self._stages(replica)
        for stage, seconds in enumerate(times):
            now = free_s[stage] = max(now, free_s[stage]) + seconds
        self.busy_s += sum(times) / self.group.costs.num_engines
        return now

    def _stages(self, replica: Replica) -> list[float]:
        return self._stages_free_s[self.replicas.index(replica) // self.group.costs.num_stages]

    @property
    def num_unfinished(self) -> int:
        """Requests that were sent to its engines and have not ended."""
        return sum(replica.num_unfinished for replica in self.replicas)

    @property
    def is_empty(self) -> bool:
        """Whether it has no requests, and keeps nothing for any."""
        return not any(replica.unfinished or replica.num_kept for replica in self.replicas)

    @property
    def takes_requests(self) -> bool:
        """Whether a router may choose it."""
        return self.is_up and not self.is_draining

    def start(self, now: float) -> None:
        """It is paid for from now on."""
        self.generation += 1
        self.is_paid, self.is_draining = True, False
        self._paid_since_s = now

    def ready(self, now: float) -> None:
        """It takes requests from now on."""
        self.is_up, self._up_since_s = True, now

    def fail(self, now: float) -> None:
        """It is down; it goes on to be paid for."""
        self.generation += 1
        self.is_up = False
        self.spans.append((self._up_since_s, now))
        self._clear()

    def stop(self, now: float) -> None:
        """It is gone."""
        self.generation += 1
        if self.is_up:
            self.spans.append((self._up_since_s, now))
        self.paid_spans.append((self._paid_since_s, now))
        self.is_up = self.is_paid = self.is_draining = False
        self._clear()

    def _clear(self) -> None:
        """No step is under way any more."""
        self.stepping.clear()
        self.step_end_s = -math.inf
        for stages in self._stages_free_s:
            stages[:] = [-math.inf] * len(stages)

    def end(self, now: float) -> None:
        """The replay is over."""
        if self.is_paid:
            self.stop(now)
