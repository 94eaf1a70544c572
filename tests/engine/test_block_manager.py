"""What the block manager does in each case that has a name: exact tables, exact counts."""

from array import array
from typing import NoReturn

import pytest

from pagellm.engine.requests.sampling_params import SamplingParams
from pagellm.engine.scheduling.block_manager import (
    BlockManager,
    HashBlock,
    PrefixCacheStats,
    TransferKind,
    chained_hash,
)
from pagellm.engine.scheduling.block_usage import BlockUsage
from pagellm.engine.scheduling.sequence import Sequence, SequenceStatus

_ids = iter(range(10**9))


def sequence(*token_ids: int, reads_cache: bool = True, salt: str = "") -> Sequence:
    return Sequence(next(_ids), token_ids, SamplingParams(cache_salt=salt), reads_cache=reads_cache)


def admit(manager: BlockManager, *token_ids: int, salt: str = "") -> Sequence:
    """A sequence with all its blocks."""
    new = sequence(*token_ids, salt=salt)
    manager.allocate(new, manager.cached_prefix(new), new.num_tokens)
    return new


def compute(manager: BlockManager, computed: Sequence, count: int | None = None) -> Sequence:
    """Computes so many of a sequence's tokens, or all."""
    computed.num_computed_tokens = computed.num_tokens if count is None else count
    manager.register(computed)
    manager.check()
    return computed


def serve(manager: BlockManager, *token_ids: int, salt: str = "") -> Sequence:
    return compute(manager, admit(manager, *token_ids, salt=salt))


def moved(manager: BlockManager, of: Sequence) -> list[tuple[TransferKind, int, int]]:
    """What has to be moved on behalf of a sequence and nobody else; takes note that it was."""
    transfers = list(manager.transfers)
    assert all(transfer.sequence is of for transfer in transfers)
    for _ in transfers:
        manager.transferred()
    assert not manager.transfers
    return [transfer[:3] for transfer in transfers]


def grow(manager: BlockManager, grown: Sequence) -> list[tuple[TransferKind, int, int]]:
    """Gives the last token its slot; returns what has to be copied for that."""
    manager.grow(grown)
    manager.check()
    return moved(manager, grown)


def append(manager: BlockManager, grown: Sequence, token: int) -> list[tuple[TransferKind, int, int]]:
    """Appends a token and gives it its slot; returns what has to be copied for that."""
    grown.token_ids.append(token)
    return grow(manager, grown)


def fork(manager: BlockManager, parent: Sequence, *token_ids: int) -> Sequence:
    """A sequence of the given tokens, of which all but the last are what the parent begins with."""
    child = sequence(*token_ids)
    manager.fork(parent, child, child.num_tokens - 1)
    manager.check()
    return child


def swap_out(manager: BlockManager, swapped: Sequence) -> list[tuple[TransferKind, int, int]]:
    assert manager.can_swap_out(swapped)
    manager.swap_out(swapped)
    assert swapped.status is SequenceStatus.SWAPPED
    manager.check()
    return moved(manager, swapped)


def swap_in(manager: BlockManager, swapped: Sequence) -> list[tuple[TransferKind, int, int]]:
    manager.swap_in(swapped, manager.cached_prefix(swapped), swapped.num_tokens)
    assert swapped.status is SequenceStatus.RUNNING
    manager.check()
    return moved(manager, swapped)


def hit(manager: BlockManager, *token_ids: int, salt: str = "") -> list[int]:
    return manager.cached_prefix(sequence(*token_ids, salt=salt))


def constant_hash(tokens: bytes, previous: int) -> int:
    return 1


# Allocation: how many blocks, and which


@pytest.mark.parametrize(("num_tokens", "blocks"), [(1, [0]), (3, [0]), (4, [0]), (5, [0, 1]), (8, [0, 1])])
def test_a_sequence_takes_as_many_blocks_as_its_tokens_fill(num_tokens: int, blocks: list[int]) -> None:
    manager = BlockManager(num_blocks=3, block_size=4)
    new = admit(manager, *range(num_tokens))
    assert new.block_table == blocks
    assert new.num_computed_tokens == 0
    assert manager.num_free_blocks == 3 - len(blocks)


