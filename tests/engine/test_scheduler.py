"""What the scheduler does in each case that has a name: exact batches, exact block tables."""

from collections.abc import Callable
from typing import Any

import pytest

from pagellm.engine.config import EngineConfig
from pagellm.engine.errors import RequestError
from pagellm.engine.requests.outputs import FinishReason
from pagellm.engine.requests.sampling_params import SamplingParams
from pagellm.engine.scheduling.batch import Admitted, Preempted, Preemption, PreemptionCosts, ScheduledBatch
from pagellm.engine.scheduling.block_manager import Transfer, TransferKind
from pagellm.engine.scheduling.policies import BudgetPolicy
from pagellm.engine.scheduling.scheduler import Scheduler
from pagellm.engine.scheduling.sequence import Sequence, SequenceStatus
from tests.conftest import output_of

EOS = 99

_ids = iter(range(10**9))


def scheduler(**settings: Any) -> Scheduler:
    """Blocks of 4 tokens, 16 of them, 16 tokens a step, unless the test says otherwise."""
    defaults = {"block_size": 4, "num_blocks": 16, "max_num_batched_tokens": 16}
    return Scheduler.with_blocks(EngineConfig(**defaults | settings).complete())


def prompt(num_tokens: int, first: int = 0) -> list[int]:
    return list(range(first, first + num_tokens))


def new(token_ids: list[int], reads_cache: bool = True, **params: Any) -> Sequence:
    sampling_params = SamplingParams(**{"max_tokens": None} | params)
    return Sequence(next(_ids), token_ids, sampling_params, frozenset({EOS}), reads_cache)


def add(to: Scheduler, token_ids: list[int], now: float = 0.0, **params: Any) -> Sequence:
    sequence = new(token_ids, **params)
    to.add(sequence, now)
    return sequence


def add_with_forks(to: Scheduler, token_ids: list[int], num_forks: int, **params: Any) -> list[Sequence]:
    """Completions of one prompt, the first of which computes it."""
    first, *forks = completions = [new(token_ids, **params) for _ in range(num_forks + 1)]
    to.add(first, forks=forks)
    return completions


Step = list[tuple[Sequence, int, bool]]


def work(batch: ScheduledBatch) -> Step:
    """A batch as (sequence, tokens, whether the next is sampled)."""
    return list(zip(batch.sequences, batch.num_new_tokens, batch.samples, strict=True))


def schedule(of: Scheduler) -> ScheduledBatch:
    batch = of.schedule()
    of.check()
    return batch


def commit(to: Scheduler, batch: ScheduledBatch, token: int = 50) -> list[Sequence]:
    finished = to.commit(batch, [[token]] * len(batch.sampled))
    to.check()
    return finished


def transfers(batch: ScheduledBatch) -> list[tuple[TransferKind, int, int, Sequence]]:
    return [tuple(transfer) for transfer in batch.transfers]


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
    assert list(a.token_ids) == [*prompt(6), 50]
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
    assert list(a.token_ids) == prompt(10)
    assert step(s) == [(a, 4, False)]
    assert step(s) == [(a, 2, True)]
    assert list(a.token_ids) == [*prompt(10), 50]


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


def test_stall_free_prompts_have_a_quarter_of_the_step_beside_decodes_and_all_of_it_else() -> None:
    s = scheduler(num_blocks=400, max_num_batched_tokens=400, budget="stall_free")
    a, b = add(s, prompt(390), max_tokens=2), add(s, prompt(210, 1000), max_tokens=9)
    assert step(s) == [(a, 390, True), (b, 10, False)]
    assert step(s) == [(a, 1, True), (b, 100, False)]
    assert step(s) == [(b, 100, True)]  # nobody decodes any more
    c, d = add(s, prompt(60, 2000), max_tokens=1), add(s, prompt(60, 3000), max_tokens=1)
    assert step(s) == [(b, 1, True), (c, 60, True), (d, 40, False)]


@pytest.mark.parametrize(("most", "beside"), [(128, 64), (66, 64), (64, 63), (2, 1)])
def test_stall_free_prompts_have_64_tokens_beside_decodes_if_the_step_has(most: int, beside: int) -> None:
    s = scheduler(num_blocks=400, max_num_batched_tokens=most, budget="stall_free")
    a = add(s, prompt(1))
    assert step(s) == [(a, 1, True)]
    b = add(s, prompt(500, 1000))
    assert step(s) == [(a, 1, True), (b, beside, False)]


class NothingBesideDecodes(BudgetPolicy):
    """Once somebody decodes, no prompt goes on."""

    def budget(self, most: tuple[int, int], decodes: list[Any], *_: Any) -> tuple[int, int]:
        return (0, 1) if decodes else most


