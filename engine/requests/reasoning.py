"""A model's thought told apart from its answer, as both grow token by token.

A thought stands between two markers, such as `<think>` and `</think>`, at the beginning of what a model says;
or the prompt has opened it. Pure text: which markers a model has is the tokenizer's side of it.
"""

from typing import NamedTuple

MAX_MARKER_CHARACTERS = 256
AUTO, NO_MARKERS = "auto", "none"


class Markers(NamedTuple):
    """What stands around a thought. start: "" where a thought is open from the beginning, unsaid."""

    start: str
    end: str

    @classmethod
    def read(cls, text: str) -> "Markers":
        """The markers that a text such as "<think>...</think>" names. Raises `ValueError` for another."""
        start, dots, end = (part.strip() for part in text.partition("..."))
        if not dots or not end or max(len(start), len(end)) > MAX_MARKER_CHARACTERS:
            raise ValueError(text)
        return cls(start, end)


class Piece(NamedTuple):
    """What one token gave: its text, or, if is_hidden, a special token that is left out of the text.

    number: of the token in the output, from 1. is_forced: it was not the model that chose it.
    """

    text: str
    is_hidden: bool
    number: int
    is_forced: bool = False


class ReasoningParser:
    """The thought and the answer of one completion so far.

    A thought begins where nothing but whitespace has been said, so what an answer says about markers stays in
    it, and ends at its end marker. Another may follow it at once. Each thought is without the whitespace
    around it, and so is the beginning of an answer that comes after one; an answer without a thought is the
    text as it is. However the text is cut into tokens, the result is the same.

    markers: searched for also in special tokens that are left out of the text. in_thought: whether the
    prompt has opened one. answer_tags: what may stand around an answer, and is no part of it.

    reasoning: the thoughts so far, a line end between any two. num_reasoning_tokens: tokens of them, those of
    the markers and those that were forced left out.
    """

    def __init__(
        self, markers: Markers, in_thought: bool = False, answer_tags: Markers | None = None
    ) -> None:
        self._markers = markers
        self._answer_start, self._answer_end = answer_tags or ("", "")
        self.reasoning = ""
        self.num_reasoning_tokens = 0
        self.is_thinking = in_thought or not markers.start
        self._is_answering = False
        self._is_tagged = False  # whether the answer has begun with its tag
        self._had_thought = self.is_thinking
        self._counted = 0  # the number of the last token of a thought
        self._held: list[Piece] = []  # together the beginning of a marker, perhaps
        self._space: list[Piece] = []  # whitespace that is left out unless more of the same follows
        self._has_text = False  # whether the thought has any

    def append(self, text: str, number: int, hidden: str = "", is_forced: bool = False) -> list[Piece]:
        """Takes what a token gave; returns what of that and of what was held back belongs to the answer."""
        answer: list[Piece] = []
        if text or not hidden:
            self._take(Piece(text, False, number, is_forced), answer)
        if hidden:
            self._take(Piece(hidden, True, number, is_forced), answer)
        return answer

    def finish(self) -> list[Piece]:
        """Ends the text: what was held back is no marker. Returns what of it belongs to the answer."""
        held, self._held = self._held, []
        if self.is_thinking:
            self._think(held)
            return []
        space, self._space = self._space, []
        return held if self._had_thought else space + held

    @property
    def num_spent_tokens(self) -> int:
        """Tokens of thoughts, with those that are, or begin, an end marker."""
        return self.num_reasoning_tokens + (len(self._held) if self.is_thinking else 0)

    @property
    def begun_marker(self) -> str:
        """The beginning of the end marker that a thought's text ends with."""
        # An empty piece is an unfinished character: more text is to come before whatever follows.
        return "" if not all(piece.text for piece in self._held) else _joined(self._held)

    @property
    def thought_ends_with(self) -> str:
        """The whitespace at the end of the thought; "" if it is all that there is."""
        return _joined(self._space) if self._has_text else ""

    def _take(self, piece: Piece, answer: list[Piece]) -> None:
        while True:
            if self._is_tagged:
                self._take_tagged(piece, answer)
                return
            if self._is_answering:
                answer.append(piece)
                return
            rest = self._take_thought(piece) if self.is_thinking else self._take_beginning(piece, answer)
            if rest is None:
                return
            piece = rest

    def _take_thought(self, piece: Piece) -> Piece | None:
        """Takes a piece into the thought; returns what follows its end."""
        end = self._markers.end
        pieces = [*self._held, piece]
        text = _joined(pieces)
        at = text.find(end)
        if at < 0:
            at = len(text) - _overlap(text, end)
            thought, self._held = _split(pieces, at)
            self._think(thought)
            return None
        thought, rest = _split(pieces, at)
        self._think(thought)
        self._held, self._space, self.is_thinking = [], [], False
        return _behind(rest, len(end))

    def _take_beginning(self, piece: Piece, answer: list[Piece]) -> Piece | None:
        """Takes a piece in before anything has been answered; returns what follows a marker."""
        if not self._held and not piece.is_hidden:
            words = piece.text.lstrip()
            space = len(piece.text) - len(words)
            if space or not words:
                self._space.append(piece._replace(text=piece.text[:space]))
            if not words:
                return None
            piece = piece._replace(text=words)
        self._held.append(piece)
        text = _joined(self._held)
        if self._answer_start and text.startswith(self._answer_start):
            rest = _behind(self._held, len(self._answer_start))
            self._held, self._space = [], []
            self._is_answering = self._is_tagged = True
            return rest
        for marker in filter(None, self._markers):
            if text.startswith(marker):
                rest = _behind(self._held, len(marker))
                self._held, self._space, self._has_text = [], [], False
                self._had_thought = True
                self.is_thinking = marker is self._markers.start
                return rest
        if not any(marker.startswith(text) for marker in (*self._markers, self._answer_start)):
            self._is_answering = True
            answer += self.finish()
        return None

    def _take_tagged(self, piece: Piece, answer: list[Piece]) -> None:
        """Takes a piece into an answer that ends at its tag."""
        pieces = [*self._held, piece]
        text = _joined(pieces)
        at = text.find(self._answer_end)
        is_ended = at >= 0
        said, self._held = _split(pieces, at if is_ended else len(text) - _overlap(text, self._answer_end))
        answer += said
        if is_ended:
            rest = _behind(self._held, len(self._answer_end))
            self._held, self._is_tagged = [], False
            answer += [] if rest is None else [rest]

    def _think(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            if piece.number > self._counted and not piece.is_forced:
                self._counted = piece.number
                self.num_reasoning_tokens += 1
            if piece.is_hidden:
                continue
            words = piece.text.rstrip()
            if words:
                if self._has_text:
                    self.reasoning += _joined(self._space) + words
                else:
                    self.reasoning += "\n" * bool(self.reasoning) + words.lstrip()
                self._has_text, self._space = True, []
            if len(words) < len(piece.text):
                self._space.append(piece._replace(text=piece.text[len(words) :]))


def _joined(pieces: list[Piece]) -> str:
    return "".join([piece.text for piece in pieces])


def _overlap(text: str, marker: str) -> int:
    """How much of a marker, but not all, a text ends with."""
    for size in range(min(len(text), len(marker) - 1), 0, -1):
        if text.endswith(marker[:size]):
            return size
    return 0


def _split(pieces: list[Piece], at: int) -> tuple[list[Piece], list[Piece]]:
    """The pieces of the first `at` characters, and those of the rest; an empty one stays with the former."""
    for index, piece in enumerate(pieces):
        size = len(piece.text)
        if size > at:
            first = [piece._replace(text=piece.text[:at])] if at else []
            return pieces[:index] + first, [piece._replace(text=piece.text[at:]), *pieces[index + 1 :]]
        at -= size
    return pieces, []


def _behind(pieces: list[Piece], size: int) -> Piece | None:
    """What of the last piece is behind the first `size` characters of all, which it completes."""
    text = _joined(pieces)[size:]
    return pieces[-1]._replace(text=text) if text else None