def test_the_last_free_block_can_be_had_and_then_none() -> None:
    manager = BlockManager(num_blocks=2, block_size=2)
    assert manager.can_allocate(4, [])
    assert not manager.can_allocate(5, [])
    admit(manager, 1, 2)
    assert manager.can_allocate(2, [])
    assert not manager.can_allocate(3, [])
    assert admit(manager, 3, 4).block_table == [1]
    assert manager.num_free_blocks == 0
    assert not manager.can_allocate(1, [])


def test_blocks_that_are_to_stay_free_cannot_be_had() -> None:
    manager = BlockManager(num_blocks=3, block_size=2)
    assert manager.can_allocate(4, [], spare=1)
    assert not manager.can_allocate(4, [], spare=2)
    assert not manager.can_allocate(5, [], spare=1)


def test_more_slots_than_tokens_can_be_had_at_once() -> None:
    manager = BlockManager(num_blocks=4, block_size=2)
    new = sequence(1, 2)
    manager.allocate(new, [], 7)
    assert (new.block_table, new.num_slots) == ([0, 1, 2, 3], 8)
    for token in (3, 4, 5, 6, 7, 8):
        assert append(manager, new, token) == []
    assert new.block_table == [0, 1, 2, 3]


def test_a_sequence_grows_only_past_a_full_block() -> None:
    manager = BlockManager(num_blocks=2, block_size=2)
    grown = admit(manager, 1)
    append(manager, grown, 2)
    assert grown.block_table == [0]
    append(manager, grown, 3)
    assert grown.block_table == [0, 1]
    append(manager, grown, 4)
    assert manager.can_grow(grown)
    grown.token_ids.append(5)
    assert not manager.can_grow(grown)


def test_growing_twice_for_one_token_changes_nothing() -> None:
    manager = BlockManager(num_blocks=3, block_size=2)
    grown = admit(manager, 1, 2)
    append(manager, grown, 3)
    manager.grow(grown)
    assert grown.block_table == [0, 1]


def test_freeing_gives_back_all_blocks_and_freeing_again_nothing() -> None:
    manager = BlockManager(num_blocks=3, block_size=2)
    first = serve(manager, 1, 2, 3)
    other = admit(manager, 4)
    for _ in range(2):
        manager.free(first)
        manager.check()
        assert manager.num_free_blocks == 2
    assert (first.block_table, first.num_computed_tokens) == ([], 0)
    assert other.block_table == [2]


# The prefix cache: what is found


def test_a_fully_cached_prompt_still_computes_its_last_block() -> None:
    manager = BlockManager(num_blocks=4, block_size=2)
    first = serve(manager, 1, 2, 3, 4)
    again = admit(manager, 1, 2, 3, 4)
    assert first.block_table == [0, 1]
    assert again.block_table == [0, 2]
    assert again.num_computed_tokens == 2


def test_a_prompt_of_exactly_one_cached_block_is_computed_whole() -> None:
    manager = BlockManager(num_blocks=4, block_size=2)
    serve(manager, 1, 2)
    assert hit(manager, 1, 2) == []


def test_one_token_more_than_a_cached_block_hits_it() -> None:
    manager = BlockManager(num_blocks=4, block_size=2)
    serve(manager, 1, 2)
    assert hit(manager, 1, 2, 9) == [0]


def test_token_ids_may_be_as_large_as_any_vocabulary() -> None:
    manager = BlockManager(num_blocks=4, block_size=2)
    serve(manager, 262_143, 1)
    assert hit(manager, 262_143, 1, 5) == [0]
    assert hit(manager, 262_143 - 65_536, 1, 5) == []


def test_one_token_less_than_a_block_is_not_cached() -> None:
    manager = BlockManager(num_blocks=4, block_size=3)
    serve(manager, 1, 2)
    assert hit(manager, 1, 2, 3, 4) == []


def test_with_blocks_of_one_token_all_but_the_last_are_hit() -> None:
    manager = BlockManager(num_blocks=8, block_size=1)
    serve(manager, 1, 2, 3)
    assert hit(manager, 1, 2, 3) == [0, 1]
    assert hit(manager, 1, 2, 3, 4) == [0, 1, 2]


def test_a_block_is_found_only_behind_the_same_prefix() -> None:
    manager = BlockManager(num_blocks=4, block_size=2)
    serve(manager, 1, 2, 7, 8)
    assert hit(manager, 1, 2, 7, 8, 9) == [0, 1]
    assert hit(manager, 1, 3, 7, 8, 9) == []
    assert hit(manager, 7, 8, 9) == []


