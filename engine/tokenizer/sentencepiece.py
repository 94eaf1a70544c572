"""BPE as SentencePiece has it: the vocabulary is its own list of merges, the best score first.

Kudo and Richardson, "SentencePiece: A simple and language independent subword tokenizer and detokenizer for
Neural Text Processing" (2018). Two neighbours can become one wherever the vocabulary has the two together; a
character that it lacks becomes its bytes' tokens, or the unknown token. Nothing here knows how the text was
normalised.
"""

import math
from collections.abc import Mapping, Sequence
from heapq import heappop, heappush
from itertools import chain, pairwise

from pagellm.engine.errors import CheckpointError
from pagellm.engine.tokenizer.fallback import Fallback
from pagellm.engine.tokenizer.long_texts import numbers
from pagellm.engine.tokenizer.segments import Segments
from pagellm.engine.tokenizer.word_cache import WordCache

NOTHING: Mapping[str, int] = {}
# Above, a heap instead of a search for the best of all pairs.
_SHORT = 64


class SentencePieceBpe:
    """Merges by score.

    vocab: the pieces that text can become, with their ids. scores: of each id; of two pieces the one with the
    higher score is made first, of equals the leftmost. whole: words that are tokens as they stand.

    Raises `CheckpointError` for a score that is no number.
    """

    def __init__(
        self,
        vocab: Mapping[str, int],
        scores: Sequence[float],
        fallback: Fallback,
        whole: Mapping[str, int] = NOTHING,
    ) -> None:
        if any(map(math.isnan, scores)):
            index = next(index for index, score in enumerate(scores) if math.isnan(score))
            raise CheckpointError(f"scores[{index}]: found nan, expected a number")
        self._vocab = vocab
        self._rank_of = {piece: -scores[id_] for piece, id_ in vocab.items()}
        self._fallback = fallback
        self._whole = whole
        self._segments = Segments(vocab)
        self._words = WordCache(self._encode_word)
        self._parts = WordCache(self._encode_part)

    @property
    def unk_id(self) -> int | None:
        """The unknown token's."""
        return self._fallback.unk_id

    @property
    def scores(self) -> dict[str, float]:
        """Of the pieces that text can become."""
        return {piece: -rank for piece, rank in self._rank_of.items()}

    def encode_word(self, text: str) -> tuple[int, ...]:
        """The ids of a text with visible spaces.

        Raises `UnicodeEncodeError` if it has a lone surrogate.
        """
        if text in self._whole:
            return (self._whole[text],)
        words = self._segments.words(text)
        ids = list(chain.from_iterable(map(self._words.__getitem__, words)))
        return tuple(self._fallback.fused(ids))

    def _encode_word(self, word: str) -> tuple[int, ...]:
        parts = self._segments.parts(word)
        if len(parts) == 1:
            return self._encode_part(word)
        return tuple(chain.from_iterable(map(self._parts.__getitem__, parts)))

    def _encode_part(self, part: str) -> tuple[int, ...]:
        id_ = self._vocab.get(part) if len(part) < 3 else None
        if id_ is not None:
            return (id_,)
        symbols = self._merged_briefly(list(part)) if len(part) <= _SHORT else self._merged(list(part))
        ids: list[int] = []
        for symbol in symbols:
            id_ = self._vocab.get(symbol)
            if id_ is None:
                ids += self._fallback.ids(symbol)
            else:
                ids.append(id_)
        return tuple(ids)

    def _merged_briefly(self, symbols: list[str]) -> list[str]:
        rank_of = self._rank_of.get
        ranks = [rank_of(left + right, math.inf) for left, right in pairwise(symbols)]
        while ranks and (best := min(ranks)) != math.inf:
            at = ranks.index(best)
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
            del ranks[at]
            if at < len(ranks):
                ranks[at] = rank_of(symbols[at] + symbols[at + 1], math.inf)
            if at:
                ranks[at - 1] = rank_of(symbols[at - 1] + symbols[at], math.inf)
        return symbols

    def _merged(self, symbols: list[str]) -> list[str]:
        """The same in O(n log n), as `MergeTable.apply` does it: for each rank a list of its positions."""
        rank_of = self._rank_of.get
        size = len(symbols)
        rank_at = [rank_of(pair, math.inf) for pair in map(str.__add__, symbols, symbols[1:])]
        positions_of: dict[float, list[int]] = {}
        for position, rank in enumerate(rank_at):
            if rank != math.inf:
                positions_of.setdefault(rank, []).append(position)
        ranks = sorted(positions_of)
        rank_at.append(math.inf)
        next_of, previous_of = numbers(1, size), numbers(-1, size)
        # Ranks whose positions are a heap: those that had to give way to a better one that their own merge
        # made, or that got another position of their own.
        heaps: set[float] = set()

        while ranks:
            rank = ranks[0]
            positions = positions_of[rank]
            if rank not in heaps:
                positions.sort(reverse=True)
            while positions and ranks[0] == rank:
                left = heappop(positions) if rank in heaps else positions.pop()
                if rank_at[left] != rank:
                    continue
                right = next_of[left]
                symbols[left] += symbols[right]
                symbols[right] = ""
                rank_at[left] = rank_at[right] = math.inf
                after = next_of[left] = next_of[right]
                before = previous_of[left]
                if after < size:
                    previous_of[after] = left
                    rank_at[left] = rank_of(symbols[left] + symbols[after], math.inf)
                if before >= 0:
                    rank_at[before] = rank_of(symbols[before] + symbols[left], math.inf)
                for place in (left, before):
                    if place < 0 or (new_rank := rank_at[place]) == math.inf:
                        continue
                    if new_rank not in positions_of:
                        positions_of[new_rank] = [place]
                        heappush(ranks, new_rank)
                    elif new_rank in heaps:
                        heappush(positions_of[new_rank], place)
                    elif new_rank == rank:
                        positions.reverse()
                        heaps.add(rank)
                        heappush(positions, place)
                    else:
                        positions_of[new_rank].append(place)
            if ranks[0] == rank:
                del positions_of[heappop(ranks)]
                heaps.discard(rank)
            elif rank not in heaps:
                positions.reverse()
                heaps.add(rank)
        return [symbol for symbol in symbols if symbol]
