"""From a model's name to the parts of an engine, and an engine from parts alone."""

from dataclasses import asdict, replace

import pytest

from pagellm.engine import ConfigError, EngineConfig, LLMEngine, SamplingParams
from pagellm.engine.config import CompleteConfig, usable_cores
from pagellm.engine.execution.model_runner import RunnerOutput, Wishes
from pagellm.engine.loading import EngineParts, load_engine
from pagellm.engine.scheduling.batch import ScheduledBatch
from pagellm.engine.scheduling.block_manager import BlockManager
from pagellm.engine.scheduling.scheduler import Scheduler
from tests.conftest import model_path

TINY = str(model_path("llama_tiny"))


def test_complete_settings_leave_nothing_open() -> None:
    config = EngineConfig(block_size=4, max_num_batched_tokens=64).complete(num_blocks=10, context=100)
    assert isinstance(config, CompleteConfig)
    assert (config.num_blocks, config.max_model_len, config.max_prefill_chunk) == (10, 40, 64)
    assert (config.num_swap_blocks, config.num_threads, config.capacity_tokens) == (0, usable_cores(), 40)
    assert config.complete() == config


def test_what_was_asked_for_stays_as_it_was() -> None:
    asked = EngineConfig(
        num_blocks=8,
        max_model_len=30,
        max_prefill_chunk=5,
        window=7,
        preemption="swap",
        num_swap_blocks=3,
        num_threads=2,
        policy="fair",
        watermark=0.5,
    )
    assert asdict(asked.complete(num_blocks=99, context=1000)) == asdict(asked)


def test_the_second_tier_is_as_large_as_the_cache_where_there_is_one() -> None:
    assert EngineConfig(preemption="swap").complete(num_blocks=7).num_swap_blocks == 7
    assert EngineConfig(swap_dir="somewhere").complete(num_blocks=7).num_swap_blocks == 7
    assert EngineConfig(preemption="recompute").complete(num_blocks=7).num_swap_blocks == 0


def test_settings_are_not_completed_without_a_number_of_blocks() -> None:
    with pytest.raises(ConfigError, match="num_blocks: found nothing, expected a number"):
        EngineConfig().complete()


class Counting:
    """Runs no model: every token that is sampled is the number of the step."""

    def __init__(self) -> None:
        self.num_steps = 0

    def run(self, batch: ScheduledBatch, wishes: dict[int, Wishes]) -> RunnerOutput:
        self.num_steps += 1
        return RunnerOutput(token_ids=[[self.num_steps]] * len(batch.sampled))

    def close(self) -> None:
        pass


def test_an_engine_is_built_from_its_parts() -> None:
    parts = load_engine(TINY, EngineConfig(num_blocks=8, block_size=4))
    parts.runner.close()
    config = replace(parts.config, num_blocks=4, max_model_len=16)
    built = EngineParts(
        config=config,
        spec=parts.spec,
        tokenizer=parts.tokenizer,
        scheduler=Scheduler(config, BlockManager(4, 4)),
        runner=Counting(),  # type: ignore[arg-type]
        block_bytes=parts.block_bytes,
    )
    engine = LLMEngine(built)
    output = engine.add_request("0", [7, 7], SamplingParams(max_tokens=3, ignore_eos=True))
    while engine.has_unfinished:
        engine.step()
    assert output.token_ids == [1, 2, 3]
    assert engine.block_manager.num_blocks == 4
    engine.close()


def test_parts_bring_their_settings() -> None:
    parts = load_engine(TINY, EngineConfig(num_blocks=8))
    with pytest.raises(TypeError, match="config"):
        LLMEngine(parts, EngineConfig())
    LLMEngine(parts).close()
