"""Which replicas may have a request: those that serve its model and do what is next; a router chooses."""

from collections.abc import Iterable

from pagellm.engine.errors import TraceError, found
from pagellm.engine.scheduling.sequence import Sequence
from pagellm.sim.fleet.fleet import Fleet, Group
from pagellm.sim.fleet.replica import Replica
from pagellm.sim.router import CheckedRouter
from pagellm.sim.traces.request import TraceRequest


class Pool:
    """Replicas that a request may go to, and the router that chooses."""

    def __init__(self, router: str, groups: Iterable[Group]) -> None:
        self._groups = {group.name for group in groups}
        self._router = CheckedRouter(router)
        self._replicas: list[Replica] = []

    def update(self, replicas: list[Replica]) -> None:
        """Chooses from now on among those of its groups that are among these."""
        self._replicas = [replica for replica in replicas if replica.group.name in self._groups]
        self._router.show(self._replicas)

    def choose(self, sequence: Sequence, model: str | None) -> Replica | None:
        """One of them, None if there is none. Raises `PolicyError`."""
        replicas = self._replicas
        if len(replicas) < 2:
            return replicas[0] if replicas else None
        return replicas[self._router.choose(sequence, model)]


class Pools:
    """The pools of a fleet, by the name of a model; one for all requests where there is only one model.

    Requests enter at those that compute prompts, and go on from prefill to decode replicas or such that do
    both.
    """

    def __init__(self, fleet: Fleet, router: str) -> None:
        named = fleet.by_name if fleet.asks_for_models else {"": list(fleet.groups)}
        self._asks = fleet.asks_for_models
        self._entering, self._following = (
            {
                name: Pool(router, [group for group in groups if group.role != other])
                for name, groups in named.items()
            }
            for other in ("decode", "prefill")
        )

    def update(self, replicas: list[Replica]) -> None:
        """Only these are chosen from now on."""
        for pool in (*self._entering.values(), *self._following.values()):
            pool.update(replicas)

    def choose(self, sequence: Sequence, request: TraceRequest, is_computed: bool = False) -> Replica | None:
        """Who gets a request, None if there is nobody now. is_computed: its prompt is.

        Raises `TraceError` for a model that nobody serves, and `PolicyError`.
        """
        pools = self._following if is_computed else self._entering
        model = request.model
        pool = pools.get((model or "") if self._asks else "")
        if pool is None:
            shown = "nothing" if model is None else found(model)
            raise TraceError(f"model: found {shown}, expected one of {', '.join(pools)}")
        return pool.choose(sequence, model)
