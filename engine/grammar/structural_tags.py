"""Structural tags: parts of an output that have a form, between tags, in text that has none.

Both forms in use are read: vLLM's older one, {"structures": [{"begin", "schema", "end"}], "triggers": [...]},
and the one of formats within formats, {"type": "structural_tag", "format": {"type": ...}}.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

_MAX_DEPTH = 64


def to_lark(tags: Any, json_rule: Callable[[Any], str]) -> str:
    """A grammar in llguidance's Lark. json_rule: what stands in a rule for a schema.

    Raises `ValueError` for what is no structural tag.
    """
    if not isinstance(tags, Mapping):
        raise ValueError("no JSON object")
    writer = _Writer(json_rule)
    if "format" in tags:
        start = writer.rule(tags["format"], 0)
    elif "structures" in tags:
        parts = [
            {"begin": one.get("begin"), "end": one.get("end"), "content": _schema(one.get("schema"))}
            for one in _objects(tags, "structures")
        ]
        start = writer.rule({"type": "triggered_tags", "triggers": tags.get("triggers"), "tags": parts}, 0)
    else:
        raise ValueError("neither 'format' nor 'structures'")
    return "\n".join([f"start: {start}", *writer.rules, *_TERMINALS, ""])


_TERMINALS = (r"TEXT: /(.|\n)*/",)


def _schema(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": schema}


def _objects(of: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    value = of.get(name)
    if not isinstance(value, list) or not value or not all(isinstance(one, Mapping) for one in value):
        raise ValueError(f"{name}: no list of objects")
    return value


def _text(of: Mapping[str, Any], name: str, default: str | None = None) -> str:
    value = of.get(name, default)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, str):
        raise ValueError(f"{name}: no text")
    return value


class _Writer:
    """The rules of a grammar, one after the other."""

    def __init__(self, json_rule: Callable[[Any], str]) -> None:
        self.rules: list[str] = []
        self._json_rule = json_rule

    def _add(self, body: str, attributes: str = "") -> str:
        name = f"r{len(self.rules)}"
        self.rules.append(f"{name}{attributes}: {body}")
        return name

    def rule(self, form: Any, depth: int) -> str:
        """Writes the rules of a format; returns the name of its own."""
        if not isinstance(form, Mapping) or depth > _MAX_DEPTH:
            raise ValueError("format: no object, or too many within each other")
        kind = form.get("type")
        if kind == "const_string":
            return self._add(json.dumps(_text(form, "value")))
        if kind == "json_schema":
            schema = form.get("json_schema")
            if not isinstance(schema, Mapping | bool):
                raise ValueError("json_schema: no JSON schema")
            return self._add(self._json_rule(schema))
        if kind == "regex":
            return self._add(f"/{_slashed(_text(form, 'pattern'))}/")
        if kind in ("any_text", "any_tokens"):
            return self._add("TEXT")
        if kind in ("sequence", "or"):
            parts = [self.rule(one, depth + 1) for one in _objects(form, "elements")]
            return self._add((" " if kind == "sequence" else " | ").join(parts))
        if kind == "optional" or kind == "star" or kind == "plus":
            mark = {"optional": "?", "star": "*", "plus": "+"}[kind]
            return self._add(f"({self.rule(form.get('content'), depth + 1)}){mark}")
        if kind == "tag":
            return self._add(f"{json.dumps(_text(form, 'begin'))} {self._inside(form, depth)}")
        if kind == "triggered_tags":
            return self._triggered(form, depth)
        if kind == "tags_with_separator":
            return self._separated(form, depth)
        raise ValueError(f"format: the type {kind!r}"[:80] + " is not supported")

    def _inside(self, tag: Mapping[str, Any], depth: int) -> str:
        """What follows the beginning of a tag."""
        content, end = tag.get("content"), _text(tag, "end", "")
        if isinstance(content, Mapping) and content.get("type") == "any_text" and end:
            return self._add(f"TEXT {json.dumps(end)}", "[lazy]")
        return f"{self.rule(content, depth + 1)} {json.dumps(end)}" if end else self.rule(content, depth + 1)

    def _triggered(self, form: Mapping[str, Any], depth: int) -> str:
        triggers = form.get("triggers")
        if not isinstance(triggers, list) or not all(isinstance(one, str) and one for one in triggers):
            raise ValueError("triggers: no list of texts")
        parts = []
        for tag in _objects(form, "tags"):
            begin = _text(tag, "begin")
            trigger = max((one for one in triggers if begin.startswith(one)), key=len, default=None)
            if trigger is None:
                raise ValueError(f"begin: {begin[:40]!r} begins with none of the triggers")
            parts.append((trigger, json.dumps(begin[len(trigger) :]), self._inside(tag, depth)))
        tags = []
        for trigger in dict.fromkeys(one for one, *_ in parts):
            bodies = [
                f"{rest} {inside}" if rest != '""' else inside
                for own, rest, inside in parts
                if own == trigger
            ]
            head = self._add(f"TEXT {json.dumps(trigger)}", "[lazy]")
            tags.append(self._add(f"{head} ({' | '.join(bodies)})"))
        some = f"({' | '.join(tags)})"
        if form.get("at_least_one") is True:
            return self._add(some if form.get("stop_after_first") is True else f"{some}+ TEXT")
        if form.get("stop_after_first") is True:
            return self._add(f"{some} | TEXT")
        return self._add(f"{some}* TEXT")

    def _separated(self, form: Mapping[str, Any], depth: int) -> str:
        tags = [self.rule({"type": "tag", **tag}, depth + 1) for tag in _objects(form, "tags")]
        one, separator = f"({' | '.join(tags)})", json.dumps(_text(form, "separator"))
        more = "" if form.get("stop_after_first") is True else f" ({separator} {one})*"
        return self._add(f"{one}{more}" if form.get("at_least_one") is True else f"({one}{more})?")


def _slashed(pattern: str) -> str:
    """A regular expression as it stands between slashes."""
    slashed, is_escaped = "", False
    for character in pattern:
        if character == "\n":
            slashed += "n" if is_escaped else "\\n"
        else:
            slashed += "\\/" if character == "/" and not is_escaped else character
        is_escaped = character == "\\" and not is_escaped
    return slashed