def test_a_block_is_found_only_when_all_its_tokens_are_computed() -> None:
    manager = BlockManager(num_blocks=4, block_size=2)
    first = compute(manager, admit(manager, 1, 2, 3, 4), 3)
    assert hit(manager, 1, 2, 3, 4, 5) == [0]
    compute(manager, first, 4)
    assert hit(manager, 1, 2, 3, 4, 5) == [0, 1]


def test_generated_tokens_are_found_like_those_of_a_prompt() -> None:
    manager = BlockManager(num_blocks=4, block_size=2)
    first = serve(manager, 1, 2, 3)
    append(manager, first, 4)
    compute(manager, first)
    assert hit(manager, 1, 2, 3, 4, 5) == [0, 1]


def test_asking_for_the_prefix_takes_nothing() -> None:
    manager = BlockManager(num_blocks=2, block_size=2)
    manager.free(serve(manager, 1, 2))
    assert hit(manager, 1, 2, 3) == hit(manager, 1, 2, 3) == [0]
    assert manager.num_free_blocks == 2


def test_a_sequence_that_wants_its_prompts_logits_reads_nothing_but_is_found() -> None:
    manager = BlockManager(num_blocks=4, block_size=2)
    serve(manager, 1, 2)
    assert manager.cached_prefix(sequence(1, 2, 3, reads_cache=False)) == []
    reader = sequence(5, 6, 7, reads_cache=False)
    manager.allocate(reader, [], 3)
    compute(manager, reader)
    assert hit(manager, 5, 6, 7) == [1]


def test_without_prefix_caching_nothing_is_ever_found() -> None:
    manager = BlockManager(num_blocks=4, block_size=2, enable_prefix_caching=False)
    first = serve(manager, 1, 2, 3, 4)
    assert hit(manager, 1, 2, 3, 4, 5) == []
    second = serve(manager, 1, 2, 3, 4)
    assert (first.block_table, second.block_table) == ([0, 1], [2, 3])
    manager.free(first)
    assert hit(manager, 1, 2, 3, 4, 5) == []


# Sharing: reference counts


def test_a_shared_block_is_free_only_when_its_last_holder_is_gone() -> None:
    manager = BlockManager(num_blocks=4, block_size=2)
    first = serve(manager, 1, 2, 3)
    second = serve(manager, 1, 2, 4)
    assert (first.block_table, second.block_table) == ([0, 1], [0, 2])
    assert manager.num_free_blocks == 1
    manager.free(first)
    assert manager.num_free_blocks == 2
    manager.free(second)
    assert manager.num_free_blocks == 4


def test_a_cached_block_in_use_costs_an_admission_nothing_and_a_free_one_itself() -> None:
    manager = BlockManager(num_blocks=3, block_size=2)
    first = serve(manager, 1, 2, 3, 4)
    new = sequence(1, 2, 3, 4, 5)
    assert manager.cached_prefix(new) == [0, 1]
    assert manager.can_allocate(5, [0, 1])
    manager.free(first)
    admit(manager, 9)
    assert manager.cached_prefix(new) == [0, 1]
    assert not manager.can_allocate(5, [0, 1]), "two free blocks, and both are the prefix"


def test_equal_blocks_computed_twice_become_one() -> None:
    manager = BlockManager(num_blocks=6, block_size=2)
    first, second = admit(manager, 1, 2, 3, 4, 5), admit(manager, 1, 2, 3, 4, 6)
    assert (first.block_table, second.block_table) == ([0, 1, 2], [3, 4, 5])
    compute(manager, first)
    compute(manager, second)
    assert (first.block_table, second.block_table) == ([0, 1, 2], [0, 1, 5])
    assert manager.num_free_blocks == 2


def test_a_block_that_became_one_with_a_free_one_brings_it_back_into_use() -> None:
    manager = BlockManager(num_blocks=6, block_size=2)
    first, second = admit(manager, 1, 2), admit(manager, 1, 2)
    manager.free(compute(manager, first))
    compute(manager, second)
    assert second.block_table == [0]
    assert manager.num_free_blocks == 5


# Eviction: what is forgotten first


def test_blocks_that_hold_nothing_known_are_used_before_cached_ones() -> None:
    manager = BlockManager(num_blocks=3, block_size=2)
    manager.free(serve(manager, 1, 2, 3))
    assert admit(manager, 7, 8, 9).block_table == [1, 2]
    assert hit(manager, 1, 2, 3) == [0]


