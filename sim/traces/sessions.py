"""Which requests of a trace wait for answers, and what their prompts are made of when these have come.

A client sends a turn when it has the answer before it, plus the time in which it thinks or a tool runs; an
agent joins branches by waiting for several. Whoever replays a trace says when a request has ended, and is
told what is sent then. Nothing here knows an engine or a clock.
"""

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field

from pagellm.engine.errors import TraceError
from pagellm.engine.errors import found as shown
from pagellm.sim.traces.prompt_tokens import PromptTokens
from pagellm.sim.traces.request import TraceRequest
from pagellm.sim.traces.trace import Trace

# Requests by their index in the trace.
_Index = int


@dataclass(slots=True)
class _Follower:
    """A request that waits, and for how many others still."""

    request: TraceRequest
    num_waited_for: int
    context: _Index | None  # the request whose prompt and answer its own prompt begins with
    last_end_s: float = 0.0


@dataclass(slots=True)
class _Context:
    """A request that others go on with: what they need of it."""

    expected_len: int  # tokens of its prompt and answer, as the trace has them
    num_left: int  # of those others
    tokens: "array[int] | None" = None  # of prompt and answer, when it has ended
    is_answered: bool = True


@dataclass
class Sessions:
    """The requests of a trace that wait for others, read in one pass before the replay.

    Those that wait are in memory, and of others the tokens that one of them goes on with, until it has.
    A trace that has no such requests costs nothing.

    keeps_times: whether one that waits is not sent before its arrival_time, either, if it has no delay_s.

    Raises `TraceError` for a request that waits for one that there is not, or for itself.
    """

    trace: Trace
    keeps_times: bool = True
    _followers: dict[_Index, _Follower] = field(default_factory=dict)
    _after: dict[_Index, list[_Index]] = field(default_factory=dict)  # who waits for a request
    _contexts: dict[_Index, _Context] = field(default_factory=dict)
    _group_of: dict[_Index, _Index] = field(default_factory=dict)  # of requests that hang together
    _num_left: Counter[_Index] = field(default_factory=Counter)  # of a group

    def __post_init__(self) -> None:
        if self.trace.has_sessions():
            self._link()

    def __bool__(self) -> bool:
        return bool(self._followers)

    def openers(self) -> Iterator[TraceRequest]:
        """The requests that wait for no other, in the trace's order."""
        if self._followers:
            return (request for request in self.trace if request.index not in self._followers)
        return map(self._waiting_for_none, self.trace)

    def prompt(self, request: TraceRequest, prompt_tokens: PromptTokens) -> "array[int]":
        """The tokens of a request's prompt; where it goes on with others, with what was really said."""
        follower = self._followers.get(request.index)
        if follower is None or follower.context is None:
            return prompt_tokens(request)
        context = self._contexts[follower.context]
        context.num_left -= 1
        if context.num_left == 0:
            del self._contexts[follower.context]
        before = context.tokens
        assert before is not None
        if request.prompt is not None and (context.is_answered or request.continues is not None):
            text = request.prompt[request.num_context_chars or 0 :]
            return before + prompt_tokens.encode(text, is_begin=False)
        tokens = prompt_tokens(request)
        if request.continues is not None:
            return before + tokens
        return before + tokens[context.expected_len :] if context.is_answered else tokens

    def ended(
        self, request: TraceRequest, tokens: Iterable[int], now: float, is_answered: bool = True
    ) -> list[tuple[float, TraceRequest]]:
        """What is sent because a request has ended: when, and what, in the order of the trace.

        tokens: of its prompt and of what it has of an answer. is_answered: whether that is all of one.
        """
        if not self._followers:
            return []
        index = request.index
        if (group := self._group_of.get(index)) is not None:
            self._num_left[group] -= 1
        if (context := self._contexts.get(index)) is not None:
            context.tokens, context.is_answered = array("i", tokens), is_answered
        sent = []
        for waiting in self._after.pop(index, ()):
            follower = self._followers[waiting]
            follower.num_waited_for -= 1
            follower.last_end_s = max(follower.last_end_s, now)
            if follower.num_waited_for == 0:
                sent.append((self._sent_s(follower), follower.request))
        return sent

    def waits(self, request: TraceRequest) -> bool:
        """Whether a request is one that waits for others."""
        return request.index in self._followers

    def is_over(self, request: TraceRequest) -> bool:
        """Whether a request that has ended was the last of its conversation."""
        return self._num_left[self._group_of.get(request.index, -1)] == 0

    def _sent_s(self, follower: _Follower) -> float:
        request = follower.request
        if request.delay_s is not None:
            return follower.last_end_s + request.delay_s
        return max(request.arrival_time, follower.last_end_s) if self.keeps_times else follower.last_end_s

    def _waiting_for_none(self, request: TraceRequest) -> TraceRequest:
        if request.after or request.continues is not None:
            raise self._error(request, "after: found one, expected none in a trace without sessions")
        return request

    def _link(self) -> None:
        """Reads the trace: who waits for whom."""
        places: dict[str, _Index] = {}
        doubled: set[str] = set()
        last_of: dict[str, TraceRequest] = {}  # of a session
        named: list[tuple[TraceRequest, TraceRequest | None]] = []  # and the one before in its session
        for request in self.trace:
            if request.id in places:
                doubled.add(request.id)
            places[request.id] = request.index
            before = None if request.session is None else last_of.get(request.session)
            if request.after is not None or request.continues is not None:
                named.append((request, before))
            elif before is not None:
                self._follow(request, [before])
            if request.session is not None:
                last_of[request.session] = request
        if named:
            names = {name for request, _ in named for name in _names(request)}
            found = {request.id: request for request in self.trace if request.id in names}
            for request, before in named:
                self._follow_named(request, before, found, doubled)
        self._check_order()
        self._group()

    def _follow_named(
        self,
        request: TraceRequest,
        before: TraceRequest | None,
        found: Mapping[str, TraceRequest],
        doubled: Set[str],
    ) -> None:
        for name in _names(request):
            if name not in found or name in doubled:
                field_name = "continues" if name == request.continues else "after"
                which = "which several have, expected one" if name in doubled else "expected the id"
                message = f"{field_name}: found {shown(name)}, {which} of another request of the trace"
                raise self._error(request, message)
        waited_for = [found[name] for name in _names(request)]
        if request.after is None and before is not None:
            waited_for.append(before)
        if waited_for:
            self._follow(request, list({other.index: other for other in waited_for}.values()))

    def _follow(self, request: TraceRequest, waited_for: list[TraceRequest]) -> None:
        context: TraceRequest | None = None
        if request.continues is not None:
            context = next(other for other in waited_for if other.id == request.continues)
        else:
            fitting = [other for other in waited_for if goes_on(request, other)]
            context = max(fitting, key=expected_len, default=None)
        place = None if context is None else context.index
        self._followers[request.index] = _Follower(request, len(waited_for), place)
        for other in waited_for:
            self._after.setdefault(other.index, []).append(request.index)
        if context is not None:
            known = self._contexts.setdefault(context.index, _Context(expected_len(context), 0))
            known.num_left += 1

    def _check_order(self) -> None:
        """Raises an error where requests wait for each other in a circle."""
        left = {index: follower.num_waited_for for index, follower in self._followers.items()}
        ready = [index for index in self._after if index not in left]
        while ready:
            for waiting in self._after.get(ready.pop(), ()):
                left[waiting] -= 1
                if left[waiting] == 0:
                    ready.append(waiting)
                    del left[waiting]
        if left:
            request = self._followers[min(left)].request
            raise self._error(request, "after: found requests that wait for each other, expected no circle")

    def _group(self) -> None:
        """Finds which requests hang together."""
        parents: dict[_Index, _Index] = {}

        def root(index: _Index) -> _Index:
            while (parent := parents.setdefault(index, index)) != index:
                parents[index] = index = parents[parent]
            return index

        for index, others in self._after.items():
            for other in others:
                parents[root(other)] = root(index)
        self._group_of = {index: root(index) for index in list(parents)}
        self._num_left = Counter(self._group_of.values())

    def _error(self, request: TraceRequest, message: str) -> TraceError:
        return TraceError(f"{self.trace.name}: request {request.id!r}: {message}")


def _names(request: TraceRequest) -> tuple[str, ...]:
    """The ids of the requests that one says it waits for."""
    continued = () if request.continues is None else (request.continues,)
    return (*(request.after or ()), *continued)


def expected_len(request: TraceRequest) -> int:
    """Tokens of prompt and answer as the trace has them."""
    return (request.prompt_len or 0) + request.output_len


def goes_on(request: TraceRequest, before: TraceRequest) -> bool:
    """Whether a prompt begins with the whole prompt of the request before it and has room for its answer.

    As far as the trace says what prompts are made of: by ids of tokens, or of pieces, the whole ones.
    """
    if request.prompt is not None:
        return request.num_context_chars is not None
    if before.prompt_len is None or request.prompt_len is None or request.prompt_len <= expected_len(before):
        return False
    if request.prompt_token_ids is not None and before.prompt_token_ids is not None:
        return request.prompt_token_ids[: before.prompt_len] == before.prompt_token_ids
    if request.hash_ids is None or before.hash_ids is None or before.continues is not None:
        return False
    if request.hash_block_size != before.hash_block_size:
        return False
    assert before.hash_block_size is not None
    whole = max(1, before.prompt_len // before.hash_block_size)
    return request.hash_ids[:whole] == before.hash_ids[:whole]