def test_a_step_whose_decodes_all_make_way_computes_something_whatever_the_budget() -> None:
    s = scheduler(
        block_size=1,
        num_blocks=8,
        max_num_batched_tokens=2,
        max_prefill_chunk=1,
        budget=f"{__name__}:NothingBesideDecodes",
    )
    a, b = add(s, prompt(5)), add(s, prompt(1, 10), max_tokens=9)
    assert step(s) == [(a, 1, False), (b, 1, True)]
    assert [step(s) for _ in range(2)] == [[(b, 1, True)]] * 2
    batch = schedule(s)
    assert [preempted.sequence for preempted in batch.preempted] == [b]
    assert work(batch) == [(a, 1, False)]


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


def test_one_that_did_not_fit_is_let_in_when_somebody_leaves() -> None:
    s = scheduler(num_blocks=4)
    a, b, c = add(s, prompt(3)), add(s, prompt(9, 20)), add(s, prompt(5, 40))
    assert step(s) == [(a, 3, True), (b, 9, True)]
    assert step(s) == [(a, 1, True), (b, 1, True)]
    s.abort(b)
    assert work(schedule(s))[-1] == (c, 5, True)


def test_one_that_did_not_fit_is_let_in_when_another_has_computed_its_beginning() -> None:
    s = scheduler(num_blocks=4, max_prefill_chunk=4)
    a, b = add(s, prompt(8)), add(s, prompt(12))
    assert step(s) == [(a, 4, False)]
    assert step(s) == [(a, 4, True), (b, 4, False)]
    assert (a.block_table, b.block_table) == ([0, 1], [0, 1, 3]), "and what both computed became one"


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
    assert batch.preempted == [
        Preempted(b, Preemption.RECOMPUTE, needed_by=b, num_computed_tokens=8, recompute_s=0.0, swap_s=0.0)
    ]
    assert a.block_table == [0, 1, 4]
    assert (b.status, b.block_table, b.num_computed_tokens) == (SequenceStatus.WAITING, [], 0)
    assert list(b.token_ids) == [*prompt(8, 20), 50], "what it has generated it keeps"
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
    assert output_of(b) == [50, 50]


def test_nobody_is_admitted_in_a_step_in_which_somebody_makes_way() -> None:
    s, a, b = two_that_fill_the_cache(max_num_seqs=2, policy="priority")
    urgent = add(s, prompt(1, 60), priority=-5)
    batch = schedule(s)
    assert ([p.sequence for p in batch.preempted], work(batch)) == ([b], [(a, 1, True)])
    assert batch.admitted == []
    commit(s, batch)
    assert step(s) == [(a, 1, True), (urgent, 1, True)]


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
    assert ([p.sequence for p in first.preempted], work(first)) == ([c], [(a, 1, True), (b, 1, True)])
    commit(s, first)
    assert step(s) == [(a, 1, True), (b, 1, True)]
    second = schedule(s)
    assert ([p.sequence for p in second.preempted], work(second)) == ([b], [(a, 1, True)])
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
    assert output_of(b) == [50]
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
    assert output_of(a) == [50]


def test_one_aborted_while_it_is_computed_gets_no_token_and_the_others_get_theirs() -> None:
    s = scheduler()
    a, b, c = (add(s, prompt(4, first)) for first in (0, 10, 20))
    batch = schedule(s)
    s.abort(b)
    s.check()
    assert s.commit(batch, [[60], [61], [62]]) == []
    s.check()
    assert [output_of(x) for x in (a, b, c)] == [[60], [], [62]]
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
    assert (output_of(a), a.finish_reason) == ([50], FinishReason.LENGTH)


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
    assert (output_of(a), a.finish_reason) == ([50, 50, 50], FinishReason.LENGTH)


def test_an_output_ends_at_max_model_len() -> None:
    a = run_to_the_end(lambda _: 50, max_tokens=100)
    assert (a.num_tokens, a.finish_reason) == (10, FinishReason.LENGTH)


def test_an_end_of_text_token_ends_it_and_is_part_of_it() -> None:
    a = run_to_the_end(lambda index: EOS if index == 1 else 50)
    assert (output_of(a), a.finish_reason) == ([50, EOS], FinishReason.STOP)


def test_a_stop_token_ends_it() -> None:
    a = run_to_the_end(lambda index: 60 + index, stop_token_ids=[62])
    assert (output_of(a), a.finish_reason) == ([60, 61, 62], FinishReason.STOP)


def test_an_end_of_text_token_in_the_last_place_is_a_stop() -> None:
    a = run_to_the_end(lambda _: EOS, max_tokens=1)
    assert a.finish_reason is FinishReason.STOP


def test_ignore_eos_goes_on_past_the_end_of_text_but_not_past_a_stop_token() -> None:
    a = run_to_the_end(lambda _: EOS, ignore_eos=True, max_tokens=3)
    assert (output_of(a), a.finish_reason) == ([EOS] * 3, FinishReason.LENGTH)
    b = run_to_the_end(lambda index: 60 + index, ignore_eos=True, stop_token_ids=[61])
    assert (output_of(b), b.finish_reason) == ([60, 61], FinishReason.STOP)


def test_before_min_tokens_no_token_ends_it() -> None:
    a = run_to_the_end(lambda _: EOS, min_tokens=2)
    assert (output_of(a), a.finish_reason) == ([EOS, EOS, EOS], FinishReason.STOP)
    b = run_to_the_end(lambda _: EOS, min_tokens=2, max_tokens=2)
    assert (output_of(b), b.finish_reason) == ([EOS, EOS], FinishReason.LENGTH)


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


