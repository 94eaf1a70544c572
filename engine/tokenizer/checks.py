"""Checks of values read from a checkpoint: a failure says where, what was found and what was expected."""

import json
import re
from pathlib import Path
from typing import Any, TypeVar

from pagellm.engine.checks import JsonError, parse_json
from pagellm.engine.errors import CheckpointError, found
from pagellm.engine.files import MAX_TEXT_BYTES, read_plain_text

T = TypeVar("T")

# Escapes of JSON that may be half a character.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

_JSON_NAMES: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a string",
    int: "an integer",
    bool: "true or false",
}


def expect(value: object, kind: type[T], where: str) -> T:
    """`value` itself if it is of exactly that JSON type (so `true` is no integer).

    Raises `CheckpointError` if it is of another type.
    """
    if type(value) is not kind:
        raise CheckpointError(f"{where}: found {found(value)}, expected {_JSON_NAMES[kind]}")
    return value


def read_text(path: Path, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """The file's text: UTF-8, a byte order mark at its beginning left out, with "\\n" between lines.

    Raises `CheckpointError` if the file cannot be read, is too long or no plain file, or is no UTF-8.
    """
    try:
        return read_plain_text(path, max_bytes)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        place = f"{error.object[error.start :][:8]!r} at byte {error.start + 1}"
        raise CheckpointError(f"{path}: found {place}, expected UTF-8") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object that the file holds.

    Raises `CheckpointError` if the file cannot be read, is no JSON, or holds something other than an object,
    or a lone surrogate.
    """
    text = read_text(path)
    try:
        value = parse_json(text)
    except JsonError as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            char = error.object[error.start]
            raise CheckpointError(
                f"{path}: found the lone surrogate U+{ord(char):04X}, expected valid Unicode"
            ) from error
    return expect(value, dict, str(path))


def read_json_object_if_present(path: Path) -> dict[str, Any]:
    """As `read_json_object`, but a file that does not exist reads as an empty object."""
    return read_json_object(path) if path.exists() else {}
