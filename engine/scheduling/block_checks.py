"""What must hold of blocks at every moment: they are conserved, and the prefix cache never lies (laws 4, 5).

Reads the block manager's own state, because it is what that state must be.
"""

from itertools import islice
from typing import TYPE_CHECKING

from pagellm.engine.scheduling.prefix_cache import ROOT
from pagellm.engine.scheduling.sequence import GIVEN_BACK, Sequence

if TYPE_CHECKING:
    from pagellm.engine.scheduling.block_manager import BlockManager


def check_blocks(manager: "BlockManager") -> None:
    """Asserts all that is asked of a block manager, as it stands between two operations."""
    free = list(manager._free)
    assert len(free) == len(set(free)) == manager._free.size, "the free list names a block twice"
    num_blocks = manager.num_blocks
    counts = [0] * (num_blocks + manager.num_swap_blocks)
    free_swap = list(manager._free_swap)
    swapped = list(free_swap)
    for sequence in manager._swapped.values():
        swapped += sequence.swap_table
        for slot in sequence.swap_table:
            counts[num_blocks + slot] = 1
        assert sequence.swap_table, "blocks in no tier"
        assert not sequence.block_table, "blocks in both tiers"
    for sequence in manager._holders.values():
        behind = manager.window.num_behind(sequence.num_computed_tokens)
        held = sequence.block_table[behind:]
        for block in held:
            assert block >= 0, "a block that is still read was given back"
            counts[block] += 1
        assert held, "blocks in no tier"
        assert not sequence.swap_table, "blocks in both tiers"
        assert len(set(held)) == len(held), "a block twice in one table"
        assert sequence.block_table[:behind] == [GIVEN_BACK] * behind, "a block behind the window is held"
        assert sequence.num_slots <= len(sequence.block_table) * manager.block_size
        _check_own_slots(manager, sequence)
    assert counts == list(manager._reference_counts), "a reference count differs from the block tables"
    num_references = sum(counts[:num_blocks])
    assert num_references == manager._num_references, "the number of references differs from their counts"
    assert {block for block in range(num_blocks) if counts[block] == 0} == set(free)
    assert sorted(swapped) == list(range(manager.num_swap_blocks)), "a swap block is lost or held twice"
    if manager._ranked is not None:
        manager._ranked.check()
    _check_cache(manager, {block: place for place, block in enumerate(free)})
    _check_offloaded(manager, {num_blocks + slot: place for place, slot in enumerate(free_swap)})


def _check_own_slots(manager: "BlockManager", sequence: Sequence) -> None:
    """A slot that it may write to lies in a block that it shares with nobody, and nobody can find."""
    for position in range(sequence.num_computed_tokens, sequence.num_slots):
        block = sequence.block_table[position // manager.block_size]
        assert manager._reference_counts[block] == 1, "two sequences may write into one block"
        assert not manager._knows(block), "a sequence may write into a block that the cache knows"


def _check_cache(manager: "BlockManager", free_place: dict[int, int]) -> None:
    cache = manager._cache
    assert len(cache) == len(list(cache)), "the cache has lost count"
    for block in cache:
        before, tokens = cache.before(block), cache.tokens(block)
        assert before == ROOT or before in cache, "a block follows one that is not known"
        seed = cache.hash_of(before) if before != ROOT else manager._root_hash(cache.salt_of(block))
        assert manager._hash_block(tokens, seed) == cache.hash_of(block), "a hash is not of the content"
        found = cache.find(cache.hash_of(block), before, tokens, cache.salt_of(block))
        assert found == block, "two blocks hold the same prefix, or one cannot be found"
        if manager.window or manager.offloads:
            listed = sorted(islice(cache.followers(block), len(cache)))
            expected = [other for other in cache if cache.before(other) == block]
            assert listed == expected, "the blocks that follow one are not those that are listed"
        if not manager.window and before in free_place and block < manager.num_blocks and not manager._ranked:
            outlives = block not in free_place or free_place[block] > free_place[before]
            assert not outlives, "a block would outlive the one it follows"
    for sequence in manager._holders.values():
        for index, block in enumerate(sequence.block_table[: sequence.num_registered_blocks]):
            if block != GIVEN_BACK and manager._knows(block):
                assert cache.tokens(block) == manager._tokens(sequence, index), "wrong tokens"


def _check_offloaded(manager: "BlockManager", free_place: dict[int, int]) -> None:
    """What the second tier holds of the cache lies in free blocks of it, and goes before what it follows."""
    cache = manager._cache
    offloaded = [block for block in cache if block >= manager.num_blocks]
    assert len(offloaded) == cache.num_offloaded, "the cache has lost count of what is offloaded"
    for block in offloaded:
        assert block in free_place, "a swapped sequence may write into a block that the cache knows"
        before = cache.before(block)
        if not manager.window and before >= manager.num_blocks:
            assert free_place[block] < free_place[before], "a block would outlive the one it follows"
    if not manager.window:
        ahead = [block for block in cache if block < manager.num_blocks <= cache.before(block)]
        assert not ahead, "a block is in the first tier, and the one that it follows is not"
