"""Byte-pair encoding of one word: its bytes are merged pair by pair, the pair of lowest rank first.

Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units" (2016), on bytes as in GPT-2.
`Bpe` knows the vocabulary and the merges; it does not know how a text was cut into words.
"""

from collections.abc import Mapping, Sequence
from heapq import heappop, heappush
from itertools import pairwise

from pagellm.engine.errors import CheckpointError, found
from pagellm.engine.tokenizer.byte_alphabet import CHAR_OF_BYTE

_NO_MERGE = -1
_MERGED_AWAY = -1


class Bpe:
    """The merges of one vocabulary.

    `merges` are written "left right" in the byte-level alphabet, best first. A byte that has no entry in
    `vocab` (some vocabularies leave out bytes that their training text never had) becomes `unk_token`, or is
    dropped where there is none: what the reference implementations do.

    Raises `CheckpointError` if a merge is not a pair of tokens of `vocab`, or makes a token that `vocab`
    lacks.
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
        self._merges = MergeTable(vocab, merges)
        self._ignore_merges = ignore_merges
        symbols = [char if char in vocab else unk_token for char in CHAR_OF_BYTE]
        self._id_of_byte = [None if symbol is None else vocab[symbol] for symbol in symbols]

    def encode_word(self, word: str) -> tuple[int, ...]:
        """The ids of one word.

        With `ignore_merges`, a word that is a token as it stands is that token, whatever the merges would
        make of it.

        Raises `UnicodeEncodeError` if the word has a lone surrogate, which no UTF-8 can express.
        """
        data = word.encode("utf-8")
        if self._ignore_merges:
            whole = self._vocab.get("".join([CHAR_OF_BYTE[byte] for byte in data]))
            if whole is not None:
                return (whole,)
        ids = [id_ for byte in data if (id_ := self._id_of_byte[byte]) is not None]
        return tuple(self._merges.apply(ids))


class MergeTable:
    """The merges as numbers: a pair of ids is one integer, `left * stride + right`."""

    def __init__(self, vocab: Mapping[str, int], merges: Sequence[str]) -> None:
        self._stride = max(vocab.values(), default=0) + 1
        self._rank_of_pair: dict[int, int] = {}
        self._merged: list[int] = []
        for rank, merge in enumerate(merges):
            left, _, right = merge.partition(" ")
            try:
                self._rank_of_pair[vocab[left] * self._stride + vocab[right]] = rank
                self._merged.append(vocab[left + right])
            except KeyError:
                raise CheckpointError(
                    f"merges[{rank}]: found {found(merge)}, expected two tokens of the vocabulary with a"
                    " space between that join to a token of the vocabulary"
                ) from None

    def apply(self, ids: list[int]) -> list[int]:
        """Merges adjacent ids until no pair has a rank: lowest rank first, and of equals the leftmost.

        A heap of the ranks that are there, and for each rank its positions, sorted when its turn comes:
        O(n log n), so that a word of a million letters is no attack. A position whose pair has changed since
        is recognised by `rank_at` and skipped.
        """
        stride, rank_of = self._stride, self._rank_of_pair.get
        rank_at = [rank_of(left * stride + right, _NO_MERGE) for left, right in pairwise(ids)]
        positions_of: dict[int, list[int]] = {}
        for position, rank in enumerate(rank_at):
            if rank != _NO_MERGE:
                positions_of.setdefault(rank, []).append(position)
        ranks = sorted(positions_of)
        size = len(ids)
        rank_at.append(_NO_MERGE)
        ids = ids.copy()
        next_of = list(range(1, size + 1))
        previous_of = list(range(-1, size - 1))
        # Ranks that had to give way to a lower one that their own merge made: their positions are a heap.
        # A merge never makes its own pair again, so that all other lists are whole when their turn comes.
        resumed: set[int] = set()

        while ranks:
            rank = ranks[0]
            positions = positions_of[rank]
            is_heap = rank in resumed
            if not is_heap:
                positions.sort(reverse=True)
            merged = self._merged[rank]
            while positions and ranks[0] == rank:
                left = heappop(positions) if is_heap else positions.pop()
                if rank_at[left] != rank:
                    continue
                right = next_of[left]
                ids[left], ids[right] = merged, _MERGED_AWAY
                rank_at[left] = rank_at[right] = _NO_MERGE
                after = next_of[left] = next_of[right]
                if after < size:
                    previous_of[after] = left
                    new_rank = rank_at[left] = rank_of(merged * stride + ids[after], _NO_MERGE)
                    if new_rank != _NO_MERGE:
                        if new_rank not in positions_of:
                            positions_of[new_rank] = [left]
                            heappush(ranks, new_rank)
                        elif new_rank not in resumed:
                            positions_of[new_rank].append(left)
                        else:
                            heappush(positions_of[new_rank], left)
                before = previous_of[left]
                if before >= 0:
                    new_rank = rank_at[before] = rank_of(ids[before] * stride + merged, _NO_MERGE)
                    if new_rank != _NO_MERGE:
                        if new_rank not in positions_of:
                            positions_of[new_rank] = [before]
                            heappush(ranks, new_rank)
                        elif new_rank not in resumed:
                            positions_of[new_rank].append(before)
                        else:
                            heappush(positions_of[new_rank], before)
            if ranks[0] == rank:
                del positions_of[heappop(ranks)]
                resumed.discard(rank)
            elif not is_heap:
                positions.reverse()
                resumed.add(rank)
        return [id_ for id_ in ids if id_ != _MERGED_AWAY]
