r"""Patterns of the `tokenizers` library, in Oniguruma's dialect, as patterns of the `regex` module.

The two dialects look alike and differ in what `\w`, `\b`, `^`, `$`, `(?m:`, `(?i:`, `\h`, `{,n}` or `[a&&b]`
mean, and in the version of Unicode. So a pattern is read here whole, by Oniguruma's grammar
(https://github.com/kkos/oniguruma/blob/master/doc/RE), and written anew from parts that mean the same in
both. What has no such part is refused by name, and bounds keep a hostile pattern from costing more than it
may.
"""

import re
from dataclasses import dataclass, replace
from typing import NamedTuple

from pagellm.engine.errors import found as _shown
from pagellm.engine.tokenizer.character_sets import (
    MEMBERS,
    NAME_OF_SHORTHAND,
    NEWER_CHARACTERS,
    POSIX_BRACKETS,
    WITH_UNASSIGNED,
)

_MAX_LENGTH = 10_000
_MAX_DEPTH = 50
# Named sets and word boundaries, which `regex` compiles slowly.
_MAX_SETS = 100
# Oniguruma's own bound of one repeat; here also of repeats within repeats.
_MAX_REPEATS = 100_000

_CONTROLS = {"t": "\t", "n": "\n", "r": "\r", "f": "\f", "v": "\v", "a": "\a", "e": "\x1b"}
_HEX = re.compile(r"x\{([0-9A-Fa-f]{1,8})\}|x([0-7][0-9A-Fa-f])|u([0-9A-Fa-f]{4})")
_PROPERTY = re.compile(r"[pP]\{(\^?)([A-Za-z0-9_ -]*)\}")
_POSIX_BRACKET = re.compile(r"\[:(\^?)([a-z]+):\]")
_REPEATS = re.compile(r"[*+?]|\{([0-9]*)(,?)([0-9]*)\}")
_OPTIONS = re.compile(r"\(\?([imx]*)(?:-([imx]*))?([:)])")
_GROUPS = ("(?=", "(?!", "(?<=", "(?<!", "(?>")
_NAMED_GROUP = re.compile(r"\(\?(?:<[^\W\d]\w*>|'[^\W\d]\w*')")

_ONE_CHARACTER = re.compile(r"(?s:\\x..|[^\\])")
# The atoms of members: the first group is "P" where they are negated.
_ATOMS = re.compile(r"\\([pPs])(\{\w+\}|)")
# But newlines, and with them.
_ANYTHING = (r"[^\n]", r"[\x00-\U0010ffff]")
# Two letters that are one character in another case: "ß" is "ss" to (?i).
_LETTER_PAIRS_OF_ONE = ("ss", "st", "ff", "fi", "fl")


class PatternError(Exception):
    """A pattern that Oniguruma would refuse, or that has no translation; says which part, and where."""


class Translation(NamedTuple):
    """A pattern for `regex.compile(..., regex.V1)`.

    `exact` is for texts with NEWER_CHARACTERS, and slower; elsewhere `quick` is the same. `may_be_empty`:
    a match can be of no character.
    """

    quick: str
    exact: str
    may_be_empty: bool


def translate(pattern: str) -> Translation:
    """What Oniguruma understands by the pattern.

    Raises `PatternError` if it cannot be read, cannot be translated, or is out of bounds.
    """
    if len(pattern) > _MAX_LENGTH:
        raise PatternError(f"{len(pattern)} characters, expected at most {_MAX_LENGTH}")
    quick = _Parser(pattern, exact=False).parse()
    exact = _Parser(pattern, exact=True).parse()
    return Translation(quick.source, exact.source, quick.may_be_empty)


def literal(text: str) -> Translation:
    """The pattern that matches this very text."""
    source = "".join(map(_quote, text))
    return Translation(source, source, not text)


@dataclass(frozen=True, slots=True)
class _Options:
    ignore_case: bool = False
    dot_matches_newline: bool = False
    extended: bool = False


class _Part(NamedTuple):
    """A translated part. `repeats`: how often its innermost part can be repeated in it."""

    source: str
    may_be_empty: bool = False
    is_assertion: bool = False
    # That it begins with `.*` or the like.
    begins_with_anything: bool = False
    repeats: int = 1
    # With (?i), the ASCII letters that it begins and ends with, if it does.
    first: str = ""
    last: str = ""


