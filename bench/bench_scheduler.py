"""What scheduling costs: steps of steady decoding, admissions that hit the prefix cache, memory a block.

Each figure stands beside that of `bench/baseline_scheduler.py`, measured in the same run, taking turns.

Run: python bench/bench_scheduler.py [--json].
"""

import argparse
import gc
import json
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.baseline_scheduler import BaselineBlockManager, BaselineScheduler, BaselineSequence
from pagellm.engine.config import EngineConfig
from pagellm.engine.requests.sampling_params import SamplingParams
from pagellm.engine.scheduling.block_manager import BlockManager
from pagellm.engine.scheduling.scheduler import Scheduler
from pagellm.engine.scheduling.sequence import Sequence

BLOCK_SIZE = 16
NUM_SEQS = 256
ENDLESS = SamplingParams(max_tokens=None, ignore_eos=True)


def main() -> None:
    """Prints the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = [*decode_rows(), *admission_rows(), *memory_rows()]
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    print(f"{'':<58}{'ours':>10}{'baseline':>12}{'baseline/ours':>15}")
    for row in rows:
        ratio = row["baseline"] / row["ours"]
        print(f"{row['what']:<58}{row['ours']:>10.2f}{row['baseline']:>12.2f}{ratio:>15.1f}")


def decode_rows() -> list[dict]:
    """A step of 256 sequences that decode, block boundaries included: microseconds for each sequence."""
    rows = []
    for num_blocks, num_waiting in ((20_000, 0), (1_000_000, 0), (20_000, 100_000), (1_000_000, 100_000)):
        steps = [our_decode(num_blocks, num_waiting), baseline_decode(num_blocks, num_waiting)]
        ours, baseline = (1e6 * seconds / NUM_SEQS for seconds in take_turns(steps, rounds=320))
        what = f"decode, {num_blocks:,} blocks, {num_waiting:,} waiting: us a sequence"
        rows.append({"what": what, "ours": ours, "baseline": baseline})
    return rows


def our_decode(num_blocks: int, num_waiting: int) -> Callable[[], None]:
    """A scheduler in steady decoding; calling it takes a step."""
    config = EngineConfig(
        num_blocks=num_blocks, block_size=BLOCK_SIZE, max_num_seqs=NUM_SEQS, max_num_batched_tokens=16384
    ).complete()
    scheduler = Scheduler(config, BlockManager(num_blocks, BLOCK_SIZE))
    for number in range(NUM_SEQS + num_waiting):
        scheduler.add(Sequence(number, prompt(number), ENDLESS))

    def step() -> None:
        batch = scheduler.schedule()
        scheduler.commit(batch, [[7]] * len(batch.sequences))

    step()
    return step


def baseline_decode(num_blocks: int, num_waiting: int) -> Callable[[], None]:
    """The same of the baseline."""
    scheduler = BaselineScheduler(num_blocks, BLOCK_SIZE, NUM_SEQS, 16384)
    for number in range(NUM_SEQS + num_waiting):
        scheduler.add(BaselineSequence(prompt(number), 10**9, BLOCK_SIZE))

    def step() -> None:
        sequences, _ = scheduler.schedule()
        scheduler.commit(sequences, [7] * len(sequences))

    step()
    return step


def prompt(number: int) -> list[int]:
    """Twenty tokens and up to a block more, so that boundaries spread over the steps."""
    return [number] * (20 + number % BLOCK_SIZE)


def admission_rows() -> list[dict]:
    """A prompt of 1,000 tokens whose blocks but the last are cached and free, in and out: microseconds."""
    rows = []
    tokens = list(range(1000))
    for num_blocks in (20_000, 1_000_000):
        manager = BlockManager(num_blocks, BLOCK_SIZE)
        baseline = BaselineBlockManager(num_blocks, BLOCK_SIZE)

        def ours(manager: BlockManager = manager) -> None:
            sequence = Sequence(0, tokens, ENDLESS)
            manager.allocate(sequence, manager.cached_prefix(sequence), len(tokens))
            sequence.num_computed_tokens = len(tokens)
            manager.register(sequence)
            manager.free(sequence)

        def theirs(manager: BaselineBlockManager = baseline) -> None:
            sequence = BaselineSequence(tokens, 1, BLOCK_SIZE)
            manager.allocate(sequence)
            manager.deallocate(sequence)

        ours_s, theirs_s = take_turns([ours, theirs], rounds=20)
        what = f"admission of 1,000 cached tokens, {num_blocks:,} blocks: us"
        rows.append({"what": what, "ours": 1e6 * ours_s, "baseline": 1e6 * theirs_s})
    return rows


def memory_rows() -> list[dict]:
    """Bytes for each of 1,000,000 blocks when all hold a known prefix."""

    def ours() -> BlockManager:
        manager = BlockManager(num_blocks, BLOCK_SIZE)
        for first in range(num_blocks // 1000):
            sequence = Sequence(first, [first] * (1000 * BLOCK_SIZE), ENDLESS)
            manager.allocate(sequence, [], 1000 * BLOCK_SIZE)
            sequence.num_computed_tokens = 1000 * BLOCK_SIZE
            manager.register(sequence)
            manager.free(sequence)
        assert manager.num_free_blocks == num_blocks
        return manager

    def theirs() -> BaselineBlockManager:
        manager = BaselineBlockManager(num_blocks, BLOCK_SIZE)
        for first in range(num_blocks // 1000):
            sequence = BaselineSequence([first] * (1000 * BLOCK_SIZE), 1, BLOCK_SIZE)
            manager.allocate(sequence)
            manager.deallocate(sequence)
        return manager

    num_blocks = 1_000_000
    what = f"memory with {num_blocks:,} blocks, all known: bytes a block"
    figures = {name: held_bytes(make) / num_blocks for name, make in (("ours", ours), ("baseline", theirs))}
    return [{"what": what, **figures}]


def held_bytes(make: Callable[[], object]) -> int:
    """Bytes that what `make` returns holds."""
    gc.collect()
    tracemalloc.start()
    kept = make()
    gc.collect()
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    del kept
    return size


def take_turns(steps: list[Callable[[], None]], rounds: int) -> list[float]:
    """Median seconds of each step, one after the other in every round."""
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(rounds):
        for step, seconds in zip(steps, times, strict=True):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
    return [median(seconds) for seconds in times]


if __name__ == "__main__":
    main()
