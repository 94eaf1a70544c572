"""Remembers the ids of words: they repeat so much that nearly all of `encode` is look-ups here."""

from collections.abc import Callable

_MAX_WORD_CHARS = 32


class WordCache(dict[str, tuple[int, ...]]):
    """Word -> ids, by a function that is asked once for each.

    Bounded both ways: a long word is not kept, and a full cache starts again from empty, which costs less
    than keeping order.
    """

    _MAX_WORDS = 1 << 17

    def __init__(self, encode_word: Callable[[str], tuple[int, ...]]) -> None:
        super().__init__()
        self._encode_word = encode_word

    def __missing__(self, word: str) -> tuple[int, ...]:
        ids = self._encode_word(word)
        if len(word) <= _MAX_WORD_CHARS:
            if len(self) >= self._MAX_WORDS:
                self.clear()
            self[word] = ids
        return ids
