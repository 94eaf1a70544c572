"""A synthetic trace: arrivals, lengths, shared system prompts and conversations, all determined by a seed.

Requests are made one at a time, and memory holds the conversations that go on, so a trace of any size
streams.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count, islice
from random import Random
from typing import Any

from pagellm.sim.traces.distributions import Arrivals, Draw, DrawLength, arrivals, duration, length, zipf
from pagellm.sim.traces.request import (
    DEFAULT_HASH_BLOCK_SIZE,
    TraceRequest,
    bad_value,
    check_integer,
    check_number,
)
from pagellm.sim.traces.trace import Trace


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What to make; a bad value is a `TraceError` that names it.

    Distributions are written as in distributions.py.

    num_requests: of the whole trace. seed: any integer; equal workloads give equal traces.
    arrivals: when conversations begin; where they have one turn, that is when requests arrive.
    prompt_len: tokens that are new in each request's prompt. output_len: tokens of each answer.
    num_system_prompts, system_prompt_len: so many texts of so many tokens, one of which every conversation
    begins with; the n-th is chosen with a probability in proportion to n ** -system_prompt_skew.
    turns: requests of a conversation. The prompt of each begins with all prompts and answers before it.
    think_time_s: from an answer's end to the next request of its conversation. The trace gives that request
    the time at which it would arrive if answers took none.
    models: what conversations ask for, NAME=SHARE,NAME=SHARE,...; none: nothing.
    """

    num_requests: int = 1000
    arrivals: str = "poisson:1"
    prompt_len: str = "lognormal:512,1"
    output_len: str = "lognormal:128,0.7"
    num_system_prompts: int = 0
    system_prompt_len: int = 0
    system_prompt_skew: float = 1.0
    turns: str = "fixed:1"
    think_time_s: str = "exponential:30"
    models: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer("num_requests", self.num_requests, 1, 2**63)
        check_integer("num_system_prompts", self.num_system_prompts, 0, 2**20)
        check_integer("system_prompt_len", self.system_prompt_len, 0)
        if (self.num_system_prompts == 0) != (self.system_prompt_len == 0):
            expected = "0 without system prompts, more with them"
            raise bad_value("system_prompt_len", self.system_prompt_len, expected)
        if check_number("system_prompt_skew", self.system_prompt_skew) > 100:
            raise bad_value("system_prompt_skew", self.system_prompt_skew, "a number from 0 to 100")
        check_integer("seed", self.seed, -(2**63), 2**63)


def synthesise(workload: Workload) -> Trace:
    """The trace that a workload describes; each iteration makes the same one.

    Raises `TraceError` for a distribution that cannot be understood.
    """
    synthesis = _Synthesis(workload)
    name = f"synthetic, seed {workload.seed}"
    return Trace(
        lambda: islice(synthesis.requests(), workload.num_requests),
        name,
        has_sessions=lambda: workload.turns != "fixed:1",
    )


@dataclass(slots=True)
class _Conversation:
    """A conversation as far as it is: its contents in pieces, of which the last may still grow."""

    session: str
    turns_left: int
    hash_ids: list[int]
    num_tokens: int
    model: str | None
    delay_s: float | None = None  # of the next request


class _Synthesis:
    """A workload's distributions, and how they make requests."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._arrivals: Arrivals = arrivals("arrivals", workload.arrivals)
        self._prompt_len: DrawLength = length("prompt_len", workload.prompt_len)
        self._output_len: DrawLength = length("output_len", workload.output_len)
        self._turns: DrawLength = length("turns", workload.turns)
        self._think_time: Draw = duration("think_time_s", workload.think_time_s)
        self._models = _models(workload.models)
        self._system_prompt = zipf(workload.system_prompt_skew, max(1, workload.num_system_prompts))
        # A system prompt is a conversation's first piece, so its end is the end of what is shared.
        self._piece_size = workload.system_prompt_len or DEFAULT_HASH_BLOCK_SIZE

    def requests(self) -> Iterator[TraceRequest]:
        """All requests in the order of their arrival, without an end."""
        # Each kind of chance has its own stream: other lengths leave the arrivals as they are.
        times, lengths, shapes, models = (
            Random(f"{self._workload.seed} {kind}") for kind in ("times", "lengths", "shapes", "models")
        )
        piece_ids = count(self._workload.num_system_prompts)
        going_on: list[tuple[float, int, _Conversation]] = []
        begins = self._arrivals(times)
        next_begin = next(begins)
        num_conversations = 0
        for index in count():
            if going_on and going_on[0][0] <= next_begin:
                time, _, conversation = heappop(going_on)
            else:
                time, next_begin = next_begin, next(begins)
                conversation = self._begin(str(num_conversations), shapes, models)
                num_conversations += 1
            yield self._turn(conversation, index, time, lengths, piece_ids)
            if conversation.turns_left > 0:
                conversation.delay_s = self._think_time(shapes)
                heappush(going_on, (time + conversation.delay_s, index, conversation))

    def _begin(self, session: str, random: Random, models: Random) -> _Conversation:
        has_system_prompt = self._workload.num_system_prompts > 0
        hash_ids = [self._system_prompt(random) - 1] if has_system_prompt else []
        names, shares = self._models
        model = models.choices(names, shares)[0] if names else None
        return _Conversation(session, self._turns(random), hash_ids, self._workload.system_prompt_len, model)

    def _turn(
        self, conversation: _Conversation, index: int, time: float, random: Random, piece_ids: Iterator[int]
    ) -> TraceRequest:
        """The conversation's next request; the conversation then holds its prompt and answer."""
        prompt_len = conversation.num_tokens + self._prompt_len(random)
        output_len = self._output_len(random)
        # Nothing is shared with the only request of a conversation without a system prompt.
        is_alone = conversation.turns_left == 1 and not conversation.hash_ids
        contents: dict[str, Any] = {}
        if not is_alone:
            missing = -(-prompt_len // self._piece_size) - len(conversation.hash_ids)
            conversation.hash_ids.extend(islice(piece_ids, max(0, missing)))
            contents = {"hash_ids": tuple(conversation.hash_ids), "hash_block_size": self._piece_size}
        conversation.num_tokens = prompt_len + output_len
        conversation.turns_left -= 1
        return TraceRequest(
            arrival_time=time,
            prompt_len=prompt_len,
            output_len=output_len,
            id=str(index),
            session=conversation.session,
            model=conversation.model,
            delay_s=conversation.delay_s,
            index=index,
            **contents,
        )


def _models(text: str) -> tuple[list[str], list[float]]:
    """Names of models and their shares from NAME=SHARE,NAME=SHARE,... Raises `TraceError`."""
    shares: dict[str, float] = {}
    for part in text.split(",") if text else ():
        name, _, share = part.rpartition("=")
        try:
            number = float(share)
        except ValueError:
            number = 0.0
        if not name or not 0 < number < 1e9:
            raise bad_value("models", part, "NAME=SHARE, a number above 0")
        if name in shares:
            raise bad_value("models", text, f"one share of {name}")
        shares[name] = number
    return list(shares), list(shares.values())