# Decodes before prompts


def test_decodes_come_before_a_prompt_that_began_before_them() -> None:
    s = scheduler(max_num_batched_tokens=4)
    a, b = add(s, prompt(6)), add(s, prompt(1, 20))
    assert step(s) == [(a, 4, False)]
    assert step(s) == [(a, 2, True), (b, 1, True)]
    c = add(s, prompt(6, 40))
    d = add(s, prompt(1, 60))
    assert step(s) == [(a, 1, True), (b, 1, True), (c, 2, False)]
    assert step(s) == [(a, 1, True), (b, 1, True), (c, 2, False)]
    assert step(s) == [(a, 1, True), (b, 1, True), (c, 2, True)]
    assert step(s) == [(a, 1, True), (b, 1, True), (c, 1, True), (d, 1, True)]


def test_never_more_run_than_the_budget_has_tokens_for() -> None:
    s = scheduler(max_num_batched_tokens=2)
    a, b, c = (add(s, prompt(1, first), max_tokens=3) for first in (0, 10, 20))
    assert [step(s) for _ in range(3)] == [[(a, 1, True), (b, 1, True)]] * 3
    assert step(s) == [(c, 1, True)]


def test_nor_do_more_completions_begin_than_the_budget_has_tokens_for() -> None:
    s = scheduler(max_num_batched_tokens=2)
    a, b, c = add_with_forks(s, prompt(1), 2)
    step(s)
    assert [x.status.value for x in (a, b, c)] == ["running", "running", "waiting"]
    assert step(s) == [(a, 1, True), (b, 1, True)]


def test_a_prompt_is_computed_in_chunks_of_max_prefill_chunk_beside_others() -> None:
    s = scheduler(max_prefill_chunk=3)
    a, b = add(s, prompt(7)), add(s, prompt(4, 20))
    assert step(s) == [(a, 3, False), (b, 3, False)]
    assert step(s) == [(b, 1, True), (a, 3, False)]
    assert step(s) == [(a, 1, True), (b, 1, True)]


# The watermark


def test_the_watermark_stays_free_when_others_run_and_not_when_none_does() -> None:
    s = scheduler(num_blocks=8, watermark=0.25)
    a = add(s, prompt(4), max_tokens=2)
    b, c = add(s, prompt(16, 20)), add(s, prompt(9, 40))
    assert step(s) == [(a, 4, True), (b, 12, False)]
    assert s.block_manager.num_free_blocks == 3
    assert step(s) == [(a, 1, True), (b, 4, True)], "c would leave less than two blocks"
    assert a.status is SequenceStatus.FINISHED
    assert step(s) == [(b, 1, True)], "c would leave less than two blocks, for b has grown"
    s.abort(b)
    assert step(s) == [(c, 9, True)]
    s.abort(c)
    d = add(s, prompt(32, 60))
    assert step(s) == [(d, 16, False)], "alone it may have all"


# Forks: completions of one prompt


def test_completions_begin_with_the_blocks_of_the_first_and_get_their_own_tokens() -> None:
    s = scheduler()
    a, b, c = add_with_forks(s, prompt(6), 2)
    batch = schedule(s)
    assert work(batch) == [(a, 6, True)]
    assert batch.forks == {a: [b, c]}
    assert batch.sampled == [a, b, c]
    assert s.commit(batch, [[50], [51], [52]]) == []
    s.check()
    assert [output_of(x) for x in (a, b, c)] == [[50], [51], [52]]
    assert [x.block_table for x in (a, b, c)] == [[0, 1]] * 3
    assert s.block_manager.num_free_blocks == 14
    batch = schedule(s)
    assert work(batch) == [(a, 1, True), (b, 1, True), (c, 1, True)]
    assert transfers(batch) == [(TransferKind.COPY, 1, 2, a), (TransferKind.COPY, 1, 3, b)]
    assert [x.block_table for x in (a, b, c)] == [[0, 2], [0, 3], [0, 1]]
    commit(s, batch)
    assert not s.block_manager.transfers


def test_four_completions_of_1000_tokens_use_the_blocks_of_one_prompt() -> None:
    s = scheduler(block_size=16, num_blocks=80, max_num_batched_tokens=1000)
    completions = add_with_forks(s, prompt(1000), 3)
    assert step(s) == [(completions[0], 1000, True)]
    assert s.block_manager.num_free_blocks == 80 - 63
    step(s)
    assert s.block_manager.num_free_blocks == 80 - 63 - 3
    assert len({block for x in completions for block in x.block_table[:62]}) == 62


def test_the_prompt_of_completions_is_computed_in_chunks_and_they_begin_after_the_last() -> None:
    s = scheduler(max_num_batched_tokens=4)
    a, b = add_with_forks(s, prompt(6), 1)
    first = schedule(s)
    assert (first.forks, first.sampled) == ({}, [])
    commit(s, first)
    assert schedule(s).sampled == [a, b]


