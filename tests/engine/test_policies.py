"""Who goes first and who makes way, under each policy; what becomes of one that answers nonsense."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pagellm.engine.config import EngineConfig
from pagellm.engine.errors import ConfigError, PolicyError, RequestError
from pagellm.engine.requests.sampling_params import SamplingParams
from pagellm.engine.scheduling.batch import ScheduledBatch
from pagellm.engine.scheduling.block_manager import BlockManager
from pagellm.engine.scheduling.policies import (
    POLICIES,
    AdmissionPolicy,
    CheckedPolicies,
    EarliestDeadline,
    EvictionPolicy,
    Fair,
    Priority,
    SchedulerStats,
    SchedulingPolicy,
    SequenceView,
    ShortestJob,
    load_policy,
)
from pagellm.engine.scheduling.scheduler import Scheduler
from pagellm.engine.scheduling.sequence import Sequence, SequenceStatus
from pagellm.engine.scheduling.waiting_queue import WaitingQueue

GALLERY = Path(__file__).parents[2] / "examples" / "policies"
_ids = iter(range(10**9))


def scheduler(policy: str | SchedulingPolicy, **settings: Any) -> Scheduler:
    """Blocks of 4 tokens, 16 of them, 16 tokens a step, and nothing found in the cache."""
    defaults = {
        "block_size": 4,
        "num_blocks": 16,
        "max_num_batched_tokens": 16,
        "enable_prefix_caching": False,
    }
    name = policy if isinstance(policy, str) else "fcfs"
    config = EngineConfig(**{**defaults, **settings, "policy": name}).complete()
    manager = BlockManager(config.num_blocks, config.block_size, config.enable_prefix_caching)
    s = Scheduler(config, manager)
    if isinstance(policy, SchedulingPolicy):
        s.policies = CheckedPolicies(manager, policy)
        s.waiting = WaitingQueue(s.policies)
    return s


def add(to: Scheduler, num_tokens: int = 2, now: float = 0.0, **params: Any) -> Sequence:
    sampling_params = SamplingParams(**{"max_tokens": None} | params)
    sequence = Sequence(next(_ids), range(num_tokens), sampling_params)
    to.add(sequence, now)
    return sequence


def step(of: Scheduler, now: float = 0.0) -> ScheduledBatch:
    batch = of.schedule(now)
    of.check()
    of.commit(batch, [[50]] * len(batch.sampled))
    of.check()
    return batch


def order_of_service(of: Scheduler) -> list[Sequence]:
    """One after the other."""
    served = []
    while of.has_unfinished:
        served += [admitted.sequence for admitted in step(of).admitted]
    return served


def preempted(batch: ScheduledBatch) -> list[Sequence]:
    return [record.sequence for record in batch.preempted]


# Each policy's order, and its victim


@pytest.mark.parametrize("policy", ["fcfs", "prefill_first"])
def test_first_come_first_served(policy: str) -> None:
    s = scheduler(policy, max_num_seqs=1)
    sequences = [add(s, n, max_tokens=2, priority=-n, deadline_s=9 - n, tenant=str(n)) for n in (5, 3, 8, 1)]
    assert order_of_service(s) == sequences


def test_priority_serves_the_lowest_first_and_equals_by_arrival() -> None:
    s = scheduler("priority", max_num_seqs=1)
    a, b, c, d = (add(s, max_tokens=2, priority=p) for p in (1, 0, -2.5, 0))
    assert order_of_service(s) == [c, b, d, a]


def test_priority_preempts_the_highest_and_of_equals_the_youngest() -> None:
    s = scheduler("priority", num_blocks=6)
    a, b, c = (add(s, 4, priority=p) for p in (1, 0, 1))
    step(s)
    step(s)
    for _ in range(3):
        step(s)
    assert [x.num_tokens for x in (a, b, c)] == [9, 9, 9]
    assert preempted(step(s)) == [c], "a asks first"
    assert [x.status.value for x in (a, b, c)] == ["running", "running", "waiting"]


def test_shortest_job_counts_the_prompt_and_the_longest_output() -> None:
    s = scheduler("shortest_job", max_num_seqs=1)
    a, b, c = add(s, 10, max_tokens=3), add(s, 2, max_tokens=10), add(s, 1, max_tokens=12)
    d = add(s, 2, max_tokens=None)
    assert order_of_service(s) == [b, a, c, d]


def test_under_shortest_job_waiting_a_second_counts_like_100_tokens() -> None:
    s = scheduler("shortest_job", num_blocks=200, max_num_seqs=1, max_num_batched_tokens=512)
    long = add(s, 200, now=1.0, max_tokens=1)
    later = add(s, 1, now=2.98, max_tokens=1)
    passes = add(s, 1, now=2.0, max_tokens=1)
    assert order_of_service(s) == [passes, later, long]
    s = scheduler("shortest_job", num_blocks=200, max_num_seqs=1, max_num_batched_tokens=512)
    long, later = add(s, 200, now=1.0, max_tokens=1), add(s, 1, now=3.0, max_tokens=1)
    assert order_of_service(s) == [long, later]


def test_shortest_job_preempts_the_longest() -> None:
    s = scheduler("shortest_job", num_blocks=3)
    a, b = add(s, 4, max_tokens=8), add(s, 4, max_tokens=3)
    step(s)
    assert preempted(step(s)) == [a], "b asks, and a is longer though it came first"
    assert b.status is SequenceStatus.RUNNING


def test_slo_serves_the_earliest_deadline_first_and_those_without_one_last() -> None:
    s = scheduler("slo", max_num_seqs=1)
    a = add(s, now=0.0, max_tokens=2)
    b = add(s, now=0.0, max_tokens=2, deadline_s=5.0)
    c = add(s, now=1.0, max_tokens=2, deadline_s=3.0)
    d = add(s, now=4.0, max_tokens=2, deadline_s=0.5)
    e = add(s, now=5.0, max_tokens=2)
    assert order_of_service(s) == [c, d, b, a, e]


def test_slo_preempts_the_latest_deadline() -> None:
    s = scheduler("slo", num_blocks=3)
    a, b = add(s, 4), add(s, 4, deadline_s=100.0)
    step(s)
    assert preempted(step(s)) == [a]
    assert b.status is SequenceStatus.RUNNING


# Two phases


def test_prefill_first_computes_prompts_alone_and_decodes_when_there_is_none() -> None:
    s = scheduler("prefill_first", max_num_batched_tokens=8)
    a = add(s, 4)
    assert step(s).sequences == [a]
    b = add(s, 12)
    batch = step(s)
    assert (batch.sequences, batch.num_new_tokens) == ([b], [8])
    c = add(s, 2)
    batch = step(s)
    assert (batch.sequences, batch.num_new_tokens) == ([b, c], [4, 2])
    batch = step(s)
    assert (batch.sequences, batch.num_new_tokens) == ([a, b, c], [1, 1, 1])


def test_prefill_first_decodes_while_a_prompt_waits_for_room() -> None:
    s = scheduler("prefill_first", num_blocks=4)
    a = add(s, 8, max_tokens=3)
    step(s)
    b = add(s, 12)
    assert step(s).sequences == [a]
    assert step(s).sequences == [a]
    assert step(s).sequences == [b]


# Fairness


def test_fair_serves_the_tenant_that_has_been_served_least() -> None:
    s = scheduler("fair", max_num_seqs=1)
    a1, a2, a3 = (add(s, 4, tenant="a", max_tokens=1) for _ in range(3))
    b1, b2 = (add(s, 1, tenant="b", max_tokens=1) for _ in range(2))
    assert order_of_service(s) == [a1, b1, b2, a2, a3], "a prompt of a's costs as much as two of b's"


def test_a_decoded_token_costs_two_and_a_prompts_one() -> None:
    policy = Fair()
    s = scheduler(policy)
    add(s, 5, tenant="a")
    add(s, 3, tenant="b")
    step(s)
    assert policy.counters == {"a": 7.0, "b": 5.0}
    step(s)
    assert policy.counters == {"a": 10.0, "b": 8.0}


def test_the_gallerys_virtual_token_counter_is_the_papers() -> None:
    """A token of a prompt costs 1 and one of an answer 2; who comes back begins where those that wait are."""
    policy: Any = load_policy(str(GALLERY / "vtc.py:VTC"))
    s = scheduler(policy, max_num_seqs=2)
    add(s, 5, tenant="a", max_tokens=3)
    add(s, 3, tenant="b")
    step(s)
    assert policy.served == {"a": 5 + 2, "b": 3 + 2}
    late = add(s, 1, tenant="c")  # nobody waits, and b left the queue last
    assert policy.served["c"] == 5
    add(s, 1, tenant="a")  # has 7, and c, which waits, 5
    assert policy.served["a"] == 7
    step(s)
    step(s)
    assert (policy.served["a"], policy.served["b"]) == (5 + 3 * 2, 3 + 3 * 2)
    assert late.status is SequenceStatus.WAITING
    step(s)
    assert policy.served["c"] == 5 + 1 + 2, "c, which has 5, goes before a, which has 11"
    assert (policy.last_left, list(policy.waiting.values())) == ("c", ["a"])


def test_a_chunk_that_gives_no_token_costs_its_tokens_alone() -> None:
    policy = Fair()
    s = scheduler(policy, max_num_batched_tokens=4)
    add(s, 6, tenant="a")
    step(s)
    assert policy.counters == {"a": 4.0}


def test_idleness_earns_no_credit() -> None:
    policy = Fair()
    s = scheduler(policy)
    idle = add(s, 1, tenant="idle", max_tokens=1)
    busy = add(s, 10, tenant="busy")
    step(s)
    assert idle.status is SequenceStatus.FINISHED
    assert policy.counters == {"idle": 3.0, "busy": 12.0}
    add(s, 1, tenant="idle")
    add(s, 1, tenant="new")
    assert policy.counters == {"idle": 12.0, "busy": 12.0, "new": 12.0}
    s.abort(busy)
    assert policy.active == {"idle": 1, "new": 1}


def test_one_that_was_served_more_than_the_others_keeps_its_count() -> None:
    policy = Fair()
    s = scheduler(policy)
    add(s, 10, tenant="a", max_tokens=1)
    add(s, 1, tenant="b")
    step(s)
    add(s, 1, tenant="a")
    assert policy.counters == {"a": 12.0, "b": 3.0}


def test_fair_preempts_the_youngest_of_the_tenant_that_was_served_most() -> None:
    s = scheduler("fair", num_blocks=5)
    a1, a2 = add(s, 4, tenant="a"), add(s, 4, tenant="a")
    b = add(s, 4, tenant="b")
    step(s)
    batch = step(s)
    assert preempted(batch) == [a2]
    assert batch.sequences == [a1, b]


def test_completions_of_one_prompt_are_active_each() -> None:
    policy = Fair()
    s = scheduler(policy)
    first, fork = (Sequence(next(_ids), [1, 2], SamplingParams(tenant="a")) for _ in range(2))
    s.add(first, forks=[fork])
    assert policy.active == {"a": 2}
    s.abort(first)
    s.abort(fork)
    assert policy.active == {}


def test_each_of_several_tokens_and_of_several_completions_is_paid_for() -> None:
    policy = Fair()
    s = scheduler(policy)
    first, fork = (Sequence(next(_ids), [1, 2], SamplingParams(tenant="a")) for _ in range(2))
    s.add(first, forks=[fork])
    s.add(Sequence(next(_ids), [3, 4, 5], SamplingParams(tenant="b")))
    s.commit(s.schedule(), [[50, 51, 52], [60], [70, 71]])
    assert policy.counters == {"a": 2 + 2 * 4, "b": 3 + 2 * 2}


# Policies of one's own


class LastComeFirstServed(SchedulingPolicy):
    """As a user would write it."""

    def order(self, sequence: Sequence, stats: SchedulerStats) -> float:
        return -sequence.arrival_index


def test_a_policy_is_loaded_by_module_and_class() -> None:
    s = scheduler(f"{__name__}:LastComeFirstServed", max_num_seqs=1)
    a, b, c = (add(s, max_tokens=1) for _ in range(3))
    assert order_of_service(s) == [c, b, a]
    s.policies.raise_error()


def test_a_policy_is_loaded_by_its_name() -> None:
    kinds = {name: type(load_policy(name)) for name in POLICIES}
    assert kinds == POLICIES
    assert (kinds["priority"], kinds["shortest_job"]) == (Priority, ShortestJob)
    assert (kinds["fair"], kinds["slo"], kinds["fcfs"]) == (Fair, EarliestDeadline, SchedulingPolicy)


class Raises(SchedulingPolicy):
    def __init__(self) -> None:
        raise RuntimeError("not today")


class NoPolicy:
    pass


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "lifo",
            "policy: found 'lifo', expected fcfs, prefill_first, priority, shortest_job, fair, slo, "
            "module:Class or path/file.py:Class",
        ),
        (
            "nowhere.at_all:Policy",
            "policy: 'nowhere.at_all:Policy' cannot be loaded: ModuleNotFoundError: .*",
        ),
        (":Policy", "policy: found ':Policy', expected fcfs, .*"),
        (f"{__name__}:Missing", f"policy: '{__name__}:Missing' cannot be loaded: AttributeError: .*"),
        (f"{__name__}:Raises", f"policy: '{__name__}:Raises' cannot be loaded: RuntimeError: not today"),
        (f"{__name__}:NoPolicy", f"policy: found '{__name__}:NoPolicy', expected a subclass of .*"),
        ("math:pi", "policy: 'math:pi' cannot be loaded: TypeError: .*"),
    ],
)
def test_a_policy_that_cannot_be_had_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}$"):
        load_policy(name)


class KnowsTheTrace(EvictionPolicy):
    needs_future = True


def test_a_policy_that_needs_the_future_is_refused_where_nobody_tells_of_it() -> None:
    s = scheduler("fcfs", eviction=f"{__name__}:KnowsTheTrace", enable_prefix_caching=True)
    with pytest.raises(RequestError, match=r"^eviction: found a policy that needs to know the requests"):
        add(s)
    s.foresee([Sequence(next(_ids), range(2), SamplingParams())])
    added = add(s, max_tokens=1)
    assert order_of_service(s) == [added]


class OneAtATime(AdmissionPolicy):
    def admit(self, sequence: SequenceView, stats: SchedulerStats) -> str:
        return "queue" if stats.num_running else "accept"


def test_who_is_held_back_stays_so_when_all_begins_anew_with_every_completion() -> None:
    s = scheduler("fcfs", admission=f"{__name__}:OneAtATime")
    runs = add(s, 4, max_tokens=8)
    step(s)
    first, *forks = held = [Sequence(next(_ids), [1, 2], SamplingParams(max_tokens=1)) for _ in range(3)]
    s.add(first, forks=forks)
    step(s)
    s.recover({sequence: sequence.num_tokens for sequence in (runs, *held)})
    s.recover({sequence: sequence.num_tokens for sequence in (runs, *held)})
    s.check()
    assert list(s.waiting) == [runs]
    assert order_of_service(s) == [runs, *held]
    s.policies.raise_error()


class AcceptsAll(AdmissionPolicy):
    def admit(self, sequence: SequenceView, stats: SchedulerStats) -> str:
        return "accept"


@pytest.mark.parametrize(("policy", "is_let_in"), [("OneAtATime", False), ("AcceptsAll", True)])
def test_a_fork_is_let_in_by_the_admission_policy_as_all_are(policy: str, is_let_in: bool) -> None:
    s = scheduler("fcfs", admission=f"{__name__}:{policy}")
    parent = add(s, 4, max_tokens=3)
    step(s)
    child = Sequence(next(_ids), [*parent.token_ids[:4], 7], SamplingParams(max_tokens=1))
    s.fork(parent, child)
    s.check()
    assert (child.status is SequenceStatus.RUNNING) == is_let_in
    assert (child.block_table == parent.block_table) == is_let_in, "who is let in shares blocks"
    order_of_service(s)
    assert child.finish_reason == "length"


# Policies that go wrong


class ChangesStats(SchedulingPolicy):
    def order(self, sequence: SequenceView, stats: SchedulerStats) -> float:
        stats.num_free_blocks = 0  # type: ignore[misc]
        return 0.0


def test_a_policy_cannot_change_how_things_stand() -> None:
    s = scheduler(ChangesStats())
    add(s)
    with pytest.raises(PolicyError, match=r"sets 'num_free_blocks', and a policy cannot change how things"):
        s.policies.raise_error()
    assert s.stats.num_free_blocks == s.block_manager.num_free_blocks
    before = s.stats
    step(s)
    assert before.num_waiting == 0 < s.stats.num_waiting, "what a policy has kept stays as it was"


def answering(method: str, answer: Any) -> SchedulingPolicy:
    """Last come first served, but for one method, which gives this answer or raises it."""

    def wrong(self: SchedulingPolicy, *arguments: Any) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer() if callable(answer) else answer

    policy: SchedulingPolicy = type("Wrong", (LastComeFirstServed,), {method: wrong})()
    return policy


def stranger() -> Sequence:
    return Sequence(0, [1], SamplingParams())


CASES: list[tuple[str, Any, str]] = [
    ("order", ZeroDivisionError("oh"), "order\\(\\): ZeroDivisionError: oh"),
    ("order", math.nan, "order\\(\\): found nan, expected a number or a tuple of numbers"),
    ("order", None, "order\\(\\): found None, expected"),
    ("order", "first", "order\\(\\): found 'first', expected"),
    ("order", (1, None), "order\\(\\): found \\(1, None\\), expected"),
    ("queue_of", ZeroDivisionError("oh"), "queue_of\\(\\): ZeroDivisionError: oh"),
    ("queue_of", [1], "queue_of\\(\\): TypeError: unhashable"),
    ("victim", ZeroDivisionError("oh"), "victim\\(\\): ZeroDivisionError: oh"),
    ("victim", None, "victim\\(\\): found None, expected one of"),
    ("victim", stranger, "victim\\(\\): found Sequence\\(0, .*expected one of"),
    ("on_add", ZeroDivisionError("oh"), "on_add\\(\\): ZeroDivisionError: oh"),
    ("on_commit", ZeroDivisionError("oh"), "on_commit\\(\\): ZeroDivisionError: oh"),
    ("on_finish", ZeroDivisionError("oh"), "on_finish\\(\\): ZeroDivisionError: oh"),
]


@pytest.mark.parametrize(("method", "answer", "message"), CASES)
def test_a_policy_that_goes_wrong_is_reported_once_and_all_that_was_accepted_is_served(
    method: str, answer: Any, message: str
) -> None:
    s = scheduler(answering(method, answer), num_blocks=4)
    sequences = [add(s, 4) for _ in range(3)]
    errors = []
    for _ in range(60):
        step(s)
        try:
            s.policies.raise_error()
        except PolicyError as error:
            errors.append(error)
    assert [sequence.num_tokens for sequence in sequences] == [16] * 3
    assert len(errors) == 1
    with pytest.raises(PolicyError, match=f"^policy Wrong: {message}.*; it goes on first come first served$"):
        raise errors[0]


@pytest.mark.parametrize("answer", [ZeroDivisionError("oh"), math.nan, None, "first"])
def test_the_order_of_queues_is_checked_as_well(answer: Any) -> None:
    policy = answering("queue_order", answer)
    policy.queue_of = lambda sequence: sequence.seq_id % 2  # type: ignore[method-assign]
    s = scheduler(policy, max_num_seqs=1)
    sequences = [add(s, max_tokens=1) for _ in range(4)]
    assert set(order_of_service(s)) == set(sequences)
    with pytest.raises(PolicyError, match=r"^policy Wrong: queue_order\(\): "):
        s.policies.raise_error()


def test_after_its_first_mistake_a_policy_is_not_asked_again() -> None:
    s = scheduler(answering("on_add", ZeroDivisionError("oh")), max_num_seqs=1)
    a, b = add(s, max_tokens=1), add(s, max_tokens=1)
    assert order_of_service(s) == [a, b], "first come, first served"
    with pytest.raises(PolicyError):
        s.policies.raise_error()
    s.policies.raise_error()


def test_a_policy_of_two_phases_that_goes_wrong_leaves_no_step_without_work() -> None:
    class Wrong(SchedulingPolicy):
        prefills_alone = True

        def queue_of(self, sequence: Sequence) -> int:
            return sequence.num_prompt_tokens

        def queue_order(self, queue: object, stats: SchedulerStats) -> float:
            return math.nan

    s = scheduler(Wrong(), num_blocks=4)
    a = add(s, 8)
    s.commit(s.schedule(), [[50]])
    add(s, 12)
    add(s, 11)
    assert s.schedule().sequences == [a]


def test_a_policy_may_do_anything_to_its_list_of_candidates() -> None:
    class Wrong(SchedulingPolicy):
        def victim(self, candidates: list[Sequence], stats: SchedulerStats) -> Sequence:
            candidates.clear()
            raise ZeroDivisionError

    s = scheduler(Wrong(), num_blocks=3)
    _, b = add(s, 4), add(s, 4)
    step(s)
    assert preempted(step(s)) == [b]


def test_a_policy_is_told_the_time_and_how_things_stand() -> None:
    told: list[SchedulerStats] = []

    class Curious(SchedulingPolicy):
        def on_commit(self, batch: ScheduledBatch, stats: SchedulerStats) -> None:
            told.append(stats)

    s = scheduler(Curious(), max_num_seqs=1)
    add(s, 4, now=1.0)
    add(s, 4, now=1.5)
    step(s, now=2.0)
    step(s, now=3.0)
    assert told == [SchedulerStats(2.0, 2, 0, 16, 16, 4), SchedulerStats(3.0, 1, 1, 15, 16, 4)]


# The queue of those that wait


def waiting_queue(policy: SchedulingPolicy | None = None) -> WaitingQueue:
    return WaitingQueue(CheckedPolicies(BlockManager(4, 4), policy or SchedulingPolicy()))


def waiter(index: int, priority: float = 0, tenant: str = "") -> Sequence:
    sequence = Sequence(index, [1], SamplingParams(priority=priority, tenant=tenant))
    sequence.arrival_index = index
    return sequence


def test_anyone_can_leave_the_queue_and_the_others_keep_their_order() -> None:
    stats = SchedulerStats()
    queue = waiting_queue(Priority())
    sequences = [waiter(i, priority=-i) for i in range(6)]
    for sequence in sequences:
        queue.push(sequence, stats)
    for index in (5, 2, 0):
        queue.remove(sequences[index])
    assert list(queue) == [sequences[4], sequences[3], sequences[1]]
    assert (len(queue), queue.first(stats)) == (3, sequences[4])
    queue.push(sequences[5], stats)
    assert queue.first(stats) is sequences[5]


def test_of_equals_the_first_to_arrive_is_first_whenever_it_came_back() -> None:
    stats = SchedulerStats()
    queue = waiting_queue(Priority())
    later, earlier = waiter(1), waiter(0)
    queue.push(later, stats)
    queue.push(earlier, stats)
    assert list(queue) == [earlier, later]
    assert queue.first(stats) is earlier


def test_one_that_left_before_it_came_to_the_top_is_passed_over_there() -> None:
    stats = SchedulerStats()
    queue = waiting_queue()
    sequences = [waiter(i) for i in range(5)]
    for sequence in sequences:
        queue.push(sequence, stats)
    queue.remove(sequences[1])
    queue.remove(sequences[0])
    assert queue.first(stats) is sequences[2]


def test_the_queue_serves_those_whose_turn_must_come_then_the_swapped_then_the_rest() -> None:
    stats = SchedulerStats()
    queue = waiting_queue(Priority())
    rest, swapped, must = waiter(0, priority=-9), waiter(1), waiter(2, priority=9)
    both = waiter(3, priority=8)
    swapped.swap_table, both.swap_table = [0], [1]
    queue.push(rest, stats)
    queue.push(swapped, stats)
    queue.push(must, stats, guaranteed=True)
    queue.push(both, stats, guaranteed=True)
    served = []
    while queue:
        served.append(queue.first(stats))
        queue.remove(served[-1])
    assert served == [both, must, swapped, rest]


@pytest.mark.parametrize("kept", [0, 1])
def test_entries_of_those_that_left_do_not_pile_up(kept: int) -> None:
    stats = SchedulerStats()
    queue = waiting_queue()
    first = waiter(0)
    if kept:
        queue.push(first, stats)
    for index in range(1, 100_001):
        sequence = waiter(index)
        queue.push(sequence, stats)
        queue.remove(sequence)
        assert sum(map(len, queue._heaps.values())) <= 2
    assert list(queue) == [first] * kept


def test_a_tenants_queue_is_gone_with_its_last_one() -> None:
    stats = SchedulerStats()
    queue = waiting_queue(Fair())
    for index in range(50):
        sequence = waiter(index, tenant=str(index))
        queue.push(sequence, stats)
        queue.remove(sequence)
    assert (queue._heaps, queue._num_live) == ({}, {})


@pytest.mark.parametrize("leaving", [list, reversed])
def test_many_that_leave_in_any_order_leave_the_right_ones(leaving: Callable[[Any], Any]) -> None:
    stats = SchedulerStats()
    queue = waiting_queue()
    sequences = [waiter(index) for index in range(100)]
    for sequence in sequences:
        queue.push(sequence, stats)
    for sequence in leaving([s for s in sequences if s.seq_id % 7]):
        queue.remove(sequence)
        assert sum(map(len, queue._heaps.values())) <= 2 * len(queue)
    assert [s.seq_id for s in queue] == list(range(0, 100, 7))


def test_a_new_tenant_starts_where_the_last_one_left_off() -> None:
    policy = Fair()
    stats = SchedulerStats()
    old, new = (Sequence(next(_ids), [1], SamplingParams(tenant=name)) for name in ("old", "new"))
    policy.on_add(old, stats)
    policy.counters["old"] = 12.0
    policy.on_finish(old, stats)
    policy.on_add(new, stats)
    policy.on_add(old, stats)
    assert policy.counters == {"old": 12.0, "new": 12.0}


@pytest.mark.parametrize("changes", ["cache", "always"])
def test_an_order_by_the_cached_prefix_changes_when_the_cache_does(changes: str) -> None:
    class LongestPrefix(SchedulingPolicy):
        order_changes = changes

        def order(self, sequence: SequenceView, stats: SchedulerStats) -> float:
            return -sequence.num_cached_tokens

    s = scheduler(LongestPrefix(), max_num_seqs=1, enable_prefix_caching=True)
    prompts = [[1] * 9, [2] * 9, [3] * 9, [1] * 8 + [4], [2] * 8 + [5]]
    added = []
    for prompt in prompts:
        added.append(Sequence(next(_ids), prompt, SamplingParams(max_tokens=1)))
        s.add(added[-1])
    a, b, c, like_a, like_b = added
    assert order_of_service(s) == [a, like_a, b, like_b, c]
    assert [like_a.num_cached_tokens, like_b.num_cached_tokens] == [8, 8]
    s.policies.raise_error()