def test_the_least_recently_freed_block_is_evicted_first() -> None:
    manager = BlockManager(num_blocks=3, block_size=2)
    first, second, third = serve(manager, 1, 1), serve(manager, 2, 2), serve(manager, 3, 3)
    for freed in (second, third, first):
        manager.free(freed)
    order = [admit(manager, 9).block_table for _ in range(3)]
    assert order == [[1], [2], [0]]


def test_a_hit_makes_a_block_recent_again() -> None:
    manager = BlockManager(num_blocks=3, block_size=2)
    first, second = serve(manager, 1, 1), serve(manager, 2, 2)
    manager.free(first)
    manager.free(second)
    manager.free(admit(manager, 1, 1, 5))
    admit(manager, 9)
    admit(manager, 9)
    assert hit(manager, 1, 1, 5) == [0]
    assert hit(manager, 2, 2, 5) == []


def test_a_sequence_is_evicted_from_its_end() -> None:
    manager = BlockManager(num_blocks=3, block_size=1)
    manager.free(serve(manager, 1, 2, 3))
    left = []
    for token in (7, 8, 9):
        admit(manager, token)
        left.append(hit(manager, 1, 2, 3, 4))
    assert left == [[0, 1], [0], []]


def test_an_evicted_block_number_never_continues_an_old_chain() -> None:
    """Block 1 follows block 0; when block 0 holds something else, block 1 must not follow that."""
    manager = BlockManager(num_blocks=2, block_size=1)
    manager.free(serve(manager, 1, 2))
    manager.free(serve(manager, 8, 9))
    assert hit(manager, 8, 9, 3) == [1, 0]
    assert hit(manager, 1, 2, 3) == []
    assert hit(manager, 8, 2, 3) == [1]


def test_a_sequence_never_evicts_the_prefix_that_it_hits() -> None:
    manager = BlockManager(num_blocks=2, block_size=2)
    first, second = serve(manager, 1, 1), serve(manager, 2, 2)
    manager.free(first)
    manager.free(second)
    again = compute(manager, admit(manager, 1, 1, 5))
    assert again.block_table == [0, 1]
    assert hit(manager, 1, 1, 6) == [0]


# Collisions: equal hashes are told apart by what the blocks hold


def test_blocks_whose_hashes_collide_are_all_found() -> None:
    manager = BlockManager(num_blocks=4, block_size=2, hash_block=constant_hash)
    serve(manager, 1, 2)
    assert hit(manager, 1, 2, 5) == [0]
    assert hit(manager, 3, 4, 5) == []
    second = serve(manager, 3, 4)
    assert second.block_table == [1]
    assert hit(manager, 3, 4, 5) == [1]
    assert hit(manager, 1, 2, 5) == [0]


@pytest.mark.parametrize("evicted", [0, 1, 2])
def test_of_blocks_whose_hashes_collide_any_can_be_forgotten(evicted: int) -> None:
    manager = BlockManager(num_blocks=3, block_size=1, hash_block=constant_hash)
    held = [serve(manager, token) for token in (1, 2, 3)]
    manager.free(held[evicted])
    compute(manager, admit(manager, 9))
    expected = [[0], [1], [2]]
    expected[evicted] = []
    assert [hit(manager, token, 7) for token in (1, 2, 3)] == expected
    assert hit(manager, 9, 7) == [evicted]


def test_equal_tokens_behind_another_prefix_are_another_block_even_if_the_hash_says_otherwise() -> None:
    """The second blocks collide and hold the same tokens; their keys and values differ."""

    def hash_of_the_last_block(tokens: bytes, previous: int) -> int:
        return chained_hash(tokens, 0)

    manager = BlockManager(num_blocks=8, block_size=2, hash_block=hash_of_the_last_block)
    serve(manager, 1, 1, 7, 7)
    second = serve(manager, 2, 2, 7, 7)
    assert second.block_table == [2, 3]
    assert hit(manager, 1, 1, 7, 7, 5) == [0, 1]
    assert hit(manager, 2, 2, 7, 7, 5) == [2, 3]
    assert hit(manager, 7, 7, 5) == []


# Salts: tenants are kept apart


