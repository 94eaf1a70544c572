"""Reads the `normalizer` section of a `tokenizer.json`."""

from base64 import b64decode
from collections.abc import Callable, Mapping
from typing import Any

import regex

from pagellm.engine.errors import CheckpointError, RequestError, found
from pagellm.engine.tokenizer.added_tokens import WHITESPACE
from pagellm.engine.tokenizer.charsmap import Charsmap
from pagellm.engine.tokenizer.checks import expect
from pagellm.engine.tokenizer.normalization import Normalizer, to_nfc, to_nfd, to_nfkc, to_nfkd
from pagellm.engine.tokenizer.sections import option, pattern_of, steps, unsupported

_FORMS = {"NFC": to_nfc, "NFD": to_nfd, "NFKC": to_nfkc, "NFKD": to_nfkd}
# What a pattern may take on one text.
_TIME_LIMIT_S = 2.0


def read_normalizer(section: object, where: str) -> Normalizer:
    """The normalizer that the section describes.

    Raises `CheckpointError` for a type, a setting or a pattern that is not supported.
    """
    return Normalizer([_read_step(step, name) for step, name in steps(section, "normalizers", where)])


def _read_step(step: Mapping[str, Any], where: str) -> Callable[[str], str] | str:
    kind = step.get("type")
    if kind in _FORMS:
        return _FORMS[kind]
    match kind:
        case "Prepend":
            return expect(step.get("prepend"), str, f"{where}.prepend")
        case "Replace":
            return _read_replace(step, where)
        case "Precompiled":
            return _read_precompiled(step, where).replace_graphemes
        case "Strip":
            return _read_strip(step, where)
    raise unsupported(
        step, where, f"Prepend, Replace, Precompiled, Strip, Sequence or one of {', '.join(_FORMS)}"
    )


def _read_precompiled(step: Mapping[str, Any], where: str) -> Charsmap:
    where = f"{where}.precompiled_charsmap"
    encoded = expect(step.get("precompiled_charsmap"), str, where)
    try:
        return Charsmap(b64decode(encoded, validate=True), where)
    except ValueError as error:
        raise CheckpointError(f"{where}: found {found(encoded)}, expected base64: {error}") from error


def _read_strip(step: Mapping[str, Any], where: str) -> Callable[[str], str]:
    left = WHITESPACE if option(step, "strip_left", True, where) else ""
    right = WHITESPACE if option(step, "strip_right", True, where) else ""

    def strip(text: str) -> str:
        return text.lstrip(left).rstrip(right)

    return strip


def _read_replace(step: Mapping[str, Any], where: str) -> Callable[[str], str]:
    content = expect(step.get("content"), str, f"{where}.content")
    pattern = step.get("pattern")
    if isinstance(pattern, dict) and isinstance(text := pattern.get("String"), str) and text:
        return lambda normalized: normalized.replace(text, content)
    translation = pattern_of(step, where)
    if translation.may_be_empty:
        raise CheckpointError(
            f"{where}.pattern: found {found(pattern)}, expected a pattern that never matches nothing"
        )
    compiled = regex.compile(translation.exact, regex.V1)

    def replace(normalized: str) -> str:
        try:
            replaced: str = compiled.sub(lambda _match: content, normalized, timeout=_TIME_LIMIT_S)
            return replaced
        except TimeoutError:
            raise RequestError(
                f"text: a pattern of the normalizer took more than {_TIME_LIMIT_S} s on {len(normalized)}"
                " characters"
            ) from None

    return replace
