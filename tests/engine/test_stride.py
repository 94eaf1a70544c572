"""A stride leaves behind what its steps do one by one: sequences, blocks, free list and prefix cache."""

from random import Random
from typing import Any

import pytest

from pagellm.engine.config import EngineConfig
from pagellm.engine.requests.sampling_params import SamplingParams
from pagellm.engine.scheduling.batch import ScheduledBatch
from pagellm.engine.scheduling.scheduler import Scheduler
from pagellm.engine.scheduling.sequence import Sequence
from pagellm.engine.scheduling.stride import advance, most_alike
from tests.properties import extensions

TOKEN = 9  # which every sequence gets in every step


def new_scheduler(**settings: Any) -> Scheduler:
    return Scheduler.with_blocks(EngineConfig(**{"block_size": 4, "num_blocks": 40} | settings).complete(200))


def new(number: int, prompt: list[int], max_tokens: int, **params: Any) -> Sequence:
    return Sequence(number, prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True, **params))


def step(scheduler: Scheduler, batch: ScheduledBatch) -> list[Sequence]:
    return scheduler.commit(batch, [(TOKEN,)] * batch.num_sampled)


def state(scheduler: Scheduler) -> dict[str, Any]:
    """All that later steps depend on."""
    manager = scheduler.block_manager
    sequences = sorted({*scheduler.running, *scheduler.waiting}, key=lambda s: s.seq_id)
    return {
        "running": [s.seq_id for s in scheduler.running],
        "sequences": [
            (
                (s.seq_id, s.status, s.token_ids, s.num_computed_tokens, s.num_preemptions),
                (s.block_table, s.swap_table, s.num_slots, s.num_registered_blocks, s.block_hashes),
            )
            for s in sequences
        ],
        "free": list(manager._free),
        "cached": [(b, manager._cache.tokens(b), manager._cache.before(b)) for b in manager._cache],
        "stats": (manager.stats, manager.num_changes, manager.num_releases),
        "transfers": list(manager.transfers),
    }


def shape(batch: ScheduledBatch) -> tuple[Any, ...]:
    return (
        [s.seq_id for s in batch.sequences],
        batch.num_new_tokens,
        batch.samples,
        [a.sequence.seq_id for a in batch.admitted],
        [p.sequence.seq_id for p in batch.preempted],
        {s.seq_id: index for s, index in batch.changed_tables.items()},
    )


def settings_of(chance: Random) -> dict[str, Any]:
    preemption = chance.choice(["recompute", "swap", "auto"])
    return {
        "block_size": chance.choice([1, 2, 4]),
        "num_blocks": chance.choice([30, 60, 120]),
        "max_num_seqs": chance.choice([2, 4, 9]),
        "max_num_batched_tokens": chance.choice([9, 40]),
        "enable_prefix_caching": chance.random() < 0.8,
        "window": chance.choice([None, None, 6]),
        "preemption": preemption,
        "num_swap_blocks": 20 if preemption == "swap" else None,
        "policy": chance.choice(["fcfs", "fcfs", "priority", "fair", "prefill_first"]),
        "eviction": extensions.named(chance.choice(["lru", "lru", "Recent", "Eviction"])),
    }


@pytest.mark.parametrize("seed", range(60))
def test_a_stride_is_its_steps(seed: int) -> None:
    chance = Random(seed)
    settings = settings_of(chance)
    one_by_one, at_once = new_scheduler(**settings), new_scheduler(**settings)
    num_strides = number = 0
    now = 0.0
    while now < 400:
        if chance.random() < 0.5:
            content, length = chance.randrange(3), chance.randint(1, 20)
            params = {"priority": number % 3, "tenant": "abc"[number % 3]}
            for scheduler in (one_by_one, at_once):
                scheduler.add(new(number, [content] * length, 1 + number * 7 % 50, **params), now)
            number += 1
        if not at_once.has_unfinished:
            now += 1
            continue
        batch, other = at_once.schedule(now), one_by_one.schedule(now)
        assert shape(batch) == shape(other)
        num_steps = min(most_alike(at_once, batch), chance.randint(1, 30))
        if num_steps < 1:
            assert list(map(repr, step(at_once, batch))) == list(map(repr, step(one_by_one, other)))
            now += 1
            continue
        num_strides += 1
        times = [now + index for index in range(num_steps + 1)]
        stride, following = advance(at_once, batch, TOKEN, times, [1.0] * num_steps)
        assert 1 <= len(stride.durations_s) == len(stride.times) - 1 <= num_steps
        changes = {change.step: change for change in stride.changes}
        for index in range(len(stride.durations_s)):
            if index:
                now += 1
                other = one_by_one.schedule(now)
                assert [*other.admitted, *other.preempted, *other.transfers] == []
                assert other.num_tokens == len(batch.sequences) == len(other.sequences)
                changed = [(s.seq_id, s.block_table[i:]) for s, i in other.changed_tables.items()]
                expected = changes[index].tables if index in changes else []
                assert changed == [(s.seq_id, blocks) for s, _, blocks in expected]
                if index in changes:
                    assert changes[index].num_free_blocks == one_by_one.block_manager.num_free_blocks
                    assert changes[index].num_cached_blocks == one_by_one.block_manager.num_cached_blocks
            finished = step(one_by_one, other)
            assert not finished or index == len(stride.durations_s) - 1
        now += 1
        assert [s.seq_id for s in finished] == [s.seq_id for s in stride.finished]
        if following is not None:
            other = one_by_one.schedule(now)
            assert shape(following) == shape(other)
            assert state(at_once) == state(one_by_one)
            assert at_once.stats == one_by_one.stats
            step(at_once, following)
            step(one_by_one, other)
            now += 1
        assert state(at_once) == state(one_by_one)
        at_once.check()
    assert num_strides > 0 or settings["policy"] == "fair"
