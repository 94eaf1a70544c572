"""What a model writes, told apart into what it says and the tools it calls, as its text grows.

Four ways to write a call are known. However a text is cut into pieces, the parts are the same: each decision
follows from the text alone, and waits until enough of it is there. A call is given out when it is complete;
what begins like one and is none is said, and so nothing is lost.
"""

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from pagellm.engine.requests.json_text import JsonEnd, elements_of, json_object, value_of

HERMES, LLAMA3_JSON, MISTRAL, GPT_OSS = "hermes", "llama3_json", "mistral", "gpt_oss"
PARSERS = (HERMES, LLAMA3_JSON, MISTRAL, GPT_OSS)


class ToolCall(NamedTuple):
    """A call. arguments: the JSON text of an object, as the model wrote it."""

    name: str
    arguments: str


class Thought(NamedTuple):
    """A piece of what the model thinks, where its answer has that, too."""

    text: str


Part = str | ToolCall | Thought  # a text is a piece of what the model says


class _Markers:
    """Finds the first of some markers in a text that may go on."""

    def __init__(self, markers: Sequence[str]) -> None:
        longest_first = sorted(markers, key=len, reverse=True)
        self._any = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._longest = len(longest_first[0]) if longest_first else 0
        self._beginnings = frozenset(marker[:size] for marker in markers for size in range(1, len(marker)))

    def first_in(self, text: str) -> tuple[int, str | None, bool]:
        """Where the first of them is, which it is, and whether a longer one is out of the question.

        Where there is none: the place from which on the text may be the beginning of one.
        """
        match = self._any.search(text)
        at, marker = (len(text), None) if match is None else (match.start(), match[0])
        for begin in range(max(0, len(text) - self._longest + 1), min(at + 1, len(text))):
            if text[begin:] in self._beginnings:
                return (at, marker, False) if begin == at else (begin, None, True)
        return at, marker, True


# Special tokens are the same for all answers of a model, and there may be hundreds.
_markers_of = lru_cache(16)(_Markers)


class ToolParser:
    """The parts of one answer. Whitespace around calls is no part.

    names: of the tools there are. unsaid: special tokens, which are no part of what is said; the text that
    is given to `append` has them.
    """

    _STARTS: tuple[str, ...] = ()  # what calls begin with

    def __init__(self, names: Sequence[str] = (), unsaid: Sequence[str] = ()) -> None:
        self._names = frozenset(names)
        self._markers = _markers_of((*self._STARTS, *filter(None, unsaid)))
        self._text = ""  # what has come and is not dealt with
        self._space = ""  # whitespace that is said if more is
        self._is_behind_call = False
        self._has_said = False
        self._json = JsonEnd()

    def append(self, text: str) -> list[Part]:
        """The parts that a piece of the text completes."""
        self._text += text
        return self._advance(is_end=False)

    def finish(self) -> list[Part]:
        """The parts that are left where the text ends."""
        parts = self._advance(is_end=True)
        if self._space and not self._is_behind_call:
            parts.append(self._space)
        self._space = ""
        return parts

    def _advance(self, is_end: bool) -> list[Part]:
        parts: list[Part] = []
        while self._step(parts, is_end):
            pass
        return parts

    def _step(self, parts: list[Part], is_end: bool) -> bool:
        """Deals with some of the text, if enough is there; whether to go on."""
        raise NotImplementedError

    def _say(self, text: str, parts: list[Part]) -> None:
        text = self._space + text
        self._space = ""
        if self._is_behind_call:
            text = text.lstrip()
        kept = text.rstrip()
        self._space = text[len(kept) :]
        if kept:
            parts.append(kept)
            self._is_behind_call = False
            self._has_said = True

    def _call(self, call: ToolCall, parts: list[Part]) -> None:
        self._space = ""
        self._is_behind_call = True
        parts.append(call)

    def _say_up_to_start(self, parts: list[Part], is_end: bool) -> bool:
        """Says what stands before the first of `_STARTS`, and takes that away; returns whether one is there.

        Special tokens are left out of what is said.
        """
        while True:
            at, marker, is_sure = self._markers.first_in(self._text)
            self._say(self._text[:at], parts)
            self._text = self._text[at:]
            if marker is None or not (is_sure or is_end):
                if is_end and self._text:  # the beginning of a marker, and no more
                    self._say(self._text, parts)
                    self._text = ""
                return False
            self._text = self._text[len(marker) :]
            if marker in self._STARTS:
                self._json = JsonEnd()
                return True


