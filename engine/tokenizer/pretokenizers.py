"""Pre-tokenizers: how a text is cut into the words that BPE then merges inside.

A pre-tokenizer knows characters only: nothing of bytes, vocabularies or merges. The patterns of the model
families are in `families`.
"""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from functools import cached_property
from itertools import chain, pairwise
from typing import NamedTuple

import regex

from pagellm.engine.errors import CheckpointError, RequestError, found
from pagellm.engine.tokenizer.added_tokens import AddedToken, Finder
from pagellm.engine.tokenizer.byte_alphabet import CHAR_OF_BYTE
from pagellm.engine.tokenizer.character_sets import NEWER_CHARACTERS
from pagellm.engine.tokenizer.families import (
    BETWEEN_THREES,
    COMPLETE,
    GGUF_PRETOKENIZERS,
    PATTERNS,
    THREES,
    THREES_AT_END,
    GgufPretokenizer,
)
from pagellm.engine.tokenizer.long_texts import find_all, has
from pagellm.engine.tokenizer.normalization import Start
from pagellm.engine.tokenizer.oniguruma import (
    PatternError,
    Translation,
    translate,
)

# `Digits` is no pattern there; its Unicode is 17, so that fewer digits are too new.
DIGIT = Translation(r"\p{N}", r"[\p{N}--[\U0001246f\U00012475-\U0001247f\U00012550-\U00012686]]", False)
DIGIT_RUN = Translation(f"{DIGIT.quick}+", f"{DIGIT.exact}+", False)

# Several patterns in one, which is quicker. GPT-2's with digits one by one: a digit ends a run of whitespace
# as the text's end does.
_DIGITS_AND_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
# DeepSeek Coder's: letters and punctuation with the space before them, then cut where a stretch of Asian
# scripts begins or ends, and all digits out of it.
_ASIAN = r"\u0800-\u9fa5\uac00-\ud7ff"
_DEEPSEEK_CODER = (
    rf"[\r\n]|[\s&&[^\r\n{_ASIAN}]]?[\p{{L}}&&[^{_ASIAN}]]+|[\s&&[{_ASIAN}]]?[\p{{L}}&&[{_ASIAN}]]+"
    rf"|[\s&&[^\r\n{_ASIAN}]]?[\p{{P}}&&[^{_ASIAN}]]+|[\s&&[{_ASIAN}]]?[\p{{P}}&&[{_ASIAN}]]+"
    rf"|[\s&&[^\r\n]](?=[\p{{L}}\p{{P}}])"
    rf"|(?:[[{_ASIAN}]&&[^\p{{L}}\p{{P}}\p{{N}}\s]]|[\s&&[{_ASIAN}]](?![\p{{L}}\p{{P}}]))+|\p{{N}}"
)
_GPT2 = translate(PATTERNS["gpt2"][0])
_IN_ONE: dict[tuple[object, ...], Translation] = {
    (DIGIT, _GPT2): translate(_DIGITS_AND_GPT2),
    (translate(r"\p{N}"), _GPT2): translate(_DIGITS_AND_GPT2),
    tuple(map(translate, PATTERNS["deepseek-coder"])): translate(_DEEPSEEK_CODER),
}

# What the patterns of a model may take on one text, and for each of its characters; a hostile one can take
# longer than the universe is old.
_TIME_LIMIT_S = 2.0
_TIME_LIMIT_PER_CHARACTER_S = 4e-6

_NEWER_CHARACTER = re.compile(f"[{NEWER_CHARACTERS}]")

# Cuts a text; the number is the time when to give up, by `time.monotonic`.
Stage = Callable[[str, float], list[str]]


class Behavior(Enum):
    """What becomes of a pattern's matches, where they do not stand alone."""

    REMOVED = "Removed"
    MERGED_WITH_PREVIOUS = "MergedWithPrevious"
    MERGED_WITH_NEXT = "MergedWithNext"
    CONTIGUOUS = "Contiguous"  # matches that follow each other are one piece


class Split(NamedTuple):
    """A pattern whose matches do not stand alone. invert: what it does not match is taken for its matches."""

    pattern: Translation
    behavior: Behavior
    invert: bool = False


class Metaspace(NamedTuple):
    """Makes spaces visible, and puts one before the text: always (before what follows an added token, too),
    only at the very beginning, or never; then cuts before each, if `split` says so."""

    char: str
    scheme: str
    split: bool


class Literals(NamedTuple):
    """Texts that are pieces wherever they are, of several at one place the longest."""

    texts: tuple[str, ...]


class Alphabet(NamedTuple):
    """Writes pieces in the byte-level alphabet, which the steps behind it then see."""


# A translated pattern makes pieces of its matches; None puts a space before each piece that begins with
# another character.
Step = Translation | Split | Metaspace | Literals | Alphabet | None


