"""Blocks behind all windows: which they are, and what a scheduler makes of them."""

from hypothesis import given
from hypothesis import strategies as st

from pagellm.engine.config import EngineConfig
from pagellm.engine.requests.sampling_params import SamplingParams
from pagellm.engine.scheduling.block_window import BlockWindow
from pagellm.engine.scheduling.scheduler import Scheduler
from pagellm.engine.scheduling.sequence import GIVEN_BACK, Sequence


@given(window=st.integers(1, 40), block_size=st.integers(1, 9), num_computed=st.integers(0, 200))
def test_a_block_is_given_back_once_no_token_to_come_sees_it(
    window: int, block_size: int, num_computed: int
) -> None:
    behind = BlockWindow(window, block_size).num_behind(num_computed)
    assert behind == 0 or behind * block_size <= num_computed - window + 1
    # Where blocks are given back, at the end of a full one, none but the last is kept that nobody sees.
    end = num_computed // block_size * block_size
    is_last = behind + 1 >= num_computed // block_size
    assert is_last or (behind + 1) * block_size > end - window + 1


@given(
    window=st.integers(1, 40),
    block_size=st.integers(1, 9),
    num_computed=st.integers(0, 200),
    chunk=st.integers(1, 30),
    rest=st.integers(0, 100),
)
def test_a_sequence_holds_no_more_blocks_than_it_is_said_to(
    window: int, block_size: int, num_computed: int, chunk: int, rest: int
) -> None:
    blocks, num_tokens = BlockWindow(window, block_size), num_computed + chunk + rest
    held = -(-(num_computed + chunk) // block_size) - blocks.num_behind(num_computed)
    assert held <= blocks.most_blocks(num_tokens, chunk) <= -(-num_tokens // block_size)


def test_without_a_window_nothing_is_given_back() -> None:
    blocks = BlockWindow(0, 16)
    assert not blocks
    assert blocks.num_behind(100_000) == 0
    assert blocks.most_blocks(100_000, 512) == 6250


def test_a_long_context_runs_in_few_blocks() -> None:
    config = EngineConfig(num_blocks=300, max_num_seqs=2, watermark=0.0).complete(
        context=131_072, window=4096
    )
    assert config.max_model_len == 131_072
    scheduler = Scheduler.with_blocks(config)
    sequence = Sequence(0, [7] * 131_000, SamplingParams(max_tokens=72, ignore_eos=True))
    scheduler.add(sequence)
    most, num_steps = 0, 0
    while scheduler.has_unfinished:
        batch = scheduler.schedule()
        most = max(most, scheduler.block_manager.usage().used)
        scheduler.commit(batch, [[7]] * len(batch.sampled))
        num_steps += 1
        assert num_steps <= 256 + 71
        if num_steps < 20 or num_steps % 64 == 0:  # the first blocks are used again soon
            scheduler.check()
            table = sequence.block_table
            behind = max(0, sequence.num_computed_tokens // 16 - 256)  # 4,095 tokens are seen
            assert table[:behind] == [GIVEN_BACK] * behind
            assert min(table[behind:]) >= 0
    assert (sequence.num_tokens, num_steps) == (131_072, 256 + 71)
    assert most <= 256 + 1 + 32