def test_completions_without_a_seat_wait_and_find_the_prompt_in_the_cache() -> None:
    s = scheduler(max_num_seqs=1)
    a, b = add_with_forks(s, prompt(6), 1, max_tokens=2)
    step(s)
    assert (b.status, output_of(b)) == (SequenceStatus.WAITING, [50])
    assert step(s) == [(a, 1, True)]
    assert step(s) == [(b, 3, True)]


def test_a_prompt_that_is_taken_out_of_a_step_takes_its_completions_with_it() -> None:
    s = scheduler()
    a, b = add_with_forks(s, prompt(4), 1)
    batch = schedule(s)
    s.transfer_failed(Transfer(TransferKind.SWAP_IN, 0, a.block_table[0], a), batch)
    assert (work(batch), batch.forks, batch.sampled) == ([], {}, [])
    commit(s, batch)
    assert schedule(s).sampled == [a, b]


def test_a_completion_may_end_with_its_first_token() -> None:
    s = scheduler()
    a, b, c = add_with_forks(s, prompt(4), 2)
    batch = schedule(s)
    assert s.commit(batch, [[50], [EOS], [51]]) == [b]
    s.check()
    assert step(s) == [(a, 1, True), (c, 1, True)]


def test_when_the_first_ends_with_its_first_token_the_others_keep_its_blocks() -> None:
    s = scheduler()
    a, b = add_with_forks(s, prompt(5), 1)
    batch = schedule(s)
    assert s.commit(batch, [[EOS], [51]]) == [a]
    s.check()
    assert b.block_table == [0, 1]
    assert step(s) == [(b, 1, True)]


def test_a_completion_aborted_before_it_begins_costs_the_others_nothing() -> None:
    s = scheduler()
    a, b, c = add_with_forks(s, prompt(4), 2)
    s.abort(b)
    batch = schedule(s)
    assert batch.sampled == [a, c]
    s.abort(c)
    assert s.commit(batch, [[60], [61]]) == []
    s.check()
    assert [output_of(x) for x in (a, b, c)] == [[60], [], []]


@pytest.mark.parametrize("scheduled", [False, True])
def test_when_the_first_is_aborted_the_next_computes_the_prompt(scheduled: bool) -> None:
    s = scheduler()
    a, b, c = add_with_forks(s, prompt(4), 2)
    batch = schedule(s) if scheduled else ScheduledBatch()
    s.abort(a)
    s.check()
    assert list(s.waiting) == [b]
    assert s.commit(batch, [[60]] * len(batch.sampled)) == []
    assert not output_of(b)
    batch = schedule(s)
    assert (work(batch), batch.sampled) == ([(b, 4, True)], [b, c])


def test_a_preempted_prompt_keeps_its_completions() -> None:
    s = scheduler(num_blocks=4, max_num_batched_tokens=4, enable_prefix_caching=False)
    a = add(s, prompt(4))
    step(s)
    b, c = add_with_forks(s, prompt(10, 20), 1)
    assert step(s) == [(a, 1, True)], "no room for b beside a's second block"
    s.abort(a)
    assert step(s) == [(b, 4, False)]
    assert c.status is SequenceStatus.WAITING
    step(s)
    assert schedule(s).sampled == [b, c]


def test_a_fork_of_one_that_runs_shares_its_blocks() -> None:
    s = scheduler()
    a = add(s, prompt(5))
    step(s)
    b = new([*prompt(5), 70])
    s.fork(a, b)
    s.check()
    assert (b.status, b.block_table, b.num_computed_tokens) == (SequenceStatus.RUNNING, [0, 1], 5)
    batch = schedule(s)
    assert work(batch) == [(a, 1, True), (b, 1, True)]
    assert transfers(batch) == [(TransferKind.COPY, 1, 2, a)]


def test_what_a_fork_had_of_the_cache_is_no_more_than_it_shares() -> None:
    s = scheduler()
    add(s, prompt(9), max_tokens=1)
    step(s)
    a = add(s, prompt(9))
    step(s)
    assert a.num_cached_tokens == 8
    b, c = new([*prompt(3), 70]), new([*prompt(9), 70])
    s.fork(a, b)
    s.fork(a, c)
    assert (b.num_cached_tokens, c.num_cached_tokens) == (3, 8)


def test_what_a_completion_had_of_the_cache_is_no_more_than_its_prompt() -> None:
    """It first comes in with outputs of its own, which another that drew the same left in the cache."""
    s = scheduler(max_num_seqs=1)
    a, b = add_with_forks(s, prompt(3), 1)
    s.commit(schedule(s), [[50, 50], [50, 50]])
    assert (a.num_tokens, b.num_tokens) == (5, 5)
    while a.finish_reason is None:
        step(s, EOS if a.num_tokens > 5 else 50)
    [admitted] = schedule(s).admitted
    assert (admitted.sequence, admitted.num_cached_tokens) == (b, 4)
    assert b.num_cached_tokens == 3


