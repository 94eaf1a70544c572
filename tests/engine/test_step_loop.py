"""One loop for all who drive a scheduler: what its listeners hear, in which order, and with which times."""

from typing import Any

import pytest

from pagellm.engine.config import EngineConfig
from pagellm.engine.errors import RequestError
from pagellm.engine.requests.outputs import FinishReason
from pagellm.engine.requests.sampling_params import SamplingParams
from pagellm.engine.scheduling.batch import Preemption, PreemptionCosts, ScheduledBatch, StepLimits
from pagellm.engine.scheduling.block_manager import BlockManager, TransferKind
from pagellm.engine.scheduling.scheduler import Scheduler
from pagellm.engine.scheduling.sequence import Sequence
from pagellm.engine.scheduling.step_loop import StepEnd, StepListener, StepLoop
from pagellm.engine.step_log import StepRecord, StepRecorder
from tests.conftest import output_of


class Heard(StepListener):
    """Everything that was told, in order."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def added(self, sequence: Sequence) -> None:
        self.events.append(("added", sequence.request_id, sequence.arrival_time))

    def scheduled(self, batch: ScheduledBatch, now: float) -> None:
        self.events.append(("scheduled", [s.request_id for s in batch.sequences], now))

    def committed(self, end: StepEnd) -> None:
        names = [s.request_id for s in end.sampled], [s.request_id for s in end.finished]
        self.events.append(("committed", *names, end.now, end.duration_s, end.transfer_s))

    def ended(self, sequence: Sequence) -> None:
        self.events.append(("ended", sequence.request_id, sequence.finish_reason))


def new_loop(**settings: Any) -> StepLoop:
    config = EngineConfig(**{"block_size": 4, "num_blocks": 8} | settings).complete()
    manager = BlockManager(
        config.num_blocks, config.block_size, config.enable_prefix_caching, config.num_swap_blocks
    )
    return StepLoop(Scheduler(config, manager))


def new(number: int, name: str, length: int = 3, **params: Any) -> Sequence:
    return Sequence(number, [number] * length, SamplingParams(**params), request_id=name)


def test_listeners_hear_of_every_event_in_order() -> None:
    loop, first, second = new_loop(), Heard(), Heard()
    loop.listen(first)
    loop.listen(second)
    a, b = new(0, "a", max_tokens=1), new(1, "b")
    loop.add(a, 0.5, forks=[b])
    batch = loop.begin(1.0)
    loop.end(batch, [[7], [8]], 1.25)
    loop.abort(b, FinishReason.STOP)
    assert first.events == second.events
    assert first.events == [
        ("added", "a", 0.5),
        ("added", "b", 0.5),
        ("scheduled", ["a"], 1.0),
        ("committed", ["a", "b"], ["a"], 1.25, 0.25, 0.0),
        ("ended", "b", "stop"),
    ]


def test_one_that_stops_listening_hears_no_more() -> None:
    loop, heard = new_loop(), Heard()
    loop.listen(heard)
    loop.ignore(heard)
    loop.add(new(0, "a"), 0.0)
    assert heard.events == []


def test_one_that_was_refused_was_not_added() -> None:
    loop, heard = new_loop(), Heard()
    loop.listen(heard)
    with pytest.raises(RequestError, match="found 33 tokens"):
        loop.add(new(0, "a", length=33), 0.0)
    assert heard.events == []
    assert not loop.scheduler.has_unfinished


def test_one_that_is_aborted_in_the_middle_of_a_step_gets_no_token() -> None:
    loop, heard = new_loop(), Heard()
    loop.listen(heard)
    a, b = new(0, "a"), new(1, "b")
    loop.add(a, 0.0)
    loop.add(b, 0.0)
    batch = loop.begin(0.0)
    loop.abort(a)
    loop.abort(a)
    loop.end(batch, [[7], [8]], 0.5, duration_s=0.125, transfer_s=0.0625)
    assert heard.events[-2:] == [("ended", "a", "abort"), ("committed", ["b"], [], 0.5, 0.125, 0.0625)]
    assert (output_of(a), output_of(b)) == ([], [8])


def test_the_limits_of_one_step_hold_for_that_step_alone() -> None:
    loop = new_loop(max_num_batched_tokens=4, num_blocks=20)
    loop.add(new(0, "a", length=20), 0.0)
    counts = []
    for limits in (None, StepLimits(100, 9), None):
        batch = loop.begin(0.0, limits=limits)
        counts += batch.num_new_tokens
        loop.end(batch, [[7]] * len(batch.sampled), 0.0)
    assert counts == [4, 9, 4]


def test_costs_are_kept_until_they_are_measured_again() -> None:
    loop = new_loop()
    loop.add(new(0, "a"), 0.0)
    costs = PreemptionCosts(0.5, 0.25)
    loop.end(loop.begin(0.0, costs), [[7]], 0.0)
    loop.end(loop.begin(1.0), [[7]], 1.0)
    assert loop.scheduler.costs == costs


def two_of_which_one_moves_out() -> tuple[StepLoop, Sequence, Sequence]:
    loop = new_loop(num_blocks=4, preemption="swap", enable_prefix_caching=False)
    a, b = new(0, "a", length=8), new(1, "b", length=8)
    loop.add(a, 0.0)
    loop.add(b, 0.0)
    loop.end(loop.begin(0.0), [[7], [8]], 0.0)
    return loop, a, b


def test_a_step_that_was_given_up_moves_what_is_left_when_it_is_begun_again() -> None:
    loop, _, b = two_of_which_one_moves_out()
    abandoned = loop.begin(1.0)
    moves = [(t.kind, t.source, t.sequence) for t in abandoned.transfers]
    assert moves == [(TransferKind.SWAP_OUT, 2, b), (TransferKind.SWAP_OUT, 3, b)]
    loop.transferred()
    batch = loop.begin(2.0)
    assert batch.transfers == abandoned.transfers[1:]
    loop.transferred()
    loop.end(batch, [[9]], 2.0)
    assert not loop.scheduler.block_manager.transfers


def test_after_a_transfer_that_failed_nobody_moves_out_any_more() -> None:
    loop, a, b = two_of_which_one_moves_out()
    batch = loop.begin(1.0)
    loop.transfer_failed(batch.transfers[0], batch)
    loop.transferred()
    loop.end(batch, [[9]], 1.0)
    assert (b.swap_table, b.num_computed_tokens) == ([], 0)
    loop.abort(a)
    c = new(2, "c", length=4)
    loop.add(c, 2.0)
    ways: list[Preemption] = []
    for now in range(3, 20):
        batch = loop.begin(float(now))
        ways += [preempted.by for preempted in batch.preempted]
        loop.end(batch, [[9]] * len(batch.sampled), float(now))
    assert set(ways) == {Preemption.RECOMPUTE}


def test_a_step_that_was_given_up_is_recorded_as_one_that_computed_nothing() -> None:
    loop, _, b = two_of_which_one_moves_out()
    records: list[StepRecord] = []
    loop.listen(StepRecorder(loop.scheduler, records.append))
    loop.begin(1.0)
    loop.end(loop.begin(2.0), [[9]], 3.0)
    assert [record["step"] for record in records] == [0, 1]
    assert [record["start_s"] for record in records] == [1.0, 2.0]
    assert [record["scheduled"] for record in records] == [[], [(0, 8, 1, True)]]
    assert [preempted["sequence"] for record in records for preempted in record["preempted"]] == [b.seq_id]


def test_one_that_begins_to_listen_in_a_step_records_the_next() -> None:
    loop = new_loop()
    loop.add(new(0, "a"), 0.0)
    batch = loop.begin(0.0)
    records: list[StepRecord] = []
    loop.listen(StepRecorder(loop.scheduler, records.append))
    loop.end(batch, [[7]], 1.0)
    loop.end(loop.begin(2.0), [[8]], 3.0)
    assert [(record["start_s"], record["duration_s"]) for record in records] == [(2.0, 1.0)]
