"""The policies of one scheduler, of which every answer is checked.

After the first bad answer of one, what is built in stands in its place, so that nothing that was accepted is
lost, and `raise_error` raises what happened.
"""

from collections.abc import Callable, Hashable, Iterable
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeVar

from pagellm.engine.errors import PolicyError, found, is_from_outside
from pagellm.engine.scheduling.policies.admission import Admission, AdmissionPolicy
from pagellm.engine.scheduling.policies.budget import BudgetPolicy
from pagellm.engine.scheduling.policies.eviction import EvictionPolicy
from pagellm.engine.scheduling.policies.future import Future
from pagellm.engine.scheduling.policies.load import KINDS, load_policy
from pagellm.engine.scheduling.policies.order import SchedulingPolicy
from pagellm.engine.scheduling.policies.policy import Policy
from pagellm.engine.scheduling.policies.victim import VictimPolicy
from pagellm.engine.scheduling.policies.views import (
    BlockView,
    SchedulerStats,
    SequenceView,
    StepView,
    sequence_of,
    view_of,
)
from pagellm.engine.scheduling.sequence import Sequence

if TYPE_CHECKING:
    from pagellm.engine.config import EngineConfig
    from pagellm.engine.scheduling.batch import ScheduledBatch
    from pagellm.engine.scheduling.block_manager import BlockManager

_Answer = TypeVar("_Answer")
_arrival_index = attrgetter("arrival_index")
_BLOCK_EVENTS = ("on_known", "on_hit", "on_evict")


