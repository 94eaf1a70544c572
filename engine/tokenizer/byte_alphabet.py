"""The byte-level alphabet: one printable character for each of the 256 bytes.

Byte-level BPE vocabularies are text files, so GPT-2 writes a byte that is not printable (or is a space) as a
character from U+0100 upwards: a space is "Ġ". Every vocabulary that this package reads is written so. This
module knows that table and nothing about vocabularies.
"""

_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_SHIFTED = (byte for byte in range(256) if byte not in _PRINTABLE)

BYTE_OF_CHAR: dict[str, int] = {chr(byte): byte for byte in _PRINTABLE}
BYTE_OF_CHAR |= {chr(0x100 + index): byte for index, byte in enumerate(_SHIFTED)}

CHAR_OF_BYTE: tuple[str, ...] = tuple(sorted(BYTE_OF_CHAR, key=BYTE_OF_CHAR.__getitem__))


def token_to_bytes(token: str) -> bytes:
    """The bytes that a vocabulary entry stands for: its own UTF-8, if it is not written in the alphabet."""
    try:
        return bytes([BYTE_OF_CHAR[char] for char in token])
    except KeyError:
        return token.encode("utf-8", errors="replace")
