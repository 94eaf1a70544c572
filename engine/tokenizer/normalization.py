"""What happens to a text before it is cut: the steps of a normalizer, and Unicode's normal forms.

The normal forms are as the `tokenizers` library makes them, and in linear time. Its tables are those of
Unicode 9: what a later version made a combining mark, or a part of a composed character, it leaves alone and
sorts nothing across. Python's tables are newer, so the text is cut there. And Python sorts combining marks by
insertion, which takes minutes where a text is all marks.
"""

import re
from collections.abc import Callable, Sequence
from enum import Enum, auto
from itertools import groupby
from typing import Literal
from unicodedata import combining, normalize

import regex

from pagellm.engine.tokenizer.long_texts import spans

# After Unicode 9: combining marks, then what is compatible with other characters, and the letters of composed
# ones.
_UNKNOWN_TO_THE_LIBRARY = re.compile(
    "["
    "\u05c8\u05c9\u07fd\u0897-\u089f\u08ca-\u08d3\u09fe\u0c3c\u0d3b\u0d3c\u0eba\u1715\u1abf-\u1af0"
    "\u1df6-\u1dfa\ua82c\U00010d24-\U00010d27\U00010d69-\U00010d6d\U00010eab\U00010eac\U00010ecb-\U00010ecf"
    "\U00010ef0-\U00010efb\U00010efd-\U00010eff\U00010f46-\U00010f50\U00010f82-\U00010f85\U00011070\U0001133b"
    "\U000113ce-\U000113d0\U0001145e\U00011839\U0001183a\U0001193d\U0001193e\U00011943\U000119e0\U00011a34"
    "\U00011a47\U00011a99\U00011d42\U00011d44\U00011d45\U00011d97\U00011f41\U00011f42\U0001612f\U00016ff0"
    "\U00016ff1\U0001d127\U0001d128\U0001d250-\U0001d252\U0001d25b\U0001d25c\U0001d25f\U0001d280\U0001d281"
    "\U0001e08f\U0001e130-\U0001e136\U0001e2ae\U0001e2ec-\U0001e2ef\U0001e4ec-\U0001e4ef\U0001e5ee\U0001e5ef"
    "\U0001e6e3\U0001e6e6\U0001e6ee\U0001e6ef\U0001e6f5"
    "\u32ff\ua7f2-\ua7f4\uab69\U00010781-\U000107ba\U0001f16c\U0001fbf0-\U0001fbf9"
    "\U000105c0-\U000105ff\U00011380-\U000113ff\U00011930-\U00011938\U00016100-\U0001613f\U00016d40-\U00016d7f"
    "]+"
)
_MOST_COMPOSED = 4  # characters that are one in normal form C, such as U+1FAF
_LONG_RUN_OF_MARKS = regex.compile(r"\p{M}{32,}+")


class Start(Enum):
    """Where a stretch of text begins: what is put before a text depends on it."""

    TEXT = auto()  # with the text
    TOKEN = auto()  # behind an added token
    WITHIN = auto()  # within a text: nothing is put before it


class Normalizer:
    """Steps from text to text, in turn; a step that is a string is put before the text."""

    def __init__(self, steps: Sequence[Callable[[str], str] | str] = ()) -> None:
        self._steps = tuple(steps)

    def __call__(self, text: str, start: Start = Start.TEXT) -> str:
        """The normalised text."""
        for step in self._steps:
            if not isinstance(step, str):
                text = step(text)
            elif text and start is not Start.WITHIN:
                text = step + text
        return text

    @property
    def most_to_one(self) -> int | None:
        """Of how many characters it makes one at most; None where that is not known."""
        if not all(isinstance(step, str) or step is to_nfc for step in self._steps):
            return None
        return _MOST_COMPOSED if to_nfc in self._steps else 1


NO_NORMALIZER = Normalizer()


def to_nfc(text: str) -> str:
    """The text in normal form C."""
    return text if text.isascii() else _normalized(text, "NFC")


def to_nfd(text: str) -> str:
    """The text in normal form D."""
    return text if text.isascii() else _normalized(text, "NFD")


def to_nfkc(text: str) -> str:
    """The text in normal form KC."""
    return text if text.isascii() else _normalized(text, "NFKC")


def to_nfkd(text: str) -> str:
    """The text in normal form KD."""
    return text if text.isascii() else _normalized(text, "NFKD")


def _normalized(text: str, form: Literal["NFC", "NFD", "NFKC", "NFKD"]) -> str:
    pieces, done = list[str](), 0
    for start, stop in (*spans(_UNKNOWN_TO_THE_LIBRARY, text), (len(text), len(text))):
        known = text[done:start]
        pieces += normalize(form, _LONG_RUN_OF_MARKS.sub(_in_order, known)), text[start:stop]
        done = stop
    return "".join(pieces)


def _in_order(run: regex.Match[str]) -> str:
    """The marks in canonical order: each stretch between those of class 0 sorted by class."""
    decomposed = "".join([normalize("NFD", char) for char in run.group()])
    stretches = groupby(decomposed, key=lambda char: combining(char) == 0)
    return "".join(
        ["".join(stretch if starters else sorted(stretch, key=combining)) for starters, stretch in stretches]
    )
