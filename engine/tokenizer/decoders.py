"""Tokens to text: what bytes each token stands for, and how a text is put together from them.

Families differ in three things: how a token is written in the vocabulary, which space at a text's beginning
was put there by the tokenizer and goes away again, and which bytes become U+FFFD where they are no UTF-8.
`Decoder` describes one family; `TextStream` applies it, token by token.
"""

import codecs
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

from pagellm.engine.tokenizer.byte_alphabet import token_to_bytes

# The visible space of SentencePiece's vocabularies, U+2581.
SPACE = "\u2581"

_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


def byte_of_token(token: str) -> int | None:
    """The byte that a token such as "<0x0A>" stands for, if it is one of those."""
    match = _BYTE_TOKEN.fullmatch(token)
    return None if match is None else int(match.group(1), 16)


def byte_token(byte: int) -> str:
    """How SentencePiece writes the token of a byte."""
    return f"<0x{byte:02X}>"


def spaced_bytes(token: str) -> bytes:
    """The bytes of a token that is written with visible spaces."""
    return token.replace(SPACE, " ").encode()


class Invalid(Enum):
    """Which U+FFFD the bytes of byte tokens become where they are no UTF-8."""

    SEQUENCE = auto()  # one for each broken sequence, as Unicode recommends
    BYTE = auto()  # one for each byte of it, as `sentencepiece` does
    RUN = auto()  # one for each byte of the whole run of byte tokens, as `tokenizers` does


class Lead(Enum):
    """How long tokens at a text's beginning lose the space that was put before the text."""

    FIRST_TOKEN = auto()
    UNTIL_SPACE = auto()  # until one has lost it, or there is text
    UNTIL_TEXT = auto()


@dataclass(frozen=True, slots=True)
class Decoder:
    """How the tokens of one family become text.

    token_bytes: what a token stands for that is no byte token. byte_tokens: whether tokens such as "<0x0A>"
    are bytes. strip: a text (one character) that goes away at the beginning, so many times at most.
    lead_bytes: what a token stands for at the beginning, as long as `lead` says; None: the same.
    """

    token_bytes: Callable[[str], bytes] = token_to_bytes
    byte_tokens: bool = False
    invalid: Invalid = Invalid.SEQUENCE
    strip: tuple[str, int] = ("", 0)
    lead_bytes: Callable[[str], bytes] | None = None
    lead: Lead = Lead.FIRST_TOKEN

    def bytes_of(self, token: str) -> bytes:
        """The bytes that a token stands for."""
        if self.byte_tokens:
            byte = byte_of_token(token)
            if byte is not None:
                return bytes([byte])
        return self.token_bytes(token)


BYTE_LEVEL = Decoder()


class TextStream:
    """Puts one text together from the bytes of its tokens.

    decoder: of the tokenizer. continues: whether the text goes on with one that came before it, so that
    nothing is taken away at its beginning.
    """

    def __init__(self, decoder: Decoder, *, continues: bool = False) -> None:
        self._decoder = decoder
        errors = _ONE_EACH if decoder.invalid is Invalid.BYTE else "replace"
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors)
        self._run = bytearray() if decoder.invalid is Invalid.RUN else None
        self._is_beginning = decoder.lead_bytes is not None and not continues
        self._strip, self._strips_left = decoder.strip
        if continues:
            self._strips_left = 0

    def append(self, data: bytes, token: str | None) -> str:
        """The text that a token completes.

        data: the token's bytes. token: the token as the vocabulary has it, None for a byte token.
        """
        if self._is_beginning:
            data = self._lead(data, token)
        if self._run is None:
            text = self._utf8.decode(data)
        elif token is None:
            self._run += data
            return ""
        else:
            text = self._end_run() + data.decode("utf-8", "replace")
        return self._stripped(text) if self._strips_left else text

    def finish(self) -> str:
        """The rest at the text's end: U+FFFD for an unfinished character."""
        text = self._end_run() + self._utf8.decode(b"", final=True)
        return self._stripped(text) if self._strips_left else text

    def _lead(self, data: bytes, token: str | None) -> bytes:
        lead = self._decoder.lead
        plain, without = data, data
        if token is not None and self._decoder.lead_bytes is not None:
            without = self._decoder.lead_bytes(token)
        if lead is Lead.FIRST_TOKEN:
            self._is_beginning = False
        elif lead is Lead.UNTIL_SPACE:
            self._is_beginning = not without and not plain
        else:
            self._is_beginning = not without
        return without

    def _end_run(self) -> str:
        if not self._run:
            return ""
        try:
            text = self._run.decode()
        except UnicodeDecodeError:
            text = "\ufffd" * len(self._run)
        self._run.clear()
        return text

    def _stripped(self, text: str) -> str:
        while text and self._strips_left:
            if not text.startswith(self._strip):
                self._strips_left = 0
                break
            text = text.removeprefix(self._strip)
            self._strips_left -= 1
        return text


_ONE_EACH = "pagellm.one_each"


def _replace_one_byte(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd", error.start + 1


codecs.register_error(_ONE_EACH, _replace_one_byte)
