"""What the scheduler does in each case that has a name: exact batches, exact block tables."""

from collections.abc import Callable
from typing import Any

import pytest

from engine.block_manager import BlockManager
from engine.config import EngineConfig
from engine.errors import RequestError
from engine.outputs import FinishReason
from engine.sampling_params import SamplingParams
from engine.scheduler import ScheduledBatch, Scheduler
from engine.sequence import Sequence, SequenceStatus

EOS = 99

_ids = iter(range(10**9))


def scheduler(**settings: Any) -> Scheduler:
    """Blocks of 4 tokens, 16 of them, 16 tokens a step, unless the test says otherwise."""
    config = EngineConfig(**{"block_size": 4, "num_blocks": 16, "max_num_batched_tokens": 16} | settings)
    assert config.num_blocks is not None
    return Scheduler(config, BlockManager(config.num_blocks, config.block_size, config.enable_prefix_caching))


def prompt(num_tokens: int, first: int = 0) -> list[int]:
    return list(range(first, first + num_tokens))


def add(to: Scheduler, token_ids: list[int], **params: Any) -> Sequence:
    sampling_params = SamplingParams(**{"max_tokens": None} | params)
    sequence = Sequence(next(_ids), token_ids, sampling_params, frozenset({EOS}))
    to.add(sequence)
    return sequence


Step = list[tuple[Sequence, int, bool]]


def work(batch: ScheduledBatch) -> Step:
    """A batch as (sequence, tokens, whether the next is sampled)."""
    return list(zip(batch.sequences, batch.num_new_tokens, batch.samples, strict=True))


def schedule(of: Scheduler) -> ScheduledBatch:
    batch = of.schedule()
    of.check()
    return batch


def commit(to: Scheduler, batch: ScheduledBatch, token: int = 50) -> list[Sequence]:
    finished = to.commit(batch, [token] * sum(batch.samples))
    to.check()
    return finished


def step(of: Scheduler, token: int = 50) -> Step:
    batch = schedule(of)
    commit(of, batch, token)
    return work(batch)


# Prefill, decode, the budget


def test_an_empty_scheduler_schedules_nothing() -> None:
    s = scheduler()
    batch = schedule(s)
    assert (batch.sequences, batch.num_new_tokens, batch.samples, batch.preempted) == ([], [], [], [])
    assert batch.num_tokens == 0
    assert not s.has_unfinished


def test_a_prompt_is_computed_and_then_one_token_a_step() -> None:
    s = scheduler()
    a = add(s, prompt(6))
    assert s.has_unfinished
    assert step(s) == [(a, 6, True)]
    assert a.token_ids == [*prompt(6), 50]
    assert (a.num_computed_tokens, a.block_table) == (6, [0, 1])
    assert step(s) == [(a, 1, True)]
    assert step(s) == [(a, 1, True)]
    assert step(s) == [(a, 1, True)]
    assert (a.num_computed_tokens, a.block_table) == (9, [0, 1, 2])


@pytest.mark.parametrize(("num_tokens", "blocks"), [(3, 1), (4, 1), (5, 2)])
def test_a_prompt_gets_blocks_for_its_own_tokens_only(num_tokens: int, blocks: int) -> None:
    s = scheduler()
    a = add(s, prompt(num_tokens))
    schedule(s)
    assert len(a.block_table) == blocks


def test_prompts_share_a_step_in_order_of_arrival() -> None:
    s = scheduler()
    a, b, c = (add(s, prompt(5, first)) for first in (0, 10, 20))
    assert step(s) == [(a, 5, True), (b, 5, True), (c, 5, True)]


def test_a_prompt_longer_than_the_budget_is_computed_in_chunks() -> None:
    s = scheduler(max_num_batched_tokens=4)
    a = add(s, prompt(10))
    assert step(s) == [(a, 4, False)]
    assert a.token_ids == prompt(10)
    assert step(s) == [(a, 4, False)]
    assert step(s) == [(a, 2, True)]
    assert a.token_ids == [*prompt(10), 50]


def test_a_chunk_runs_beside_decodes_within_the_budget() -> None:
    s = scheduler(max_num_batched_tokens=6)
    a, b = add(s, prompt(3, 0)), add(s, prompt(3, 10))
    assert step(s) == [(a, 3, True), (b, 3, True)]
    c, d = add(s, prompt(7, 20)), add(s, prompt(2, 30))
    assert step(s) == [(a, 1, True), (b, 1, True), (c, 4, False)]
    assert step(s) == [(a, 1, True), (b, 1, True), (c, 3, True), (d, 1, False)]
    assert step(s) == [(a, 1, True), (b, 1, True), (c, 1, True), (d, 1, True)]


