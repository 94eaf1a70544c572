"""Reads the `pre_tokenizer` section of a `tokenizer.json`."""

from collections.abc import Mapping
from typing import Any

from pagellm.engine.errors import CheckpointError, found
from pagellm.engine.tokenizer.checks import expect
from pagellm.engine.tokenizer.decoder_json import read_metaspace
from pagellm.engine.tokenizer.families import PATTERNS
from pagellm.engine.tokenizer.oniguruma import PatternError, Translation, translate
from pagellm.engine.tokenizer.pretokenizers import (
    DIGIT,
    DIGIT_RUN,
    Alphabet,
    Behavior,
    Metaspace,
    Pretokenizer,
    Split,
    Step,
    is_complete,
)
from pagellm.engine.tokenizer.sections import option, pattern_of, steps, unsupported

_PUNCTUATION = r"[\p{P}!-/:-@\[-`{-~]"


def is_byte_level(section: object) -> bool:
    """Whether the section ends with the step that writes bytes in the byte-level alphabet."""
    if not isinstance(section, dict):
        return False
    listed = section.get("pretokenizers") if section.get("type") == "Sequence" else [section]
    return isinstance(listed, list) and any(
        isinstance(step, dict) and step.get("type") == "ByteLevel" for step in listed
    )


def sees_alphabet(section: Mapping[str, Any]) -> bool:
    """Whether the words come out in the byte-level alphabet: where steps follow `ByteLevel`."""
    listed = section.get("pretokenizers") if section.get("type") == "Sequence" else []
    steps_behind = listed[:-1] if isinstance(listed, list) else []
    return any(isinstance(step, dict) and step.get("type") == "ByteLevel" for step in steps_behind)


def read_pretokenizer(section: object, where: str) -> Pretokenizer:
    """The pre-tokenizer that the section describes.

    For a byte-level vocabulary there is a `ByteLevel`, mostly at the end.

    Raises `CheckpointError` for another type, or a setting or pattern that is not supported.
    """
    listed = list(steps(section, "pretokenizers", where))
    read: list[Step] = []
    try:
        for index, (step, name) in enumerate(listed):
            if step.get("type") == "ByteLevel" and any(isinstance(earlier, Alphabet) for earlier in read):
                raise CheckpointError(f"{name}: found ByteLevel again, expected it once")
            read += _read_step(step, name)
            if step.get("type") == "ByteLevel" and index < len(listed) - 1:
                read.append(Alphabet())
        return Pretokenizer(read)
    except PatternError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _read_step(step: Mapping[str, Any], where: str) -> list[Step]:
    match step.get("type"):
        case "ByteLevel":
            prefix: list[Step] = [None] if option(step, "add_prefix_space", True, where) else []
            uses_regex = option(step, "use_regex", True, where)
            return [*prefix, translate(PATTERNS["gpt2"][0])] if uses_regex else prefix
        case "Digits":
            return [DIGIT if option(step, "individual_digits", False, where) else DIGIT_RUN]
        case "Punctuation":
            return [_placed(translate(_PUNCTUATION), step, "Isolated", where)]
        case "Split":
            return [_placed(pattern_of(step, where), step, None, where)]
        case "WhitespaceSplit":
            return [Split(translate(r"\s"), Behavior.REMOVED)]
        case "Metaspace":
            char, scheme = read_metaspace(step, where)
            return [Metaspace(char, scheme, option(step, "split", True, where))]
    raise unsupported(
        step, where, "ByteLevel, Digits, Metaspace, Punctuation, Split, WhitespaceSplit or a Sequence"
    )


def _placed(pattern: Translation, step: Mapping[str, Any], default: str | None, where: str) -> Step:
    """A pattern with what becomes of its matches."""
    behavior = expect(step.get("behavior", default), str, f"{where}.behavior")
    invert = option(step, "invert", False, where)
    if behavior == "Isolated":
        # What does not match stands alone either way.
        return pattern
    if behavior == "Removed" and invert and is_complete(pattern):
        # "Remove what does not match" keeps every character where the pattern matches all of them.
        return pattern
    if behavior not in {kind.value for kind in Behavior} or pattern.may_be_empty:
        raise CheckpointError(
            f"{where}.behavior: found {found(behavior)}, expected Isolated, or"
            f" {', '.join(kind.value for kind in Behavior)} with a pattern that never matches nothing"
        )
    return Split(pattern, Behavior(behavior), invert)
