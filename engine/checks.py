"""Checks of values that a caller hands over: each gives the value as Python's own type, or one clear error.

An integer is anything that says it is one (`__index__`), NumPy's included, and a number anything that is a
real number; True and False are neither.
"""

import json
import os
from collections.abc import Iterable
from numbers import Real
from operator import index
from pathlib import Path
from typing import Any

from pagellm.engine.errors import PagellmError, RequestError, found

# A number beyond is as good as infinite, and so would be a sum of some.
LARGEST = 1e300
SMALLEST = 5e-324  # above 0
# What no count and no number of anything needs more of. Python refuses to print some longer integers.
_MAX_BITS = 64
MAX_PATH_BYTES = 4096  # Linux takes no longer one


class JsonError(ValueError):
    """Text that is no JSON; its message says what was found, and where.

    column: where the syntax is wrong, from 1; None for other faults. reason: the fault, without a place.
    """

    def __init__(self, message: str, reason: str, column: int | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.column = column


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON document. Raises `JsonError`, whatever is wrong with it."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as bad:
        place = f"line {bad.lineno}, column {bad.colno}"
        raise JsonError(f"malformed JSON in {place} ({bad.msg})", bad.msg, bad.colno) from None
    except UnicodeDecodeError as bad:
        found_bytes = f"{bad.object[bad.start :][:8]!r} at byte {bad.start + 1}"
        raise JsonError(f"{found_bytes}, which is no UTF-8", bad.reason) from None
    except (ValueError, RecursionError) as bad:  # of too many digits, or too deep
        raise JsonError(f"JSON beyond limits ({bad})", str(bad)) from None


def integer(
    name: str, value: Any, low: int | None = None, high: int | None = None,
    error: type[PagellmError] = RequestError,
) -> int:  # fmt: skip
    """The value as an int from `low` to `high`, both included; None leaves a side open, up to 64 bits."""
    try:
        if isinstance(value, bool):
            raise TypeError
        result = index(value)
    except TypeError:
        result = None
    if result is not None and result.bit_length() > _MAX_BITS and None in (low, high):
        raise error(f"{name}: found {found(value)}, expected an integer of at most {_MAX_BITS} bits")
    if result is None or (low is not None and result < low) or (high is not None and result > high):
        if (low, high) == (1, None):
            raise error(f"{name}: found {found(value)}, expected a positive integer")
        bounds = "" if low is None else f" from {low}"
        bounds += "" if high is None else f"{' up' * (low is None)} to {high}"
        bounds += " on" * (low is not None and high is None)
        raise error(f"{name}: found {found(value)}, expected an integer{bounds}")
    return result


def integers(name: str, values: Iterable[Any]) -> list[int]:
    """The values as ints; the error names the first that is no integer."""
    listed = values.tolist() if hasattr(values, "tolist") else list(values)
    if not isinstance(listed, list):  # a number of NumPy's, which has no elements
        raise RequestError(f"{name}: found {found(values)}, expected a list of integers")
    if set(map(type, listed)) <= {int}:
        return listed
    return [integer(f"{name}[{place}]", value) for place, value in enumerate(listed)]


def number(
    name: str, value: Any, low: float | None = None, high: float | None = None,
    error: type[PagellmError] = RequestError, expected: str | None = None,
) -> float:  # fmt: skip
    """The value as a finite float from `low` to `high`, both included; None leaves a side open.

    expected: what an error says instead of these bounds.
    """
    try:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError
        result = float(value)
    except (TypeError, OverflowError):
        result = None
    least, most = -LARGEST if low is None else low, LARGEST if high is None else high
    if result is None or not least <= result <= most:
        if expected is None:
            bounds = "" if low is None else f" from {low:g}"
            bounds += "" if high is None else f" to {high:g}"
            expected = f"a {'finite ' if high is None else ''}number{bounds}"
        raise error(f"{name}: found {found(value)}, expected {expected}")
    return result


def flag(name: str, value: Any, error: type[PagellmError] = RequestError) -> bool:
    """The value, which is True or False."""
    if not isinstance(value, bool):
        raise error(f"{name}: found {found(value)}, expected True or False")
    return value


def text(name: str, value: Any, error: type[PagellmError] = RequestError) -> str:
    """The value as a string of valid Unicode, which a lone surrogate is not."""
    if not isinstance(value, str):
        raise error(f"{name}: found {found(value)}, expected a string")
    try:
        value.encode()
    except UnicodeEncodeError as failure:
        raise error(
            f"{name}: found {found(value)}, whose character {failure.start} is a lone surrogate, expected "
            "valid Unicode"
        ) from None
    return str(value)


def is_path(text: str) -> bool:
    """Whether a file's name may consist of these characters: no null character, no lone surrogate."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:  # a lone surrogate
        return False


def path(name: str, value: Any, error: type[PagellmError]) -> Path:
    """The value, a string or a path object, as a path that the system may have a file at."""
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or not is_path(text):
        raise error(f"{name}: found {found(value)}, expected a path")
    if len(os.fsencode(text)) > MAX_PATH_BYTES:
        raise error(f"{name}: found {found(value)}, expected a path of at most {MAX_PATH_BYTES} bytes")
    return Path(text)