@pytest.mark.parametrize("hash_block", [chained_hash, constant_hash])
def test_a_prefix_is_found_under_its_own_salt_alone(hash_block: HashBlock) -> None:
    manager = BlockManager(num_blocks=12, block_size=2, hash_block=hash_block)
    tables = [serve(manager, 1, 2, 3, 4, salt=salt).block_table for salt in ("", "a", "b")]
    assert tables == [[0, 1], [2, 3], [4, 5]]
    for salt, table in zip(("", "a", "b"), tables, strict=True):
        assert hit(manager, 1, 2, 3, 4, 5, salt=salt) == table
    assert hit(manager, 1, 2, 3, 4, 5, salt="c") == []


def test_the_hashes_of_equal_tokens_differ_with_the_salt() -> None:
    manager = BlockManager(num_blocks=12, block_size=2)
    hashes = [serve(manager, 1, 2, 3, 4, salt=salt).block_hashes for salt in ("", "a", "b")]
    assert len({block_hash for each in hashes for block_hash in each}) == 6


def test_a_block_that_had_a_salt_loses_it_with_its_content() -> None:
    manager = BlockManager(num_blocks=1, block_size=1)
    manager.free(serve(manager, 1, salt="a"))
    manager.free(serve(manager, 1))
    assert hit(manager, 1, 2) == [0]
    assert hit(manager, 1, 2, salt="a") == []


# Forks: blocks are shared until somebody writes


def test_a_fork_takes_no_block_and_shares_all_that_is_computed() -> None:
    manager = BlockManager(num_blocks=4, block_size=2)
    parent = serve(manager, 1, 2, 3)
    child = fork(manager, parent, 1, 2, 3, 7)
    assert (parent.block_table, child.block_table) == ([0, 1], [0, 1])
    assert (child.num_computed_tokens, child.num_registered_blocks) == (3, 1)
    assert manager.num_free_blocks == 2


def test_the_first_to_write_into_a_shared_block_copies_it_and_the_last_writes_in_place() -> None:
    manager = BlockManager(num_blocks=6, block_size=4)
    parent = serve(manager, 1, 2, 3, 4, 5)
    first, second = fork(manager, parent, 1, 2, 3, 4, 5, 7), fork(manager, parent, 1, 2, 3, 4, 5, 8)
    assert append(manager, parent, 6) == [(TransferKind.COPY, 1, 2)]
    assert grow(manager, first) == [(TransferKind.COPY, 1, 3)]
    assert grow(manager, second) == []
    assert [s.block_table for s in (parent, first, second)] == [[0, 2], [0, 3], [0, 1]]
    assert manager.num_free_blocks == 2
    manager.check()


def test_a_fork_at_a_blocks_end_takes_a_new_block_and_copies_nothing() -> None:
    manager = BlockManager(num_blocks=4, block_size=2)
    parent = serve(manager, 1, 2)
    child = fork(manager, parent, 1, 2, 7)
    assert grow(manager, child) == []
    assert append(manager, parent, 6) == []
    assert (parent.block_table, child.block_table) == ([0, 2], [0, 1])


def test_a_fork_that_is_shorter_than_its_parent_shares_the_blocks_it_reaches_into() -> None:
    manager = BlockManager(num_blocks=4, block_size=2)
    parent = serve(manager, 1, 2, 3, 4, 5)
    child = fork(manager, parent, 1, 2, 3, 7)
    assert (child.block_table, child.num_computed_tokens) == ([0, 1], 3)
    assert grow(manager, child) == [(TransferKind.COPY, 1, 3)]
    assert append(manager, parent, 6) == []


def test_a_fork_never_writes_into_a_block_that_its_parent_filled_and_others_can_find() -> None:
    manager = BlockManager(num_blocks=4, block_size=2)
    parent = serve(manager, 1, 2, 3, 4)
    child = fork(manager, parent, 1, 2, 3, 7)
    manager.free(parent)
    assert grow(manager, child) == [(TransferKind.COPY, 1, 2)]
    compute(manager, child)
    assert hit(manager, 1, 2, 3, 4, 5) == [0, 1]
    assert hit(manager, 1, 2, 3, 7, 5) == [0, 2]


def test_a_copy_needs_a_free_block_and_writing_in_place_none() -> None:
    manager = BlockManager(num_blocks=1, block_size=4)
    parent = serve(manager, 1, 2)
    child = fork(manager, parent, 1, 2, 7)
    assert not manager.can_grow(child)
    manager.free(parent)
    assert manager.can_grow(child)
    assert grow(manager, child) == []
    assert child.block_table == [0]


