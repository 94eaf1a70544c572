"""What of a sequence's blocks a model with sliding windows in all of its layers still reads.

Knows two numbers, the widest window and the size of a block; whose blocks they are is the block manager's
business.
"""


class BlockWindow:
    """The blocks behind the next token that are kept. tokens: the widest window of all layers.

    A token sees `tokens` of the last ones, itself included. Blocks are given back when another one is full;
    one full block always stays, so that the prefix cache knows what the next one follows. tokens is 0 where
    some layer sees everything: then all blocks are kept.
    """

    __slots__ = ("_block_size", "_num_kept", "tokens")

    def __init__(self, tokens: int, block_size: int) -> None:
        self.tokens = tokens
        self._block_size = block_size
        self._num_kept = max(1, -(-(tokens - 1) // block_size))

    def __bool__(self) -> bool:
        return self.tokens > 0

    def num_behind(self, num_computed: int) -> int:
        """The first blocks of a sequence, so many of whose tokens are computed, that are not kept."""
        if not self.tokens:
            return 0
        return max(0, num_computed // self._block_size - self._num_kept)

    def most_blocks(self, num_tokens: int, max_chunk: int) -> int:
        """Blocks that a sequence of so many tokens holds at once, computed in chunks of `max_chunk`."""
        all_blocks = -(-num_tokens // self._block_size)
        if not self.tokens:
            return all_blocks
        return min(all_blocks, self._num_kept + 1 + -(-max_chunk // self._block_size))
