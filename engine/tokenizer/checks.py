"""Checks of values read from a checkpoint: a failure says where, what was found and what was expected."""

from pathlib import Path
from typing import Any, TypeVar

from pagellm.engine.checks import JsonError, parse_json
from pagellm.engine.errors import CheckpointError, found
from pagellm.engine.files import read_plain

__all__ = ["expect", "found", "read_json_object", "read_json_object_if_present"]

T = TypeVar("T")

_JSON_NAMES: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a string",
    int: "an integer",
    bool: "true or false",
}


def expect(value: object, kind: type[T], where: str) -> T:
    """`value` itself if it is of exactly that JSON type (so `true` is no integer).

    Raises:
        CheckpointError: it is of another type.
    """
    if type(value) is not kind:
        raise CheckpointError(f"{where}: found {found(value)}, expected {_JSON_NAMES[kind]}")
    return value


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object that the file holds.

    Raises:
        CheckpointError: the file cannot be read, is no JSON, or holds something other than an object.
    """
    try:
        value = parse_json(read_plain(path))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except JsonError as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    return expect(value, dict, str(path))


def read_json_object_if_present(path: Path) -> dict[str, Any]:
    """As `read_json_object`, but a file that does not exist reads as an empty object."""
    return read_json_object(path) if path.exists() else {}