class PlainText(ToolParser):
    """Text without calls: a thought, say. Special tokens are left out."""

    def _step(self, parts: list[Part], is_end: bool) -> bool:
        return self._say_up_to_start(parts, is_end)


class HermesParser(ToolParser):
    """<tool_call>{"name": ..., "arguments": {...}}</tool_call>, of Hermes, Qwen, Granite 4 and others."""

    _START, _END = "<tool_call>", "</tool_call>"
    _STARTS = (_START,)
    _is_in_call = False

    def _step(self, parts: list[Part], is_end: bool) -> bool:
        if not self._is_in_call:
            self._is_in_call = self._say_up_to_start(parts, is_end)
            return self._is_in_call
        size = self._json.of_object(self._text)
        if size is None and not is_end:
            return False
        call = None
        if size:
            behind = self._text[size:].lstrip()
            if not (behind.startswith(self._END) or is_end) and self._END.startswith(behind):
                return False
            if not behind or behind.startswith(self._END):
                call = _call_of(self._text[:size])
        self._is_in_call = False
        if call is None:
            self._say(self._START, parts)
        else:
            self._call(call, parts)
            self._text = behind.removeprefix(self._END)
        return True


class Llama3JsonParser(ToolParser):
    """{"name": ..., "parameters": {...}} at the beginning of an answer, "; " between several. Of Llama 3."""

    _TAG = "<|python_tag|>"

    def __init__(self, names: Sequence[str] = (), unsaid: Sequence[str] = ()) -> None:
        super().__init__(names, [*unsaid, self._TAG])
        self._is_calling = True
        self._skipped = ""  # whitespace and a semicolon, before what may be a call

    def _step(self, parts: list[Part], is_end: bool) -> bool:
        if not self._is_calling:
            return self._say_up_to_start(parts, is_end)
        words = self._text.lstrip()
        self._skipped += self._text[: len(self._text) - len(words)]
        self._text = words
        if not words:
            if is_end:
                self._is_calling = False
                self._text, self._skipped = self._skipped, ""
            return is_end
        if words[0] == ";" and self._is_behind_call and ";" not in self._skipped:
            self._skipped += ";"
            self._text = words[1:]
            return True
        if words[0] != "{":
            at, marker, is_sure = self._markers.first_in(words)
            if at == 0:
                if not (is_sure and marker) and not is_end:
                    return False
                if marker:
                    self._text = words[len(marker) :]
                    return True
        size = self._json.of_object(words)
        if size is None and not is_end:
            return False
        call = _call_of(words[:size]) if size else None
        self._json = JsonEnd()
        if call is None or call.name not in self._names:
            self._is_calling = False
            self._text, self._skipped = self._skipped + words, ""
        else:
            self._call(call, parts)
            self._text, self._skipped = words[size:], ""
        return True


class MistralParser(ToolParser):
    """[TOOL_CALLS][{"name": ..., "arguments": {...}}] or, later, [TOOL_CALLS]name[ARGS]{...}. Of Mistral."""

    _START = "[TOOL_CALLS]"
    _STARTS = (_START,)
    _NAME = re.compile(r"\s*([\w.:/-]+)\s*(?:\[CALL_ID\]\s*[\w-]*\s*)?(?:\[ARGS\])?\s*(?=\{)")
    _MOST_BEFORE_ARGUMENTS = 512
    _is_in_call = False

    def _step(self, parts: list[Part], is_end: bool) -> bool:
        if not self._is_in_call:
            self._is_in_call = self._say_up_to_start(parts, is_end)
            return self._is_in_call
        words = self._text.lstrip()
        if not words and not is_end:
            return False
        calls, size = self._list(words, is_end) if words[:1] == "[" else self._named(words, is_end)
        if size is None:
            return False
        self._is_in_call = False
        if calls:
            for call in calls:
                self._call(call, parts)
            self._text = words[size:]
        else:
            self._say(self._START, parts)
        return True

    def _list(self, words: str, is_end: bool) -> tuple[list[ToolCall], int | None]:
        """Calls in a list, and where it ends; no calls if it is none, and no end if that is not known yet."""
        size = self._json.of_array(words)
        if not size:
            return [], None if size is None and not is_end else 0
        with_none = [_call_of(one) for one in elements_of(words[:size])]
        calls = [call for call in with_none if call is not None]
        return (calls if len(calls) == len(with_none) else []), size

    def _named(self, words: str, is_end: bool) -> tuple[list[ToolCall], int | None]:
        """The same for a call whose name comes first."""
        header = self._NAME.match(words)
        if header is None:
            brace = words.find("{")
            is_over = is_end or brace >= 0 or len(words) > self._MOST_BEFORE_ARGUMENTS
            return [], 0 if is_over else None
        arguments = words[header.end() :]
        size = self._json.of_object(arguments)
        if size is None and not is_end:
            return [], None
        if not size or json_object(arguments[:size]) is None:
            return [], 0
        return [ToolCall(header[1], arguments[:size])], header.end() + size


