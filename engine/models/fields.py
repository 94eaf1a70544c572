"""Typed access to a checkpoint's configuration: each bad field is one error that names it.

A reader asks for every key that it obeys; a key that nobody asked for and that is not known to change nothing
is refused, because it may stand for arithmetic that would be left out.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pagellm.engine.errors import CheckpointError, found, named

# Of `Fields.refuse_others`, where no other key is harmless.
NOTHING = re.compile("(?!)")

REQUIRED = object()


class Fields:
    """The configuration of one checkpoint, or one section of it.

    values: without the prefix, which only messages show. A default, of `defaults` or of the call, is for a
    key that is absent; one that is null has no value, an error except where the default is None, too.
    keys: what this configuration calls a key that is asked for by another name; None: it has no such key.
    """

    def __init__(
        self,
        path: Path,
        values: Mapping[str, Any],
        prefix: str = "",
        defaults: Mapping[str, Any] | None = None,
        keys: Mapping[str, str | None] | None = None,
    ) -> None:
        self.path = path
        self.values = values
        self.prefix = prefix
        self._defaults = defaults or {}
        self._keys = keys or {}
        self._asked: set[str] = set()

    def integer(self, name: str, default: Any = REQUIRED, maximum: int = 1 << 20) -> int:
        """A positive integer; the maximum keeps a hostile file from asking for endless work."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= maximum:
            raise self.error(name, value, f"an integer from 1 to {maximum}")
        return value

    def integer_or_none(self, name: str, default: int | None = None, maximum: int = 1 << 20) -> int | None:
        """A positive integer, or None where the key is null."""
        return self.integer(name, default, maximum) if self.get(name, default) is not None else None

    def whole_number(self, name: str, default: Any = REQUIRED, maximum: int = 1 << 20) -> int:
        """An integer that may be 0."""
        value = self._get(name, default)
        if type(value) is int and value == 0:
            return 0
        return self.integer(name, default, maximum)

    def number_or_none(self, name: str) -> float | None:
        """A positive finite number, or None where the key is null."""
        return None if self.get(name) is None else self.number(name)

    def number_or_zero(self, name: str, default: Any = None) -> float:
        """A positive finite number, or 0 where the key is null or 0."""
        value = self.get(name, default)
        return (
            0.0
            if value is None or (type(value) in (int, float) and value == 0)
            else self.number(name, default)
        )

    def number(self, name: str, default: Any = REQUIRED) -> float:
        """A positive finite number."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise self.error(name, value, "a positive number")
        return float(value)

    def boolean(self, name: str, default: Any = REQUIRED) -> bool:
        """True or false."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, value, "true or false")
        return value

    def choice(self, name: str, choices: Mapping[str, str], default: Any = REQUIRED) -> str:
        """One of the keys of `choices`; returns what it stands for."""
        value = self._get(name, default)
        if not isinstance(value, str) or value not in choices:
            raise self.error(name, value, f"one of {', '.join(choices)}")
        return choices[value]

    def section(self, name: str) -> "Fields | None":
        """A nested object, or None where it is absent, null or empty."""
        value = self.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise self.error(name, value, "an object")
        return Fields(self.path, value, f"{self.prefix}{name}.") if value else None

    def get(self, name: str, default: Any = None) -> Any:
        """A key's value as it is; the default where it is absent."""
        key = self._keys.get(name, name)
        default = self._defaults.get(name, default)
        if key is None:
            return default
        self._asked |= {key, name}
        return self.values.get(key, default)

    def has(self, name: str) -> bool:
        """Whether a key is there and not null."""
        return self.get(name) is not None

    def expect(self, name: str, *neutral: Any) -> None:
        """Refuses a key unless its value is one of these, which change nothing; null and absent are fine."""
        value = self.get(name)
        if value is not None and not any(type(value) is type(one) and value == one for one in neutral):
            raise self.error(name, value, f"{found(neutral[0])}; another value is not supported")

    def expect_unasked(self, neutral: Mapping[str, Any]) -> None:
        """Refuses those of these keys that nobody asked for unless their values are these."""
        for name, value in neutral.items():
            if name not in self._asked:
                self.expect(name, value)

    def refuse_others(self, harmless: re.Pattern[str], reader: str) -> None:
        """Refuses the first key that was not asked for and is not `harmless`; null says nothing."""
        for name, value in self.values.items():
            if name not in self._asked and value is not None and not harmless.fullmatch(name):
                raise self.error(
                    name, value, f"no such key: {reader} does not know it, and it may change what is computed"
                )

    def error(self, name: str, value: object, expected: str) -> CheckpointError:
        """The error for a field's bad value."""
        key = named(self._keys.get(name) or name)
        return CheckpointError(f"{self.path}: {self.prefix}{key}: found {found(value)}, expected {expected}")

    def _get(self, name: str, default: Any) -> Any:
        value = self.get(name, default)
        if value is REQUIRED:
            raise CheckpointError(f"{self.path}: {self.prefix}{self._keys.get(name) or name} is missing")
        return value
