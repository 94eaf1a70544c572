"""Who goes first, and who makes way: small classes that the scheduler asks.

A policy decides about order alone. It cannot lose a request, overfill memory or make anybody wait for ever:
those are the scheduler's laws, whatever a policy answers. It knows no clock: time and statistics are
arguments. One of your own is named as `module:Class`, a subclass of `SchedulingPolicy`.
"""

import math
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from pagellm.engine.errors import ConfigError, PolicyError, is_from_outside
from pagellm.engine.scheduling.sequence import Sequence

if TYPE_CHECKING:
    from pagellm.engine.scheduling.batch import ScheduledBatch

Key = float | tuple[float, ...]
_Answer = TypeVar("_Answer")


@dataclass
class SchedulerStats:
    """What a policy may look at beside the sequences; the scheduler keeps one and brings it up to date."""

    now: float = 0.0  # seconds, on the clock of Sequence.arrival_time
    num_waiting: int = 0
    num_running: int = 0
    num_free_blocks: int = 0
    num_blocks: int = 0


class SchedulingPolicy:
    """First come, first served; the others override what they do differently.

    prefills_alone: whether a step computes either prompts or decodes, prompts first, instead of both.
    """

    prefills_alone = False

    def order(self, sequence: Sequence, stats: SchedulerStats) -> Key:
        """The sort key of a sequence: a number or a tuple of numbers, the lowest goes first.

        Asked when the sequence begins to wait; equal keys go by arrival.
        """
        return sequence.arrival_index

    def queue_of(self, sequence: Sequence) -> Hashable:
        """The queue that a sequence waits in. Most policies have one; see `queue_order`."""
        return None

    def queue_order(self, queue: Hashable, stats: SchedulerStats) -> Key:
        """The sort key of a queue, asked whenever something could be admitted; the lowest is served next."""
        return 0

    def victim(self, candidates: list[Sequence], stats: SchedulerStats) -> Sequence:
        """Which of the running sequences gives up its blocks when memory runs out: the last in order."""
        return max(candidates, key=lambda s: (self.order(s, stats), s.arrival_index))

    def on_add(self, sequence: Sequence, stats: SchedulerStats) -> None:
        """A new sequence was taken in."""

    def on_commit(self, batch: "ScheduledBatch", stats: SchedulerStats) -> None:
        """A batch was computed, which has given its `token_ids`. Called before its sequences move on."""

    def on_finish(self, sequence: Sequence, stats: SchedulerStats) -> None:
        """A sequence ended, for whatever reason."""


class PrefillFirst(SchedulingPolicy):
    """The classic two phases: prompts as soon as they fit, and decodes in steps without any."""

    prefills_alone = True


class Priority(SchedulingPolicy):
    """The lowest `SamplingParams.priority` first."""

    def order(self, sequence: Sequence, stats: SchedulerStats) -> Key:
        return sequence.sampling_params.priority


class ShortestJob(SchedulingPolicy):
    """The fewest tokens of prompt and longest possible output first.

    Ageing: a second of waiting counts like `AGEING_TOKENS` fewer, so a long one is passed over for so long
    and no longer. Written with the arrival in the place of the wait, the key need not change as time passes.
    """

    AGEING_TOKENS = 100.0

    def order(self, sequence: Sequence, stats: SchedulerStats) -> Key:
        return sequence.max_len + self.AGEING_TOKENS * sequence.arrival_time


class Fair(SchedulingPolicy):
    """The tenant that has been served least goes first: virtual token counters (Sheng et al., OSDI 2024).

    A generated token costs `DECODE_WEIGHT` times what a computed one does. A tenant that comes back from
    idleness starts where the least served active one stands, or where the last one stood when it left, so
    that idleness earns no credit.
    """

    DECODE_WEIGHT = 2.0

    def __init__(self) -> None:
        self.counters: dict[str, float] = {}
        self.active: Counter[str] = Counter()  # unfinished sequences of each tenant
        self._last_left = ""  # the tenant that became idle last

    def queue_of(self, sequence: Sequence) -> Hashable:
        return sequence.sampling_params.tenant

    def queue_order(self, queue: Hashable, stats: SchedulerStats) -> Key:
        return self.counters.get(str(queue), 0.0)

    def victim(self, candidates: list[Sequence], stats: SchedulerStats) -> Sequence:
        """The youngest of the tenant that has been served most."""
        return max(candidates, key=lambda s: (self.counters[s.sampling_params.tenant], self.order(s, stats)))

    def on_add(self, sequence: Sequence, stats: SchedulerStats) -> None:
        tenant = sequence.sampling_params.tenant
        if tenant not in self.active:
            others = self.active or (self._last_left,)
            least = min(self.counters.get(other, 0.0) for other in others)
            self.counters[tenant] = max(self.counters.get(tenant, 0.0), least)
        self.active[tenant] += 1

    def on_commit(self, batch: "ScheduledBatch", stats: SchedulerStats) -> None:
        given = iter(batch.token_ids)
        for sequence, count, samples in zip(
            batch.sequences, batch.num_new_tokens, batch.samples, strict=True
        ):
            num_samples = samples and 1 + len(batch.forks.get(sequence, ()))
            num_sampled = sum(map(len, islice(given, num_samples)))
            self.counters[sequence.sampling_params.tenant] += count + self.DECODE_WEIGHT * num_sampled

    def on_finish(self, sequence: Sequence, stats: SchedulerStats) -> None:
        tenant = sequence.sampling_params.tenant
        self.active[tenant] -= 1
        if self.active[tenant] == 0:
            del self.active[tenant]
            self._last_left = tenant