@pytest.mark.parametrize(
    ("tokens", "params"),
    [
        ([*prompt(5), 50, 70], {}),  # more than is computed
        ([0, 1, 9, 70], {}),  # another beginning
        ([*prompt(5), 70], {"cache_salt": "of another tenant"}),
        ([0], {}),  # nothing in common
    ],
)
def test_what_a_fork_cannot_share_is_computed_by_itself(tokens: list[int], params: dict[str, str]) -> None:
    s = scheduler()
    a = add(s, prompt(5))
    step(s)
    b = new(tokens, **params)
    s.fork(a, b)
    s.check()
    assert (b.status, b.block_table) == (SequenceStatus.WAITING, [])
    assert work(schedule(s))[1][0] is b


def test_a_fork_of_one_that_waits_or_has_ended_waits() -> None:
    s = scheduler()
    a = add(s, prompt(5))
    b, c = new([*prompt(5), 70]), new([*prompt(5), 71])
    s.fork(a, b)
    s.abort(a)
    s.fork(a, c)
    assert list(s.waiting) == [b, c]


def test_a_fork_is_checked_at_the_door() -> None:
    s = scheduler(num_blocks=2)
    a = add(s, prompt(5))
    step(s)
    with pytest.raises(RequestError, match="found 9 tokens, expected at most 8"):
        s.fork(a, new(prompt(9)))
    s.check()


# The second tier


def test_a_preempted_sequence_moves_out_and_comes_back_where_it_was() -> None:
    s, a, b = two_that_fill_the_cache(preemption="swap", num_swap_blocks=4, enable_prefix_caching=False)
    batch = schedule(s)
    assert work(batch) == [(a, 1, True)]
    assert batch.preempted == [
        Preempted(b, Preemption.SWAP, needed_by=b, num_computed_tokens=8, recompute_s=0.0, swap_s=0.0)
    ]
    assert transfers(batch) == [(TransferKind.SWAP_OUT, 2, 0, b), (TransferKind.SWAP_OUT, 3, 1, b)]
    assert (b.status, b.block_table, b.num_computed_tokens) == (SequenceStatus.SWAPPED, [], 8)
    commit(s, batch)
    s.abort(a)
    c = add(s, prompt(1, 60))
    batch = schedule(s)
    assert work(batch) == [(b, 1, True), (c, 1, True)]
    assert batch.admitted == [Admitted(b, SequenceStatus.SWAPPED, 0), Admitted(c, SequenceStatus.WAITING, 0)]
    assert transfers(batch) == [
        (TransferKind.SWAP_IN, 0, b.block_table[0], b),
        (TransferKind.SWAP_IN, 1, b.block_table[1], b),
    ]
    assert s.block_manager.num_free_swap_blocks == 4


def test_what_the_cache_kept_is_not_moved_back() -> None:
    s, a, b = two_that_fill_the_cache(preemption="swap", num_swap_blocks=4)
    step(s)
    s.abort(a)
    batch = schedule(s)
    assert work(batch) == [(b, 1, True)]
    assert batch.admitted == [Admitted(b, SequenceStatus.SWAPPED, 8)]
    assert transfers(batch) == []
    assert b.num_cached_tokens == 0


def test_what_was_copied_in_this_step_moves_out_after_it_was_copied() -> None:
    s = scheduler(num_blocks=4, policy="fair", preemption="swap", num_swap_blocks=4)
    a, b = new(prompt(5), tenant="a"), new(prompt(5), tenant="b")
    s.add(a, forks=[b])
    c = add(s, prompt(4, 20), tenant="c")
    step(s)
    batch = schedule(s)
    assert work(batch) == [(c, 1, True), (b, 1, True)]
    assert transfers(batch) == [
        (TransferKind.COPY, 1, 3, a),
        (TransferKind.SWAP_OUT, 0, 0, a),
        (TransferKind.SWAP_OUT, 3, 1, a),
    ]
    assert [x.block_table for x in (a, b, c)] == [[], [0, 1], [2, 3]]


def test_one_swapped_out_comes_back_before_any_that_is_new() -> None:
    s, a, b = two_that_fill_the_cache(preemption="swap", num_swap_blocks=4, policy="priority")
    step(s)
    urgent = add(s, prompt(1, 60), priority=-5)
    assert list(s.waiting) == [b, urgent]
    s.abort(a)
    assert step(s) == [(b, 1, True), (urgent, 1, True)]


def test_a_tier_that_has_no_room_means_computing_again() -> None:
    s, _, b = two_that_fill_the_cache(preemption="swap", num_swap_blocks=1)
    batch = schedule(s)
    assert batch.preempted == [
        Preempted(b, Preemption.RECOMPUTE, needed_by=b, num_computed_tokens=8, recompute_s=0.0, swap_s=0.0)
    ]
    assert (b.status, transfers(batch)) == (SequenceStatus.WAITING, [])


