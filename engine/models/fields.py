"""Typed access to a checkpoint's configuration: each bad field is one error that names it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pagellm.engine.errors import CheckpointError

_REQUIRED = object()


class Fields:
    """The configuration of one checkpoint, its names after `prefix`."""

    def __init__(self, path: Path, values: Mapping[str, Any], prefix: str = "") -> None:
        self.path = path
        self.values = values
        self.prefix = prefix

    def integer(self, name: str, default: Any = _REQUIRED, maximum: int = 1 << 20) -> int:
        """A positive integer; the maximum keeps a hostile file from asking for endless work."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= maximum:
            raise self.error(name, value, f"an integer from 1 to {maximum}")
        return value

    def number(self, name: str, default: Any = _REQUIRED) -> float:
        """A positive finite number."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise self.error(name, value, "a positive number")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, value, "true or false")
        return value

    def choice(self, name: str, choices: Mapping[str, str], default: Any = _REQUIRED) -> str:
        """One of the keys of `choices`; returns what it stands for."""
        value = self._get(name, default)
        if not isinstance(value, str) or value not in choices:
            raise self.error(name, value, f"one of {', '.join(choices)}")
        return choices[value]

    def section(self, name: str) -> "Fields | None":
        """A nested object, or None where it is absent or null."""
        value = self._get(name, None)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.error(name, value, "an object")
        return Fields(self.path, value, f"{name}.")

    def has(self, name: str) -> bool:
        """Whether a field is there and not null."""
        return self._get(name, None) is not None

    def error(self, name: str, found: object, expected: str) -> CheckpointError:
        """The error for a field's bad value."""
        return CheckpointError(f"{self.path}: {self.prefix}{name}: found {found!r}, expected {expected}")

    def _get(self, name: str, default: Any) -> Any:
        # GGUF spells the prefix out in each key; a nested section has it only in its messages.
        value = self.values.get(name, self.values.get(self.prefix + name))
        if value is not None:
            return value
        if default is _REQUIRED:
            raise CheckpointError(f"{self.path}: {self.prefix}{name} is missing")
        return default
