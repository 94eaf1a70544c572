"""What a quantizer says of a directory, key by key: asked for, known to change nothing, or refused."""

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from pagellm.engine.errors import CheckpointError, found, named


class Section:
    """A quantizer's settings, or a part of them.

    path: the file that has them; prefix: what stands before their keys in it.
    """

    def __init__(self, path: Path, prefix: str, values: Mapping[str, Any]) -> None:
        self.path = path
        self.prefix = prefix
        self.values = values
        self._asked: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        """A key's value; the default where it is absent or null."""
        self._asked.add(name)
        value = self.values.get(name)
        return default if value is None else value

    def only(self, name: str, *allowed: Any, default: Any = None) -> Any:
        """A key that may have one of these values. None among them: it may be absent."""
        value = self.get(name, default)
        if not any(type(value) is type(one) and value == one for one in allowed):
            raise self.error(name, value, " or ".join(found(one) for one in allowed))
        return value

    def integer(self, name: str, default: int | None = None) -> int:
        """A positive integer, or -1 where everything is one group."""
        value = self.get(name, default)
        if type(value) is not int or not (value == -1 or 1 <= value <= 1 << 20):
            raise self.error(name, value, "a positive integer, or -1")
        return value

    def pair(self, name: str) -> tuple[int, int]:
        """Two positive integers."""
        value = self.get(name)
        is_pair = isinstance(value, list) and len(value) == 2
        if not is_pair or not all(type(one) is int and one > 0 for one in value):
            raise self.error(name, value, "two positive integers")
        return value[0], value[1]

    def names(self, name: str) -> list[str]:
        """A list of names; empty where it is absent."""
        value = self.get(name, [])
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise self.error(name, value, "a list of names")
        return value

    def section(self, name: str) -> "Section | None":
        """A part of the settings; None where it is absent or empty."""
        value = self.get(name, {})
        if not isinstance(value, Mapping):
            raise self.error(name, value, "an object")
        return Section(self.path, f"{self.prefix}{name}.", value) if value else None

    def refuse_others(self, harmless: Collection[str]) -> None:
        """Refuses the first key that nobody asked for and that is not known to change nothing."""
        for name, value in self.values.items():
            if name not in self._asked and name not in harmless and value is not None:
                raise self.error(name, value, "no such key: it may change what is computed")

    def error(self, name: str, value: object, expected: str) -> CheckpointError:
        """The error for a bad value of a key."""
        return CheckpointError(
            f"{self.path}: {self.prefix}{named(name)}: found {found(value)}, expected {expected}"
        )


def by_parts(patterns: Collection[str], section: Section, key: str) -> Callable[[str], bool]:
    """Whether a module is one of those that transformers leaves as they are: by a part of its name.

    A pattern is the beginning of a name up to a dot or its end, as a regular expression, or just a part of
    the name, as AutoAWQ and bitsandbytes have it.
    """
    compiled = [_compiled(pattern, section, key) for pattern in patterns]

    def matches(module: str) -> bool:
        return any(one.match(module) for one in compiled) or any(
            pattern in module.split(".") or f".{pattern}." in f".{module}." for pattern in patterns
        )

    return matches


def by_regex(patterns: Collection[str], section: Section, key: str) -> Callable[[str], bool]:
    """Whether compressed-tensors means a module: by its name, or by a regular expression after "re:"."""
    names = {pattern for pattern in patterns if not pattern.startswith("re:")}
    compiled = [
        _compiled(pattern.removeprefix("re:"), section, key, whole=False)
        for pattern in patterns
        if pattern.startswith("re:")
    ]

    def matches(module: str) -> bool:
        return module in names or any(one.match(module) for one in compiled)

    return matches


def _compiled(pattern: str, section: Section, key: str, whole: bool = True) -> re.Pattern[str]:
    try:
        return re.compile(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))" if whole else pattern)
    except re.error as error:
        raise section.error(key, pattern, f"a regular expression: {error}") from error