def test_a_budget_of_one_serves_the_oldest_first() -> None:
    s = scheduler(max_num_batched_tokens=1)
    a, b = add(s, prompt(1), max_tokens=2), add(s, prompt(1, 10), max_tokens=1)
    assert [step(s) for _ in range(3)] == [[(a, 1, True)], [(a, 1, True)], [(b, 1, True)]]
    assert not s.has_unfinished


def test_no_more_than_max_num_seqs_run() -> None:
    s = scheduler(max_num_seqs=2)
    a, b, c = (add(s, prompt(2, first), max_tokens=2) for first in (0, 10, 20))
    assert step(s) == [(a, 2, True), (b, 2, True)]
    assert step(s) == [(a, 1, True), (b, 1, True)]
    assert step(s) == [(c, 2, True)]


def test_admission_waits_for_blocks_and_nobody_overtakes() -> None:
    s = scheduler(num_blocks=4)
    a = add(s, prompt(9), max_tokens=2)
    b, c = add(s, prompt(5, 20)), add(s, prompt(1, 40))
    assert step(s) == [(a, 9, True)], "b does not fit, and c, which would, came after it"
    assert list(s.waiting) == [b, c]
    assert step(s) == [(a, 1, True)]
    assert step(s) == [(b, 5, True), (c, 1, True)]


# The prefix cache


def test_a_cached_prefix_is_not_computed_again() -> None:
    s = scheduler()
    a = add(s, prompt(9))
    step(s)
    b = add(s, [*prompt(8), 70, 71])
    assert step(s) == [(a, 1, True), (b, 2, True)]
    assert (a.block_table, b.block_table) == ([0, 1, 2], [0, 1, 3])
    assert (a.num_cached_tokens, b.num_cached_tokens) == (0, 8)


def test_a_fully_cached_prompt_computes_its_last_block_again() -> None:
    s = scheduler()
    a = add(s, prompt(8), max_tokens=1)
    step(s)
    assert a.status is SequenceStatus.FINISHED
    b = add(s, prompt(8))
    batch = schedule(s)
    assert work(batch) == [(b, 4, True)]
    assert b.num_cached_tokens == 4
    assert b.block_table == [0, 2]
    commit(s, batch)
    assert b.block_table == [0, 1], "and takes the cached one for it: they are equal"


def test_prompts_of_one_step_do_not_share_what_is_not_computed_yet() -> None:
    s = scheduler()
    a, b = add(s, prompt(5)), add(s, prompt(5))
    batch = schedule(s)
    assert work(batch) == [(a, 5, True), (b, 5, True)]
    assert (a.block_table, b.block_table) == ([0, 1], [2, 3])
    commit(s, batch)
    assert (a.block_table, b.block_table) == ([0, 1], [0, 3])


def test_without_prefix_caching_all_is_computed_again() -> None:
    s = scheduler(enable_prefix_caching=False)
    a = add(s, prompt(8))
    step(s)
    b = add(s, prompt(8))
    assert step(s) == [(a, 1, True), (b, 8, True)]
    assert set(a.block_table).isdisjoint(b.block_table)
    assert b.num_cached_tokens == 0


# Preemption


def two_that_fill_the_cache(**settings: Any) -> tuple[Scheduler, Sequence, Sequence]:
    """Both need a block in the next step, and one is free."""
    s = scheduler(num_blocks=5, **settings)
    a, b = add(s, prompt(8)), add(s, prompt(8, 20))
    step(s)
    assert (a.block_table, b.block_table) == ([0, 1], [2, 3])
    return s, a, b


def test_the_youngest_is_preempted_when_blocks_run_out() -> None:
    s, a, b = two_that_fill_the_cache()
    batch = schedule(s)
    assert work(batch) == [(a, 1, True)]
    assert batch.preempted == [b]
    assert a.block_table == [0, 1, 4]
    assert (b.status, b.block_table, b.num_computed_tokens) == (SequenceStatus.WAITING, [], 0)
    assert b.token_ids == [*prompt(8, 20), 50], "what it has generated it keeps"
    assert (a.num_preemptions, b.num_preemptions) == (0, 1)


def test_a_preempted_sequence_returns_first_with_its_own_cached_blocks() -> None:
    s, a, b = two_that_fill_the_cache()
    c = add(s, prompt(1, 40))
    assert step(s) == [(a, 1, True)]
    assert list(s.waiting) == [b, c], "nor is c let in with the blocks taken from b"
    s.abort(a)
    assert step(s) == [(b, 1, True), (c, 1, True)]
    assert b.block_table[:2] == [2, 3]
    assert b.num_cached_tokens == 0, "not a saving of the prompt, only the way back"
    assert b.output_token_ids == [50, 50]


