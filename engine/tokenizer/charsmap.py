"""SentencePiece's precompiled character map: which stretches of a text are replaced by which.

It is a double array (Aoe 1989, as darts-clone lays it out: a 32-bit unit a node) over UTF-8, whose values
are offsets into a list of replacements that end with a zero byte. There are hundreds of thousands of keys, so
it is walked where it lies, and what a single character leads to is remembered.
"""

import re
from array import array
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import regex

from pagellm.engine.errors import CheckpointError

_LABEL = 0x800000FF
_HAS_LEAF = 0x100
_ASCII = [chr(code) for code in range(128)]
_NOT_ASCII = r"[^\x00-\x7f]"
_GRAPHEME = regex.compile(r"\X", regex.V1)
# Longer graphemes are not looked for by the `tokenizers` library.
_MAX_GRAPHEME_BYTES = 5


class _Place(NamedTuple):
    """Where a beginning of keys leads to; what replaces it, if it is a key itself."""

    node: int
    replacement: str | None


class Charsmap:
    """Replaces stretches of a text.

    data: the map; empty: nothing is replaced. where: its place, for errors. kept: stretches that stay as they
    are, before all others.

    Raises `CheckpointError` if the bytes are no such map.
    """

    def __init__(self, data: bytes, where: str, kept: Iterable[str] = ()) -> None:
        size = int.from_bytes(data[:4], "little")
        if data and (size < 4 or size % 4 or 4 + size > len(data)):
            raise CheckpointError(
                f"{where}: found a trie of {size} bytes in {len(data)}, expected a precompiled character map"
            )
        self._where = where
        self._units = array("I", data[4 : 4 + size] or bytes(4))
        self._replacements = data[4 + size :]
        self._kept = frozenset(kept)
        self._kept_lengths = sorted({len(key) for key in self._kept}, reverse=True)
        self._root = _Place(self._children(0), None)
        self._of_char = lru_cache(1 << 16)(self._walk_char)
        self._candidate = re.compile("|".join([*self._ascii_candidates(), _NOT_ASCII]))

    def replace_longest(self, text: str) -> str:
        """As SentencePiece: from left to right the longest stretch that there is."""
        out: list[str] = []
        done = 0
        for match in self._candidate.finditer(text):
            start = match.start()
            if start < done:
                continue
            stop, replacement = self._longest(text, start)
            if replacement is not None:
                out += [text[done:start], replacement]
                done = stop
        return "".join([*out, text[done:]])

    def replace_graphemes(self, text: str) -> str:
        """As the `tokenizers` library: a short grapheme by what a beginning of it is replaced by.

        The whole grapheme gives way, to the first that is found; a longer one is replaced by characters.
        """
        if not self._candidate.search(text):
            return text
        replaced: str = _GRAPHEME.sub(self._of_grapheme, text)
        return replaced

    def _longest(self, text: str, start: int) -> tuple[int, str | None]:
        """Where the longest key at this place ends, and its replacement, if there is one."""
        for length in self._kept_lengths:
            if text[start : start + length] in self._kept:
                return start + length, text[start : start + length]
        place = self._of_char(text[start])
        stop, replacement = start + 1, place.replacement if place else None
        at = start
        while place is not None and (at := at + 1) < len(text):
            place = self._walk(place.node, text[at])
            if place is not None and place.replacement is not None:
                stop, replacement = at + 1, place.replacement
        return stop, replacement

    def _of_grapheme(self, match: regex.Match[str]) -> str:
        grapheme: str = match.group()
        if len(grapheme.encode()) <= _MAX_GRAPHEME_BYTES:
            place = self._of_char(grapheme[0])
            for char in (*grapheme[1:], ""):
                if place is None or place.replacement is not None:
                    break
                place = self._walk(place.node, char) if char else None
            if place is not None and place.replacement is not None:
                return place.replacement
        if len(grapheme) == 1 and grapheme.isascii():
            return grapheme
        return "".join([self._of_single(char) for char in grapheme])

    def _of_single(self, char: str) -> str:
        place = self._of_char(char)
        return char if place is None or place.replacement is None else place.replacement

    def _ascii_candidates(self) -> list[str]:
        """Patterns of the places in ASCII where something may be replaced.

        Most letters begin a key, such as an "a" with a combining mark: what follows them tells.
        """
        places = {char: place for char in _ASCII if (place := self._of_char(char)) is not None}
        singles = {char for char, place in places.items() if place.replacement is not None}
        singles |= {key for key in self._kept if len(key) == 1}
        longer = {
            (char, second)
            for char, place in places.items()
            for second in _ASCII
            if char not in singles and self._walk(place.node, second) is not None
        }
        longer |= {(key[0], key[1]) for key in self._kept if len(key) > 1}
        patterns = [_set_of(singles)] if singles else []
        if firsts := places.keys() - singles:
            patterns.append(f"{_set_of(firsts)}(?={_NOT_ASCII})")
        if longer:
            firsts, seconds = ({pair[0] for pair in longer}, {pair[1] for pair in longer})
            patterns.append(f"{_set_of(firsts)}(?={_set_of(seconds)})")
        return patterns

    def _walk_char(self, char: str) -> _Place | None:
        return self._walk(self._root.node, char)

    def _walk(self, node: int, char: str) -> _Place | None:
        """The place behind another character, if keys go on there."""
        units = self._units
        place = None
        for byte in char.encode("utf-8", "surrogatepass"):
            child = node ^ byte
            if byte == 0 or child >= len(units) or units[child] & _LABEL != byte:
                return None
            node = self._children(child)
            place = child
        if place is None:
            return None
        replacement = None
        if units[place] & _HAS_LEAF and node < len(units):
            replacement = self._replacement(units[node] & 0x7FFFFFFF)
        return _Place(node, replacement)

    def _children(self, at: int) -> int:
        unit = self._units[at]
        return at ^ ((unit >> 10) << ((unit & 0x200) >> 6))

    def _replacement(self, start: int) -> str:
        try:
            return self._replacements[start : self._replacements.index(0, start)].decode()
        except (UnicodeDecodeError, ValueError) as error:
            raise CheckpointError(
                f"{self._where}: cannot be read at byte {start} of the replacements: {error}, expected UTF-8"
                " that ends with a zero byte"
            ) from error


def _set_of(chars: Iterable[str]) -> str:
    return f"[{re.escape(''.join(sorted(chars)))}]"
