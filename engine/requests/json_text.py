"""JSON as a model writes it into a text: where a value ends, and its parts as they are written."""

import json
import re
from typing import Any

_DECODER = json.JSONDecoder()
_BETWEEN = re.compile(r"[ \t\r\n,:]*")  # the parts of an object or an array


class JsonEnd:
    """Finds where a JSON value ends in a text that grows; what has been read is not read again."""

    def __init__(self) -> None:
        self._at = self._depth = 0
        self._is_in_text = self._is_escaped = False

    def of_object(self, text: str) -> int | None:
        """Where the object ends that a text begins with; 0: it begins with none, None: it goes on."""
        return self._end(text, "{")

    def of_array(self, text: str) -> int | None:
        """The same of an array."""
        return self._end(text, "[")

    _STRUCTURE = re.compile(r'[{}\[\]"]')
    _TEXT = re.compile(r'["\\]')

    def _end(self, text: str, opening: str) -> int | None:
        if not self._depth:
            begin = len(text) - len(text.lstrip())
            if begin == len(text):
                return None
            if text[begin] != opening:
                return 0
            self._at, self._depth = begin + 1, 1
        while True:
            if self._is_escaped:
                if self._at >= len(text):
                    return None
                self._at, self._is_escaped = self._at + 1, False
            match = (self._TEXT if self._is_in_text else self._STRUCTURE).search(text, self._at)
            if match is None:
                self._at = len(text)
                return None
            self._at = match.end()
            if match[0] == "\\":
                self._is_escaped = True
            elif match[0] == '"':
                self._is_in_text = not self._is_in_text
            else:
                self._depth += 1 if match[0] in "{[" else -1
                if not self._depth:
                    return self._at


def json_object(text: str) -> dict[str, Any] | None:
    """The JSON object that a text is; None if it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def elements_of(text: str) -> list[str]:
    """The elements of a JSON array as they are written; none if it is no array."""
    try:
        if not isinstance(json.loads(text), list):
            return []
    except (ValueError, RecursionError):
        return []
    return [written for _, written in _parts(text)]


def value_of(text: str, key: str) -> str | None:
    """How the value of a key of a JSON object is written; None unless it stands there once."""
    parts = _parts(text)
    found = [written for (name, _), (_, written) in zip(parts[::2], parts[1::2], strict=True) if name == key]
    return found[0] if len(found) == 1 else None


def _parts(text: str) -> list[tuple[Any, str]]:
    """The elements of an array, or the keys and values of an object, and how each is written."""
    parts, at = list[tuple[Any, str]](), len(text) - len(text.lstrip()) + 1
    while True:
        match = _BETWEEN.match(text, at)
        assert match is not None
        if text[match.end()] in "]}":
            return parts
        value, at = _DECODER.raw_decode(text, match.end())
        parts.append((value, text[match.end() : at]))
