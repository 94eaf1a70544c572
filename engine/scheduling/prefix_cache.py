"""What each block of the KV cache that holds a known prefix holds, and how it is found, in whichever tier.

Knows numbers, hashes and bytes; which blocks are known, and for how long, is the block manager's business.
A block of the first tier is named by its number, and block b of the second tier by `num_blocks + b`.
"""

from array import array
from collections.abc import Iterable, Iterator
from typing import Protocol

ROOT = -2  # stands before a sequence's first block
_UNKNOWN = -3  # stands before a block that is not known
_NONE = -1


class CacheObserver(Protocol):
    """Hears of each block that becomes known and of each that is forgotten, in that order.

    A hash stands for a whole prefix. tier: 0 or 1; a block that goes from one to the other is known in both
    for a moment. What it does must not fail, and changes nothing here.
    """

    def stored(self, block_hash: int, parent_hash: int | None, tokens: bytes, salt: str, tier: int) -> None:
        """A block is known. parent_hash: of the block that it follows; None for a first block.

        tokens: as int32. salt: of a first block.
        """

    def removed(self, block_hash: int, tier: int) -> None:
        """A block is forgotten."""

    def cleared(self) -> None:
        """All blocks of the first tier are forgotten, and no others are known."""


class PrefixCache:
    """What each known block holds, and a hash map to find it; equal hashes are told apart by content.

    The map is chained through arrays, a fifth of the memory of a dictionary of integers. knows_followers:
    whether it is known which blocks follow one; always with num_swap_blocks, of the second tier. observer:
    hears of what happens from when it is set; None: nobody does. num_changes: how often a block became known,
    or was forgotten. num_offloaded: known blocks of the second tier.
    """

    def __init__(
        self, num_blocks: int, block_size: int, knows_followers: bool = False, num_swap_blocks: int = 0
    ) -> None:
        self._num_first = num_blocks
        num_blocks += num_swap_blocks
        num_buckets = 1 << max(1, num_blocks).bit_length()
        self._mask = num_buckets - 1
        self._first = array("i", [_NONE]) * num_buckets  # block of each bucket
        self._next = array("i", [_NONE]) * num_blocks  # block of the same bucket
        self._hashes = array("Q", [0]) * num_blocks
        self._before = array("i", [_UNKNOWN]) * num_blocks  # the block that a block follows
        self._block_bytes = block_size * array("i").itemsize
        self._tokens = [b""] * num_blocks
        self._salts: dict[int, str] = {}  # of first blocks that have one
        self._num_known = 0
        self._known_since = array("q", [0]) * num_blocks  # num_changes when a block became known
        # Of each block those that follow it in the first tier, and in the second.
        self._followers = _Followers(num_blocks) if knows_followers or num_swap_blocks else None
        self._offloaded_followers = _Followers(num_blocks) if num_swap_blocks else None
        self.observer: CacheObserver | None = None
        self.num_changes = 0
        self.num_offloaded = 0

    def __len__(self) -> int:
        return self._num_known

    def __contains__(self, block: int) -> bool:
        return self._before[block] != _UNKNOWN

    def __iter__(self) -> Iterator[int]:
        return (block for block, before in enumerate(self._before) if before != _UNKNOWN)

    def find(self, block_hash: int, before: int, tokens: bytes, salt: str) -> int | None:
        """The block that holds exactly these tokens behind block `before`."""
        block = self._first[block_hash & self._mask]
        while block >= 0:
            if (
                self._hashes[block] == block_hash
                and self._before[block] == before
                and self.tokens(block) == tokens
                and (before != ROOT or self._salts.get(block, "") == salt)
            ):
                return block
            block = self._next[block]
        return None

    def add(self, blocks: Iterable[int], hashes: Iterable[int], before: int, run: bytes, salt: str) -> int:
        """Makes blocks of the first tier known, each behind the one before, up to one whose prefix is known.

        before: what the first one follows. run: the tokens of all. Returns how many became known.
        """
        first, following, mask, size = self._first, self._next, self._mask, self._block_bytes
        all_hashes, all_before, known_since = self._hashes, self._before, self._known_since
        contents, is_noted = self._tokens, self._followers is not None or self.observer is not None
        start = 0
        num_before = num_changes = self.num_changes
        if salt and before == ROOT:
            is_noted = True
        for block, block_hash in zip(blocks, hashes, strict=True):
            tokens, bucket = run[start : start + size], block_hash & mask
            head = other = first[bucket]
            while other >= 0 and all_hashes[other] != block_hash:
                other = following[other]
            if other >= 0 and self.find(block_hash, before, tokens, salt) is not None:
                break
            following[block] = head
            first[bucket] = block
            all_hashes[block] = block_hash
            all_before[block] = before
            num_changes += 1
            known_since[block] = num_changes
            contents[block] = tokens
            if is_noted:
                self._note_added(block, before, salt)
            before = block
            start += size
        self.num_changes = num_changes
        self._num_known += num_changes - num_before
        return num_changes - num_before

    def _note_added(self, block: int, before: int, salt: str) -> None:
        """Takes note of a block that is known now, where it is listed beside or somebody hears of it."""
        if before == ROOT:
            if salt:
                self._salts[block] = salt
        elif self._followers is not None:
            self._followers.add(block, before)
        if self.observer is not None:
            parent_hash = None if before == ROOT else self._hashes[before]
            own_salt = salt if before == ROOT else ""
            self.observer.stored(self._hashes[block], parent_hash, self._tokens[block], own_salt, 0)

    def move(self, source: int, target: int) -> None:
        """Lets what a known block holds be found in a block of the other tier, and those that follow, too.

        It costs as much as blocks follow it directly. In the order of the least recently used, a block that
        many follow goes back and forth only when all others have.
        """
        block_hash, before, since = self._hashes[source], self._before[source], self._known_since[source]
        tokens, salt = self.tokens(source), self.salt_of(source)
        near, far = self._followers, self._offloaded_followers
        assert near is not None
        assert far is not None
        observer, self.observer = self.observer, None
        self.remove((source,))
        self.observer = observer
        bucket = block_hash & self._mask
        self._next[target], self._first[bucket] = self._first[bucket], target
        self._hashes[target], self._before[target], self._known_since[target] = block_hash, before, since
        self._tokens[target] = tokens
        self._num_known += 1
        self.num_changes -= 1  # as much is known as before
        if salt:
            self._salts[target] = salt
        goes_out = target >= self._num_first
        self.num_offloaded += goes_out
        if before != ROOT:
            (far if goes_out else near).add(target, before)
        for lists in (near, far):
            for block in list(lists.of(source)):
                lists.remove(block, source)
                lists.add(block, target)
                self._before[block] = target
        if observer is not None:
            parent_hash = None if before == ROOT else self._hashes[before]
            observer.stored(block_hash, parent_hash, tokens, salt, int(goes_out))
            observer.removed(block_hash, int(not goes_out))

    def forget(self, block: int) -> list[int]:
        """Forgets a known block and all that follow it, which nobody could find any more; returns them."""
        forgotten, rest = [], [block]
        while rest:
            block = rest.pop()
            rest.extend(self.followers(block))
            self.remove((block,))
            forgotten.append(block)
        return forgotten

    def followers(self, block: int) -> Iterator[int]:
        """The known blocks that follow one, those of the first tier first."""
        assert self._followers is not None
        yield from self._followers.of(block)
        if self._offloaded_followers is not None:
            yield from self._offloaded_followers.of(block)

    def is_followed(self, block: int) -> bool:
        """Whether a known block of the first tier follows one."""
        assert self._followers is not None
        return next(self._followers.of(block), None) is not None

    def known(self, blocks: Iterable[int]) -> list[int]:
        """Those of some blocks that are known, in order."""
        before = self._before
        return [block for block in blocks if before[block] != _UNKNOWN]

    def unknown(self, blocks: Iterable[int]) -> list[int]:
        """The others."""
        before = self._before
        return [block for block in blocks if before[block] == _UNKNOWN]

    def remove(self, blocks: Iterable[int]) -> int:
        """Forgets those of some blocks that are known, in order; returns how many.

        Those that follow one must be forgotten, too.
        """
        first, following, mask = self._first, self._next, self._mask
        hashes, all_before = self._hashes, self._before
        is_noted = self._followers is not None or self.observer is not None or bool(self._salts)
        num_removed = 0
        for block in blocks:
            before = all_before[block]
            if before == _UNKNOWN:
                continue
            bucket = hashes[block] & mask
            other = first[bucket]
            if other == block:
                first[bucket] = following[block]
            else:
                while following[other] != block:
                    other = following[other]
                following[other] = following[block]
            all_before[block] = _UNKNOWN
            num_removed += 1
            if is_noted:
                self._note_removed(block, before)
        self._num_known -= num_removed
        self.num_changes += num_removed
        return num_removed

    def _note_removed(self, block: int, before: int) -> None:
        """Takes note of it where a block that is known no more, and followed another, was listed beside."""
        is_offloaded = block >= self._num_first
        if self._followers is not None and before != ROOT:
            followers = self._offloaded_followers if is_offloaded else self._followers
            assert followers is not None
            followers.remove(block, before)
        self.num_offloaded -= is_offloaded
        self._salts.pop(block, None)
        if self.observer is not None:
            self.observer.removed(self._hashes[block], int(is_offloaded))

    def clear(self) -> None:
        """Forgets all."""
        observer, self.observer = self.observer, None
        self.tell_cleared(observer)
        self.remove(list(self))
        self.observer = observer

    def tell_cleared(self, observer: CacheObserver | None) -> None:
        """Tells an observer that all that is known is forgotten: what is offloaded is told block by block."""
        if observer is not None:
            for block in self:
                if block >= self._num_first:
                    observer.removed(self._hashes[block], 1)
            observer.cleared()

    def tokens(self, block: int) -> bytes:
        """The tokens that a known block holds, as int32."""
        return self._tokens[block]

    def before(self, block: int) -> int:
        """The block that a known block follows, or `ROOT`."""
        return self._before[block]

    def hash_of(self, block: int) -> int:
        """The hash of a known block's prefix."""
        return self._hashes[block]

    def known_since(self, block: int) -> int:
        """The change with which a block became known; 0: it is not. One that is known anew has another."""
        return self._known_since[block] if block in self else 0

    def salt_of(self, block: int) -> str:
        """The salt of a known first block."""
        return self._salts.get(block, "")


class _Followers:
    """Which known blocks follow each one: lists that any member can leave in O(1), in three arrays."""

    def __init__(self, num_blocks: int) -> None:
        self._first = array("i", [_NONE]) * num_blocks  # that follows a block
        self._next = array("i", [_NONE]) * num_blocks  # that follows the same one
        self._previous = array("i", [_NONE]) * num_blocks

    def of(self, before: int) -> Iterator[int]:
        """The blocks that follow one."""
        block = self._first[before]
        while block != _NONE:
            yield block
            block = self._next[block]

    def add(self, block: int, before: int) -> None:
        """Lets a block follow another one."""
        other = self._first[before]
        self._next[block], self._previous[block] = other, _NONE
        self._first[before] = block
        if other != _NONE:
            self._previous[other] = block

    def remove(self, block: int, before: int) -> None:
        """Lets a block no longer follow another one."""
        previous, following = self._previous[block], self._next[block]
        if previous == _NONE:
            self._first[before] = following
        else:
            self._next[previous] = following
        if following != _NONE:
            self._previous[following] = previous