def test_forks_of_a_prompt_of_1000_tokens_hold_its_blocks_once() -> None:
    manager = BlockManager(num_blocks=100, block_size=16)
    tokens = range(1000)
    parent = serve(manager, *tokens)
    children = [fork(manager, parent, *tokens, 5000 + i) for i in range(3)]
    assert manager.num_free_blocks == 100 - 63
    copies = [copy[:2] for child in children for copy in grow(manager, child)]
    assert copies == [(TransferKind.COPY, 62)] * 3
    assert append(manager, parent, 5003) == []
    assert manager.num_free_blocks == 100 - 63 - 3
    for sequence in (parent, *children):
        manager.free(sequence)
    assert manager.num_free_blocks == 100


# The second tier


def test_a_sequence_is_swapped_out_and_in_block_by_block() -> None:
    manager = BlockManager(num_blocks=4, block_size=2, enable_prefix_caching=False, num_swap_blocks=5)
    admit(manager, 9)
    swapped = serve(manager, 1, 2, 3, 4)
    append(manager, swapped, 5)
    assert swap_out(manager, swapped) == [(TransferKind.SWAP_OUT, 1, 0), (TransferKind.SWAP_OUT, 2, 1)]
    assert (swapped.block_table, swapped.swap_table) == ([], [0, 1])
    assert (swapped.num_computed_tokens, swapped.num_registered_blocks, swapped.num_slots) == (4, 0, 0)
    assert (manager.num_free_blocks, manager.num_free_swap_blocks) == (3, 3)
    assert swap_in(manager, swapped) == [(TransferKind.SWAP_IN, 0, 1), (TransferKind.SWAP_IN, 1, 2)]
    assert (swapped.block_table, swapped.swap_table) == ([1, 2, 3], [])
    assert (swapped.num_computed_tokens, swapped.num_slots) == (4, 6)
    assert (manager.num_free_blocks, manager.num_free_swap_blocks) == (0, 5)


def test_the_second_tier_gives_out_the_same_blocks_again() -> None:
    manager = BlockManager(num_blocks=4, block_size=1, enable_prefix_caching=False, num_swap_blocks=3)
    for _ in range(3):
        swapped = serve(manager, 1, 2, 3)
        swapped.token_ids.append(4)
        swap_out(manager, swapped)
        assert (swapped.swap_table, manager.num_free_swap_blocks) == ([0, 1, 2], 0)
        swap_in(manager, swapped)
        assert (swapped.swap_table, manager.num_free_swap_blocks) == ([], 3)
        manager.free(swapped)


def test_only_what_is_computed_is_swapped_out() -> None:
    manager = BlockManager(num_blocks=4, block_size=2, num_swap_blocks=5)
    swapped = compute(manager, admit(manager, 1, 2, 3, 4, 5, 6), 3)
    assert swap_out(manager, swapped) == [(TransferKind.SWAP_OUT, 0, 0), (TransferKind.SWAP_OUT, 1, 1)]


def test_the_cache_may_forget_what_is_swapped_out_from_its_end() -> None:
    manager = BlockManager(num_blocks=3, block_size=2, num_swap_blocks=3)
    swapped = serve(manager, 1, 2, 3, 4)
    append(manager, swapped, 5)
    swap_out(manager, swapped)
    assert swapped.num_registered_blocks == 0
    assert manager.cached_prefix(swapped) == [0, 1], "also the last block: its last token was computed"
    assert admit(manager, 8, 9).block_table == [2]
    assert admit(manager, 8, 9).block_table == [1], "the end of the other one is forgotten first"
    assert manager.cached_prefix(swapped) == [0]


def test_hits_and_swapped_blocks_together_make_a_table() -> None:
    manager = BlockManager(num_blocks=4, block_size=2, num_swap_blocks=3)
    swapped = serve(manager, 1, 2, 3, 4)
    append(manager, swapped, 5)
    swap_out(manager, swapped)
    others = [admit(manager, 7, 8, 7, 8), admit(manager, 9)]
    assert [other.block_table for other in others] == [[2, 3], [1]]
    manager.free(others[0])
    assert swap_in(manager, swapped) == [(TransferKind.SWAP_IN, 1, 2)]
    assert swapped.block_table == [0, 2, 3]
    assert swapped.num_registered_blocks == 1
    compute(manager, swapped)
    assert hit(manager, 1, 2, 3, 4, 6) == [0, 2]