class Pretokenizer:
    """Steps applied in turn, each cutting every piece of the one before.

    Raises `PatternError` if `regex` refuses a translation.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        self._steps = tuple(steps)
        in_one = _IN_ONE.get(self._steps)
        quick = self._steps if in_one is None else (in_one,)
        # `Digits` knows other characters than the patterns do.
        self._exact_steps = self._steps if DIGIT in self._steps else quick
        self._stages = [_stage_of(step, exact=False) for step in quick]
        patterns = [step.pattern if isinstance(step, Split) else step for step in self._steps]
        self._depends_on_unicode = any(
            isinstance(pattern, Translation) and pattern.quick != pattern.exact for pattern in patterns
        )

    @classmethod
    def named(cls, name: str, *, add_prefix_space: bool = False) -> "Pretokenizer":
        """The pre-tokenizer of a family in `PATTERNS`."""
        prefix = [None] if add_prefix_space else []
        return cls([*prefix, *map(translate, PATTERNS[name])])

    @property
    def drops_nothing(self) -> bool:
        """Whether all of a text is in its words."""
        return not any(isinstance(s, Split) and s.behavior is Behavior.REMOVED for s in self._steps)

    def __call__(self, text: str, start: Start = Start.TEXT) -> list[str]:
        """The words of the text; joined they give it back, but for a prefixed space.

        Raises `RequestError` if a pattern that came with the model takes too long on this text.
        """
        if not self._steps:
            return [text]
        stages = self._stages
        if self._depends_on_unicode and not text.isascii() and has(_NEWER_CHARACTER, text):
            stages = self._exact_stages
        limit_s = _TIME_LIMIT_S + len(text) * _TIME_LIMIT_PER_CHARACTER_S
        give_up_at = time.monotonic() + limit_s
        pieces = [text]
        try:
            for stage in stages:
                if isinstance(stage, Metaspace):
                    pieces = list(chain.from_iterable(_metaspace_words(stage, pieces, start)))
                    continue
                # The same pieces come again and again.
                words_of = {piece: stage(piece, give_up_at) for piece in dict.fromkeys(pieces)}
                pieces = list(chain.from_iterable(map(words_of.__getitem__, pieces)))
        except TimeoutError:
            raise RequestError(
                f"text: the pre-tokenizer's patterns took more than {limit_s:.1f} s on {len(text)}"
                " characters: they go through some texts in exponentially many ways"
            ) from None
        return pieces

    @cached_property
    def _exact_stages(self) -> list[Stage | Metaspace]:
        return [_stage_of(step, exact=True) for step in self._exact_steps]


def from_gguf_name(pre: str) -> tuple[Pretokenizer, GgufPretokenizer]:
    """The pre-tokenizer that a GGUF file names in `tokenizer.ggml.pre`.

    Raises `CheckpointError` if the name is not one of those supported.
    """
    if pre not in GGUF_PRETOKENIZERS:
        raise CheckpointError(
            f"tokenizer.ggml.pre: found {found(pre)}, expected one of {', '.join(sorted(GGUF_PRETOKENIZERS))}"
        )
    named = GGUF_PRETOKENIZERS[pre]
    return Pretokenizer.named(named.family), named


def is_complete(pattern: Translation) -> bool:
    """Whether the pattern is known to match every character."""
    return pattern.quick in COMPLETE


def _stage_of(step: Step, *, exact: bool) -> Stage | Metaspace:
    if step is None:
        return _prefix_space
    if isinstance(step, Metaspace):
        return step
    if isinstance(step, Literals):
        return _finding(step.texts)
    if isinstance(step, Alphabet):
        return lambda text, _give_up_at: ["".join([CHAR_OF_BYTE[byte] for byte in text.encode()])]
    pattern = step.pattern if isinstance(step, Split) else step
    source = pattern.exact if exact else pattern.quick
    if isinstance(step, Split):
        return _splitting(source, step.behavior, step.invert)
    return _stage(source, pattern.may_be_empty)


def _stage(source: str, may_be_empty: bool) -> Stage:
    """The stage that makes each match a piece, and each stretch between matches one too."""
    if source in _THREES:
        return _cutting_threes(*_THREES[source])
    if source in COMPLETE:
        compiled = _compile(source)
        return lambda text, _give_up_at: compiled.findall(text)
    return _cutting_at_places(source) if may_be_empty else _cutting_out(source)


def _compile(source: str) -> regex.Pattern[str]:
    try:
        return regex.compile(source, regex.V1)
    except (regex.error, RecursionError, OverflowError, MemoryError) as error:
        raise PatternError(f"{found(source)} cannot be compiled: {error}") from error


def _runs_of_threes() -> dict[str, tuple[str, bool]]:
    """For the patterns of digits in threes, which take quadratic time: the runs; whether they stand alone.

    Where they do not, what is left over in front is no piece of its own.
    """
    runs = ((THREES, r"\p{N}+", True), (THREES_AT_END, r"\d++(?!\w)", True), (BETWEEN_THREES, r"\d+", False))
    found_runs = {}
    for pattern, run, alone in runs:
        slow, quick = translate(pattern), translate(run)
        found_runs[slow.quick] = quick.quick, alone
        found_runs[slow.exact] = quick.exact, alone
    return found_runs


_THREES = _runs_of_threes()


def _cutting_threes(run: str, alone: bool) -> Stage:
    """Where runs of digits are cut into threes, counted from the right."""
    compiled = _compile(run)

    def stage(text: str, give_up_at: float) -> list[str]:
        cuts = [0]
        for match in compiled.finditer(text, timeout=_time_left(give_up_at)):
            start, stop = match.span()
            cuts += (
                [start, *range(start + (stop - start) % 3, stop, 3), stop]
                if alone
                else range(start + (stop - start) % 3, stop, 3)
            )
        cuts.append(len(text))
        return [text[start:stop] for start, stop in pairwise(cuts) if start < stop]

    return stage


def _cutting_out(source: str) -> Stage:
    """Where every match has characters."""
    compiled = _compile(f"({source})")

    def stage(text: str, give_up_at: float) -> list[str]:
        # Stretches and matches in turn.
        return list(filter(None, compiled.split(text, timeout=_time_left(give_up_at))))

    return stage


def _cutting_at_places(source: str) -> Stage:
    """Where a match may be empty, and then only cuts.

    Where a match ends, another one that is empty is passed over, and with it whatever else could begin there:
    the rule of the library's Oniguruma binding, which is not Python's.
    """
    compiled = _compile(source)

    def stage(text: str, give_up_at: float) -> list[str]:
        pieces: list[str] = []
        done = at = 0
        last_stop = -1
        while match := compiled.search(text, at, timeout=_time_left(give_up_at)):
            start, stop = match.span()
            if start == stop == last_stop:
                at += 1
                if at > len(text):
                    break
                continue
            if done < start:
                pieces.append(text[done:start])
            if start < stop:
                pieces.append(text[start:stop])
            done = at = last_stop = stop
        if done < len(text):
            pieces.append(text[done:])
        return pieces

    return stage


def _finding(texts: Sequence[str]) -> Stage:
    finder = Finder({text: AddedToken(0, text, special=False) for text in texts})

    def stage(text: str, _give_up_at: float) -> list[str]:
        pieces = finder.split(text, parse_special=True)
        return [piece if isinstance(piece, str) else piece.content for piece in pieces]

    return stage


def _splitting(source: str, behavior: Behavior, invert: bool) -> Stage:
    """Where the matches do not stand alone; none is of no character."""
    compiled = _compile(source)

    def stage(text: str, give_up_at: float) -> list[str]:
        pieces: list[tuple[str, bool]] = []
        done = 0
        for match in compiled.finditer(text, timeout=_time_left(give_up_at)):
            start, stop = match.span()
            if done < start:
                pieces.append((text[done:start], invert))
            pieces.append((text[start:stop], not invert))
            done = stop
        if done < len(text):
            pieces.append((text[done:], invert))
        return _placed(pieces, behavior)

    return stage


def _placed(pieces: list[tuple[str, bool]], behavior: Behavior) -> list[str]:
    """The pieces, each with whether it is a match, as the behavior puts them together."""
    if behavior is Behavior.REMOVED:
        return [piece for piece, is_match in pieces if not is_match]
    backwards = behavior is Behavior.MERGED_WITH_NEXT
    # Each is a list of what it is put together from.
    groups: list[list[str]] = []
    was_match = False
    for piece, is_match in reversed(pieces) if backwards else pieces:
        joins = is_match == was_match if behavior is Behavior.CONTIGUOUS else is_match and not was_match
        if joins and groups:
            groups[-1].append(piece)
        else:
            groups.append([piece])
        was_match = is_match
    if backwards:
        return ["".join(reversed(group)) for group in reversed(groups)]
    return ["".join(group) for group in groups]


def _metaspace_words(metaspace: Metaspace, pieces: list[str], start: Start) -> Iterator[list[str]]:
    """The words of pieces that together begin at `start`."""
    char, scheme, split = metaspace
    word = re.compile(f"{re.escape(char)}[^{re.escape(char)}]*|[^{re.escape(char)}]+")
    for index, piece in enumerate(pieces):
        text = piece.replace(" ", char)
        is_first = index == 0
        is_prefixed = scheme == "always" if not is_first else scheme != "never" and start is not Start.WITHIN
        if is_first and scheme == "first" and start is Start.TOKEN:
            is_prefixed = False
        if is_prefixed and not text.startswith(char):
            text = char + text
        yield find_all(word, text) if split else [text]


def _prefix_space(text: str, _give_up_at: float) -> list[str]:
    return [text if text.startswith(" ") else f" {text}"]


def _time_left(give_up_at: float) -> float:
    """In seconds, above zero, which would mean no limit."""
    return max(give_up_at - time.monotonic(), 1e-3)
