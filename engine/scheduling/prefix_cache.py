"""What each block of the KV cache that holds a known prefix holds, and how it is found.

Knows numbers, hashes and bytes; which blocks are known, and for how long, is the block manager's business.
"""

from array import array
from collections.abc import Iterator

ROOT = -1  # stands before a sequence's first block
_UNKNOWN = -2  # stands before a block that is not known


class PrefixCache:
    """What each known block holds, and a hash map to find it; equal hashes are told apart by content.

    The map is chained through arrays, a fifth of the memory of a dictionary of integers.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        num_buckets = 1 << max(1, num_blocks).bit_length()
        self._mask = num_buckets - 1
        self._first = array("i", [ROOT]) * num_buckets  # block of each bucket
        self._next = array("i", [ROOT]) * num_blocks  # block of the same bucket
        self._hashes = array("Q", [0]) * num_blocks
        self._before = array("i", [_UNKNOWN]) * num_blocks  # the block that a block follows
        self._block_bytes = block_size * array("i").itemsize
        self._tokens = bytearray(num_blocks * self._block_bytes)
        self._salts: dict[int, str] = {}  # of first blocks that have one
        self._num_known = 0

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

    def add(self, block: int, block_hash: int, before: int, tokens: bytes, salt: str) -> None:
        """Makes a block known that is not yet."""
        bucket = block_hash & self._mask
        self._next[block], self._first[bucket] = self._first[bucket], block
        self._hashes[block] = block_hash
        self._before[block] = before
        self._num_known += 1
        start = block * self._block_bytes
        self._tokens[start : start + self._block_bytes] = tokens
        if before == ROOT and salt:
            self._salts[block] = salt

    def remove(self, block: int) -> None:
        """Forgets a known block."""
        bucket = self._hashes[block] & self._mask
        other = self._first[bucket]
        if other == block:
            self._first[bucket] = self._next[block]
        else:
            while self._next[other] != block:
                other = self._next[other]
            self._next[other] = self._next[block]
        self._before[block] = _UNKNOWN
        self._num_known -= 1
        self._salts.pop(block, None)

    def tokens(self, block: int) -> bytearray:
        """The tokens that a known block holds, as int32."""
        start = block * self._block_bytes
        return self._tokens[start : start + self._block_bytes]

    def before(self, block: int) -> int:
        """The block that a known block follows, or `ROOT`."""
        return self._before[block]

    def hash_of(self, block: int) -> int:
        """The hash of a known block's prefix."""
        return self._hashes[block]

    def salt_of(self, block: int) -> str:
        """The salt of a known first block."""
        return self._salts.get(block, "")