def test_a_sequence_that_wants_its_prompts_logits_takes_what_it_computed_itself_from_the_cache() -> None:
    manager = BlockManager(num_blocks=4, block_size=2, num_swap_blocks=4)
    reader = sequence(1, 2, 3, 4, 5, reads_cache=False)
    manager.allocate(reader, [], 5)
    compute(manager, reader, 3)
    swap_out(manager, reader)
    assert manager.cached_prefix(reader) == [0]
    assert swap_in(manager, reader) == [(TransferKind.SWAP_IN, 1, 1)]


def test_a_tier_that_is_full_takes_nothing() -> None:
    manager = BlockManager(num_blocks=6, block_size=2, num_swap_blocks=2)
    assert not manager.can_swap_out(admit(manager, 1)), "there is nothing to be moved"
    first, second = serve(manager, 2, 3, 4, 5), serve(manager, 6)
    swap_out(manager, first)
    assert not manager.can_swap_out(second)
    manager.free(first)
    assert manager.can_swap_out(second)
    assert manager.num_free_swap_blocks == 2


def test_shared_blocks_are_swapped_out_by_each_and_stay_with_the_other() -> None:
    manager = BlockManager(num_blocks=3, block_size=2, num_swap_blocks=4)
    parent = serve(manager, 1, 2, 3)
    child = fork(manager, parent, 1, 2, 3, 7)
    assert swap_out(manager, child) == [(TransferKind.SWAP_OUT, 0, 0), (TransferKind.SWAP_OUT, 1, 1)]
    assert (parent.block_table, manager.num_free_blocks) == ([0, 1], 1)
    assert swap_in(manager, child) == [(TransferKind.SWAP_IN, 1, 2)]
    assert child.block_table == [0, 2]


# Forgetting everything


def test_a_reset_forgets_every_prefix_and_takes_no_block_from_anybody() -> None:
    manager = BlockManager(num_blocks=4, block_size=2)
    held, gone = serve(manager, 1, 2, 3), serve(manager, 5, 6)
    manager.free(gone)
    manager.reset_cache()
    manager.check()
    assert hit(manager, 1, 2, 3) == hit(manager, 5, 6, 7) == []
    assert (held.block_table, manager.num_free_blocks) == ([0, 1], 2)
    append(manager, held, 4)
    compute(manager, held)
    assert hit(manager, 1, 2, 3, 4, 5) == [], "what comes after something forgotten cannot be found"
    again = serve(manager, 1, 2, 3, 4)
    assert hit(manager, 1, 2, 3, 4, 5) == again.block_table


# Telling others what the cache knows


class Heard:
    """All that an observer of the cache is told, in order."""

    def __init__(self) -> None:
        self.events: list[tuple[object, ...]] = []

    def stored(self, block_hash: int, parent_hash: int | None, tokens: bytes, salt: str, tier: int) -> None:
        of_tier = ("of tier 1",) if tier else ()
        token_ids = list(memoryview(tokens).cast("i"))
        self.events.append(("stored", block_hash, parent_hash, token_ids, salt, *of_tier))

    def removed(self, block_hash: int, tier: int) -> None:
        self.events.append(("removed", block_hash, *(("of tier 1",) if tier else ())))

    def cleared(self) -> None:
        self.events.append(("cleared",))


def test_an_observer_hears_of_each_block_that_becomes_known_and_of_each_that_is_forgotten() -> None:
    manager, heard = BlockManager(num_blocks=3, block_size=2), Heard()
    manager.observe_cache(heard)
    first = chained_hash(array("i", [1, 2]).tobytes(), 0)
    second = chained_hash(array("i", [3, 4]).tobytes(), first)
    manager.free(serve(manager, 1, 2, 3, 4, 5))
    assert heard.events == [("stored", first, None, [1, 2], ""), ("stored", second, first, [3, 4], "")]
    manager.free(serve(manager, 1, 2, 3, 4, 5))
    assert len(heard.events) == 2, "what is known already is not told again"
    serve(manager, 7, 8, 9)
    other = chained_hash(array("i", [7, 8]).tobytes(), 0)
    assert heard.events[2:] == [("removed", second), ("stored", other, None, [7, 8], "")]
    manager.reset_cache()
    assert heard.events[4:] == [("cleared",)]


def test_an_observer_hears_of_a_recovery_and_of_what_comes_after_it() -> None:
    manager, heard = BlockManager(num_blocks=3, block_size=2), Heard()
    manager.observe_cache(heard)
    serve(manager, 1, 2)
    manager.recover()
    serve(manager, 1, 2)
    stored = ("stored", chained_hash(array("i", [1, 2]).tobytes(), 0), None, [1, 2], "")
    assert heard.events == [stored, ("cleared",), stored]


