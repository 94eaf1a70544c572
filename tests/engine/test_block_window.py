"""Blocks behind all windows: which they are, and what a scheduler makes of them."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagellm.engine import LLM
from pagellm.engine.config import EngineConfig
from pagellm.engine.errors import ConfigError
from pagellm.engine.execution.memory import Memory
from pagellm.engine.loading import size_cache
from pagellm.engine.requests.sampling_params import SamplingParams
from pagellm.engine.scheduling.block_window import BlockWindow
from pagellm.engine.scheduling.scheduler import Scheduler
from pagellm.engine.scheduling.sequence import GIVEN_BACK, Sequence
from tests.conftest import MODELS


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
        if num_steps % 64 == 0:
            scheduler.check()
            table = sequence.block_table
            behind = sequence.num_computed_tokens // 16 - 256  # 4,095 tokens behind the next one
            assert table[:behind] == [GIVEN_BACK] * behind
            assert min(table[behind:]) >= 0
    assert (sequence.num_tokens, num_steps) == (131_072, 256 + 71)
    assert most <= 256 + 1 + 32


def test_a_context_that_never_fits_is_refused() -> None:
    memory = Memory(10**9, 10**9, "here")
    few = EngineConfig(num_blocks=100, max_model_len=131_072)
    assert size_cache(few, 131_072, 1, memory, window=512).max_model_len == 131_072
    with pytest.raises(ConfigError, match="max_model_len: found 131072, expected at most 1600"):
        size_cache(few, 131_072, 1, memory, window=4096)
    assert size_cache(EngineConfig(num_blocks=100), 131_072, 1, memory, window=4096).max_model_len == 1600


def test_the_cache_is_no_larger_than_the_windows_of_all_sequences() -> None:
    memory = Memory(10**12, 10**12, "here")
    config = EngineConfig(max_num_seqs=4, block_size=16, max_num_batched_tokens=512)
    assert size_cache(config, 131_072, 1, memory, window=1024).num_blocks == 4 * (64 + 1 + 32)


def test_an_engine_takes_no_window_but_its_model_s() -> None:
    memory = Memory(10**9, 10**9, "here")
    with pytest.raises(ConfigError, match="window: found 100, expected 4096, that of this model"):
        size_cache(EngineConfig(window=100), 8192, 1, memory, window=4096)
    with pytest.raises(ConfigError, match="window: found 100, expected 0, that of this model"):
        size_cache(EngineConfig(window=100), 8192, 1, memory)
    assert size_cache(EngineConfig(window=4096), 8192, 1, memory, window=4096).window == 4096


@pytest.mark.parametrize("window", [1, 5, 9])
def test_an_engine_computes_the_same_bits_in_blocks_that_it_uses_again(window: int, tmp_path: Path) -> None:
    for path in (MODELS / "mistral").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"sliding_window": window}))
    ids = np.random.default_rng(3).integers(0, config["vocab_size"], 60).tolist()
    whole = LLM(str(tmp_path), num_threads=2, show_progress=False)
    assert whole.engine.config.window == window
    expected = whole.logits(ids)
    whole.close()
    few = LLM(
        str(tmp_path), block_size=2, num_blocks=8, max_num_batched_tokens=4, max_model_len=60, num_threads=2,
        watermark=0.0, show_progress=False,
    )  # fmt: skip
    logits = few.logits(ids)
    few.engine.scheduler.check()
    few.close()
    np.testing.assert_array_equal(logits, expected)
