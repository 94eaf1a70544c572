"""Keeps what users write from forging control tokens: in a message, the text of one is text.

Every place in a message that is a control token, or that could become one together with what is beside it,
is put between two marks before the chat template sees it, and every other character stays as it is. So a
harmless conversation is rendered and tokenized exactly as without. In what was rendered, a control token that
has a marked character in it was written by a user. (`sanitize_control_tokens` of `transformers` does it so,
for whole tokens. A template that itself drops characters out of the middle of a message can still join a
token from the rest.)
"""

import re
from collections.abc import Collection, Iterator
from itertools import takewhile
from typing import NamedTuple

from pagellm.engine.errors import RequestError

# Private use: code points that mean nothing. Two that a conversation does not contain become its marks.
_FIRST_MARK = 0x10F000


class Piece(NamedTuple):
    """A stretch of a rendered conversation."""

    text: str
    is_forged: bool  # whether it is the text of a control token that a user wrote


class MarkInUseError(Exception):
    """The conversation contains a character that was to be a mark."""


class ControlTokens:
    """The control tokens of a model, and marks for one conversation.

    contents: the control tokens. attempt: another number gives other marks.
    """

    def __init__(self, contents: Collection[str], attempt: int = 0) -> None:
        longest_first = sorted(contents, key=len, reverse=True)
        self._tokens = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._beginnings = {token[:size] for token in contents for size in range(1, len(token))}
        self._ends = {token[-size:] for token in contents for size in range(1, len(token))}
        self._longest = max(map(len, contents), default=1) - 1
        self._open, self._close = chr(_FIRST_MARK + 2 * attempt), chr(_FIRST_MARK + 2 * attempt + 1)
        self._marked: set[str] = set()

    def mark(self, text: str) -> str:
        """A user's text with marks around what is a control token or could become one."""
        if self._open in text or self._close in text:
            raise MarkInUseError
        spans = [match.span() for match in self._tokens.finditer(text)]
        # Templates trim what they join.
        start, stop = len(text) - len(text.lstrip()), len(text.rstrip())
        sizes = range(min(self._longest, stop - start), 0, -1)
        spans += [(start, start + size) for size in sizes if text[start : start + size] in self._ends][:1]
        spans += [(stop - size, stop) for size in sizes if text[stop - size : stop] in self._beginnings][:1]
        pieces, done = [], 0
        for first, last in sorted(spans):
            first = max(first, done)
            if first < last:
                self._marked.add(text[first:last])
                pieces += [text[done:first], self._open, text[first:last], self._close]
                done = last
        return "".join([*pieces, text[done:]])

    def pieces(self, rendered: str) -> Iterator[Piece]:
        """The rendered conversation without the marks, cut around the control tokens that users wrote."""
        if _escaped(self._open) in rendered or _escaped(self._close) in rendered:
            raise RequestError(
                "messages: found text of control tokens, which the chat template hides, expected none"
            )
        text, users = self._without_marks(rendered)
        done = at = 0
        for match in self._tokens.finditer(text):
            while at < len(users) and users[at].stop < match.start():
                at += 1
            near = takewhile(lambda user: user.start <= match.end(), users[at:])  # noqa: B023 (used up at once)
            if any(user.touches(*match.span()) for user in near):
                yield Piece(text[done : match.start()], False)
                yield Piece(match.group(), True)
                done = match.end()
        yield Piece(text[done:], False)

    def _without_marks(self, rendered: str) -> tuple[str, list["_UserText"]]:
        """The text, and where in it what was marked is, in order."""
        texts: list[str] = []
        users: list[_UserText] = []
        size = opened = 0
        for part in re.split(f"([{self._open}{self._close}])", rendered):
            if part == self._open:
                users.append(_UserText(size, size, _AFTER))
                opened = len(texts)
            elif part == self._close:
                # A template may cut between two marks: then what stands between them may be its own.
                is_whole = users and users[-1].side == _AFTER and "".join(texts[opened:]) in self._marked
                start = users.pop().start if is_whole else size
                users.append(_UserText(start, size, _BETWEEN if is_whole else _BEFORE))
            else:
                texts.append(part)
                size += len(part)
        return "".join(texts), users


_BEFORE, _BETWEEN, _AFTER = -1, 0, 1


class _UserText(NamedTuple):
    """Marked text, or the place of one mark that lost its other, with the user's text on one side."""

    start: int
    stop: int
    side: int

    def touches(self, start: int, stop: int) -> bool:
        """Whether a control token there has a user's character in it."""
        if self.side == _BETWEEN:
            return self.start < stop and start < self.stop
        return start <= self.start < stop if self.side == _AFTER else start < self.start <= stop


def _escaped(mark: str) -> str:
    """As JSON writes a mark that must be ASCII."""
    high, low = divmod(ord(mark) - 0x10000, 0x400)
    return f"\\u{0xD800 + high:04x}\\u{0xDC00 + low:04x}"