class CheckedPolicies:
    """One policy for each extension point; those that are not given are built in.

    victim: None: the scheduling policy says who makes way, too.

    order_changes: as in `SchedulingPolicy`. prefills_alone, asks_queues, makes_way, admits, has_budget,
    hears_adds, counts_batches, hears_ends: whether there is anything to ask for; block_events: what is to be
    told of blocks. What nobody overrides costs nothing.
    """

    def __init__(
        self,
        manager: "BlockManager",
        policy: SchedulingPolicy | None = None,
        victim: VictimPolicy | None = None,
        admission: AdmissionPolicy | None = None,
        eviction: EvictionPolicy | None = None,
        budget: BudgetPolicy | None = None,
    ) -> None:
        self._manager = manager
        self._policies: dict[str, Policy] = {
            "policy": policy or SchedulingPolicy(),
            "admission": admission or AdmissionPolicy(),
            "eviction": eviction or EvictionPolicy(),
            "budget": budget or BudgetPolicy(),
        }
        if victim is not None:
            self._policies["victim"] = victim
        self._errors: list[PolicyError] = []
        self.future: Future | None = None  # of the trace that is replayed, where it is known
        self.num_replaced = 0  # how often a policy has failed
        self._look()

    @classmethod
    def load(cls, config: "EngineConfig", manager: "BlockManager") -> "CheckedPolicies":
        """Those that the settings name. Raises `ConfigError`."""
        names = {setting: getattr(config, setting) for setting in KINDS}
        loaded: dict[str, Any] = {
            setting: load_policy(name, setting) for setting, name in names.items() if name is not None
        }
        return cls(manager, **loaded)

    @property
    def needs_future(self) -> bool:
        """Whether the eviction policy asks for what is to come."""
        return bool(self._eviction.needs_future)

    @property
    def ranks_blocks(self) -> bool:
        """Whether the eviction policy is anything but the least recently used first."""
        return type(self._eviction) is not EvictionPolicy

    def restart(self) -> None:
        """Puts new policies of the same classes in the place of those that may have missed something."""
        for setting, policy in list(self._policies.items()):
            try:
                self._policies[setting] = type(policy)()
            except Exception as error:  # a user's policy may raise anything
                if is_from_outside(error):
                    raise
                self._replace(setting, "__init__", error)
        self._look()

    def raise_error(self, then: str | None = None) -> None:
        """Raises the `PolicyError` of a policy that has failed, once. then: what happens now, if told."""
        if self._errors:
            error = self._errors.pop(0)
            raise error if then is None else PolicyError(error.failure, then)

    def order(self, sequence: Sequence, stats: SchedulerStats) -> tuple[float, ...]:
        if self._is_fcfs:
            return (sequence.arrival_index,)
        return self._ask("policy", "order", _as_key, self._view(sequence), stats)

    def queue_of(self, sequence: Sequence) -> Hashable:
        if not self._has_queues:
            return None
        return self._ask("policy", "queue_of", _as_hashable, self._view(sequence))

    def queue_order(self, queue: Hashable, stats: SchedulerStats) -> tuple[float, ...]:
        return self._ask("policy", "queue_order", _as_key, queue, stats)

    def victim(self, candidates: list[Sequence], stats: SchedulerStats) -> Sequence:
        if self._youngest_makes_way:
            return max(candidates, key=_arrival_index)
        views = [self._view(sequence) for sequence in candidates]

        def as_candidate(answer: Any) -> Sequence:
            if not any(answer is view for view in views):
                raise ValueError(f"found {found(answer)}, expected one of {found(candidates)}")
            return sequence_of(answer)

        return self._ask(self._victim_setting, "victim", as_candidate, views, stats)

    def make_way(self, candidates: list[Sequence], first: Sequence, stats: SchedulerStats) -> list[Sequence]:
        views = [self._view(sequence) for sequence in candidates]

        def as_candidates(answer: Any) -> list[Sequence]:
            chosen = list(answer) if isinstance(answer, Iterable) else [answer]
            for one in chosen:
                if not any(one is view for view in views):
                    raise ValueError(f"found {found(one)}, expected some of {found(candidates)}")
            return [sequence_of(one) for one in dict.fromkeys(chosen)]

        return self._ask(self._victim_setting, "make_way", as_candidates, views, self._view(first), stats)

    def admit(self, sequence: Sequence, stats: SchedulerStats) -> Admission:
        return self._ask("admission", "admit", _as_admission, self._view(sequence), stats)

    def budget(
        self, most: tuple[int, int], decodes: list[Sequence], prefills: list[Sequence], stats: SchedulerStats
    ) -> tuple[int, int]:
        def as_limits(answer: Any) -> tuple[int, int]:
            parts: tuple[Any, ...] = answer if isinstance(answer, tuple) and len(answer) == 2 else (None,)
            if not all(isinstance(part, int) and not isinstance(part, bool) and part >= 0 for part in parts):
                raise ValueError(f"found {found(answer)}, expected two numbers of tokens, 0 or more")
            return min(parts[0], most[0]), min(parts[1], most[1])

        views = ([self._view(s) for s in decodes], [self._view(s) for s in prefills])
        return self._ask("budget", "budget", as_limits, most, *views, stats)

    def block_order(self, block: BlockView) -> tuple[float, ...]:
        return self._ask("eviction", "order", _as_key, block)

    def block_queue(self, block: BlockView) -> Hashable:
        if not self._has_block_queues:
            return None
        return self._ask("eviction", "queue_of", _as_hashable, block)

    def block_queue_order(self, queue: Hashable) -> tuple[float, ...]:
        return self._ask("eviction", "queue_order", _as_key, queue)

    def next_use(self, block_hash: int) -> float | None:
        """As a block's view shows it; None where it is not to be seen."""
        if self.future is None or not self.needs_future:
            return None
        return self.future.next_use(block_hash)

    def on_block(self, event: str, block: BlockView) -> None:
        """Tells of one of the `block_events`: on_known, on_hit or on_evict."""
        self._ask("eviction", event, _ignore, block)

    def on_add(self, sequence: Sequence, stats: SchedulerStats) -> None:
        for setting in self._hear["on_add"]:
            self._ask(setting, "on_add", _ignore, self._view(sequence), stats)

    def on_commit(self, batch: "ScheduledBatch", stats: SchedulerStats) -> None:
        for setting in self._hear["on_commit"]:
            self._ask(setting, "on_commit", _ignore, StepView(batch, self._manager), stats)

    def on_finish(self, sequence: Sequence, stats: SchedulerStats) -> None:
        for setting in self._hear["on_finish"]:
            self._ask(setting, "on_finish", _ignore, self._view(sequence), stats)

    def _view(self, sequence: Sequence) -> SequenceView:
        return view_of(sequence, self._manager)

    def _ask(self, setting: str, method: str, check: Callable[[Any], _Answer], *arguments: Any) -> _Answer:
        # A list of its own for each that is asked: the user's may do anything with the first.
        own = [list(argument) if isinstance(argument, list) else argument for argument in arguments]
        try:
            return check(getattr(self._policies[setting], method)(*own))
        except Exception as error:  # a user's policy may raise anything
            if is_from_outside(error):
                raise
            self._replace(setting, method, error)
            return check(getattr(self._policies[setting], method)(*arguments))

    def _look(self) -> None:
        """What of the policies is overridden, because the rest is called in every step."""
        policy, budget = self._policies["policy"], self._policies["budget"]
        admission, eviction = self._policies["admission"], self._policies["eviction"]
        assert isinstance(policy, SchedulingPolicy)
        assert isinstance(eviction, EvictionPolicy)
        self._eviction = eviction
        self._victim_setting = "victim" if "victim" in self._policies else "policy"
        self._is_fcfs = not _overrides(policy, SchedulingPolicy, "order")
        chooses = self._policies[self._victim_setting]
        self._youngest_makes_way = not _overrides(chooses, VictimPolicy, "victim") or not (
            _overrides(chooses, SchedulingPolicy, "victim") or _overrides(chooses, SchedulingPolicy, "order")
        )
        self._has_queues = _overrides(policy, SchedulingPolicy, "queue_of")
        self.asks_queues = self._has_queues or _overrides(policy, SchedulingPolicy, "queue_order")
        self._has_block_queues = _overrides(eviction, EvictionPolicy, "queue_of")
        self.block_events = {event for event in _BLOCK_EVENTS if _overrides(eviction, EvictionPolicy, event)}
        self.prefills_alone = policy.prefills_alone
        self.order_changes = order_changes(type(policy))
        self.makes_way = _overrides(chooses, VictimPolicy, "make_way")
        self.admits = _overrides(admission, AdmissionPolicy, "admit")
        self.has_budget = _overrides(budget, BudgetPolicy, "budget")
        self._hear = {
            method: [setting for setting, one in self._policies.items() if _overrides(one, Policy, method)]
            for method in ("on_add", "on_commit", "on_finish")
        }
        self.hears_adds, self.counts_batches, self.hears_ends = map(bool, self._hear.values())

    def _replace(self, setting: str, method: str, error: Exception) -> None:
        what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        name, kind = type(self._policies[setting]).__name__, KINDS[setting]
        self._errors.append(PolicyError(f"{setting} {name}: {method}(): {what}", kind.then))
        self._policies[setting] = kind.base()
        self.num_replaced += 1
        self._look()


def order_changes(policy: type[SchedulingPolicy]) -> str:
    """When the order of a class is to be asked for again: as it says, if it says so of this very order."""
    for cls in policy.__mro__:
        if "order_changes" in vars(cls):
            return policy.order_changes
        if "order" in vars(cls):
            break
    return "always"


def _overrides(policy: Policy, base: type[Policy], method: str) -> bool:
    return getattr(type(policy), method) is not getattr(base, method) or method in vars(policy)


def _as_key(answer: Any) -> tuple[float, ...]:
    key: tuple[float, ...] = answer if isinstance(answer, tuple) else (answer,)
    if not all(isinstance(part, int | float) and part == part for part in key):
        raise ValueError(f"found {found(answer)}, expected a number or a tuple of numbers")
    return key


def _as_hashable(answer: Hashable) -> Hashable:
    hash(answer)
    return answer


def _as_admission(answer: Any) -> Admission:
    if answer not in tuple(Admission):
        raise ValueError(f"found {found(answer)}, expected one of {', '.join(Admission)}")
    return Admission(answer)


def _ignore(answer: object) -> None:
    pass
