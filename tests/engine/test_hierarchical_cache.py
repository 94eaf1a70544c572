"""The prefix cache in two tiers: what is evicted from the first is found in the second, and comes back."""

from array import array

import pytest

from pagellm.engine.config import EngineConfig
from pagellm.engine.errors import ConfigError
from pagellm.engine.requests.sampling_params import SamplingParams
from pagellm.engine.scheduling.batch import PreemptionCosts
from pagellm.engine.scheduling.block_manager import (
    BlockManager,
    PrefixCacheStats,
    TransferKind,
    chained_hash,
)
from pagellm.engine.scheduling.scheduler import Scheduler
from pagellm.engine.scheduling.sequence import Sequence, SequenceStatus
from tests.engine.test_block_manager import Heard, admit, compute, sequence, serve

OFFLOAD, LOAD, SWAP_OUT = TransferKind.OFFLOAD, TransferKind.LOAD, TransferKind.SWAP_OUT


def tiers(num_blocks: int = 3, num_swap_blocks: int = 3, **settings: int) -> BlockManager:
    return BlockManager(num_blocks, 2, num_swap_blocks=num_swap_blocks, offloads=True, **settings)


def moves(manager: BlockManager) -> list[tuple[TransferKind, int, int]]:
    """What is to be moved, which is done then."""
    found = [transfer[:3] for transfer in manager.transfers]
    manager.transfers.clear()
    manager.check()
    return found


def flush(manager: BlockManager) -> list[tuple[TransferKind, int, int]]:
    """Lets one sequence have all blocks and go."""
    manager.free(admit(manager, *[9] * 2 * manager.num_blocks))
    return moves(manager)


def test_evicted_blocks_go_to_the_second_tier_and_come_back_when_they_are_hit() -> None:
    manager = tiers()
    manager.free(serve(manager, 1, 2, 3, 4, 5))
    assert flush(manager) == [(OFFLOAD, 1, 0), (OFFLOAD, 0, 1)], "the end of a chain goes first"
    assert (manager.num_cached_blocks, manager.num_offloaded_blocks) == (0, 2)
    assert manager.num_free_swap_blocks == 3, "no swapped sequence holds one"
    again = admit(manager, 1, 2, 3, 4, 6)
    first, second, _ = again.block_table
    assert moves(manager) == [(LOAD, 1, first), (LOAD, 0, second)]
    assert again.num_computed_tokens == 4
    assert manager.stats == PrefixCacheStats(queries=16, hits=4, evictions=0, host_hits=4, offloads=4)
    assert (manager.num_cached_blocks, manager.num_offloaded_blocks) == (2, 0)
    assert manager.usage().swap_used == 0


def test_a_prefix_goes_on_in_the_second_tier() -> None:
    manager = tiers(num_blocks=4)
    manager.free(serve(manager, 1, 2, 3, 4, 5, 6))
    held = admit(manager, 1, 2)  # takes the empty block: with no token to spare it hits nothing
    manager.free(held)
    manager.free(admit(manager, *[9] * 4))
    assert moves(manager) == [(OFFLOAD, 2, 0)]
    again = sequence(1, 2, 3, 4, 5, 6, 7)
    prefix = manager.cached_prefix(again)
    assert prefix == [0, 1, 4 + 0], "block 0 of the second tier is number 4"
    assert manager.num_offloaded_tokens(prefix) == 2
    assert manager.num_cached_tokens(again) == 6
    manager.allocate(again, prefix, 7)
    assert again.block_table[:2] == [0, 1]
    assert moves(manager) == [(LOAD, 0, again.block_table[2])]


def test_a_hit_in_the_second_tier_needs_a_free_block_as_a_miss_does() -> None:
    manager = tiers()
    manager.free(serve(manager, 1, 2, 3, 4))
    flush(manager)
    admit(manager, 7, 8)
    wanted = sequence(1, 2, 3, 4, 5)
    assert len(manager.cached_prefix(wanted)) == 2
    assert not manager.can_allocate(5, manager.cached_prefix(wanted))
    assert manager.can_allocate(4, manager.cached_prefix(wanted))


def test_of_cached_blocks_in_the_second_tier_the_least_recently_used_make_room() -> None:
    manager = tiers(num_blocks=2, num_swap_blocks=2)
    for token in (1, 2, 3):
        manager.free(serve(manager, token, token))
        flush(manager)
    found = [len(manager.cached_prefix(sequence(token, token, 0))) for token in (1, 2, 3)]
    assert found == [0, 1, 1]
    assert (manager.stats.evictions, manager.stats.offloads) == (2, 6)


def test_swapped_sequences_go_before_cached_blocks() -> None:
    manager = tiers(num_blocks=4, num_swap_blocks=2)
    manager.free(serve(manager, 1, 2, 3, 4))
    flush(manager)
    assert manager.num_offloaded_blocks == 2
    running = compute(manager, admit(manager, 5, 6, 7), 3)
    assert manager.can_swap_out(running)
    manager.swap_out(running)
    assert [kind for kind, *_ in moves(manager)] == [SWAP_OUT, SWAP_OUT]
    assert (manager.num_offloaded_blocks, manager.num_free_swap_blocks) == (0, 0)
    assert manager.cached_prefix(sequence(1, 2, 3)) == []
    manager.free(admit(manager, *[8] * 8))
    assert manager.num_offloaded_blocks == 0, "where swapped sequences hold all, evicted blocks are forgotten"
    manager.check()


def test_what_is_computed_again_is_no_longer_in_the_second_tier() -> None:
    manager = tiers()
    manager.free(serve(manager, 1, 2, 3))
    flush(manager)
    reader = sequence(1, 2, 3, reads_cache=False)
    manager.allocate(reader, [], 3)
    moves(manager)
    compute(manager, reader)
    assert manager.num_offloaded_blocks == 0
    assert manager.cached_prefix(sequence(1, 2, 3)) == reader.block_table[:1]