# Reports


def test_the_cache_counts_what_it_was_asked_and_what_it_had() -> None:
    manager = BlockManager(num_blocks=3, block_size=2)
    manager.free(serve(manager, 1, 2, 3))
    again = admit(manager, 1, 2, 5)
    assert manager.stats == PrefixCacheStats(queries=6, hits=2, evictions=0)
    manager.free(again)
    again.was_admitted = True
    manager.allocate(again, manager.cached_prefix(again), 3)
    reader = sequence(1, reads_cache=False)
    manager.allocate(reader, [], 1)
    assert manager.stats == PrefixCacheStats(queries=6, hits=2, evictions=0)
    manager.free(again)
    manager.free(reader)
    admit(manager, 7, 7, 7, 7, 7, 7)
    assert manager.stats == PrefixCacheStats(queries=12, hits=2, evictions=2)


def test_the_report_counts_blocks_references_and_slots_that_nobody_has_written() -> None:
    manager = BlockManager(num_blocks=6, block_size=4, num_swap_blocks=3)
    parent = serve(manager, 1, 2, 3, 4, 5)
    fork(manager, parent, 1, 2, 3, 4, 7)
    compute(manager, admit(manager, 8, 8, 8), 2)
    swapped = serve(manager, 9)
    swap_out(manager, swapped)
    assert manager.usage() == BlockUsage(used=3, free=3, shared=1, unwritten_slots=5, swap_used=1)


class Unread(list[int]):
    """A block table that nobody may walk through."""

    def __iter__(self) -> NoReturn:
        raise AssertionError("a report counts every block of every sequence")

    __getitem__ = __iter__  # type: ignore[assignment]


def test_a_report_costs_the_same_however_long_sequences_are() -> None:
    manager = BlockManager(num_blocks=2000, block_size=2, num_swap_blocks=10)
    running = [serve(manager, *[i] * 900) for i in range(4)]
    expected = BlockUsage(used=1800, free=200, shared=0, unwritten_slots=0, swap_used=0)
    for sequence in running:
        sequence.block_table = Unread(sequence.block_table)
    assert manager.usage() == expected


def test_a_slot_that_is_shared_counts_once_and_as_written_if_one_of_its_holders_has_written_it() -> None:
    manager = BlockManager(num_blocks=6, block_size=4)
    full, partial = serve(manager, 1, 2, 3, 4, 5, 6, 7, 8), serve(manager, 9, 9, 9, 9, 9, 9)
    fork(manager, full, 1, 2, 3, 4, 5, 0)
    child = fork(manager, partial, 9, 9, 9, 9, 9, 0)
    assert manager.usage() == BlockUsage(used=4, free=2, shared=4, unwritten_slots=2, swap_used=0)
    manager.free(full)
    manager.free(partial)
    assert manager.usage() == BlockUsage(used=4, free=2, shared=0, unwritten_slots=6, swap_used=0)
    append(manager, child, 8)
    compute(manager, child)
    assert manager.usage().unwritten_slots == 4


def test_the_tables_that_changed_are_told_with_the_first_index_that_did() -> None:
    manager = BlockManager(num_blocks=8, block_size=2)
    parent = serve(manager, 1, 2, 3)
    assert manager.take_changed_tables() == {parent: 0}
    child = fork(manager, parent, 1, 2, 3, 7)
    assert manager.take_changed_tables() == {child: 0}
    append(manager, parent, 4)
    compute(manager, parent)
    append(manager, parent, 5)
    assert (child.block_table, parent.block_table) == ([0, 1], [0, 2, 3])
    assert manager.take_changed_tables() == {parent: 1}
    append(manager, parent, 6)
    compute(manager, parent)
    assert manager.take_changed_tables() == {}
    append(manager, parent, 7)
    assert manager.take_changed_tables() == {parent: 3}
    manager.free(parent)
    assert manager.take_changed_tables() == {}


def test_the_hash_stands_for_the_whole_prefix() -> None:
    tokens = bytes(16)
    assert chained_hash(tokens, 0) == chained_hash(tokens, 0)
    assert chained_hash(tokens, 1) != chained_hash(tokens, 0)
    assert 0 <= chained_hash(tokens, 2**64 - 1) < 2**64
