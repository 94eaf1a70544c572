"""A model's thoughts as the engine deals with them: in text by their markers, in tokens by what spells those.

Binds what the tokenizer and the chat template say, or the user in their place, to prompts and budgets.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from pagellm.engine.errors import RequestError, found
from pagellm.engine.requests.reasoning import (
    AUTO,
    MAX_MARKER_CHARACTERS,
    NO_MARKERS,
    Markers,
    Piece,
    ReasoningParser,
)
from pagellm.engine.tokenizer import Tokenizer
from pagellm.engine.tokenizer.thinking import (
    ThoughtFormat,
    markers_of_template,
    markers_of_tokens,
    opens_thoughts,
    thought_format,
)

_MOST_TOKENS_OF_MARKER = 2 * MAX_MARKER_CHARACTERS  # with whitespace behind it


class Thoughts:
    """The thoughts of a model that has some, between these markers."""

    def __init__(self, tokenizer: Tokenizer, markers: Markers) -> None:
        self._tokenizer = tokenizer
        self._markers = markers
        self._ids_of_text: dict[str, list[int]] = {}

    @classmethod
    def of_model(cls, tokenizer: Tokenizer, setting: str) -> "Thoughts | None":
        """The thoughts of a model with this tokenizer; None if it has none. setting: as in `EngineConfig`."""
        if setting == NO_MARKERS:
            return None
        if setting != AUTO:
            return cls(tokenizer, Markers.read(setting))
        template = tokenizer.chat_template
        markers = None if template is None else markers_of_template(template)
        markers = markers or markers_of_tokens(tokenizer.added_tokens)
        return None if markers is None else cls(tokenizer, markers)

    @cached_property
    def format(self) -> ThoughtFormat:
        """How they are written."""
        return thought_format(self._markers, self._tokenizer.chat_template)

    def closing_ids(self, begun_marker: str = "", ends_with: str = "") -> list[int]:
        """The tokens that close a thought: see `ThoughtFormat.closing`.

        Raises `RequestError` if no tokens spell that.
        """
        text = self.format.closing(begun_marker, ends_with)
        if text not in self._ids_of_text:
            self._ids_of_text[text] = self._spelled(text)
        return self._ids_of_text[text]

    @cached_property
    def opening_ids(self) -> list[int]:
        """The tokens that open a thought, where that is said; none where no tokens spell it."""
        try:
            return self._spelled(self._markers.start) if self._markers.start else []
        except RequestError:
            return []

    def may_open_after(self, token_ids: Sequence[int]) -> bool:
        """Whether the model may open a thought itself, where a prompt has not done so.

        Not where its last turn has had one, empty perhaps, nor where the template would have opened it.
        """
        return not self._are_opened and self._markers.end not in self._last_turn(token_ids)

    @cached_property
    def _are_opened(self) -> bool:
        """Whether the chat template opens them."""
        template = self._tokenizer.chat_template
        return template is not None and opens_thoughts(template, self._markers)

    def begin_at_end_of(self, token_ids: Sequence[int]) -> bool:
        """Whether a prompt from a chat template opens a thought: it ends with the start marker."""
        text = self._tokenizer.decode(token_ids[-_MOST_TOKENS_OF_MARKER:]).rstrip()
        if not self._markers.start:
            return not text.endswith(self._markers.end)
        return text.endswith(self._markers.start)

    def are_open_in(self, token_ids: Sequence[int]) -> bool:
        """Whether a prompt ends within a thought of its last turn."""
        text = self._last_turn(token_ids)
        start, end = self._markers
        if not start:
            return end not in text
        return text.rfind(start) > text.rfind(end)

    def _last_turn(self, token_ids: Sequence[int]) -> str:
        ends = [at for at, token_id in enumerate(token_ids) if token_id in self._tokenizer.eos_token_ids]
        return self._tokenizer.decode(token_ids[ends[-1] + 1 :] if ends else token_ids)

    def are_open_after(self, answer: str) -> bool:
        """Whether an answer that is to be continued, so far, ends within a thought."""
        parser = ReasoningParser(Markers(self._markers.start or "\0", self._markers.end))
        parser.append(answer, 1)
        return parser.is_thinking

    def _spelled(self, text: str) -> list[int]:
        encode, bytes_of = self._tokenizer.encode, self._tokenizer.token_bytes
        for before in ("", "a", "\n"):  # where a text begins, some tokenizers put a space
            first = encode(before, add_special_tokens=False)
            token_ids = encode(before + text, add_special_tokens=False)[len(first) :]
            if b"".join(map(bytes_of, token_ids)) == text.encode():
                return token_ids
        raise RequestError(f"thinking_token_budget: found no tokens that spell {found(text)}")


@dataclass(frozen=True)
class Thinking:
    """How the thoughts of a request are dealt with.

    in_thought: whether its prompt has opened one. is_separate: whether they are told apart from its text.
    """

    thoughts: Thoughts
    in_thought: bool
    is_separate: bool


class ThoughtTracker:
    """The thoughts of one completion, and the tokens that close them when their budget is spent.

    All of it follows from the completion's tokens: whoever begins again with the same ones comes to the same
    state.
    """

    def __init__(self, thinking: Thinking, budget: int | None) -> None:
        self._thinking = thinking
        self._budget = budget
        form = thinking.thoughts.format
        self._parser = ReasoningParser(form.markers, thinking.in_thought, form.answer_tags)
        self._forced: deque[int] = deque()
        self._close_if_spent()

    @property
    def forced_token(self) -> int | None:
        """The token that comes next, whatever would be sampled; None if that is free."""
        return self._forced[0] if self._forced else None

    @property
    def is_thinking(self) -> bool:
        """Whether a thought is open."""
        return self._parser.is_thinking

    @property
    def reasoning(self) -> str | None:
        """The thoughts so far, where they are told apart; None if there are none."""
        return (self._parser.reasoning or None) if self._thinking.is_separate else None

    @property
    def num_reasoning_tokens(self) -> int:
        """Tokens of the thoughts so far."""
        return self._parser.num_reasoning_tokens

    def append(self, text: str, number: int, hidden: str, is_last: bool) -> list[Piece]:
        """Takes what a token gave, as `ReasoningParser.append`; returns what belongs to the text."""
        is_forced = bool(self._forced)
        if is_forced:
            self._forced.popleft()
        answer = self._parser.append(text, number, hidden, is_forced)
        self._close_if_spent()
        if not self._thinking.is_separate:
            return [Piece(text, False, number), Piece(hidden, True, number)][: 1 + bool(hidden)]
        return answer + self.finish() if is_last else answer

    def finish(self) -> list[Piece]:
        """Ends the text: returns what of what was held back belongs to it."""
        answer = self._parser.finish()
        return answer if self._thinking.is_separate else []

    def _close_if_spent(self) -> None:
        budget, parser = self._budget, self._parser
        is_spent = budget is not None and parser.is_thinking and parser.num_spent_tokens >= budget
        if is_spent and not self._forced:
            thoughts = self._thinking.thoughts
            self._forced += thoughts.closing_ids(parser.begun_marker, parser.thought_ends_with)
