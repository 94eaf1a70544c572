"""Byte-pair encoding of one word: its bytes are merged pair by pair, the pair of lowest rank first.

Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units" (2016), on bytes as in GPT-2.
`Bpe` knows the vocabulary and the merges; it does not know how a text was cut into words.
"""

from collections.abc import Mapping, Sequence
from heapq import heapify, heappop, heappush
from itertools import pairwise

from pagellm.engine.errors import CheckpointError
from pagellm.engine.tokenizer.byte_alphabet import CHAR_OF_BYTE
from pagellm.engine.tokenizer.checks import found

_NO_MERGE = -1


class Bpe:
    """The merges of one vocabulary.

    `merges` are written "left right" in the byte-level alphabet, best first. A byte that has no entry in
    `vocab` (some vocabularies leave out bytes that their training text never had) becomes `unk_token`, or is
    dropped where there is
    none: what the reference implementations do.

    Raises:
        CheckpointError: a merge is not a pair, or makes a token that `vocab` lacks.
    """

    def __init__(
        self,
        vocab: Mapping[str, int],
        merges: Sequence[str],
        *,
        ignore_merges: bool = False,
        unk_token: str | None = None,
    ) -> None:
        self._vocab = vocab
        self._ranks = dict(zip(merges, range(len(merges)), strict=True))
        self._ignore_merges = ignore_merges
        self._symbol_of_byte = [char if char in vocab else unk_token or "" for char in CHAR_OF_BYTE]
        self._drops_bytes = "" in self._symbol_of_byte
        for index, merge in enumerate(merges):
            left, _, right = merge.partition(" ")
            if left + right not in vocab or not left or not right:
                raise CheckpointError(
                    f"merges[{index}]: found {found(merge)}, expected two tokens with a space between that"
                    " join to a token of the vocabulary"
                )

    def encode_word(self, word: str) -> tuple[int, ...]:
        """The ids of one word.

        With `ignore_merges`, a word that is a token as it stands is that token, whatever the merges would
        make of it.

        Raises:
            UnicodeEncodeError: the word has a lone surrogate, which no UTF-8 can express.
        """
        symbols = [self._symbol_of_byte[byte] for byte in word.encode("utf-8")]
        if self._drops_bytes:
            symbols = [symbol for symbol in symbols if symbol]
        if self._ignore_merges:
            whole = self._vocab.get("".join(symbols))
            if whole is not None:
                return (whole,)
        return tuple([self._vocab[symbol] for symbol in merge_symbols(symbols, self._ranks)])


def merge_symbols(symbols: list[str], ranks: Mapping[str, int]) -> list[str]:
    """Merges adjacent symbols until no pair has a rank: lowest rank first, and of equals the leftmost.

    A heap of (rank, position) over a doubly linked list: O(n log n), so that a word of a million letters is
    no attack. An entry of the heap whose pair has changed since is recognised by `rank_at` and skipped.
    """
    size = len(symbols)
    rank_of = ranks.get
    rank_at = [rank_of(f"{left} {right}", _NO_MERGE) for left, right in pairwise(symbols)]
    rank_at.append(_NO_MERGE)
    # One integer an entry, because integers compare faster than tuples.
    heap = [rank * size + position for position, rank in enumerate(rank_at) if rank != _NO_MERGE]
    if not heap:
        return symbols
    heapify(heap)
    symbols = symbols.copy()
    next_of = list(range(1, size + 1))
    previous_of = list(range(-1, size - 1))

    while heap:
        rank, left = divmod(heappop(heap), size)
        if rank_at[left] != rank:
            continue
        right = next_of[left]
        merged = symbols[left] + symbols[right]
        symbols[left], symbols[right] = merged, ""
        rank_at[left] = rank_at[right] = _NO_MERGE
        after = next_of[left] = next_of[right]
        if after < size:
            previous_of[after] = left
            rank = rank_at[left] = rank_of(f"{merged} {symbols[after]}", _NO_MERGE)
            if rank != _NO_MERGE:
                heappush(heap, rank * size + left)
        before = previous_of[left]
        if before >= 0:
            rank = rank_at[before] = rank_of(f"{symbols[before]} {merged}", _NO_MERGE)
            if rank != _NO_MERGE:
                heappush(heap, rank * size + before)
    return [symbol for symbol in symbols if symbol]
