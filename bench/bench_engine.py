"""What Python does around the kernels: the scheduler with its block manager, and the tokenizer.

Run: python -m pytest bench/bench_engine.py --benchmark-columns=median,ops
"""

from pathlib import Path

import pytest

from engine.block_manager import BlockManager
from engine.config import EngineConfig
from engine.sampling_params import SamplingParams
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from engine.tokenizer import load_tokenizer

GPT2 = Path(__file__).parents[1] / "tests" / "fixtures" / "gpt2"


@pytest.mark.parametrize("num_seqs", [1, 16, 256])
def test_a_decode_step_of_the_scheduler(benchmark, num_seqs):
    config = EngineConfig(num_blocks=200_000, max_num_seqs=num_seqs, max_num_batched_tokens=8192)
    scheduler = Scheduler(config, BlockManager(200_000, config.block_size))
    for number in range(num_seqs):
        prompt = [number + 1] * 20
        scheduler.add(Sequence(number, prompt, SamplingParams(max_tokens=None, ignore_eos=True)))

    def step():
        batch = scheduler.schedule()
        scheduler.commit(batch, [7] * sum(batch.samples))

    step()
    benchmark(step)


def test_the_tokenizer_on_english(benchmark):
    tokenizer = load_tokenizer(GPT2)
    text = Path(__file__).parents[1].joinpath("README.md").read_text() * 40
    assert tokenizer.decode(tokenizer.encode(text)) == text
    benchmark(tokenizer.encode, text)
    benchmark.extra_info["MB_per_s"] = len(text) / 1e6 / benchmark.stats.stats.median
    print(f"\n{benchmark.extra_info['MB_per_s']:.1f} MB/s")