class EarliestDeadline(SchedulingPolicy):
    """The earliest deadline first: arrival and `SamplingParams.deadline_s`; those without come last."""

    def order(self, sequence: Sequence, stats: SchedulerStats) -> Key:
        deadline_s = sequence.sampling_params.deadline_s
        return math.inf if deadline_s is None else sequence.arrival_time + deadline_s


POLICIES: dict[str, type[SchedulingPolicy]] = {
    "fcfs": SchedulingPolicy,
    "prefill_first": PrefillFirst,
    "priority": Priority,
    "shortest_job": ShortestJob,
    "fair": Fair,
    "slo": EarliestDeadline,
}


def load_policy(name: str) -> SchedulingPolicy:
    """A policy by its name or as `module:Class`. Raises `ConfigError`."""
    if name in POLICIES:
        return POLICIES[name]()
    module_name, _, class_name = name.partition(":")
    if not class_name:
        raise ConfigError(f"policy: found {name!r}, expected {', '.join(POLICIES)} or module:Class")
    if "/" in module_name or "\\" in module_name or module_name.endswith(".py"):
        raise ConfigError(
            f"policy: found {name!r}, expected module:Class with the module's name as in an import: "
            f"my.policy:{class_name} for my/policy.py"
        )
    try:
        policy = getattr(import_module(module_name), class_name)()
    except (Exception, SystemExit) as error:  # the user's module may raise anything
        raise ConfigError(f"policy: {name!r} cannot be loaded: {type(error).__name__}: {error}") from error
    if not isinstance(policy, SchedulingPolicy):
        raise ConfigError(f"policy: found {name!r}, expected a subclass of pagellm.SchedulingPolicy")
    return policy


class CheckedPolicy:
    """A policy whose every answer is checked.

    After the first bad one it answers like first come, first served, so that nothing that was accepted is
    lost, and `raise_error` raises what happened.
    """

    def __init__(self, policy: SchedulingPolicy) -> None:
        self._error: PolicyError | None = None
        self._set(policy)

    def restart(self) -> None:
        """Puts a new policy of the same class in the place of one that may not have heard of everything."""
        try:
            self._set(type(self._policy)())
        except Exception as error:  # a user's policy may raise anything
            if is_from_outside(error):
                raise
            self._replace("__init__", error)

    def raise_error(self) -> None:
        """Raises the policy's `PolicyError`, once."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def order(self, sequence: Sequence, stats: SchedulerStats) -> tuple[float, ...]:
        return self._ask("order", _as_key, sequence, stats)

    def queue_of(self, sequence: Sequence) -> Hashable:
        return self._ask("queue_of", _as_hashable, sequence)

    def queue_order(self, queue: Hashable, stats: SchedulerStats) -> tuple[float, ...]:
        return self._ask("queue_order", _as_key, queue, stats)

    def victim(self, candidates: list[Sequence], stats: SchedulerStats) -> Sequence:
        def as_candidate(answer: Any) -> Sequence:
            if not any(answer is candidate for candidate in candidates):
                raise ValueError(f"found {answer!r}, expected one of {candidates}")
            assert isinstance(answer, Sequence)
            return answer

        return self._ask("victim", as_candidate, candidates, stats)

    def on_add(self, sequence: Sequence, stats: SchedulerStats) -> None:
        self._ask("on_add", _ignore, sequence, stats)

    def on_commit(self, batch: "ScheduledBatch", stats: SchedulerStats) -> None:
        self._ask("on_commit", _ignore, batch, stats)

    def on_finish(self, sequence: Sequence, stats: SchedulerStats) -> None:
        self._ask("on_finish", _ignore, sequence, stats)

    def _ask(self, method: str, check: Callable[[Any], _Answer], *arguments: Any) -> _Answer:
        # A list of its own for each that is asked: the user's may do anything with the first.
        own = [list(argument) if isinstance(argument, list) else argument for argument in arguments]
        try:
            return check(getattr(self._policy, method)(*own))
        except Exception as error:  # a user's policy may raise anything
            if is_from_outside(error):
                raise
            self._replace(method, error)
            return check(getattr(self._policy, method)(*arguments))

    def _set(self, policy: SchedulingPolicy) -> None:
        self._policy = policy
        self.prefills_alone = policy.prefills_alone
        # Called in every step, hence left out where it does nothing.
        self.counts_batches = type(policy).on_commit is not SchedulingPolicy.on_commit

    def _replace(self, method: str, error: Exception) -> None:
        what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        name = type(self._policy).__name__
        self._error = PolicyError(f"policy {name}: {method}(): {what}; it goes on first come first served")
        self._set(SchedulingPolicy())


def _as_key(answer: Any) -> tuple[float, ...]:
    key: tuple[float, ...] = answer if isinstance(answer, tuple) else (answer,)
    if not all(isinstance(part, int | float) and part == part for part in key):
        raise ValueError(f"found {answer!r}, expected a number or a tuple of numbers")
    return key


def _as_hashable(answer: Hashable) -> Hashable:
    hash(answer)
    return answer


def _ignore(answer: object) -> None:
    pass
