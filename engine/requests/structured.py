"""What form an output is to have: a JSON schema, a regular expression, a choice, a grammar or tagged parts.

Checked and copied here; what a form means, and whether it can be had, is the grammar compiler's business.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from pagellm.engine.checks import JsonError, flag, parse_json, text
from pagellm.engine.errors import RequestError, found

MAX_CHARACTERS = 1 << 18  # of a form, as JSON or as it is written
FORMS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")


@dataclass(frozen=True)
class StructuredOutputs:
    """The form of an output, under vLLM's names; exactly one of the first six. Raises `RequestError`.

    json: a JSON schema: a mapping, its text, or a class with `model_json_schema`, such as pydantic's.
    regex: in the syntax of Rust's crate, of the whole output. choice: one of these texts.
    grammar: in the dialect of Lark that llguidance reads, or in GBNF. json_object: any JSON object.
    structural_tag: forms of parts of the output between tags; a mapping or its JSON.
    disable_any_whitespace: JSON without whitespace. Else there are at most 8 characters of it in one place,
    or what whitespace_pattern, a regular expression, allows.
    disable_additional_properties: objects have no properties but those that their schema names.

    All but the flags are kept as texts, so two that ask for the same are equal.
    """

    json: Any = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: Any = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        if self.json_object is not None and not flag("structured.json_object", self.json_object):
            object.__setattr__(self, "json_object", None)
        given = [name for name in FORMS if getattr(self, name) is not None]
        if len(given) != 1:
            raise RequestError(
                f"structured: found {' and '.join(given) or 'no form'}, expected one of {', '.join(FORMS)}"
            )
        for name in ("disable_any_whitespace", "disable_additional_properties"):
            flag(f"structured.{name}", getattr(self, name))
        for name in ("regex", "grammar", "whitespace_pattern"):
            if getattr(self, name) is not None:
                self._put(name, text(f"structured.{name}", getattr(self, name)))
        if self.choice is not None:
            self._put("choice", _choices(self.choice))
        for name in ("json", "structural_tag"):
            if getattr(self, name) is not None:
                self._put(name, _json_text(f"structured.{name}", getattr(self, name)))

    def _put(self, name: str, value: str | tuple[str, ...]) -> None:
        size = len(value) if isinstance(value, str) else sum(map(len, value))
        if size > MAX_CHARACTERS:
            raise RequestError(
                f"structured.{name}: found {size} characters, expected at most {MAX_CHARACTERS}"
            )
        object.__setattr__(self, name, value)

    @classmethod
    def read(cls, name: str, value: Any) -> StructuredOutputs:
        """Takes one, or a mapping of its fields. name: of the parameter, for errors."""
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise RequestError(f"{name}: found {found(value)}, expected a StructuredOutputs or its fields")
        given = {key: one for key, one in value.items() if one is not None}
        known = {field.name for field in fields(cls)}
        for key in given:
            if key not in known:
                raise RequestError(
                    f"{name}: found the field {found(key)}, expected {', '.join(sorted(known))}"
                )
        return cls(**given)

    @property
    def form(self) -> str:
        """Which of the forms it is."""
        return next(name for name in FORMS if getattr(self, name) is not None)


def _choices(value: Any) -> tuple[str, ...]:
    is_list = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    if not is_list or not value:
        raise RequestError(f"structured.choice: found {found(value)}, expected a non-empty list of texts")
    return tuple(dict.fromkeys(text("structured.choice", one) for one in value))


def _json_text(name: str, value: Any) -> str:
    """The JSON text of a mapping, a text that is JSON, or a class that describes itself."""
    if hasattr(value, "model_json_schema"):
        value = value.model_json_schema()
    if isinstance(value, str):
        if len(value) > MAX_CHARACTERS:
            return value  # which is refused for that
        try:
            value = parse_json(text(name, value))
        except JsonError as bad:
            raise RequestError(f"{name}: found {bad}, expected JSON") from None
    if not isinstance(value, Mapping | bool):
        raise RequestError(f"{name}: found {found(value)}, expected a JSON object")
    try:
        return json.dumps(value, default=_as_plain, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as bad:
        raise RequestError(f"{name}: found {found(value)}, which is no JSON ({bad})"[:500]) from None


def _as_plain(value: Any) -> Any:
    """Mappings and sequences that are no dicts and lists."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence):
        return list(value)
    raise TypeError(f"{type(value).__name__} is not JSON serializable")
