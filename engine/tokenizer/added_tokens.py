"""Added tokens: those that are recognised in the text as a whole, before any pre-tokenization or merge.

`AddedVocabulary` cuts a text into added tokens and the stretches between them, by the rules of the Hugging
Face `tokenizers` library: of several tokens at one place the longest wins, tokens marked `normalized` are
looked for in the normalised text and all others in the raw text first, and `lstrip`/`rstrip` tokens swallow
the whitespace beside them. It knows nothing of what happens to the stretches.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import regex

from pagellm.engine.tokenizer.normalization import NO_NORMALIZER, Normalizer, Start

# Unicode's White_Space property. `str.strip()` alone would also take U+001C..U+001F.
_EN_AND_EM_SPACES = "".join(map(chr, range(0x2000, 0x200B)))
WHITESPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + _EN_AND_EM_SPACES
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

    def __init__(self, tokens: Iterable[AddedToken], normalize: Normalizer = NO_NORMALIZER) -> None:
        self.tokens = tuple(tokens)
        self._normalize = normalize
        raw: dict[str, AddedToken] = {}
        normalized: dict[str, AddedToken] = {}
        # Where two contents are normalised to one, a special token goes first.
        for token in sorted(self.tokens, key=lambda token: not token.special):
            if token.normalized:
                normalized.setdefault(normalize(token.content), token)
            else:
                raw[token.content] = token
        self._raw, self._normalized = Finder(raw), Finder(normalized)

    @property
    def texts(self) -> dict[int, str]:
        """What each token is written as, by id: one that is looked for in the normalised text, as there."""
        return {
            token.id: self._normalize(token.content) if token.normalized else token.content
            for token in self.tokens
        }

    def split(
        self, text: str, *, parse_special: bool, start: Start = Start.TEXT
    ) -> Iterator[tuple[str, Start] | AddedToken]:
        """The text's added tokens and the (normalised) stretches between them with their starts, in order.

        With `parse_special` false, special tokens are text like any other. start: of the text itself.
        """
        for piece in self._raw.split(text, parse_special):
            if isinstance(piece, AddedToken):
                yield piece
            else:
                for part in self._normalized.split(self._normalize(piece, start), parse_special):
                    yield part if isinstance(part, AddedToken) else (part, start)
                    start = Start.TOKEN
            start = Start.TOKEN


class Finder:
    """Finds any of the given contents, leftmost first and then longest."""

    def __init__(self, token_of: dict[str, AddedToken]) -> None:
        self._token_of = token_of
        lengths: dict[str, set[int]] = {}
        for content in token_of:
            lengths.setdefault(content[0], set()).add(len(content))
        self._lengths_of_first = {first: sorted(found, reverse=True) for first, found in lengths.items()}
        self._candidate = _candidates(token_of) if token_of else None

    def split(self, text: str, parse_special: bool) -> Iterator[str | AddedToken]:
        done = 0
        # Where the last run of whitespace that was looked through ends.
        space_stop = 0
        for start, content in self._matches(text):
            token = self._token_of[content]
            stop = start + len(content)
            if token.special and not parse_special:
                continue
            if token.single_word and _touches_a_word(text, start, stop):
                continue
            # A token of whitespace that the one before has swallowed (`rstrip`) is there all the same, unless
            # it takes whitespace on its left too: then nothing is left of it.
            if token.lstrip:
                start = done + len(text[done:start].rstrip(WHITESPACE))
            if token.rstrip:
                if space_stop < stop:
                    space_stop = stop
                    while space_stop < len(text) and text[space_stop] in WHITESPACE:
                        space_stop += 1
                stop = space_stop if text[stop : stop + 1] in WHITESPACE else stop
            if done < start:
                yield text[done:start]
            if start < stop:
                yield token
            done = stop
        if done < len(text):
            yield text[done:]

    def _matches(self, text: str) -> Iterator[tuple[int, str]]:
        """Each match's start and content; none begins before the end of the one before it."""
        if self._candidate is None:
            return
        done = 0
        for candidate in self._candidate.finditer(text):
            start = candidate.start()
            if start < done:
                continue
            for length in self._lengths_of_first[text[start]]:
                content = text[start : start + length]
                if content in self._token_of:
                    yield start, content
                    done = start + len(content)
                    break


def _candidates(contents: Iterable[str]) -> re.Pattern[str]:
    """The places where one may begin: its first character, before its second."""
    seconds: dict[str, set[str]] = {}
    for content in contents:
        seconds.setdefault(content[0], set()).add(content[1:2])
    # Of those with the same followers a set.
    firsts: dict[str, str] = {}
    for first, following in seconds.items():
        behind = "" if "" in following else f"(?=[{re.escape(''.join(sorted(following)))}])"
        firsts[behind] = firsts.get(behind, "") + first
    return re.compile("|".join([f"[{re.escape(first)}]{behind}" for behind, first in firsts.items()]))


def _touches_a_word(text: str, start: int, stop: int) -> bool:
    before = text[start - 1] if start else ""
    after = text[stop] if stop < len(text) else ""
    return _WORD_CHARACTER.search(before + after) is not None
