"""Which replica gets a request: round robin, the least loaded, the one that has most of its prompt, or yours.

A router is asked once for each request, when it arrives.
"""

from collections.abc import Sequence as Items
from typing import TYPE_CHECKING, Any

from pagellm.engine.errors import PolicyError, found, is_from_outside
from pagellm.engine.requests.sampling_params import SamplingParams
from pagellm.engine.scheduling.policies.load import load_class
from pagellm.engine.scheduling.policies.views import View
from pagellm.engine.scheduling.scheduler import Scheduler
from pagellm.engine.scheduling.sequence import Sequence

if TYPE_CHECKING:
    from pagellm.sim.fleet.replica import Replica


class ArrivingView(View):
    """What a router sees of a request that no engine has yet."""

    __slots__ = ("_model", "_sequence")
    _what = "a request that arrives"
    _model: str | None
    _sequence: Sequence

    def __init__(self, sequence: Sequence, model: str | None = None) -> None:
        object.__setattr__(self, "_sequence", sequence)
        object.__setattr__(self, "_model", model)

    @property
    def request_id(self) -> str:
        """The request's name."""
        return self._sequence.request_id

    @property
    def model(self) -> str | None:
        """The model that it asks for by name; all replicas that are to choose from serve it."""
        return self._model

    @property
    def sampling_params(self) -> SamplingParams:
        """What was asked for, with priority, tenant and deadline_s."""
        return self._sequence.sampling_params

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return self._sequence.num_prompt_tokens

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The prompt: a copy."""
        return tuple(self._sequence.token_ids)


class ReplicaView(View):
    """What a router sees of a replica, which it can read and not change."""

    __slots__ = ("_replica",)
    _what = "a replica"
    _replica: "Replica"

    def __init__(self, replica: "Replica") -> None:
        object.__setattr__(self, "_replica", replica)

    @property
    def number(self) -> int:
        """Its number among all replicas of the fleet."""
        return self._replica.number

    @property
    def group(self) -> str:
        """The group of alike replicas that it is one of."""
        return self._replica.group.name

    @property
    def role(self) -> str:
        """What it does: both, prefill or decode."""
        return self._replica.group.role

    @property
    def model(self) -> str:
        """The model that it serves."""
        return self._replica.group.model

    @property
    def num_unfinished(self) -> int:
        """Requests that were sent to it and have not ended."""
        return self._replica.num_unfinished

    @property
    def num_waiting(self) -> int:
        """Those that its scheduler has, and that do not run."""
        return self._scheduler.num_waiting

    @property
    def num_running(self) -> int:
        """Those that run."""
        return len(self._scheduler.running)

    @property
    def num_blocks(self) -> int:
        """Blocks of its KV cache."""
        return self._scheduler.block_manager.num_blocks

    @property
    def num_free_blocks(self) -> int:
        """Those that no sequence holds, whether they hold a known prefix or not."""
        return self._scheduler.block_manager.num_free_blocks

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self._scheduler.block_manager.block_size

    def cached_tokens(self, sequence: ArrivingView) -> int:
        """Tokens of a prompt that its prefix cache has now."""
        manager = self._scheduler.block_manager
        return len(manager.cached_prefix(sequence._sequence)) * manager.block_size

    @property
    def _scheduler(self) -> Scheduler:
        return self._replica.scheduler


class Router:
    """One after the other; the others override `choose`."""

    _next = 0

    def choose(self, sequence: ArrivingView, replicas: Items[ReplicaView]) -> int:
        """The place of a replica in the list."""
        chosen = self._next % len(replicas)
        self._next = chosen + 1
        return chosen


class LeastLoaded(Router):
    """The one with the fewest unfinished requests, the first of equals."""

    def choose(self, sequence: ArrivingView, replicas: Items[ReplicaView]) -> int:
        return min(range(len(replicas)), key=lambda i: replicas[i].num_unfinished)


class PrefixAware(Router):
    """The one whose cache has the longest prefix of the prompt now; of equals the least loaded.

    It does not balance: where all prompts begin alike, the first replica that has that keeps them all.
    """

    def choose(self, sequence: ArrivingView, replicas: Items[ReplicaView]) -> int:
        def rank(i: int) -> tuple[int, int]:
            return -replicas[i].cached_tokens(sequence), replicas[i].num_unfinished

        return min(range(len(replicas)), key=rank)


ROUTERS: dict[str, type[Router]] = {
    "round_robin": Router,
    "least_loaded": LeastLoaded,
    "prefix_aware": PrefixAware,
}


def load_router(name: str) -> Router:
    """A router by its name, as module:Class or as path/file.py:Class. Raises `ConfigError`."""
    return load_class(name, "router", Router, ROUTERS)


class CheckedRouter:
    """A router whose every answer is checked. Raises `PolicyError` for a bad one: a replay ends with it."""

    def __init__(self, name: str) -> None:
        self._router = load_router(name)
        self._views: list[ReplicaView] = []

    def show(self, replicas: Items["Replica"]) -> None:
        """Lets it choose from these from now on."""
        self._views = [ReplicaView(replica) for replica in replicas]

    def choose(self, sequence: Sequence, model: str | None = None) -> int:
        """The place of a replica among those shown. model: that the request asks for."""
        try:
            answer: Any = self._router.choose(ArrivingView(sequence, model), list(self._views))
            if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(self._views):
                raise ValueError(f"found {found(answer)}, expected a number from 0 to {len(self._views) - 1}")
        except Exception as error:  # a user's router may raise anything
            if is_from_outside(error):
                raise
            what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            name = type(self._router).__name__
            raise PolicyError(f"router {name}: choose(): {what}", "the replay ends here") from error
        return answer
