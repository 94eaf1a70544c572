"""How many blocks and slots are in use: counts for a report, from the block manager's own state."""

from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pagellm.engine.scheduling.block_manager import BlockManager

_num_computed = attrgetter("num_computed_tokens")


class BlockUsage(NamedTuple):
    """Counts of blocks, and of slots, for a report."""

    used: int
    free: int
    shared: int  # references beyond the first of each block
    unwritten_slots: int  # of blocks in use, without computed keys and values
    swap_used: int  # by swapped sequences
    swap_cached: int = 0  # that hold a known prefix


def count_usage(manager: "BlockManager") -> BlockUsage:
    """The counts as they are now: O(sequences that run)."""
    free = manager.num_free_blocks
    used = manager.num_blocks - free
    shared = manager.num_shared
    # Whoever shares a block has all of it, with the exceptions that are taken up afterwards.
    written = sum(map(_num_computed, manager._holders.values())) - shared * manager.block_size
    if manager.window:
        behind = sum(map(manager.window.num_behind, map(_num_computed, manager._holders.values())))
        written -= behind * manager.block_size
    if manager._partly_shared:
        written += _num_counted_too_often(manager)
    swap_used = manager.num_swap_blocks - manager.num_free_swap_blocks
    unwritten = used * manager.block_size - written
    return BlockUsage(used, free, shared, unwritten, swap_used, manager.num_offloaded_blocks)


def _num_counted_too_often(manager: "BlockManager") -> int:
    """Slots of partly shared blocks that `count_usage` has taken off although nobody has written them."""
    size = manager.block_size
    filled_of: dict[int, list[int]] = {}  # of each block, by its holders that have not written all slots
    for sequence in manager._holders.values():
        index, filled = divmod(sequence.num_computed_tokens, size)
        if filled and sequence.block_table[index] in manager._partly_shared:
            filled_of.setdefault(sequence.block_table[index], []).append(filled)
    num_slots = 0
    for block, slots in filled_of.items():
        num_slots += sum(size - filled for filled in slots)
        if len(slots) == manager._reference_counts[block]:
            num_slots -= size - max(slots)
    return num_slots