class _Parser:
    def __init__(self, pattern: str, *, exact: bool) -> None:
        self._pattern = pattern
        self._exact = exact
        self._at = 0
        self._depth = 0
        self._in_lookbehind = False
        self._num_sets = 0
        # Within a set: whether the brackets around this place negate it, and whether each named set in the
        # union at this place is negated in the end.
        self._negated = False
        self._sign_of_named: dict[str, bool] = {}

    def parse(self) -> _Part:
        part = self._alternatives(_Options())
        if self._at < len(self._pattern):
            raise self._error("found ) without (")
        return part

    def _alternatives(self, options: _Options) -> _Part:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise self._error(f"nested more than {_MAX_DEPTH} deep")
        branches = [self._branch(options)]
        while self._take("|"):
            branches.append(self._branch(options))
        self._depth -= 1
        return _Part(
            "|".join([branch.source for branch in branches]),
            may_be_empty=any(branch.may_be_empty for branch in branches),
            is_assertion=any(branch.is_assertion for branch in branches),
            begins_with_anything=any(branch.begins_with_anything for branch in branches),
            repeats=max(branch.repeats for branch in branches),
            first="".join([branch.first for branch in branches]),
            last="".join([branch.last for branch in branches]),
        )

    def _branch(self, options: _Options) -> _Part:
        parts: list[_Part] = []
        while self._at < len(self._pattern) and self._pattern[self._at] not in "|)":
            start = self._at
            part = self._atom(options)
            if part is None:
                continue
            if part.is_assertion and self._in_lookbehind:
                raise self._error("an assertion in a lookbehind, which has no translation", start)
            part = self._repeated(part, options, start)
            if part.begins_with_anything and parts and all(part.is_assertion for part in parts):
                # Oniguruma looks for it at the beginning of the text or of a line alone, which it should not.
                raise self._error("any characters behind an assertion, which has no translation", start)
            if parts and any(a + b in _LETTER_PAIRS_OF_ONE for a in parts[-1].last for b in part.first):
                raise self._error("letters under (?i) that are one character in another case", start)
            parts.append(part)
        return _Part(
            "".join([part.source for part in parts]),
            may_be_empty=all(part.may_be_empty for part in parts),
            is_assertion=bool(parts) and all(part.is_assertion for part in parts),
            begins_with_anything=bool(parts) and parts[0].begins_with_anything,
            repeats=max([part.repeats for part in parts], default=1),
            first=parts[0].first if parts else "",
            last=parts[-1].last if parts else "",
        )

    def _atom(self, options: _Options) -> _Part | None:
        """The next part without its repeats; None for a comment."""
        char = self._pattern[self._at]
        if options.extended and char in " \t\n\r\f\v":
            self._at += 1
            return None
        if options.extended and char == "#":
            stop = self._pattern.find("\n", self._at)
            self._at = len(self._pattern) if stop < 0 else stop
            return None
        if char == "(":
            return self._group(options)
        if char == "[":
            self._sign_of_named.clear()
            return _Part(self._brackets(options))
        if char == "\\":
            return self._escape(options)
        if char in "*+?" or (char == "{" and _REPEATS.match(self._pattern, self._at)):
            raise self._error("a repeat of nothing")
        self._at += 1
        if char == ".":
            return _Part(_ANYTHING[options.dot_matches_newline])
        if char == "^":
            return _Part(r"(?:\A|(?<=\n)(?!\Z))", may_be_empty=True, is_assertion=True)
        if char == "$":
            return _Part(r"(?=\n|\Z)", may_be_empty=True, is_assertion=True)
        return self._character(char, options)

    def _group(self, options: _Options) -> _Part | None:
        start = self._at
        if self._pattern.startswith("(?#", start):
            stop = self._pattern.find(")", start)
            if stop < 0:
                raise self._error("a comment without an end")
            self._at = stop + 1
            return None
        if found := _OPTIONS.match(self._pattern, start):
            on, off, end = found.groups(default="")
            options = _with_options(options, on, True)
            options = _with_options(options, off, False)
            self._at = found.end()
            inner = self._alternatives(options)
            # `(?i)` alone holds until its group ends, alternatives included.
            if end == ":" and not self._take(")"):
                raise self._error("found ( without )", start)
            return inner._replace(source=f"(?:{inner.source})")
        opening = next((opening for opening in _GROUPS if self._pattern.startswith(opening, start)), None)
        if opening is not None:
            self._at += len(opening)
        elif found := _NAMED_GROUP.match(self._pattern, start):
            self._at = found.end()
        elif self._pattern.startswith(("(?", "(*"), start):
            raise self._error(f"found {_shown(self._pattern[start : start + 4])}, which has no translation")
        else:
            self._at += 1
        return self._rest_of_group(opening or "(?:", options, start)

    def _rest_of_group(self, opening: str, options: _Options, start: int) -> _Part:
        is_lookbehind = opening in ("(?<=", "(?<!")
        if self._in_lookbehind:
            raise self._error("a group in a lookbehind that is not (?:...), which has no translation", start)
        self._in_lookbehind |= is_lookbehind
        inner = self._alternatives(options)
        if is_lookbehind:
            self._in_lookbehind = False
        if not self._take(")"):
            raise self._error("found ( without )", start)
        source = f"{opening}{inner.source})"
        if opening in ("(?:", "(?>"):
            return inner._replace(source=source)
        return _Part(source, may_be_empty=True, is_assertion=True, repeats=inner.repeats)

    def _repeated(self, part: _Part, options: _Options, start: int) -> _Part:
        found = _REPEATS.match(self._pattern, self._at)
        if found is None:
            return part
        if part.is_assertion:
            raise self._error("a repeat of an assertion, which has no translation", start)
        low, high = _bounds(found)
        if low is None or (high is not None and high < low):
            raise self._error(f"found {_shown(found.group())}, which has no translation")
        most = max(low, high or 0, 1)
        if most * part.repeats > _MAX_REPEATS:
            raise self._error(f"found {_shown(found.group())}: more than {_MAX_REPEATS} repeats")
        if part.may_be_empty and (high is None or high > 1):
            raise self._error("a repeat of what may be empty, which has no translation", start)
        self._at = found.end()
        quantifier = found.group() if found.group() in "*+?" else f"{{{low},{'' if high is None else high}}}"
        mode = self._pattern[self._at : self._at + 1]
        is_exact_count = found.group(2) == ""
        if self._in_lookbehind and high != low:
            raise self._error("a repeat of no fixed number in a lookbehind, which has no translation", start)
        if mode == "+" and found.group() in "*+?":
            self._at += 1
        elif mode == "?":
            self._at += 1
            if is_exact_count:
                # `a{3}?` matches three or nothing; it is not a lazy three.
                return part._replace(
                    source=f"(?:(?:{part.source}){quantifier})?",
                    may_be_empty=True,
                    repeats=most * part.repeats,
                )
        else:
            mode = ""
        if _REPEATS.match(self._pattern, self._at):
            raise self._error("a repeat of a repeat, which has no translation")
        if most > 1 and any(a + b in _LETTER_PAIRS_OF_ONE for a in part.last for b in part.first):
            raise self._error("letters under (?i) that are one character in another case", start)
        return part._replace(
            source=f"(?:{part.source}){quantifier}{mode}",
            may_be_empty=part.may_be_empty or low == 0,
            begins_with_anything=part.begins_with_anything or (high is None and part.source in _ANYTHING),
            repeats=most * part.repeats,
        )

    def _escape(self, options: _Options) -> _Part:
        start = self._at
        char = self._pattern[start + 1 : start + 2]
        if char.lower() in NAME_OF_SHORTHAND or char in ("p", "P"):
            negated, name = self._named_set()
            if options.ignore_case and name not in ("space", "digit", "nd", "n"):
                raise self._error("a set of letters under (?i), which has no translation", start)
            return _Part(f"[{'^' * negated}{self._members_of(name)}]")
        assertions = {"A": r"\A", "z": r"\Z", "Z": r"(?=\n?\Z)", "b": "", "B": ""}
        if char in assertions:
            source = assertions[char] or self._word_boundary(negated=char == "B")
            self._at += 2
            return _Part(source, may_be_empty=True, is_assertion=True)
        sets = {"N": _ANYTHING[0], "O": _ANYTHING[1], "R": r"(?>\r\n|[\n-\r\x85\u2028\u2029])"}
        if char in sets and not (char == "R" and self._in_lookbehind):
            self._at += 2
            return _Part(sets[char])
        return self._character(self._escaped_character(), options)

    def _word_boundary(self, *, negated: bool) -> str:
        word = self._members_of("word")
        is_word, is_none = f"(?=[{word}])", f"(?![{word}])"
        behind_word, behind_none = (is_word, is_none) if negated else (is_none, is_word)
        return f"(?:(?<=[{word}]){behind_word}|(?<![{word}]){behind_none})"

    def _escaped_character(self) -> str:
        """The one character that the escape at this place stands for."""
        start = self._at
        char = self._pattern[start + 1 : start + 2]
        if found := _HEX.match(self._pattern, start + 1):
            code = int(next(filter(None, found.groups())), 16)
            if code > 0x10FFFF or 0xD800 <= code < 0xE000:
                raise self._error(f"found {_shown(found.group())}, expected a character")
            self._at = found.end()
            return chr(code)
        if char in _CONTROLS:
            self._at += 2
            return _CONTROLS[char]
        if not char or char.isalnum() or char == "_":
            raise self._error(f"found '\\{char}', which has no translation")
        self._at += 2
        return char

    def _character(self, char: str, options: _Options) -> _Part:
        if "\ud800" <= char <= "\udfff":
            raise self._error(f"found the lone surrogate U+{ord(char):04X}")
        if not options.ignore_case:
            return _Part(_quote(char))
        if not char.isascii():
            raise self._error(f"found {char!r} under (?i), which has no translation")
        letter = char.lower() if char.isalpha() else ""
        return _Part(f"[{_quote_in_either_case(char)}]", first=letter, last=letter)

    def _brackets(self, options: _Options) -> str:
        """A set, from its opening to its closing bracket."""
        start = self._at
        self._at += 1
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise self._error(f"nested more than {_MAX_DEPTH} deep")
        negated = self._take("^")
        self._negated ^= negated
        if self._pattern.startswith("]", self._at):
            raise self._error("found ] first in a set, expected \\]")
        intersected: list[str] = []
        members: list[str] = []
        signs_around, self._sign_of_named = self._sign_of_named, {}
        while not self._take("]"):
            if self._at >= len(self._pattern):
                raise self._error("found [ without ]", start)
            if self._take("&&"):
                intersected.append("".join(members))
                members = []
                self._sign_of_named = {}
            else:
                members.append(self._member(options))
        intersected.append("".join(members))
        if "" in intersected:
            raise self._error("an empty set, which has no translation", start)
        self._depth -= 1
        self._negated ^= negated
        signs, self._sign_of_named = self._sign_of_named, signs_around
        if len(intersected) == 1:
            for atom, sign in signs.items():
                self._note_sign(atom, sign)
        if negated and len(intersected) == 1 and _ONE_CHARACTER.fullmatch(intersected[0]):
            # `regex` joins alternatives such as `[^a]|[^b]` into `[^ab]`, but not this form.
            return f"[[\\x00-\\U0010ffff]--{intersected[0]}]"
        if len(intersected) > 1:
            return f"[{'^' * negated}{'&&'.join([f'[{side}]' for side in intersected])}]"
        return f"[{'^' * negated}{intersected[0]}]"

    def _member(self, options: _Options) -> str:
        """One member of a set: a character, a range, a named set or a set of its own."""
        start = self._at
        if found := _POSIX_BRACKET.match(self._pattern, start):
            sign, name = found.groups()
            if name not in POSIX_BRACKETS:
                raise self._error(
                    f"found {_shown(found.group())}, expected one of {', '.join(sorted(POSIX_BRACKETS))}"
                )
            if options.ignore_case and name not in ("space", "digit"):
                raise self._error("a set of letters under (?i), which has no translation")
            self._at = found.end()
            if name == "punct":
                name = "punct and symbols"
            return self._member_set(name, sign == "^")
        if self._pattern[start] == "[":
            return self._brackets(options)
        following = self._pattern[start + 1 : start + 2]
        if self._pattern[start] == "\\" and following and following in "wWdDsShHpP":
            negated, name = self._named_set()
            if options.ignore_case and name not in ("space", "digit", "nd", "n"):
                raise self._error("a set of letters under (?i), which has no translation", start)
            if self._pattern.startswith("-", self._at) and not self._pattern.startswith("-]", self._at):
                raise self._error("found - behind a set in a set, expected \\-")
            return self._member_set(name, negated)
        low = self._set_character(is_first=self._pattern[start - 1] in "[^")
        if not self._pattern.startswith("-", self._at) or self._pattern.startswith("-]", self._at):
            return self._range(low, low, options)
        self._at += 1
        if self._pattern.startswith(("[", "&&"), self._at):
            raise self._error("a range to a set")
        high = self._set_character(is_first=False, is_high=True)
        if high < low:
            raise self._error(f"found the range {low!r} to {high!r}, expected it to go up", start)
        if self._pattern.startswith("-", self._at) and not self._pattern.startswith("-]", self._at):
            raise self._error("found - behind a range in a set, expected \\-")
        return self._range(low, high, options)

    def _set_character(self, *, is_first: bool, is_high: bool = False) -> str:
        char = self._pattern[self._at : self._at + 1]
        if not char:
            raise self._error("found [ without ]")
        if char == "\\":
            if self._pattern.startswith("\\b", self._at):
                self._at += 2
                return "\b"
            return self._escaped_character()
        if char == "-" and not is_first and (is_high or not self._pattern.startswith("-]", self._at)):
            raise self._error("found - between members of a set, expected \\-")
        if "\ud800" <= char <= "\udfff":
            raise self._error(f"found the lone surrogate U+{ord(char):04X}")
        self._at += 1
        return char

    def _range(self, low: str, high: str, options: _Options) -> str:
        if not options.ignore_case:
            return _quote(low) if low == high else f"{_quote(low)}-{_quote(high)}"
        if not high.isascii():
            raise self._error(f"found {high!r} under (?i), which has no translation")
        return "".join([_quote_in_either_case(chr(code)) for code in range(ord(low), ord(high) + 1)])

    def _named_set(self) -> tuple[bool, str]:
        """The shorthand or property at this place: whether it is negated, and its name."""
        start = self._at
        char = self._pattern[start + 1]
        negated = char.isupper()
        if char in "pP":
            found = _PROPERTY.match(self._pattern, start + 1)
            name = "" if found is None else re.sub("[ _-]", "", found.group(2)).lower()
            if found is None or name not in MEMBERS:
                shown = self._pattern[start : start + 20]
                raise self._error(
                    f"found {_shown(shown)}, expected a property that is known here, such as \\p{{L}}"
                )
            negated ^= found.group(1) == "^"
            self._at = found.end()
        else:
            name = NAME_OF_SHORTHAND[char.lower()]
            self._at += 2
        return negated, name

    def _member_set(self, name: str, negated: bool) -> str:
        """A named set within brackets."""
        if name == "word":
            name = "word in brackets"
        for letter, atom in _ATOMS.findall(MEMBERS[name]):
            self._note_sign(atom, self._negated ^ negated ^ (letter == "P"))
        members = self._members_of(name)
        return f"[^{members}]" if negated else members

    def _note_sign(self, atom: str, sign: bool) -> None:
        if self._sign_of_named.setdefault(atom, sign) != sign:
            # `regex` takes the two together for everything, also where they are negated.
            raise self._error("a named set and its opposite in one set, which has no translation")

    def _members_of(self, name: str) -> str:
        self._num_sets += 1
        if self._num_sets > _MAX_SETS:
            raise self._error(f"more than {_MAX_SETS} named sets and word boundaries")
        members = MEMBERS[name]
        if not self._exact:
            return members
        if name in WITH_UNASSIGNED:
            return f"{members}{NEWER_CHARACTERS}"
        return f"[[{members}]--[{NEWER_CHARACTERS}]]"

    def _take(self, text: str) -> bool:
        if not self._pattern.startswith(text, self._at):
            return False
        self._at += len(text)
        return True

    def _error(self, message: str, at: int | None = None) -> PatternError:
        return PatternError(f"at character {self._at if at is None else at}: {message}")


def _with_options(options: _Options, letters: str, value: bool) -> _Options:
    names = {"i": "ignore_case", "m": "dot_matches_newline", "x": "extended"}
    return replace(options, **{names[letter]: value for letter in letters})


def _bounds(found: re.Match[str]) -> tuple[int | None, int | None]:
    """How often at least and at most; the first is None where neither is given."""
    if found.group() in "*+?":
        return {"*": (0, None), "+": (1, None), "?": (0, 1)}[found.group()]
    low, comma, high = found.groups()
    if max(len(low), len(high)) > len(str(_MAX_REPEATS)):
        # Too many digits to be a number within bounds.
        return _MAX_REPEATS + 1, None
    if not comma:
        return (int(low), int(low)) if low else (None, None)
    return (int(low or 0) if low or high else None), (int(high) if high else None)


def _quote(char: str) -> str:
    if char.isascii() and not char.isalnum():
        return f"\\x{ord(char):02x}"
    return char


def _quote_in_either_case(char: str) -> str:
    """An ASCII character with what it is in another case."""
    others = {"k": "\u212a", "s": "\u017f"}
    if not char.isalpha():
        return _quote(char)
    return char.lower() + char.upper() + others.get(char.lower(), "")