@pytest.mark.parametrize(
    ("recompute_token_s", "swap_block_s", "by"),
    [
        (0.0, 0.0, Preemption.RECOMPUTE),
        (1.0, 1.9, Preemption.SWAP),  # 8 tokens against 2 blocks out and in
        (1.0, 2.0, Preemption.RECOMPUTE),
        (1.0, 2.1, Preemption.RECOMPUTE),
    ],
)
def test_auto_does_what_was_measured_to_be_cheaper(
    recompute_token_s: float, swap_block_s: float, by: Preemption
) -> None:
    s, _, b = two_that_fill_the_cache(preemption="auto", num_swap_blocks=4)
    costs = PreemptionCosts(recompute_token_s, swap_block_s)
    recompute_s, swap_s = 8 * recompute_token_s, 4 * swap_block_s
    assert s.schedule(costs=costs).preempted == [Preempted(b, by, b, 8, recompute_s, swap_s)]


def test_a_swap_costs_what_the_blocks_cost_that_a_window_still_holds() -> None:
    s = scheduler(num_blocks=5, window=4, policy="priority", preemption="auto", num_swap_blocks=4)
    a, b = add(s, prompt(8)), add(s, prompt(8, 20), priority=5)
    step(s)
    c = add(s, prompt(4, 40))
    assert step(s) == [(a, 1, True), (b, 1, True), (c, 4, True)]
    # The first of the victim's three blocks has been given back: two go out and in.
    batch = s.schedule(costs=PreemptionCosts(recompute_token_s=1.0, swap_block_s=1.0))
    assert batch.preempted == [Preempted(b, Preemption.SWAP, c, 9, recompute_s=9.0, swap_s=4.0)]


def test_aborting_one_that_is_swapped_out_gives_back_its_blocks_there() -> None:
    s, _, b = two_that_fill_the_cache(preemption="swap", num_swap_blocks=2)
    step(s)
    assert s.block_manager.num_free_swap_blocks == 0
    s.abort(b)
    s.check()
    assert s.block_manager.num_free_swap_blocks == 2


@pytest.mark.parametrize("comes_back", [False, True])
def test_one_whose_transfer_failed_is_computed_again(comes_back: bool) -> None:
    s, a, b = two_that_fill_the_cache(preemption="swap", num_swap_blocks=4, enable_prefix_caching=False)
    batch = schedule(s)
    if comes_back:
        commit(s, batch)
        s.abort(a)
        batch = schedule(s)
        assert work(batch) == [(b, 1, True)]
    s.transfer_failed(batch.transfers[0], batch)
    s.check()
    assert (b.status, b.swap_table, b.num_computed_tokens) == (SequenceStatus.WAITING, [], 0)
    assert work(batch) == ([] if comes_back else [(a, 1, True)])
    assert s.block_manager.num_free_swap_blocks == 4
    commit(s, batch)
    s.abort(a)
    assert step(s) == [(b, 9, True)]


def test_one_that_was_aborted_is_not_computed_again() -> None:
    s, _, b = two_that_fill_the_cache(preemption="swap", num_swap_blocks=4)
    batch = schedule(s)
    s.abort(b)
    s.transfer_failed(batch.transfers[0], batch)
    s.check()
    assert b.status is SequenceStatus.FINISHED


def test_transfers_of_a_step_that_was_given_up_are_done_in_the_next_and_first() -> None:
    s, a, _ = two_that_fill_the_cache(preemption="swap", num_swap_blocks=4, enable_prefix_caching=False)
    assert len(schedule(s).transfers) == 2
    s.block_manager.transferred()
    s.abort(a)
    batch = schedule(s)
    assert [t[:2] for t in transfers(batch)] == [
        (TransferKind.SWAP_OUT, 3),
        (TransferKind.SWAP_IN, 0),
        (TransferKind.SWAP_IN, 1),
    ]


# A bounded number of preemptions


def test_one_that_made_way_often_enough_gets_all_its_blocks_at_once_and_keeps_them() -> None:
    s, a, b = two_that_fill_the_cache(max_preemptions=1, preemption="recompute")
    step(s)
    assert b.num_preemptions == 1
    s.abort(a)
    assert step(s) == [(b, 1, True)]
    assert len(b.block_table) == 5, "20 tokens are all that it may ever have"
    while s.has_unfinished:
        assert step(s) == [(b, 1, True)]
    assert (b.num_tokens, b.num_preemptions) == (20, 1)


def test_the_last_token_needs_no_slot_of_its_own() -> None:
    s, a, b = two_that_fill_the_cache(max_preemptions=1)
    b.max_len = 17
    step(s)
    s.abort(a)
    step(s)
    assert len(b.block_table) == 4


def test_one_that_may_not_make_way_again_is_passed_over_for_another() -> None:
    s = scheduler(num_blocks=7, max_preemptions=1, enable_prefix_caching=False)
    a, b = add(s, prompt(11)), add(s, prompt(11, 20), max_tokens=3)
    b.num_preemptions = 1
    step(s)
    step(s)
    batch = schedule(s)
    assert batch.preempted == [
        Preempted(a, Preemption.RECOMPUTE, needed_by=a, num_computed_tokens=12, recompute_s=0.0, swap_s=0.0)
    ]
    assert work(batch) == [(b, 1, True)]


