"""The wire format of Protocol Buffers, as far as reading a `tokenizer.model` needs it.

A message is fields in any order: a number and a kind, then a variable-length integer, 4 or 8 bytes, or a
length and so many bytes (https://protobuf.dev/programming-guides/encoding).
"""

import struct
from collections.abc import Iterator

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_VARINT_BYTES = 10

Value = int | bytes


class WireError(Exception):
    """Bytes that are no message; says what is wrong, and at which byte."""


def fields(data: bytes) -> Iterator[tuple[int, Value]]:
    """The fields of a message with their numbers: integers, or bytes (also those of 4 and 8).

    Raises `WireError` where the bytes are no message.
    """
    at = 0
    while at < len(data):
        start = at
        key, at = _varint(data, at)
        kind = key & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind == _BYTES:
            size, at = _varint(data, at)
        elif kind in (_FIXED64, _FIXED32):
            size = 8 if kind == _FIXED64 else 4
        else:
            raise WireError(f"a field of kind {kind} at byte {start}")
        if at + size > len(data):
            raise WireError(f"a field of {size} bytes at byte {start}, {len(data) - at} are left")
        yield key >> 3, data[at : at + size]
        at += size


def as_float(value: Value) -> float:
    """A field of 4 bytes as a number."""
    if not isinstance(value, bytes) or len(value) != 4:
        raise WireError("a number that is not of 4 bytes")
    number: float = struct.unpack("<f", value)[0]
    return number


def as_bytes(value: Value) -> bytes:
    """A field that is bytes: text, or a message."""
    if not isinstance(value, bytes):
        raise WireError("an integer in the place of bytes")
    return value


def as_int(value: Value) -> int:
    """A field that is an integer of 32 bits with a sign, an enumeration or a flag."""
    if not isinstance(value, int):
        raise WireError("bytes in the place of an integer")
    low = value & 0xFFFFFFFF
    return low - (1 << 32) if low & 0x80000000 else low


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for index, byte in enumerate(data[at : at + _MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, at + index + 1
    raise WireError(f"an integer without an end at byte {at}")
