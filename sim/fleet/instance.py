"""An instance: devices that start, fail and are paid for together, with the replicas on them."""

from pagellm.sim.fleet.fleet import Group
from pagellm.sim.fleet.replica import Replica


class Instance:
    """One of a group: whether it is up, and since when it is paid for.

    place: in its group. spans: of time in which it was up; paid_spans: in which it was paid for, from its
    start on. generation: how often it was started or failed, which tells old events from new ones.
    """

    def __init__(self, group: Group, place: int, replica: Replica) -> None:
        self.group = group
        self.place = place
        self.replica = replica
        self.is_up = self.is_paid = False
        self.is_draining = False  # takes no more requests, and stops when it has none
        self.generation = 0
        self.num_failures = 0
        self.spans: list[tuple[float, float]] = []
        self.paid_spans: list[tuple[float, float]] = []
        self._up_since_s = self._paid_since_s = 0.0

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
        self.num_failures += 1
        self.is_up = False
        self.spans.append((self._up_since_s, now))

    def stop(self, now: float) -> None:
        """It is gone."""
        self.generation += 1
        if self.is_up:
            self.spans.append((self._up_since_s, now))
        self.paid_spans.append((self._paid_since_s, now))
        self.is_up = self.is_paid = self.is_draining = False

    def end(self, now: float) -> None:
        """The replay is over."""
        if self.is_paid:
            self.stop(now)