def test_one_that_made_way_often_enough_comes_before_all_others() -> None:
    s = scheduler(num_blocks=5, max_preemptions=1, policy="priority", enable_prefix_caching=False)
    a, b = add(s, prompt(8)), add(s, prompt(8, 20))
    step(s)
    step(s)
    urgent = add(s, prompt(1, 60), priority=-5)
    assert list(s.waiting) == [b, urgent]
    assert step(s) == [(a, 1, True)], "nor does the urgent one pass while there is no room for b"


def test_one_that_may_not_make_way_shares_nothing_that_it_will_write_to() -> None:
    s, a, b = two_that_fill_the_cache(max_preemptions=1)
    step(s)
    s.abort(a)
    step(s)
    child = new([*list(b.token_ids)[:9], 70])
    s.fork(b, child)
    s.check()
    assert child.status is SequenceStatus.WAITING


def test_one_that_was_preempted_after_its_prompt_may_take_it_from_the_cache() -> None:
    s = scheduler(num_blocks=5)
    a = add(s, prompt(8))
    b = new(prompt(8, 20), reads_cache=False)
    s.add(b)
    step(s)
    step(s)
    s.abort(a)
    assert step(s) == [(b, 1, True)]


def test_one_in_the_middle_of_its_prompt_computes_all_of_it_again_if_it_may_not_read_the_cache() -> None:
    s = scheduler(num_blocks=4, max_num_batched_tokens=5)
    a = add(s, prompt(4))
    b = new(prompt(12, 20), reads_cache=False)
    s.add(b)
    assert step(s) == [(a, 4, True), (b, 1, False)]
    batch = schedule(s)
    assert ([x.sequence for x in batch.preempted], work(batch)) == ([b], [(a, 1, True)])
    commit(s, batch)
    s.abort(a)
    assert work(schedule(s)) == [(b, 5, False)]
    assert b.num_cached_tokens == 0


# Salts


def test_tenants_with_salts_of_their_own_share_no_block() -> None:
    s = scheduler()
    a = add(s, prompt(9), cache_salt="a")
    step(s)
    b, c = add(s, prompt(9), cache_salt="b"), add(s, prompt(9), cache_salt="a")
    assert step(s) == [(a, 1, True), (b, 9, True), (c, 1, True)]
    assert set(a.block_table).isdisjoint(b.block_table)
    assert a.block_table[:2] == c.block_table[:2]


def test_one_whose_transfer_failed_is_not_counted_as_new_when_it_comes_back() -> None:
    s = scheduler(num_blocks=8)
    a = add(s, prompt(6))
    step(s)
    batch = schedule(s)
    s.transfer_failed(Transfer(TransferKind.SWAP_IN, 0, a.block_table[0], a), batch)
    s.check()
    commit(s, batch)
    before = (s.block_manager.stats.queries, s.block_manager.stats.hits)
    assert step(s) == [(a, 3, True)]
    assert a.num_cached_tokens == 0
    assert (s.block_manager.stats.queries, s.block_manager.stats.hits) == before == (6, 0)


def test_nothing_is_shared_while_content_is_under_way() -> None:
    """If the transfer failed, the fork would compute on garbage."""
    s, _, b = two_that_fill_the_cache(preemption="swap", num_swap_blocks=8, enable_prefix_caching=False)
    step(s)
    s.abort(s.running[0])
    batch = schedule(s)
    assert batch.transfers
    assert s.running == [b]
    fork = Sequence(next(_ids), [*b.token_ids[:5], 70], SamplingParams())
    s.fork(b, fork)
    assert fork.status is SequenceStatus.WAITING


def test_when_the_second_tier_is_given_up_nobody_moves_out_any_more() -> None:
    s, a, b = two_that_fill_the_cache(preemption="swap", num_swap_blocks=8, enable_prefix_caching=False)
    batch = schedule(s)
    assert [(p.sequence, p.by) for p in batch.preempted] == [(b, Preemption.SWAP)]
    s.transfer_failed(batch.transfers[0], batch)
    commit(s, batch)
    s.abort(a)
    for first_token in (60, 80):
        add(s, prompt(4, first_token))
    while not (batch := schedule(s)).preempted:
        commit(s, batch)
    assert {p.by for p in batch.preempted} == {Preemption.RECOMPUTE}
    assert not batch.transfers


def test_after_an_operation_that_did_not_end_all_begin_anew_in_their_order() -> None:
    """Whatever queues, tables and states say: three run, of which one has a fork to come, and one waits."""
    s = scheduler(max_num_seqs=3)
    parent, fork = add_with_forks(s, prompt(5), 1)
    second, third = add(s, prompt(6, 50)), add(s, prompt(4, 70))
    late = add(s, prompt(3, 90))
    for _ in range(2):
        batch = s.schedule()
        s.commit(batch, [[7]] * len(batch.sampled))
    s.running.clear()  # as in the midst of something
    s.block_manager._reference_counts[0] += 1
    s.recover({late: 3, third: 4, second: 7, fork: 6, parent: 5})
    s.check()
    assert (s.block_manager.num_free_blocks, s.block_manager.num_cached_blocks, s.running) == (16, 0, [])
    assert [sequence.num_tokens for sequence in (parent, fork, second, third, late)] == [5, 6, 7, 4, 3]
    served = []
    while s.has_unfinished:
        batch = s.schedule()
        served += [admitted.sequence for admitted in batch.admitted]
        s.commit(batch, [[EOS]] * len(batch.sampled))
    assert served == [parent, fork, second, third, late]