def test_without_the_cache_a_preempted_sequence_is_computed_again_whole() -> None:
    s, a, b = two_that_fill_the_cache(enable_prefix_caching=False)
    step(s)
    s.abort(a)
    assert step(s) == [(b, 9, True)]


def test_several_preempted_sequences_keep_their_order() -> None:
    s = scheduler(num_blocks=6, block_size=2, max_num_batched_tokens=16)
    a, b, c = add(s, prompt(4)), add(s, prompt(4, 20)), add(s, prompt(4, 40))
    d = add(s, prompt(1, 60))
    step(s)
    first = schedule(s)
    assert (first.preempted, work(first)) == ([c], [(a, 1, True), (b, 1, True)])
    commit(s, first)
    assert step(s) == [(a, 1, True), (b, 1, True)]
    second = schedule(s)
    assert (second.preempted, work(second)) == ([b], [(a, 1, True)])
    assert list(s.waiting) == [b, c, d]


def test_a_sequence_alone_in_the_cache_is_never_preempted() -> None:
    s = scheduler(num_blocks=2, block_size=2)
    a = add(s, prompt(1))
    while s.has_unfinished:
        assert step(s) == [(a, 1, True)]
    assert (a.num_tokens, a.finish_reason) == (4, FinishReason.LENGTH)
    assert a.num_preemptions == 0


# Abort


def test_aborting_one_that_waits_takes_it_out_of_the_queue() -> None:
    s = scheduler()
    a, b = add(s, prompt(2)), add(s, prompt(2, 10))
    s.abort(a)
    assert (a.status, a.finish_reason) == (SequenceStatus.FINISHED, FinishReason.ABORT)
    assert step(s) == [(b, 2, True)]


def test_aborting_a_running_prefill_frees_its_blocks_and_what_is_computed_stays_known() -> None:
    s = scheduler(max_num_batched_tokens=6)
    a = add(s, prompt(10))
    assert step(s) == [(a, 6, False)]
    s.abort(a)
    s.check()
    assert s.block_manager.num_free_blocks == 16
    b = add(s, prompt(10))
    assert step(s) == [(b, 6, True)]
    assert b.num_cached_tokens == 4


def test_aborting_a_running_decode_leaves_the_others_alone() -> None:
    s = scheduler()
    a, b, c = (add(s, prompt(3, first)) for first in (0, 10, 20))
    step(s)
    s.abort(b)
    s.check()
    assert b.output_token_ids == [50]
    assert step(s) == [(a, 1, True), (c, 1, True)]


def test_aborting_a_preempted_sequence_forgets_it() -> None:
    s, a, b = two_that_fill_the_cache()
    step(s)
    s.abort(b)
    assert b.finish_reason is FinishReason.ABORT
    assert step(s) == [(a, 1, True)]
    assert not s.waiting


def test_aborting_a_finished_sequence_changes_nothing() -> None:
    s = scheduler()
    a = add(s, prompt(3), max_tokens=1)
    step(s)
    s.abort(a)
    assert a.finish_reason is FinishReason.LENGTH
    assert a.output_token_ids == [50]


def test_one_aborted_while_it_is_computed_gets_no_token_and_the_others_get_theirs() -> None:
    s = scheduler()
    a, b, c = (add(s, prompt(4, first)) for first in (0, 10, 20))
    batch = schedule(s)
    s.abort(b)
    s.check()
    assert s.commit(batch, [60, 61, 62]) == []
    s.check()
    assert [x.output_token_ids for x in (a, b, c)] == [[60], [], [62]]
    assert (b.finish_reason, b.num_computed_tokens, b.block_table) == (FinishReason.ABORT, 0, [])
    d = add(s, prompt(5, 10))
    assert step(s) == [(a, 1, True), (c, 1, True), (d, 5, True)], "nothing of b is taken for computed"


def test_all_aborted_while_they_are_computed_leave_nothing_behind() -> None:
    s = scheduler()
    a, b = add(s, prompt(4)), add(s, prompt(4, 10))
    batch = schedule(s)
    s.abort(a)
    s.abort(b)
    assert commit(s, batch) == []
    assert not s.has_unfinished
    assert s.block_manager.num_free_blocks == 16


