"""Looks through long texts a little at a time: `re` lets no other thread go on while it looks.

Of use to patterns of which each match stands for itself: none looks behind or ahead by more than a character.
"""

import re
from array import array
from collections.abc import Iterator
from operator import add

_AT_ONCE = 1 << 16  # characters, or numbers: a millisecond or two


def has(pattern: re.Pattern[str], text: str) -> bool:
    """Whether there is a match, of one character."""
    return any(pattern.search(text, at, at + _AT_ONCE) for at in range(0, len(text), _AT_ONCE))


def spans(pattern: re.Pattern[str], text: str) -> Iterator[tuple[int, int]]:
    """Where the matches are, of a set's characters one after another. A long one may come in two."""
    for at in range(0, len(text), _AT_ONCE):
        for match in pattern.finditer(text, at, at + _AT_ONCE):
            yield match.span()


def find_all(pattern: re.Pattern[str], text: str) -> list[str]:
    """What `pattern.findall` gives; a match with other threads' turns between."""
    if len(text) <= _AT_ONCE:
        return pattern.findall(text)
    return [match.group() for match in pattern.finditer(text)]


def pairs_in(text: str) -> frozenset[str]:
    """All characters that stand beside each other."""
    pairs: set[str] = set()
    for at in range(0, len(text), _AT_ONCE):
        part = text[at : at + _AT_ONCE + 1]
        pairs.update(map(add, part, part[1:]))
    return frozenset(pairs)


def numbers(first: int, count: int) -> "array[int]":
    """The integers from `first` on: an array, which is also given back at once."""
    found = array("i")
    for start in range(first, first + count, _AT_ONCE):
        found.extend(range(start, min(start + _AT_ONCE, first + count)))
    return found
