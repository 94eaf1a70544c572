"""Reads the `decoder` section of a `tokenizer.json`.

There a decoder is a list of steps from tokens to tokens. What this reads is what published files have: steps
on each token, then bytes, then all tokens put together and stripped at the beginning.
"""

from collections.abc import Callable, Mapping
from typing import Any

from pagellm.engine.errors import CheckpointError, found
from pagellm.engine.tokenizer.checks import expect
from pagellm.engine.tokenizer.decoders import BYTE_LEVEL, Decoder, Invalid
from pagellm.engine.tokenizer.sections import option, steps, unsupported

_EXPECTED = "Replace, Metaspace, ByteFallback, Fuse, Strip or ByteLevel"


def read_decoder(section: object, where: str, *, byte_level: bool) -> Decoder:
    """The decoder that the section describes.

    byte_level: whether the vocabulary is written in the byte-level alphabet, whose decoder may be left out.

    Raises `CheckpointError` for a type, a setting or an order that is not supported.
    """
    listed = list(steps(section, "decoders", where))
    if byte_level:
        for step, name in listed:
            if step.get("type") != "ByteLevel":
                raise unsupported(step, name, "ByteLevel")
        return BYTE_LEVEL
    if not listed:
        raise CheckpointError(f"{where}: found none, expected {_EXPECTED}")
    return _Reader().read(listed)


class _Reader:
    """What the steps so far come to."""

    def __init__(self) -> None:
        self._replaced: list[tuple[str, str]] = []
        self._metaspace: str | None = None  # the replacement of one that takes the first away
        self._byte_tokens = False
        self._is_fused = False
        self._strip = ("", 0)

    def read(self, listed: list[tuple[Mapping[str, Any], str]]) -> Decoder:
        for step, where in listed:
            self._add(step, where)
        replaced = self._replaced

        def token_text(token: str) -> str:
            for before, after in replaced:
                token = token.replace(before, after)
            return token

        lead: Callable[[str], bytes] | None = None
        if (char := self._metaspace) is not None:

            def lead(token: str) -> bytes:
                return token_text(token.replace(char, "")).encode()

        return Decoder(
            lambda token: token_text(token).encode(),
            byte_tokens=self._byte_tokens,
            invalid=Invalid.RUN if self._byte_tokens else Invalid.SEQUENCE,
            strip=self._strip,
            lead_bytes=lead,
        )

    def _add(self, step: Mapping[str, Any], where: str) -> None:
        match step.get("type"):
            case "Replace" if not self._byte_tokens and not self._is_fused:
                self._replaced.append(_read_replace(step, where))
            case "Metaspace" if not (
                self._replaced or self._byte_tokens or self._is_fused or self._metaspace
            ):
                char, takes_first = read_metaspace(step, where)
                self._replaced.append((char, " "))
                self._metaspace = char if takes_first != "never" else None
            case "ByteFallback" if not self._byte_tokens and not self._is_fused:
                self._byte_tokens = True
            case "Fuse" if not self._is_fused:
                self._is_fused = True
            case "Strip" if self._is_fused and self._strip[1] == 0:
                self._strip = _read_strip(step, where)
            case "Replace" | "Metaspace" | "ByteFallback" | "Fuse" | "Strip":
                raise CheckpointError(
                    f"{where}: found {found(step.get('type'))} in this place, expected the order Replace or"
                    " Metaspace, ByteFallback, Fuse, Strip"
                )
            case _:
                raise unsupported(step, where, _EXPECTED)


def read_metaspace(step: Mapping[str, Any], where: str) -> tuple[str, str]:
    """Of a Metaspace, in either section: its replacement, and its prepend scheme.

    Raises `CheckpointError` if one is something else.
    """
    char = expect(step.get("replacement"), str, f"{where}.replacement")
    # Files of old versions have the one or the other.
    default = "always" if option(step, "add_prefix_space", True, where) else "never"
    scheme = expect(step.get("prepend_scheme", default), str, f"{where}.prepend_scheme")
    if len(char) != 1 or scheme not in ("always", "first", "never"):
        raise CheckpointError(
            f"{where}: found {found(char)} and {found(scheme)}, expected one character, and always, first or"
            " never"
        )
    return char, scheme


def _read_replace(step: Mapping[str, Any], where: str) -> tuple[str, str]:
    pattern = expect(step.get("pattern"), dict, f"{where}.pattern")
    before = pattern.get("String")
    if not isinstance(before, str) or not before:
        raise CheckpointError(f"{where}.pattern: found {found(pattern)}, expected a String")
    return before, expect(step.get("content"), str, f"{where}.content")


def _read_strip(step: Mapping[str, Any], where: str) -> tuple[str, int]:
    content = expect(step.get("content"), str, f"{where}.content")
    start = expect(step.get("start"), int, f"{where}.start")
    stop = expect(step.get("stop"), int, f"{where}.stop")
    if len(content) != 1 or start < 0 or stop != 0:
        raise CheckpointError(
            f"{where}: found {found(content)}, {start} at the start and {stop} at the stop, expected one"
            " character and none at the stop"
        )
    return content, start
