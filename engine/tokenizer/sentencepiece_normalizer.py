"""What SentencePiece does to a text before it is cut: characters replaced, spaces put, taken away, shown."""

import re
from dataclasses import dataclass
from enum import Enum, auto

from pagellm.engine.tokenizer.charsmap import Charsmap
from pagellm.engine.tokenizer.decoders import SPACE
from pagellm.engine.tokenizer.normalization import Normalizer, Start


class Prefix(Enum):
    """Where a space is put before a text."""

    NOWHERE = auto()
    TEXT = auto()
    EVERY_STRETCH = auto()  # behind added tokens, too


@dataclass(frozen=True, slots=True)
class Spaces:
    """What becomes of spaces. single: runs become one, and none is left at the ends. shown: as U+2581."""

    prefix: Prefix = Prefix.EVERY_STRETCH
    single: bool = True
    shown: bool = True


class GgufNormalizer(Normalizer):
    """The same for a GGUF file, as llama.cpp has it: what was visible in the text stays.

    prefix: whether a space is put before a stretch. single: as in `Spaces`; then one is there anyway.
    """

    def __init__(self, charsmap: Charsmap, *, prefix: bool, single: bool) -> None:
        super().__init__()
        self._charsmap = charsmap
        self._prefix, self._single = prefix, single

    def __call__(self, text: str, start: Start = Start.TEXT) -> str:
        """The normalised text."""
        text = self._charsmap.replace_longest(text)
        if self._single:
            text = "".join([f" {word}" for word in text.split(" ") if word])
            if start is Start.WITHIN:
                text = text.removeprefix(" ")
        elif self._prefix and start is not Start.WITHIN and text.strip(" "):
            text = " " + text
        return text.replace(" ", SPACE)


class SentencePieceNormalizer(Normalizer):
    """The normalizer of a `tokenizer.model`."""

    def __init__(self, charsmap: Charsmap, spaces: Spaces) -> None:
        super().__init__()
        self._charsmap = charsmap
        self._spaces = spaces

    def __call__(self, text: str, start: Start = Start.TEXT) -> str:
        """The normalised text."""
        spaces = self._spaces
        text = self._charsmap.replace_longest(text)
        if spaces.single:
            text = re.sub(" +", " ", text)
            if start is not Start.WITHIN:
                text = text.lstrip(" ")
        if not text:
            return ""
        if start is Start.TEXT:
            is_prefixed = spaces.prefix is not Prefix.NOWHERE
        else:
            is_prefixed = start is Start.TOKEN and spaces.prefix is Prefix.EVERY_STRETCH
        if is_prefixed:
            text = " " + text
        if spaces.shown:
            text = text.replace(" ", SPACE)
        # A space that was visible in the text goes away, too.
        return text.rstrip(SPACE if spaces.shown else " ") if spaces.single else text
