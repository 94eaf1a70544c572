"""What the property tests hold the engine's block tables against: a memory that knows what it was told.

Each slot remembers the whole prefix that its keys and values depend on, as a number: equal prefixes under
equal salts have equal numbers, and all others different ones.
"""

from array import array
from collections.abc import Iterable
from copy import copy

from pagellm.engine.scheduling.block_manager import BlockManager, Transfer, TransferKind, chained_hash
from pagellm.engine.scheduling.sequence import Sequence

NOTHING = 0


def two_bits(tokens: bytes, previous: int) -> int:
    """Collides all the time, but tells some blocks apart."""
    return chained_hash(tokens, previous) & 3


def constant(tokens: bytes, previous: int) -> int:
    """Every block collides with every other one."""
    return 7


def names_of_cached_blocks(manager: BlockManager) -> dict[int, tuple[str, tuple[int, ...]]]:
    """Of each block in the prefix cache its salt and the tokens from the sequence's start to its end."""
    cache = manager._cache
    names: dict[int, tuple[str, tuple[int, ...]]] = {}

    def name_of(block: int) -> tuple[str, tuple[int, ...]]:
        if block not in names:
            before, tokens = cache.before(block), tuple(array("i", cache.tokens(block)))
            salt, prefix = name_of(before) if before >= 0 else (cache.salt_of(block), ())
            names[block] = salt, prefix + tokens
        return names[block]

    for block in cache:
        name_of(block)
    return names


class Memory:
    """Two tiers of blocks, written by computing and by transfers alone.

    window: the tokens that a token sees, itself included; 0: all before it.
    """

    def __init__(self, num_blocks: int, block_size: int, num_swap_blocks: int, window: int = 0) -> None:
        self.block_size = block_size
        self.window = window
        self.blocks = [[NOTHING] * block_size for _ in range(num_blocks)]
        self.swap = [[NOTHING] * block_size for _ in range(num_swap_blocks)]
        self._numbers: dict[tuple[int | str, int], int] = {}
        self._prefixes: dict[int, list[int]] = {}  # of each sequence, by seq_id

    def forget_tokens(self, num_tokens: dict[int, int]) -> None:
        """Sequences, by seq_id, have no more than so many tokens now."""
        for seq_id, count in num_tokens.items():
            del self._prefixes.setdefault(seq_id, [])[count:]

    def prefixes(self, sequence: Sequence) -> list[int]:
        """The number of the prefix that ends with each of a sequence's tokens."""
        known = self._prefixes.setdefault(sequence.seq_id, [])
        previous: int | str = known[-1] if known else sequence.sampling_params.cache_salt
        for token in sequence.token_ids[len(known) :]:
            previous = self.number(previous, token)
            known.append(previous)
        return known

    def number(self, previous: int | str, token: int) -> int:
        """The number of the prefix of `token` behind another prefix, or behind a salt."""
        return self._numbers.setdefault((previous, token), len(self._numbers) + 1)

    def write(self, sequence: Sequence, start: int, end: int) -> None:
        """Computes a sequence's tokens from `start` up to `end`."""
        prefixes = self.prefixes(sequence)
        for position in range(start, end):
            index, slot = divmod(position, self.block_size)
            assert sequence.block_table[index] >= 0, "a token's slot was given back"
            self.blocks[sequence.block_table[index]][slot] = prefixes[position]

    def move(self, transfer: Transfer, fails: bool = False) -> None:
        """Does a transfer; one that fails leaves nothing that could be used."""
        kind, source, target, _ = transfer
        sources = self.swap if kind in (TransferKind.SWAP_IN, TransferKind.LOAD) else self.blocks
        targets = self.swap if kind in (TransferKind.SWAP_OUT, TransferKind.OFFLOAD) else self.blocks
        targets[target] = [NOTHING] * self.block_size if fails else list(sources[source])

    def moved(self, transfers: Iterable[Transfer]) -> "Memory":
        """What it will be when these are done."""
        after = copy(self)
        after.blocks, after.swap = list(self.blocks), list(self.swap)
        for transfer in transfers:
            after.move(transfer)
        return after

    def content(self, block: int) -> list[int]:
        """Of a block of either tier, numbered as the prefix cache numbers them."""
        return self.blocks[block] if block < len(self.blocks) else self.swap[block - len(self.blocks)]

    def holds(self, sequence: Sequence, num_tokens: int, table: list[int] | None = None) -> bool:
        """Whether the blocks hold those of the sequence's first tokens that its next one sees."""
        prefixes, size = self.prefixes(sequence)[:num_tokens], self.block_size
        for index, block in enumerate(sequence.block_table if table is None else table):
            own = prefixes[index * size : (index + 1) * size]
            if block < 0:  # the next token, at num_tokens, must not see any of it
                if not self.window or (index + 1) * size > num_tokens - self.window + 1:
                    return False
                continue
            if self.content(block)[: len(own)] != own:
                return False
        return True

    def holds_what_the_cache_says(self, manager: BlockManager) -> bool:
        """Whether each cached block holds what it would be found by, once all that is to be moved is."""
        after = self.moved(manager.transfers)
        for block, (salt, prefix) in names_of_cached_blocks(manager).items():
            content: int | str = salt
            numbers = [content := self.number(content, token) for token in prefix]
            if after.content(block) != numbers[-self.block_size :]:
                return False
        return True
