"""What the block manager does in each case that has a name: exact tables, exact counts."""

import pytest

from engine.block_manager import BlockManager, chained_hash
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence

_ids = iter(range(10**9))


def sequence(*token_ids: int, reads_cache: bool = True) -> Sequence:
    return Sequence(next(_ids), list(token_ids), SamplingParams(), reads_cache=reads_cache)


def admit(manager: BlockManager, *token_ids: int) -> Sequence:
    """A sequence with all its blocks."""
    new = sequence(*token_ids)
    manager.allocate(new, manager.cached_prefix(new))
    return new


def compute(manager: BlockManager, computed: Sequence, count: int | None = None) -> Sequence:
    """Computes so many of a sequence's tokens, or all."""
    computed.num_computed_tokens = computed.num_tokens if count is None else count
    manager.register(computed)
    manager.check()
    return computed


def serve(manager: BlockManager, *token_ids: int) -> Sequence:
    return compute(manager, admit(manager, *token_ids))


def append(manager: BlockManager, grown: Sequence, token: int) -> None:
    grown.token_ids.append(token)
    manager.grow(grown)


def hit(manager: BlockManager, *token_ids: int) -> list[int]:
    return manager.cached_prefix(sequence(*token_ids))


def constant_hash(previous: int, tokens: bytes) -> int:
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
    assert manager.can_allocate(sequence(1, 2, 3, 4), [])
    assert not manager.can_allocate(sequence(1, 2, 3, 4, 5), [])
    admit(manager, 1, 2)
    assert manager.can_allocate(sequence(1, 2), [])
    assert not manager.can_allocate(sequence(1, 2, 3), [])
    assert admit(manager, 3, 4).block_table == [1]
    assert manager.num_free_blocks == 0
    assert not manager.can_allocate(sequence(1), [])


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
    manager.allocate(reader, [])
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
    assert manager.can_allocate(new, [0, 1])
    manager.free(first)
    admit(manager, 9)
    assert manager.cached_prefix(new) == [0, 1]
    assert not manager.can_allocate(new, [0, 1]), "two free blocks, and both are the prefix"


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


# Collisions: a miss, never a wrong hit


def test_a_collision_is_a_miss() -> None:
    manager = BlockManager(num_blocks=4, block_size=2, hash_block=constant_hash)
    serve(manager, 1, 2)
    assert hit(manager, 1, 2, 5) == [0]
    assert hit(manager, 3, 4, 5) == []
    second = serve(manager, 3, 4)
    assert second.block_table == [1]
    assert hit(manager, 3, 4, 5) == []
    assert hit(manager, 1, 2, 5) == [0]


def test_equal_tokens_behind_another_prefix_are_a_miss_even_if_the_hash_says_otherwise() -> None:
    """The second blocks collide and hold the same tokens; their keys and values differ."""

    def hash_of_the_last_block(previous: int, tokens: bytes) -> int:
        return chained_hash(0, tokens)

    manager = BlockManager(num_blocks=8, block_size=2, hash_block=hash_of_the_last_block)
    serve(manager, 1, 1, 7, 7)
    second = serve(manager, 2, 2, 7, 7)
    assert second.block_table == [2, 3]
    assert hit(manager, 1, 1, 7, 7, 5) == [0, 1]
    assert hit(manager, 2, 2, 7, 7, 5) == [2]
    assert hit(manager, 7, 7, 5) == []


def test_behind_a_block_that_collided_nothing_is_cached() -> None:
    def collide_at_the_start(previous: int, tokens: bytes) -> int:
        return chained_hash(previous, tokens) if previous else 1

    manager = BlockManager(num_blocks=8, block_size=1, hash_block=collide_at_the_start)
    serve(manager, 1, 5)
    broken = serve(manager, 2, 5, 6)
    manager.free(broken)
    assert hit(manager, 2, 5, 6, 7) == []
    assert hit(manager, 1, 5, 6) == [0, 1]
    assert admit(manager, 8, 8, 8).block_table == [2, 3, 4], "no more than their place is left of them"


def test_the_hash_stands_for_the_whole_prefix() -> None:
    tokens = bytes(16)
    assert chained_hash(0, tokens) == chained_hash(0, tokens)
    assert chained_hash(1, tokens) != chained_hash(0, tokens)
    assert 0 <= chained_hash(2**64 - 1, tokens) < 2**64
