"""The sections of a `tokenizer.json`: what they have in common when they are read.

A section has a type, and one of type Sequence lists others.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from pagellm.engine.errors import CheckpointError, PagellmError, found
from pagellm.engine.tokenizer.checks import expect
from pagellm.engine.tokenizer.oniguruma import PatternError, Translation, literal, translate


def steps(section: object, key: str, where: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    """The steps of a section, sequences within sequences laid out flat, each with its place in the file.

    key: where a Sequence lists its steps. Nothing has no steps.

    Raises `CheckpointError` if a section is no object, or a Sequence lists none.
    """
    if section is None:
        return
    section = expect(section, dict, where)
    if section.get("type") != "Sequence":
        yield section, where
        return
    for index, step in enumerate(expect(section.get(key), list, f"{where}.{key}")):
        yield from steps(step, key, f"{where}.{key}[{index}]")


def option(step: Mapping[str, Any], name: str, default: bool, where: str) -> bool:
    """A setting that is true or false."""
    return expect(step.get(name, default), bool, f"{where}.{name}")


def pattern_of(step: Mapping[str, Any], where: str) -> Translation:
    """The pattern of a step: a text as it stands, or a regular expression.

    Raises `CheckpointError` if it is neither, or has no translation.
    """
    pattern = expect(step.get("pattern"), dict, f"{where}.pattern")
    kind, text = next(iter(pattern.items()), (None, None))
    if kind not in ("Regex", "String") or len(pattern) != 1:
        raise CheckpointError(f"{where}.pattern: found {found(pattern)}, expected Regex or String")
    text = expect(text, str, f"{where}.pattern.{kind}")
    try:
        return translate(text) if kind == "Regex" else literal(text)
    except PatternError as error:
        raise CheckpointError(
            f"{where}.pattern.{kind}: found {found(text)}, expected a pattern with a translation: {error}"
        ) from error


def unsupported(step: Mapping[str, Any], where: str, expected: str) -> PagellmError:
    """The error for a type that is not among those that are read."""
    return CheckpointError(f"{where}.type: found {found(step.get('type'))}, expected {expected}")