def test_a_reset_and_a_recovery_forget_both_tiers() -> None:
    for forget in (BlockManager.reset_cache, BlockManager.recover):
        manager = tiers()
        manager.free(serve(manager, 1, 2, 3))
        flush(manager)
        forget(manager)
        manager.check()
        assert (manager.num_offloaded_blocks, manager.cached_prefix(sequence(1, 2, 3))) == (0, [])
        manager.free(serve(manager, 1, 2, 3))
        flush(manager)
        assert manager.num_offloaded_blocks == 1, "it goes on"


def test_an_observer_is_told_in_which_tier_a_block_is() -> None:
    manager, heard = tiers(), Heard()
    manager.observe_cache(heard)
    manager.free(serve(manager, 1, 2, 3))
    flush(manager)
    block = chained_hash(array("i", [1, 2]).tobytes(), 0)
    stored = ("stored", block, None, [1, 2], "")
    out = [(*stored, "of tier 1"), ("removed", block)]
    assert heard.events == [stored, *out]
    admit(manager, 1, 2, 3)
    assert heard.events[3:] == [stored, ("removed", block, "of tier 1")]
    manager.recover()
    assert heard.events[5:] == [("cleared",)]
    manager.free(serve(manager, 1, 2, 3))
    flush(manager)
    manager.reset_cache()
    assert heard.events[6:] == [stored, *out, ("removed", block, "of tier 1"), ("cleared",)]


def test_behind_a_window_what_lies_in_the_second_tier_is_used_and_not_moved() -> None:
    manager = BlockManager(4, 2, num_swap_blocks=4, window=3, offloads=True)
    manager.free(serve(manager, 1, 2, 3, 4, 5, 6, 7))
    flush(manager)
    assert manager.num_offloaded_blocks == 3
    again = admit(manager, 1, 2, 3, 4, 5, 6, 8)
    assert [kind for kind, *_ in moves(manager)] == [LOAD]
    assert again.block_table[:2] == [-1, -1]
    assert (manager.num_cached_blocks, manager.num_offloaded_blocks) == (1, 2)


# A medium that fails


def scheduler_with_an_offloaded_prefix() -> Scheduler:
    config = EngineConfig(block_size=2, num_blocks=4, num_swap_blocks=4, enable_hierarchical_cache=True)
    scheduler = Scheduler.with_blocks(config.complete())
    for seq_id, tokens in enumerate(([1, 2, 3, 4, 5], [9] * 7)):
        scheduler.add(Sequence(seq_id, tokens, SamplingParams(max_tokens=1)))
        scheduler.commit(scheduler.schedule(), [[0]])
        scheduler.check()
    assert scheduler.block_manager.num_offloaded_blocks > 0
    return scheduler


def test_sequences_that_share_what_cannot_be_loaded_are_all_computed_again() -> None:
    scheduler = scheduler_with_an_offloaded_prefix()
    manager = scheduler.block_manager
    alike = [Sequence(10 + i, [1, 2, 3, i], SamplingParams(max_tokens=1)) for i in range(2)]
    for one in alike:
        scheduler.add(one)
    batch = scheduler.schedule()
    assert [one.num_cached_tokens for one in alike] == [2, 2]
    assert [one.num_host_tokens for one in alike] == [2, 0], "the second finds it in the first tier"
    [load] = [transfer for transfer in manager.transfers if transfer.kind is LOAD]
    while manager.transfers[0] is not load:
        manager.transferred()
    scheduler.transfer_failed(load, batch)
    manager.transferred()
    scheduler.check()
    assert not manager.offloads
    assert not manager.transfers
    assert batch.sequences == []
    assert {one.status for one in alike} == {SequenceStatus.WAITING}
    scheduler.commit(batch, [])
    again = scheduler.schedule()
    assert again.sequences == alike
    assert again.num_new_tokens == [4, 4], "nothing of it is found"


def test_what_could_not_be_written_is_never_read() -> None:
    scheduler = scheduler_with_an_offloaded_prefix()
    manager = scheduler.block_manager
    scheduler.add(Sequence(10, [7] * 8, SamplingParams(max_tokens=1)))
    scheduler.add(Sequence(11, [9] * 3, SamplingParams(max_tokens=1)))
    batch = scheduler.schedule()
    out = next(transfer for transfer in manager.transfers if transfer.kind is OFFLOAD)
    scheduler.transfer_failed(out, batch)
    manager.transferred()
    scheduler.check()
    assert manager.num_offloaded_blocks == 0
    assert not [t for t in manager.transfers if t.kind in (OFFLOAD, LOAD)]


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"enable_prefix_caching": False},
            "enable_hierarchical_cache: found True without enable_prefix_caching, expected both",
        ),
        (
            {"num_swap_blocks": 0},
            "num_swap_blocks: found 0 with enable_hierarchical_cache, expected at least 1",
        ),
        ({"enable_hierarchical_cache": "yes"}, "enable_hierarchical_cache: found 'yes'"),
    ],
)
def test_settings_that_contradict_themselves_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**{"enable_hierarchical_cache": True} | settings)  # type: ignore[arg-type]


def test_the_second_tier_is_as_large_as_the_first_where_nobody_says() -> None:
    config = EngineConfig(num_blocks=7, enable_hierarchical_cache=True, preemption="recompute")
    assert config.complete().num_swap_blocks == 7
    costs = PreemptionCosts(recompute_token_s=1.0)  # to swap would be cheaper, but it is not asked for
    scheduler = Scheduler.with_blocks(config.complete())
    scheduler.schedule(costs=costs)
    assert scheduler.preemption == "recompute"
