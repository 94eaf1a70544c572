"""Which replicas may have a request: those that serve its model; a router chooses among them."""

from collections.abc import Iterable

from pagellm.engine.errors import TraceError, found
from pagellm.engine.scheduling.sequence import Sequence
from pagellm.sim.fleet.fleet import Fleet
from pagellm.sim.fleet.replica import Replica
from pagellm.sim.router import CheckedRouter
from pagellm.sim.traces.request import TraceRequest


class Pool:
    """Replicas that a request may go to, and the router that chooses."""

    def __init__(self, router: str, replicas: Iterable[Replica]) -> None:
        self._replicas = list(replicas)
        self._router = CheckedRouter(router, self._replicas)

    def choose(self, sequence: Sequence, model: str | None) -> Replica:
        """One of them. Raises `PolicyError`."""
        if len(self._replicas) == 1:
            return self._replicas[0]
        return self._replicas[self._router.choose(sequence, model)]


class Pools:
    """The pools of a fleet, by the name of a model; one for all requests where there is only one model."""

    def __init__(self, fleet: Fleet, router: str, replicas: list[Replica]) -> None:
        self._only: Pool | None = None
        self._named: dict[str, Pool] = {}
        if fleet.asks_for_models:
            for name, groups in fleet.by_name.items():
                self._named[name] = Pool(router, [one for one in replicas if one.group in groups])
        else:
            self._only = Pool(router, replicas)

    def choose(self, sequence: Sequence, request: TraceRequest) -> Replica:
        """Who gets a request. Raises `TraceError` for a model that nobody serves, and `PolicyError`."""
        if self._only is not None:
            return self._only.choose(sequence, request.model)
        pool = self._named.get(request.model or "")
        if pool is None:
            model = "nothing" if request.model is None else found(request.model)
            raise TraceError(f"model: found {model}, expected one of {', '.join(self._named)}")
        return pool.choose(sequence, request.model)