class GptOssParser(ToolParser):
    """<|channel|>commentary to=functions.name <|constrain|>json<|message|>{...}<|call|>, of gpt-oss.

    What is said to the channel `analysis` is a thought. A prompt ends within the first message's header, so
    that an answer may begin with ` to=functions.name`.
    """

    _HEADER = _Markers(("<|start|>", "<|channel|>"))
    _MESSAGE = "<|message|>"
    _ENDS = _Markers(("<|end|>", "<|call|>", "<|return|>", "<|start|>"))
    _RECIPIENT = "to=functions."
    _TO = re.compile(r"to=functions\.([\w.:/-]+)")
    _is_first = True  # nothing has been read yet

    def __init__(self, names: Sequence[str] = (), unsaid: Sequence[str] = ()) -> None:
        super().__init__(names, unsaid)
        self._header: str | None = None  # of the message that is being read
        self._body = ""  # of a call

    def _step(self, parts: list[Part], is_end: bool) -> bool:
        if self._header is None:
            return self._begin(parts, is_end)
        call = self._TO.search(self._header)
        at, end, _ = self._ENDS.first_in(self._text)
        body, self._text = self._text[:at], self._text[at:]
        if end is None and is_end:
            body, self._text = body + self._text, ""
        if call is not None:
            self._body += body
        elif "analysis" in self._header:
            parts += [Thought(body)] if body else []
        elif body:
            self._say(body, parts)
        if end is None and not is_end:
            return False
        if call is not None and (end is not None or self._body):
            if json_object(self._body) is None:
                self._say(f"{self._header}{self._MESSAGE}{self._body}", parts)
            else:
                self._call(ToolCall(call[1], self._body.strip()), parts)
        self._header, self._body = None, ""
        if end is not None and end != "<|start|>":
            self._text = self._text[len(end) :]
        return bool(self._text)

    def _begin(self, parts: list[Part], is_end: bool) -> bool:
        """Reads a message's header, or what is said without one."""
        at, marker, _ = self._HEADER.first_in(self._text)
        if self._is_first and self._may_be_recipient(self._text[:at]):
            if marker is None and not is_end:
                return False
            if marker == "<|channel|>":
                at = 0
        if marker is None:
            self._is_first = False
            self._say_up_to_start(parts, is_end)
            return False
        end = self._text.find(self._MESSAGE, at)
        if end < 0 and not is_end:
            return False
        self._is_first = False
        said, rest = self._text[:at], self._text[at:]
        self._text = said
        if said:
            self._say_up_to_start(parts, is_end=True)
        if end < 0:
            self._text = ""
            self._say(rest, parts)
            return False
        self._header = rest[: end - at]
        self._text = rest[end - at + len(self._MESSAGE) :]
        return True

    def _may_be_recipient(self, text: str) -> bool:
        words = text.lstrip()
        return self._RECIPIENT.startswith(words) or re.fullmatch(f"{self._TO.pattern}\\s*", words) is not None


_KINDS: dict[str, type[ToolParser]] = {
    HERMES: HermesParser,
    LLAMA3_JSON: Llama3JsonParser,
    MISTRAL: MistralParser,
    GPT_OSS: GptOssParser,
}


def new_parser(kind: str, names: Sequence[str], unsaid: Sequence[str]) -> ToolParser:
    """A parser of one of `PARSERS`, for one answer."""
    return _KINDS[kind](names, unsaid)


def _call_of(text: str) -> ToolCall | None:
    """The call that a JSON object says, with its arguments as they are written; None if it says none."""
    value = json_object(text)
    if value is None or not isinstance(value.get("name"), str) or not value["name"]:
        return None
    key = "arguments" if "arguments" in value else "parameters"
    arguments = value.get(key, {})
    if isinstance(arguments, str):  # an object that was written as a text
        return None if json_object(arguments) is None else ToolCall(value["name"], arguments)
    if not isinstance(arguments, dict):
        return None
    return ToolCall(value["name"], value_of(text, key) or json.dumps(arguments, ensure_ascii=False))
