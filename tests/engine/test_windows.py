"""Models all of whose layers have a window: what their cache is sized by, and that no bit depends on it."""

import json
from pathlib import Path

import numpy as np
import pytest

from pagellm.engine import LLM, ConfigError, EngineConfig
from pagellm.engine.execution.memory import Memory
from pagellm.engine.loading import size_cache
from tests.conftest import MODELS


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
