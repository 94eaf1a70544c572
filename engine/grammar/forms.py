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
