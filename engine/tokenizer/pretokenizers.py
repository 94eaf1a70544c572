"""Pre-tokenizers: how a text is cut into the words that BPE then merges inside.

The patterns of the supported model families stand here by name, together with the names that GGUF files give
them and the reading of the `pre_tokenizer` section of a `tokenizer.json`. A pre-tokenizer knows characters
only: nothing of bytes, vocabularies or merges.
"""

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import regex

from pagellm.engine.errors import CheckpointError
from pagellm.engine.tokenizer.checks import expect, found

PATTERNS: dict[str, str] = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama3": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    # Digits one by one, then GPT-2 on what lies between: in one pattern, a digit ends a run of whitespace
    # just as the end of the text does.
    "smollm": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+",
}

# Only names whose pattern is the very same; a model loaded with a merely similar one would be quietly worse.
PATTERN_OF_GGUF_PRE: dict[str, str] = {
    "gpt-2": "gpt2",
    "phi-2": "gpt2",
    "llama-bpe": "llama3",
    "llama-v3": "llama3",
    "llama3": "llama3",
    "qwen2": "qwen2",
    "refact": "smollm",
    "smollm": "smollm",
    "starcoder": "smollm",
}

_EVERY_DIGIT = r"\p{N}"
_DIGIT_RUNS = r"\p{N}+"

Stage = Callable[[str], list[str]]


class Pretokenizer:
    """Stages applied in turn, each cutting every piece of the stage before."""

    def __init__(self, stages: Iterable[Stage]) -> None:
        self._stages = tuple(stages)

    @classmethod
    def named(cls, name: str, *, add_prefix_space: bool = False) -> "Pretokenizer":
        """The pre-tokenizer of a family in `PATTERNS`."""
        prefix = [_prefix_space] if add_prefix_space else []
        return cls([*prefix, _split(PATTERNS[name], name)])

    def __call__(self, text: str) -> list[str]:
        """The words of the text; joined they give it back, but for the spaces that a prefix stage adds."""
        pieces = [text]
        for stage in self._stages:
            pieces = stage(pieces[0]) if len(pieces) == 1 else list(chain.from_iterable(map(stage, pieces)))
        return pieces


def from_gguf_name(pre: str) -> Pretokenizer:
    """The pre-tokenizer that a GGUF file names in `tokenizer.ggml.pre`.

    Raises:
        CheckpointError: the name is not one of those supported.
    """
    if pre not in PATTERN_OF_GGUF_PRE:
        raise CheckpointError(
            f"tokenizer.ggml.pre: found {found(pre)}, expected one of {', '.join(PATTERN_OF_GGUF_PRE)}"
        )
    return Pretokenizer.named(PATTERN_OF_GGUF_PRE[pre])


def from_tokenizer_json(section: object, where: str) -> Pretokenizer:
    """The pre-tokenizer that the `pre_tokenizer` section of a `tokenizer.json` describes.

    `ByteLevel` alone, or a `Sequence` of `Split` and `Digits` that ends with `ByteLevel`.

    Raises:
        CheckpointError: another type, or a setting that is not supported.
    """
    section = expect(section, dict, where)
    if section.get("type") != "Sequence":
        steps = [(where, section)]
    else:
        listed = expect(section.get("pretokenizers"), list, f"{where}.pretokenizers")
        names = [f"{where}.pretokenizers[{index}]" for index in range(len(listed))]
        steps = [(name, expect(step, dict, name)) for name, step in zip(names, listed, strict=True)]
    if not steps or steps[-1][1].get("type") != "ByteLevel":
        last = steps[-1][1].get("type") if steps else None
        raise CheckpointError(f"{where}: ends with {found(last)}, expected ByteLevel")
    patterns = [pattern for name, step in steps for pattern in _read_step(step, name)]
    if patterns == [_EVERY_DIGIT, PATTERNS["gpt2"]]:
        patterns = [PATTERNS["smollm"]]
    return Pretokenizer(_prefix_space if pattern is None else _split(pattern, where) for pattern in patterns)


def _read_step(step: Mapping[str, Any], where: str) -> list[str | None]:
    """One entry as patterns; None stands for the stage that prefixes a space."""
    match step.get("type"):
        case "ByteLevel":
            prefix: list[str | None] = [None] if step.get("add_prefix_space", True) else []
            return [*prefix, PATTERNS["gpt2"]] if step.get("use_regex", True) else prefix
        case "Digits":
            return [_EVERY_DIGIT if step.get("individual_digits", False) else _DIGIT_RUNS]
        case "Split":
            return [_read_split(step, where)]
        case other:
            raise CheckpointError(f"{where}.type: found {found(other)}, expected ByteLevel, Split or Digits")


def _read_split(step: Mapping[str, Any], where: str) -> str:
    pattern = expect(step.get("pattern"), dict, f"{where}.pattern")
    kind, text = next(iter(pattern.items()), (None, None))
    if kind not in ("Regex", "String"):
        raise CheckpointError(f"{where}.pattern: found {found(pattern)}, expected Regex or String")
    text = expect(text, str, f"{where}.pattern.{kind}")
    if kind == "String":
        text = regex.escape(text)
    behavior, invert = step.get("behavior"), step.get("invert", False)
    # "Remove what does not match" keeps every character where the pattern matches all of them.
    keeps_all = behavior == "Removed" and invert is True and text in PATTERNS.values()
    if not keeps_all and (behavior != "Isolated" or invert is not False):
        raise CheckpointError(
            f"{where}.behavior: found {found(behavior)} with invert {found(invert)}, expected 'Isolated'"
            " without invert"
        )
    return text


def _split(pattern: str, where: str) -> Stage:
    """The stage that makes each match a piece, and each stretch between matches one too."""
    try:
        compiled = regex.compile(pattern)
    except regex.error as error:
        raise CheckpointError(f"{where}: {found(pattern)} is no regular expression: {error}") from error
    if pattern in PATTERNS.values():
        # These match every character and have no groups, so the C loop alone does it.
        find_all: Stage = compiled.findall
        return find_all

    def isolate(text: str) -> list[str]:
        pieces: list[str] = []
        done = 0
        for match in compiled.finditer(text):
            start, stop = match.span()
            if start == stop:
                continue
            if done < start:
                pieces.append(text[done:start])
            pieces.append(text[start:stop])
            done = stop
        if done < len(text):
            pieces.append(text[done:])
        return pieces

    return isolate


def _prefix_space(text: str) -> list[str]:
    return [text if text.startswith(" ") else f" {text}"]
