"""Cuts a text where no token can cross, so that each part has the same tokens alone as within the text.

A tokenizer without a pre-tokenizer merges over the whole text. But where no entry of the vocabulary has two
characters beside each other, no token ever joins them: the parts between such places can be encoded one by
one, and remembered. (In English that is before nearly every space.)
"""

import re
from collections.abc import Iterable
from functools import cached_property
from itertools import pairwise
from operator import add

from pagellm.engine.tokenizer.decoders import SPACE
from pagellm.engine.tokenizer.long_texts import find_all, pairs_in

# No character of any text: what stands between two entries makes no pair with them.
_BETWEEN = "\udfff"


class Segments:
    """The places of one vocabulary that no token crosses.

    pieces: every entry that can be a token, or a part of one on the way to it.
    """

    def __init__(self, pieces: Iterable[str]) -> None:
        self._pieces = pieces

    def words(self, text: str) -> list[str]:
        """Parts of the text that begin with a space, quickly."""
        return find_all(self._word, text)

    def parts(self, text: str) -> list[str]:
        """The parts of the text between all those places."""
        pairs = self._pairs
        cuts = [at for at, pair in enumerate(map(add, text, text[1:]), 1) if pair not in pairs]
        if not cuts:
            return [text]
        return [text[start:stop] for start, stop in pairwise([0, *cuts, len(text)])]

    @cached_property
    def _pairs(self) -> frozenset[str]:
        """All characters that stand beside each other in an entry."""
        joined = _BETWEEN.join(self._pieces)
        return pairs_in(joined)

    @cached_property
    def _word(self) -> re.Pattern[str]:
        # The few characters that a space follows in some entry: there the part goes on.
        joined = _BETWEEN.join(self._pieces)
        followed = find_all(re.compile(f"[^{SPACE}{_BETWEEN}]{SPACE}"), joined)
        before = "".join(sorted({pair[0] for pair in followed}))
        goes_on = f"(?:(?<=[{re.escape(before)}]){SPACE}+[^{SPACE}]*)*" if before else ""
        return re.compile(f"{SPACE}*[^{SPACE}]+{goes_on}|{SPACE}+")
