"""Added tokens: those that are recognised in the text as a whole, before any pre-tokenization or merge.

`AddedVocabulary` cuts a text into added tokens and the stretches between them, by the rules of the Hugging
Face `tokenizers` library: of several tokens at one place the longest wins, tokens marked `normalized` are
looked for in the normalised text and all others in the raw text first, and `lstrip`/`rstrip` tokens swallow
the whitespace beside them. It knows nothing of what happens to the stretches.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import regex

# Unicode's White_Space property. `str.strip()` alone would also take U+001C..U+001F.
_EN_AND_EM_SPACES = "".join(map(chr, range(0x2000, 0x200B)))
_WHITESPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + _EN_AND_EM_SPACES
# What Unicode's UTS 18 calls a word character; other definitions leave out combining marks or joiners.
_WORD_CHARACTER = regex.compile(r"[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]")


@dataclass(frozen=True, slots=True)
class AddedToken:
    """One added token.

    `special` tokens control the model (end of turn and the like): text from a user can be encoded without
    recognising them, and decoding can leave them out.
    """

    id: int
    content: str
    special: bool = True
    normalized: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


class AddedVocabulary:
    """The added tokens of one tokenizer, and the search for them."""

    def __init__(self, tokens: Iterable[AddedToken], normalize: Callable[[str], str] = str) -> None:
        self.tokens = tuple(tokens)
        self._normalize = normalize

    def split(self, text: str, *, parse_special: bool) -> Iterator[str | AddedToken]:
        """The text's added tokens and the (normalised) stretches between them, in order.

        With `parse_special` false, special tokens are text like any other.
        """
        raw, normalized = self._finders if parse_special else self._finders_without_special
        for piece in raw.split(text):
            if isinstance(piece, AddedToken):
                yield piece
            else:
                yield from normalized.split(self._normalize(piece))

    @cached_property
    def _finders(self) -> tuple["_Finder", "_Finder"]:
        return self._make_finders(self.tokens)

    @cached_property
    def _finders_without_special(self) -> tuple["_Finder", "_Finder"]:
        return self._make_finders([token for token in self.tokens if not token.special])

    def _make_finders(self, tokens: Iterable[AddedToken]) -> tuple["_Finder", "_Finder"]:
        """One finder for the raw text and one for the normalised text."""
        raw: dict[str, AddedToken] = {}
        normalized: dict[str, AddedToken] = {}
        for token in tokens:
            if token.normalized:
                normalized[self._normalize(token.content)] = token
            else:
                raw[token.content] = token
        return _Finder(raw), _Finder(normalized)


class _Finder:
    """Finds any of the given contents, leftmost first and then longest."""

    def __init__(self, token_of: dict[str, AddedToken]) -> None:
        self._token_of = token_of
        # The standard library's `re` skips by the alternatives' common prefix ("<|"); `regex` does not.
        longest_first = sorted(token_of, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if token_of else None

    def split(self, text: str) -> Iterator[str | AddedToken]:
        done = 0
        for match in self._pattern.finditer(text) if self._pattern else ():
            token = self._token_of[match.group()]
            start, stop = match.span()
            if start < done or (token.single_word and _touches_a_word(text, start, stop)):
                continue
            if token.lstrip:
                start = done + len(text[done:start].rstrip(_WHITESPACE))
            if token.rstrip:
                while stop < len(text) and text[stop] in _WHITESPACE:
                    stop += 1
            if done < start:
                yield text[done:start]
            yield token
            done = stop
        if done < len(text):
            yield text[done:]


def _touches_a_word(text: str, start: int, stop: int) -> bool:
    before = text[start - 1] if start else ""
    after = text[stop] if stop < len(text) else ""
    return _WORD_CHARACTER.search(before + after) is not None
