"""Unigram: of all ways to put a text together from pieces, the one with the highest sum of scores.

Kudo, "Subword Regularization: Improving Neural Network Translation Models with Multiple Subword Candidates"
(2018); the search is Viterbi's. Sums are rounded, and where two ways are as good as each other the rounding
decides: so each sum here is made in the reference's order and precision, from the beginning of the text. That
a part of a text can be remembered all the same is because sums of one binade are rounded to multiples of one
unit: within it, the best way depends only on whether the sum so far is an even or an odd one of them.
"""

import struct
from collections.abc import Mapping, Sequence
from enum import Enum
from math import frexp, isnan

from pagellm.engine.errors import CheckpointError
from pagellm.engine.tokenizer.fallback import Fallback
from pagellm.engine.tokenizer.segments import Segments

_UNK_PENALTY = 10.0
_MAX_PARTS = 1 << 18
# So many characters tell how long a piece can be that begins with them; shorter ones are tried anyway.
_BEGINNING = 3
_SHORT_LENGTHS = tuple(range(1, _BEGINNING))
# In the place of the exponent of nothing.
_OF_ZERO = 1 << 20
_MAX_PART_CHARS = 32


class Precision(Enum):
    """How sums are kept, by the bits of their significands."""

    SINGLE = 24
    DOUBLE = 53


class Unigram:
    """The most probable pieces.

    vocab: the pieces that text can become, with their ids. scores: of each id. unk_score: of a character that
    is no piece. fallback: what becomes of those characters.

    Raises `CheckpointError` for a score that is no number.
    """

    def __init__(
        self,
        vocab: Mapping[str, int],
        scores: Sequence[float],
        unk_score: float,
        fallback: Fallback,
        *,
        precision: Precision = Precision.DOUBLE,
    ) -> None:
        if any(map(isnan, scores)):
            index = next(index for index, score in enumerate(scores) if isnan(score))
            raise CheckpointError(f"scores[{index}]: found nan, expected a number")
        self._of_piece = {piece: (id_, float(scores[id_])) for piece, id_ in vocab.items()}
        self._unk_score = unk_score
        self._fallback = fallback
        self._bits = precision.value
        self._segments = Segments(vocab)
        self._lengths = _lengths_by_beginning(vocab)
        costs = [score for _, score in self._of_piece.values()]
        self._highest = max(0.0, *costs, unk_score) if costs else 0.0
        self._lowest = min(0.0, *costs, unk_score) if costs else unk_score
        # By the part, and the binade and the parity of the sum before it: the ids, and what the sum grows by.
        self._known: dict[tuple[str, int, int], tuple[list[int], float]] = {}
        self._parts: dict[str, list[str]] = {}

    def encode_word(self, text: str) -> tuple[int, ...]:
        """The ids of a normalised text.

        Raises `UnicodeEncodeError` if it has a lone surrogate.
        """
        total = 0.0
        ids: list[int] = []
        known, bits = self._known, self._bits
        for word in self._segments.words(text):
            for part in self._parts_of(word):
                if len(part) == 1:
                    total = self._add_character(part, total, ids)
                    continue
                fraction, exponent = frexp(total) if total else (0.0, _OF_ZERO)
                key = (part, exponent, int(fraction * (1 << bits)) & 1)
                entry = known.get(key)
                if entry is not None and self._stays_in_binade(part, total, exponent):
                    ids += entry[0]
                    total += entry[1]
                    continue
                part_ids, after = self._search(part, total)
                ids += part_ids
                if len(part) <= _MAX_PART_CHARS and self._stays_in_binade(part, total, exponent):
                    if len(known) >= _MAX_PARTS:
                        known.clear()
                    known[key] = part_ids, after - total
                total = after
        return tuple(self._fallback.fused(ids))

    def _add_character(self, char: str, total: float, ids: list[int]) -> float:
        """Adds a part of one character, which has no choice; returns the sum behind it."""
        found = self._of_piece.get(char)
        if found is None:
            ids += self._fallback.ids(char)
            after = total + self._unk_score
        else:
            ids.append(found[0])
            after = total + found[1]
        return as_single(after) if self._bits == Precision.SINGLE.value else after

    def _parts_of(self, word: str) -> list[str]:
        parts = self._parts.get(word)
        if parts is None:
            parts = self._segments.parts(word)
            if len(word) <= _MAX_PART_CHARS:
                if len(self._parts) >= _MAX_PARTS:
                    self._parts.clear()
                self._parts[word] = parts
        return parts

    def _stays_in_binade(self, part: str, total: float, exponent: int) -> bool:
        """Whether every sum on the way through the part is rounded as `total` is."""
        if total >= 0:
            return total == 0
        outermost = -total - self._lowest * len(part)
        innermost = -total - self._highest * len(part)
        return outermost < 2.0**exponent and innermost >= 2.0 ** (exponent - 1)

    def _search(self, part: str, total: float) -> tuple[list[int], float]:
        """The best ids of a part, and the sum behind it. total: the sum before it."""
        of_piece, lengths_of = self._of_piece.get, self._lengths.get
        single = self._bits == Precision.SINGLE.value
        size = len(part)
        sums: list[float] = [total] * (size + 1)
        starts = [-1] * (size + 1)
        ids = [-1] * (size + 1)
        for start in range(size):
            here = sums[start]
            has_single = False
            for length in lengths_of(part[start : start + _BEGINNING], _SHORT_LENGTHS):
                stop = start + length
                if stop > size:
                    break
                found = of_piece(part[start:stop])
                if found is None:
                    continue
                id_, score = found
                candidate = as_single(here + score) if single else here + score
                if starts[stop] < 0 or candidate > sums[stop]:
                    sums[stop] = candidate
                    starts[stop], ids[stop] = start, id_
                if stop == start + 1:
                    has_single = True
            if not has_single:
                stop = start + 1
                candidate = as_single(here + self._unk_score) if single else here + self._unk_score
                if starts[stop] < 0 or candidate > sums[stop]:
                    sums[stop] = candidate
                    starts[stop], ids[stop] = start, -1
        found_ids: list[list[int]] = []
        stop = size
        while stop > 0:
            start = starts[stop]
            found_ids.append([ids[stop]] if ids[stop] >= 0 else self._fallback.ids(part[start:stop]))
            stop = start
        return [id_ for each in reversed(found_ids) for id_ in each], sums[size]


def unk_score(scores: Sequence[float]) -> float:
    """The score of a character that is no piece. scores: those that it is to be below."""
    return min(scores, default=0.0) - _UNK_PENALTY


def _lengths_by_beginning(vocab: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """The lengths that pieces can have, by their first characters."""
    lengths: dict[str, set[int]] = {}
    for piece in vocab:
        lengths.setdefault(piece[:_BEGINNING], set(_SHORT_LENGTHS)).add(len(piece))
    return {beginning: tuple(sorted(found)) for beginning, found in lengths.items()}


_SINGLE = struct.Struct("f")


def as_single(value: float) -> float:
    """A number in single precision."""
    rounded: float = _SINGLE.unpack(_SINGLE.pack(value))[0]
    return rounded
