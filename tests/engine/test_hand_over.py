"""A sequence that goes on with another scheduler: what was computed counts there, its blocks stay here."""

from hypothesis import given, settings
from hypothesis import strategies as st

from pagellm.engine import EngineConfig, SamplingParams
from pagellm.engine.requests.outputs import FinishReason
from pagellm.engine.scheduling.block_manager import BlockManager
from pagellm.engine.scheduling.scheduler import Scheduler
from pagellm.engine.scheduling.sequence import Sequence, SequenceStatus
from pagellm.engine.scheduling.step_loop import StepListener, StepLoop

CONFIG = EngineConfig(block_size=4, num_blocks=12, max_num_seqs=4, max_num_batched_tokens=16, watermark=0.0)


def scheduler(num_blocks: int = 12, window: int = 0) -> Scheduler:
    config = EngineConfig(**vars(CONFIG) | {"num_blocks": num_blocks, "window": window})
    complete = config.complete(context=100)
    return Scheduler(complete, BlockManager(num_blocks, 4, window=window))


def step(one: Scheduler) -> list[tuple[int, int, int]]:
    """Computes one step: (sequence, tokens before, tokens)."""
    batch = one.schedule()
    done = [
        (sequence.seq_id, sequence.num_computed_tokens, count)
        for sequence, count in zip(batch.sequences, batch.num_new_tokens, strict=True)
    ]
    one.commit(batch, [[7]] * len(batch.sampled))
    one.block_manager.check()
    return done


def test_what_was_computed_here_counts_there_and_blocks_stay_taken_until_they_are_freed() -> None:
    here, there = scheduler(), scheduler()
    sequence = Sequence(0, range(6), SamplingParams(max_tokens=3))
    here.add(sequence)
    assert step(here) == [(0, 0, 6)]
    keeper = here.hand_over(sequence)
    here.block_manager.check()
    assert (sequence.status, sequence.num_computed_tokens) == (SequenceStatus.WAITING, 6)
    assert (here.has_unfinished, here.block_manager.num_free_blocks) == (False, 10)

    there.add(sequence)
    assert sequence.max_len == 9
    assert step(there) == [(0, 6, 1)]
    assert step(there) == [(0, 7, 1)]
    assert (sequence.finish_reason, sequence.num_output_tokens) == (FinishReason.LENGTH, 3)
    there.check()
    assert there.block_manager.num_free_blocks == 12

    here.block_manager.free(keeper)
    here.check()
    assert here.block_manager.num_free_blocks == 12


def test_both_sides_know_the_prefix_afterwards() -> None:
    here, there = scheduler(), scheduler()
    first, second = (Sequence(number, range(9), SamplingParams(max_tokens=2)) for number in range(2))
    here.add(first)
    step(here)
    here.block_manager.free(here.hand_over(first))
    there.add(first)
    step(there)
    for one in (here, there):
        assert one.block_manager.num_cached_tokens(second) == 8


def test_what_the_other_side_has_in_its_cache_is_shared_there() -> None:
    here, there = scheduler(), scheduler()
    known = Sequence(1, range(9), SamplingParams(max_tokens=4))
    there.add(known)
    step(there)
    sequence = Sequence(0, range(9), SamplingParams(max_tokens=4))
    here.add(sequence)
    step(here)
    here.hand_over(sequence)
    there.add(sequence)
    assert step(there) == [(1, 9, 1), (0, 9, 1)]
    assert sequence.block_table[:2] == known.block_table[:2]
    there.check()


def test_with_a_window_only_what_is_seen_is_given_blocks() -> None:
    here, there = scheduler(30, window=8), scheduler(30, window=8)
    sequence = Sequence(0, range(40), SamplingParams(max_tokens=3))
    here.add(sequence)
    while sequence.num_output_tokens == 0:
        step(here)
    keeper = here.hand_over(sequence)
    there.add(sequence)
    assert step(there) == [(0, 40, 1)]
    assert 30 - there.block_manager.num_free_blocks < 8
    here.block_manager.free(keeper)
    for one in (here, there):
        one.check()


def test_a_loop_says_who_left_and_why() -> None:
    told = []

    class Listener(StepListener):
        def left(self, sequence: Sequence, why: str) -> None:
            told.append((sequence.seq_id, why))

    loop = StepLoop(scheduler(), [Listener()])
    sequences = [Sequence(number, range(3), SamplingParams(max_tokens=9)) for number in range(3)]
    for sequence in sequences:
        loop.add(sequence, 0.0)
    batch = loop.begin(0.0)
    loop.end(batch, [[7]] * 3, 1.0)
    loop.hand_over(sequences[0])
    loop.begin(1.0)  # in the middle of which all is lost
    loop.lose(sequences[1:])
    assert told == [(0, "handed over"), (1, "lost"), (2, "lost")]
    assert not loop.scheduler.has_unfinished
    assert loop.scheduler.block_manager.num_free_blocks == 12
    for sequence in sequences[1:]:
        assert (sequence.num_tokens, sequence.num_computed_tokens) == (4, 0)
        loop.add(sequence, 2.0)
    batch = loop.begin(2.0)
    assert batch.num_new_tokens == [4, 4]
    loop.end(batch, [[7]] * 2, 3.0)
    loop.scheduler.check()


@settings(max_examples=200, deadline=None)
@given(
    asked=st.lists(st.tuples(st.integers(1, 20), st.integers(2, 8)), min_size=1, max_size=8),
    moves=st.lists(st.tuples(st.integers(0, 7), st.booleans()), max_size=40),
    window=st.sampled_from([0, 8]),
)
def test_whatever_is_handed_over_when_every_sequence_gets_all_its_tokens(
    asked: list[tuple[int, int]], moves: list[tuple[int, bool]], window: int
) -> None:
    """Between two schedulers, back and forth, at any step, while blocks run short on both sides."""
    sides = scheduler(8, window), scheduler(8, window)
    sequences = [
        Sequence(number, range(length), SamplingParams(max_tokens=most))
        for number, (length, most) in enumerate(asked)
    ]
    for sequence in sequences:
        sides[0].add(sequence)
    kept: list[tuple[Scheduler, Sequence]] = []
    turns = iter(moves)
    while any(side.has_unfinished for side in sides):
        for side, other in (sides, sides[::-1]):
            if side.has_unfinished and not step(side):  # all blocks are kept for those that left
                for owner, keeper in kept:
                    owner.block_manager.free(keeper)
                kept.clear()
            number, is_freed = next(turns, (0, True))
            moving = [one for one in side.running if one.num_output_tokens and one.seq_id % 8 == number]
            there = {keeper.seq_id for owner, keeper in kept if owner is other}
            for sequence in [one for one in moving if one.seq_id not in there][:1]:
                keeper = side.hand_over(sequence)
                other.add(sequence)
                kept.append((side, keeper))
            if is_freed:
                for owner, keeper in kept:
                    owner.block_manager.free(keeper)
                kept.clear()
            side.block_manager.check()
    for owner, keeper in kept:
        owner.block_manager.free(keeper)
    for side in sides:
        side.check()
        assert side.block_manager.num_free_blocks == 8
    for sequence, (length, most) in zip(sequences, asked, strict=True):
        assert sequence.num_output_tokens == min(most, sequence.max_len - length)
        assert list(sequence.token_ids[:length]) == list(range(length))