def test_a_recovery_that_was_interrupted_is_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    s = scheduler()
    first, second = add(s, prompt(4)), add(s, prompt(5))
    s.schedule()
    restart = Sequence.restart

    def interrupted(sequence: Sequence, num_tokens: int) -> None:
        restart(sequence, num_tokens)
        if sequence is second:
            raise KeyboardInterrupt

    monkeypatch.setattr(Sequence, "restart", interrupted)
    with pytest.raises(KeyboardInterrupt):
        s.recover({first: 4, second: 5})
    monkeypatch.undo()
    s.recover({first: 4, second: 5})
    s.check()
    assert list(s.waiting) == [first, second]


# Several tokens at once


def test_several_tokens_at_once_are_computed_in_the_next_step() -> None:
    s = scheduler()
    a, b = add(s, prompt(3)), add(s, prompt(3, 20))
    batch = schedule(s)
    assert s.commit(batch, [[50, 51, 52, 53], [60]]) == []
    s.check()
    assert batch.num_output_tokens == 5
    assert (output_of(a), a.num_computed_tokens) == ([50, 51, 52, 53], 3)
    batch = schedule(s)
    assert work(batch) == [(b, 1, True), (a, 4, True)], "who has several comes behind those that have one"
    assert (a.num_slots, len(a.block_table)) == (8, 2)
    commit(s, batch)
    assert a.num_computed_tokens == 7


def test_tokens_behind_one_that_ends_a_sequence_are_dropped() -> None:
    s = scheduler()
    stopped, cut, goes_on = add(s, prompt(3)), add(s, prompt(3, 20), max_tokens=2), add(s, prompt(3, 40))
    batch = schedule(s)
    assert s.commit(batch, [[50, EOS, 51], [60, 61, 62], [70, 71]]) == [stopped, cut]
    assert (output_of(stopped), stopped.finish_reason) == ([50, EOS], FinishReason.STOP)
    assert (output_of(cut), cut.finish_reason) == ([60, 61], FinishReason.LENGTH)
    assert output_of(goes_on) == [70, 71]
    assert batch.num_output_tokens == 6


def test_a_stop_token_among_several_counts_from_min_tokens_on() -> None:
    s = scheduler()
    a = add(s, prompt(3), min_tokens=2)
    assert s.commit(schedule(s), [[EOS, EOS, EOS, 50]]) == [a]
    assert output_of(a) == [EOS, EOS, EOS]


def test_what_several_tokens_take_is_made_room_for_before_any_decode_is_scheduled() -> None:
    """The last to arrive makes way for two new blocks of the first, and is in no batch that it left."""
    s = scheduler(num_blocks=4, enable_prefix_caching=False, preemption="recompute")
    a, b = add(s, prompt(4)), add(s, prompt(7, 20))
    s.commit(schedule(s), [[50, 51, 52, 53, 54], [60]])
    batch = schedule(s)
    assert work(batch) == [(a, 5, True)]
    assert [(p.sequence, p.needed_by) for p in batch.preempted] == [(b, a)]
    assert len(a.block_table) == 3


def test_completions_of_one_prompt_may_begin_with_several_tokens_each() -> None:
    s = scheduler()
    a, b = add_with_forks(s, prompt(6), 1)
    s.commit(schedule(s), [[50, 51], [60, 61, 62]])
    s.check()
    assert (b.block_table, b.num_computed_tokens) == (a.block_table, 6), "they share what is computed"
    batch = schedule(s)
    assert work(batch) == [(a, 2, True), (b, 3, True)]
    assert [(t.kind, t.source, t.sequence) for t in batch.transfers] == [(TransferKind.COPY, 1, a)]


def test_several_tokens_of_one_that_was_aborted_are_passed_over() -> None:
    s = scheduler()
    a, b = add(s, prompt(3)), add(s, prompt(3, 20))
    batch = schedule(s)
    s.abort(a)
    s.commit(batch, [[50, 51], [60, 61]])
    assert (output_of(a), output_of(b), batch.num_output_tokens) == ([], [60, 61], 2)


def test_tokens_go_to_whom_they_were_sampled_for_also_beside_a_prompt_that_is_not_done() -> None:
    s = scheduler()
    a, b, c = add(s, prompt(3)), add(s, prompt(3, 20)), add(s, prompt(20, 40))
    batch = schedule(s)
    assert batch.samples == [True, True, False]
    s.abort(a)
    s.commit(batch, [[50], [60]])
    assert [output_of(x) for x in (a, b, c)] == [[], [60], []]
