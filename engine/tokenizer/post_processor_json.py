"""Reads the `post_processor` section of a `tokenizer.json`: what is put around every text."""

from collections.abc import Mapping, Sequence
from typing import Any

from pagellm.engine.errors import CheckpointError, found
from pagellm.engine.tokenizer.added_tokens import AddedToken
from pagellm.engine.tokenizer.checks import expect
from pagellm.engine.tokenizer.sections import steps, unsupported

Ends = tuple[tuple[int, ...], tuple[int, ...]]


def read_ends(section: object, added_tokens: Sequence[AddedToken], where: str) -> Ends:
    """The ids that the post-processor puts before and behind every text.

    Raises `CheckpointError` for a type or a template that is not supported.
    """
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    for step, name in steps(section, "processors", where):
        match step.get("type"):
            case "ByteLevel":
                continue
            case "TemplateProcessing":
                before, behind = _read_template(step, added_tokens, name)
                prefix, suffix = before + prefix, suffix + behind
            case _:
                raise unsupported(step, name, "ByteLevel, TemplateProcessing or a Sequence")
    return prefix, suffix


def _read_template(step: Mapping[str, Any], added_tokens: Sequence[AddedToken], where: str) -> Ends:
    pieces = expect(step.get("single"), list, f"{where}.single")
    kinds = [next(iter(piece), None) if isinstance(piece, dict) else None for piece in pieces]
    if kinds.count("Sequence") != 1 or not set(kinds) <= {"Sequence", "SpecialToken"}:
        raise CheckpointError(f"{where}.single: found {found(pieces)}, expected the text once, and tokens")
    ids: list[tuple[int, ...]] = []
    for index, piece in enumerate(pieces):
        if kinds[index] == "SpecialToken":
            ids.append(_read_special(piece["SpecialToken"], step, added_tokens, where, index))
        else:
            ids.append(())
    at = kinds.index("Sequence")
    return tuple(id_ for listed in ids[:at] for id_ in listed), tuple(
        id_ for listed in ids[at:] for id_ in listed
    )


def _read_special(
    piece: object, step: Mapping[str, Any], added_tokens: Sequence[AddedToken], where: str, index: int
) -> tuple[int, ...]:
    content = expect(piece, dict, f"{where}.single[{index}]").get("id")
    token = next((token for token in added_tokens if token.content == content), None)
    if token is None:
        raise CheckpointError(
            f"{where}.single[{index}]: found {found(content)}, expected one of added_tokens"
        )
    listed = expect(step.get("special_tokens"), dict, f"{where}.special_tokens").get(token.content)
    ids = listed.get("ids") if isinstance(listed, dict) else None
    if ids != [token.id]:
        raise CheckpointError(
            f"{where}.special_tokens: found ids {found(ids)} for {found(content)}, expected [{token.id}]"
        )
    return (token.id,)
