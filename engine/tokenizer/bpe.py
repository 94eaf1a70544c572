"""Byte-pair encoding of one word: its symbols are merged pair by pair, the pair of lowest rank first.

Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units" (2016): on bytes as in GPT-2
(`Bpe`), or on characters (`CharacterBpe`). They know the vocabulary and the merges; they do not know how a
text was cut into words.
"""

from collections.abc import Collection, Mapping, Sequence
from heapq import heappop, heappush
from itertools import chain, pairwise

from pagellm.engine.errors import CheckpointError, found
from pagellm.engine.tokenizer.byte_alphabet import CHAR_OF_BYTE, token_to_bytes
from pagellm.engine.tokenizer.fallback import Fallback
from pagellm.engine.tokenizer.long_texts import numbers
from pagellm.engine.tokenizer.segments import Segments
from pagellm.engine.tokenizer.word_cache import WordCache

# Best first, each "left right" or a pair.
Merges = Sequence[str] | Sequence[Sequence[str]]

_SHORT = 48
_NO_MERGE = -1
_MERGED_AWAY = -1


class Bpe:
    """The merges of one vocabulary.

    `merges` are written in the byte-level alphabet, best first. A byte that has no entry in
    `vocab` (some vocabularies leave out bytes that their training text never had) becomes `unk_token`, or is
    dropped where there is none: what the reference implementations do. in_alphabet: whether words come in the
    byte-level alphabet, too.

    Raises `CheckpointError` if a merge is not a pair of tokens of `vocab`, or makes a token that `vocab`
    lacks.
    """

    def __init__(
        self,
        vocab: Mapping[str, int],
        merges: Merges,
        *,
        ignore_merges: bool = False,
        unk_token: str | None = None,
        in_alphabet: bool = False,
    ) -> None:
        self._vocab = vocab
        self._merges = MergeTable(vocab, merges)
        self.ignore_merges = ignore_merges
        self._in_alphabet = in_alphabet
        symbols = [char if char in vocab else unk_token for char in CHAR_OF_BYTE]
        self._id_of_byte = [None if symbol is None else vocab[symbol] for symbol in symbols]

    @property
    def drops_nothing(self) -> bool:
        """Whether each byte of a word is in one of its tokens."""
        return None not in self._id_of_byte

    def encode_word(self, word: str) -> tuple[int, ...]:
        """The ids of one word.

        With `ignore_merges`, a word that is a token as it stands is that token, whatever the merges would
        make of it.

        Raises `UnicodeEncodeError` if the word has a lone surrogate, which no UTF-8 can express.
        """
        data = token_to_bytes(word) if self._in_alphabet else word.encode("utf-8")
        if self.ignore_merges:
            whole = self._vocab.get("".join([CHAR_OF_BYTE[byte] for byte in data]))
            if whole is not None:
                return (whole,)
        ids = [id_ for byte in data if (id_ := self._id_of_byte[byte]) is not None]
        return tuple(self._merges.apply(ids))


class CharacterBpe:
    """Merges of characters, as the conversions of SentencePiece's vocabularies have them.

    `merges` are written as those of `Bpe`, with characters as they are. whole_words: as `ignore_merges` of
    `Bpe`. fuse_unk: whether unknown tokens that follow each other become one. A word may be a whole text: it
    is cut where no token can cross.

    Raises `CheckpointError` as `MergeTable`.
    """

    def __init__(
        self,
        vocab: Mapping[str, int],
        merges: Merges,
        fallback: Fallback,
        *,
        ignore_merges: bool = False,
        fuse_unk: bool = False,
    ) -> None:
        self._vocab = vocab
        self._merges = MergeTable(vocab, merges)
        self._fallback = fallback
        self._ignore_merges = ignore_merges
        self._fuse_unk = fuse_unk
        self._segments = None if self._merges.touches(fallback.all_ids) else Segments(vocab)
        self._words = WordCache(self._encode_word)
        self._parts = WordCache(self._encode_part)

    def encode_word(self, word: str) -> tuple[int, ...]:
        """The ids of one word.

        Raises `UnicodeEncodeError` if the word has a lone surrogate.
        """
        if self._ignore_merges and (whole := self._vocab.get(word)) is not None:
            return (whole,)
        if self._segments is None:
            return self._fused(self._encode_part(word))
        words = self._segments.words(word)
        return self._fused(tuple(chain.from_iterable(map(self._words.__getitem__, words))))

    @property
    def unk_id(self) -> int | None:
        """The unknown token's."""
        return self._fallback.unk_id

    def _fused(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self._fallback.fused(list(ids))) if self._fuse_unk else ids

    def _encode_word(self, word: str) -> tuple[int, ...]:
        assert self._segments is not None
        parts = self._segments.parts(word)
        if len(parts) == 1:
            return self._encode_part(word)
        return tuple(chain.from_iterable(map(self._parts.__getitem__, parts)))

    def _encode_part(self, part: str) -> tuple[int, ...]:
        ids: list[int] = []
        for char in part:
            id_ = self._vocab.get(char)
            if id_ is None:
                ids += self._fallback.ids(char)
            else:
                ids.append(id_)
        return tuple(self._merges.apply(ids)) if len(ids) > 1 else tuple(ids)


def _is_merge(vocab: Mapping[str, int], half: Sequence[str]) -> bool:
    return len(half) == 2 and half[0] in vocab and half[1] in vocab and half[0] + half[1] in vocab


class MergeTable:
    """The merges as numbers: a pair of ids is one integer, `left * stride + right`."""

    def __init__(self, vocab: Mapping[str, int], merges: Merges) -> None:
        self._stride = stride = max(vocab.values(), default=0) + 1
        halves = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in merges]
        try:
            pairs = [vocab[left] * stride + vocab[right] for left, right in halves]
            self._merged = [vocab[left + right] for left, right in halves]
        except (KeyError, ValueError):
            rank = next(rank for rank, half in enumerate(halves) if not _is_merge(vocab, half))
            raise CheckpointError(
                f"merges[{rank}]: found {found(merges[rank])}, expected two tokens of the vocabulary with a"
                " space between that join to a token of the vocabulary"
            ) from None
        self._rank_of_pair = dict(zip(pairs, range(len(pairs)), strict=True))

    def touches(self, ids: Collection[int]) -> bool:
        """Whether one of the ids is a part of any pair."""
        stride = self._stride
        wanted = frozenset(ids)
        return any(pair % stride in wanted or pair // stride in wanted for pair in self._rank_of_pair)

    def apply(self, ids: list[int]) -> list[int]:
        """Merges adjacent ids until no pair has a rank: lowest rank first, and of equals the leftmost."""
        return self._apply_briefly(ids) if len(ids) <= _SHORT else self._apply(ids)

    def _apply_briefly(self, ids: list[int]) -> list[int]:
        """By looking through all ranks for each merge, which is the quickest for a few."""
        stride, rank_of, none = self._stride, self._rank_of_pair.get, len(self._merged)
        ranks = [rank_of(left * stride + right, none) for left, right in pairwise(ids)]
        ids = ids.copy()
        while ranks and (best := min(ranks)) != none:
            at = ranks.index(best)
            merged = self._merged[best]
            ids[at : at + 2] = [merged]
            del ranks[at]
            if at < len(ranks):
                ranks[at] = rank_of(merged * stride + ids[at + 1], none)
            if at:
                ranks[at - 1] = rank_of(ids[at - 1] * stride + merged, none)
        return ids

    def _apply(self, ids: list[int]) -> list[int]:
        """The same for many.

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
        next_of, previous_of = numbers(1, size), numbers(-1, size)
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