def test_an_abort_can_carry_another_reason() -> None:
    s = scheduler()
    a = add(s, prompt(3))
    step(s)
    s.abort(a, FinishReason.STOP)
    assert a.finish_reason is FinishReason.STOP


# The door


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(RequestError, match=r"^prompt: found no tokens, expected at least one$"):
        add(scheduler(), [])


@pytest.mark.parametrize(
    ("settings", "longest"),
    [({"num_blocks": 3}, 12), ({"max_model_len": 7}, 7), ({"num_blocks": 2, "max_model_len": 20}, 8)],
)
def test_a_prompt_longer_than_the_cache_or_the_model_is_refused(
    settings: dict[str, int], longest: int
) -> None:
    s = scheduler(**settings)
    a = add(s, prompt(2))
    with pytest.raises(
        RequestError, match=f"^prompt: found {longest + 1} tokens, expected at most {longest},"
    ):
        add(s, prompt(longest + 1))
    s.check()
    assert list(s.waiting) == [a]
    add(s, prompt(longest))


@pytest.mark.parametrize("settings", [{"max_model_len": 8}, {"num_blocks": 2}])
def test_a_prompt_that_fills_everything_gives_one_token(settings: dict[str, int]) -> None:
    s = scheduler(**settings)
    a = add(s, prompt(8))
    assert step(s) == [(a, 8, True)]
    assert (a.output_token_ids, a.finish_reason) == ([50], FinishReason.LENGTH)


# The end


def run_to_the_end(token_of_step: Callable[[int], int], **params: Any) -> Sequence:
    s = scheduler(max_model_len=10)
    a = add(s, prompt(3), **params)
    for index in range(10):
        if not s.has_unfinished:
            break
        step(s, token_of_step(index))
    assert a.status is SequenceStatus.FINISHED
    assert s.block_manager.num_free_blocks == 16
    return a


def test_an_output_ends_at_max_tokens() -> None:
    a = run_to_the_end(lambda _: 50, max_tokens=3)
    assert (a.output_token_ids, a.finish_reason) == ([50, 50, 50], FinishReason.LENGTH)


def test_an_output_ends_at_max_model_len() -> None:
    a = run_to_the_end(lambda _: 50, max_tokens=100)
    assert (a.num_tokens, a.finish_reason) == (10, FinishReason.LENGTH)


def test_an_end_of_text_token_ends_it_and_is_part_of_it() -> None:
    a = run_to_the_end(lambda index: EOS if index == 1 else 50)
    assert (a.output_token_ids, a.finish_reason) == ([50, EOS], FinishReason.STOP)


def test_a_stop_token_ends_it() -> None:
    a = run_to_the_end(lambda index: 60 + index, stop_token_ids=[62])
    assert (a.output_token_ids, a.finish_reason) == ([60, 61, 62], FinishReason.STOP)


def test_an_end_of_text_token_in_the_last_place_is_a_stop() -> None:
    a = run_to_the_end(lambda _: EOS, max_tokens=1)
    assert a.finish_reason is FinishReason.STOP


def test_ignore_eos_goes_on_past_the_end_of_text_but_not_past_a_stop_token() -> None:
    a = run_to_the_end(lambda _: EOS, ignore_eos=True, max_tokens=3)
    assert (a.output_token_ids, a.finish_reason) == ([EOS] * 3, FinishReason.LENGTH)
    b = run_to_the_end(lambda index: 60 + index, ignore_eos=True, stop_token_ids=[61])
    assert (b.output_token_ids, b.finish_reason) == ([60, 61], FinishReason.STOP)


def test_before_min_tokens_no_token_ends_it() -> None:
    a = run_to_the_end(lambda _: EOS, min_tokens=2)
    assert (a.output_token_ids, a.finish_reason) == ([EOS, EOS, EOS], FinishReason.STOP)
    b = run_to_the_end(lambda _: EOS, min_tokens=2, max_tokens=2)
    assert (b.output_token_ids, b.finish_reason) == ([EOS, EOS], FinishReason.LENGTH)


def test_an_end_of_text_token_in_the_prompt_ends_nothing() -> None:
    s = scheduler()
    a = add(s, [EOS, EOS])
    assert step(s) == [(a, 2, True)]
    assert a.status is SequenceStatus.RUNNING


def test_commit_names_those_that_ended_and_makes_room_for_others() -> None:
    s = scheduler(max_num_seqs=2)
    a, b, c = add(s, prompt(2), max_tokens=1), add(s, prompt(2, 10)), add(s, prompt(2, 20))
    assert commit(s, schedule(s)) == [a]
    assert step(s) == [(b, 1, True), (c, 2, True)]
