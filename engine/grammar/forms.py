"""From the form that a request asks for to a grammar of llguidance's. Texts alone; needs llguidance."""

import json
from collections.abc import Mapping
from typing import Any

from pagellm.engine.grammar.structural_tags import to_lark

# So that a small model, once it has begun to indent, does not go on for ever.
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,8}"


def to_grammar(form: Mapping[str, Any]) -> str:
    """A grammar as `LLMatcher` takes it. form: the fields of `StructuredOutputs`.

    Raises `ValueError`, with what is wrong, for a form that cannot be read.
    """
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    if form["regex"] is not None:
        return str(LLMatcher.grammar_from_regex(form["regex"]))
    if form["choice"] is not None:
        return _lark("start: " + " | ".join(json.dumps(choice) for choice in form["choice"]))
    if form["grammar"] is not None:
        try:
            return _lark(any_to_lark(form["grammar"]))
        except Exception as bad:  # of whatever kind: it reads GBNF in Python
            raise ValueError(f"no GBNF ({bad})") from None
    if form["structural_tag"] is not None:
        return _lark(to_lark(json.loads(form["structural_tag"]), lambda schema: json_rule(schema, form)))
    schema = json.dumps(_with_closed(json_schema(form), form))
    return str(LLMatcher.grammar_from_json_schema(schema, defaults=_json_options(form)))


def json_schema(form: Mapping[str, Any]) -> Any:
    """The schema of a form that is one of JSON."""
    return {"type": "object"} if form["json_object"] else json.loads(form["json"])


def json_rule(schema: Any, form: Mapping[str, Any]) -> str:
    """What stands in a rule of Lark for a JSON schema. form: gives options, those that are not usual."""
    schema = _with_closed(schema, form)
    if not isinstance(schema, dict):
        schema = {} if schema else {"not": {}}
    return "%json " + json.dumps({"x-guidance": _json_options(form), **schema})


def closed_where_unsaid(schema: Any) -> Any:
    """A schema whose objects have the properties that it names, and others only where it says so.

    Where it leaves that open JSON Schema lets anything come, and a small model goes on with properties until
    its tokens are spent; OpenAI's strict mode and vLLM's default backend take it so as well. A schema that
    puts objects together of parts stays as it is: each part would exclude what the others name.
    """
    return _closed_at(schema, 0) if not _has_part(schema, 0) else schema


# What puts an object together, or says what else it may have.
_PARTS = frozenset({"allOf", "if", "then", "else", "dependentSchemas", "unevaluatedProperties"})
_BESIDE = frozenset({"additionalProperties", "patternProperties", "$ref", "anyOf", "oneOf", "not"})
_VALUES = frozenset({"enum", "const", "default", "examples"})  # which are no schemas
_DEEPEST = 200  # a deeper one is refused anyway


def _has_part(value: Any, depth: int) -> bool:
    if depth > _DEEPEST:
        return True
    if isinstance(value, list):
        return any(_has_part(one, depth + 1) for one in value)
    if not isinstance(value, Mapping):
        return False
    return bool(_PARTS & value.keys()) or any(
        _has_part(one, depth + 1) for name, one in value.items() if name not in _VALUES
    )


def _closed_at(value: Any, depth: int) -> Any:
    if isinstance(value, list):
        return [_closed_at(one, depth + 1) for one in value]
    if not isinstance(value, Mapping):
        return value
    closed = {name: one if name in _VALUES else _closed_at(one, depth + 1) for name, one in value.items()}
    named, required = value.get("properties"), value.get("required", [])
    says_all = value.get("type") == "object" and isinstance(required, list) and not _BESIDE & value.keys()
    if says_all and isinstance(named, Mapping) and all(one in named for one in required):
        closed["additionalProperties"] = False
    return closed


def _with_closed(schema: Any, form: Mapping[str, Any]) -> Any:
    return _closed(schema) if form.get("disable_additional_properties") else schema


def _json_options(form: Mapping[str, Any]) -> dict[str, Any]:
    """How llguidance is to write JSON."""
    if form.get("disable_any_whitespace"):
        return {"whitespace_flexible": False}
    return {"whitespace_pattern": form.get("whitespace_pattern") or WHITESPACE}


def _lark(text: str) -> str:
    from llguidance import LLMatcher

    return str(LLMatcher.grammar_from_lark(text))


def _closed(schema: Any) -> Any:
    """The schema, in which objects have no properties but those that are named."""
    if isinstance(schema, list):
        return [_closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {
        name: value if name in ("enum", "const", "default", "examples") else _closed(value)
        for name, value in schema.items()
    }
    if isinstance(schema.get("properties"), dict) and not isinstance(schema.get("patternProperties"), dict):
        closed["additionalProperties"] = False
    return closed
