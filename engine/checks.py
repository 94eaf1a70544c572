"""Checks of values that a caller hands over: each gives the value as Python's own type, or one clear error.

An integer is anything that says it is one (`__index__`), NumPy's included, and a number anything that is a
real number; True and False are neither.
"""

from collections.abc import Iterable
from numbers import Real
from operator import index
from typing import Any

from pagellm.engine.errors import PagellmError, RequestError, found


def integer(
    name: str, value: Any, low: int | None = None, high: int | None = None,
    error: type[PagellmError] = RequestError,
) -> int:  # fmt: skip
    """The value as an int from `low` to `high`, both included; None leaves a side open."""
    try:
        if isinstance(value, bool):
            raise TypeError
        result = index(value)
    except TypeError:
        result = None
    if result is None or (low is not None and result < low) or (high is not None and result > high):
        bounds = "" if low is None else f" from {low}"
        bounds += "" if high is None else f"{' up' * (low is None)} to {high}"
        bounds += " on" * (low is not None and high is None)
        raise error(f"{name}: found {found(value)}, expected an integer{bounds}")
    return result


def integers(name: str, values: Iterable[Any]) -> list[int]:
    """The values as ints; the error says which of them is none."""
    listed = values.tolist() if hasattr(values, "tolist") else list(values)
    if set(map(type, listed)) <= {int}:
        return listed
    return [integer(f"{name}[{place}]", value) for place, value in enumerate(listed)]


def number(name: str, value: Any, low: float, high: float, error: type[PagellmError] = RequestError) -> float:
    """The value as a float from `low` to `high`, both included."""
    try:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError
        result = float(value)
    except (TypeError, OverflowError):
        result = None
    if result is None or not low <= result <= high:
        raise error(f"{name}: found {found(value)}, expected a number from {low:g} to {high:g}")
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
