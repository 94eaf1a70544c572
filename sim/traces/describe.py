"""What a trace is like: counts, rate, lengths, shared prefixes and conversations.

One pass over the requests. Memory holds two integers a request, for exact percentiles, and of contents and
conversations those met last: what comes back after half a million others counts as new.
"""

import json
import math
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from xxhash import xxh3_64_intdigest

from pagellm.sim.quantiles import quantiles
from pagellm.sim.traces.formats import format_text
from pagellm.sim.traces.request import BYTES_PER_TOKEN, TraceRequest, bad_value
from pagellm.sim.traces.sessions import expected_len, goes_on
from pagellm.sim.traces.trace import Trace

_MAX_REMEMBERED = 2**19
# Pieces in which ids and texts are compared, where the trace itself names none.
_PIECE_TOKENS = 16
_MAX_MODELS = 100


@dataclass(frozen=True)
class Lengths:
    """Tokens; percentiles interpolate linearly between the values around them, as NumPy's do by default."""

    total: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: int


@dataclass(frozen=True)
class Description:
    """What `describe` finds.

    duration_s: from the trace's start to the last arrival.
    rate_per_s: requests a second from the first arrival to the last; None where all arrive at once.
    gap_cv: coefficient of variation of the gaps between arrivals, 1 for Poisson.
    num_estimated: requests whose prompt is a text, its tokens estimated from its bytes.
    shared_prefix_share: of all prompt tokens, those in a prefix that an earlier prompt began with as well, or
    an earlier prompt and its answer without the last token, which is never computed: what a prefix cache of
    unlimited size finds.
    models: requests by the model that they ask for, those of most first; at most 100 are told apart.
    num_sessions: conversations that requests name. num_waiting: requests that wait for others to end.
    is_exact: whether these two are; else the share is at least so large, the number at most.
    num_skipped, num_dropped: as in `Trace`. format: of the file, None for a trace that is from none.
    """

    name: str
    format: str | None
    num_requests: int
    duration_s: float
    rate_per_s: float | None
    gap_cv: float | None
    prompt_len: Lengths
    output_len: Lengths
    num_estimated: int
    shared_prefix_share: float
    models: dict[str, int]
    num_sessions: int
    num_waiting: int
    is_exact: bool
    num_skipped: int
    num_dropped: int

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(asdict(self), allow_nan=False)

    def to_text(self) -> str:
        """A table for people."""
        at_least, at_most = ("", "") if self.is_exact else ("at least ", "at most ")
        rate = "all at once" if self.rate_per_s is None else f"{self.rate_per_s:,.3f} requests a second"
        gaps = "" if self.gap_cv is None else f", coefficient of variation of the gaps {self.gap_cv:.2f}"
        models = ", ".join(f"{name} {count:,}" for name, count in self.models.items())
        models = "".join(c if c.isprintable() else "?" for c in models)
        lines = [
            f"{self.name}",
            *([] if self.format is None else [f"format         {format_text(self.format)}"]),
            f"requests       {self.num_requests:,}"
            + f"{f', {self.num_skipped:,} skipped' if self.num_skipped else ''}"
            + f"{f', {self.num_dropped:,} dropped, with nothing to generate' if self.num_dropped else ''}",
            f"duration       {self.duration_s:,.1f} s",
            f"rate           {rate}{gaps}",
            f"shared prefix  {at_least}{self.shared_prefix_share:.1%} of prompt tokens",
            f"sessions       {at_most}{self.num_sessions:,}"
            + f"{f'; {self.num_waiting:,} requests wait for an answer' if self.num_waiting else ''}",
            *([f"models         {models}"] if models else []),
            f"{'tokens':<14} {'total':>15} {'mean':>10} {'P50':>10} {'P90':>10} {'P99':>10} {'max':>10}",
        ]
        for name, n in (("prompt", self.prompt_len), ("output", self.output_len)):
            middle = " ".join(f"{value:>10,.1f}" for value in (n.mean, n.p50, n.p90, n.p99))
            lines.append(f"{name:<14} {n.total:>15,} {middle} {n.max:>10,}")
        if self.num_estimated:
            note = f"prompts of {self.num_estimated:,} requests are texts"
            lines.append(f"({note}, {BYTES_PER_TOKEN} bytes taken for a token)")
        return "\n".join(lines)


def describe(trace: Trace) -> Description:
    """Reads a trace once and says what it is like; a trace without requests is a `TraceError`."""
    prompt_lens, output_lens = array("i"), array("i")
    gaps = _Gaps()
    prefixes, sessions = _Recent(), _Recent()
    num_estimated = num_shared = num_sessions = num_waiting = 0
    turns = _Turns()
    models: Counter[str] = Counter()
    for request in trace:
        if request.model is not None and (request.model in models or len(models) < _MAX_MODELS):
            models[request.model] += 1
        context, is_waiting = turns.context(request)
        num_waiting += is_waiting
        prompt_lens.append(request.expected_prompt_len + context.num_before)
        output_lens.append(request.output_len)
        gaps.add(request.arrival_time)
        num_estimated += request.prompt is not None
        found = max(0, context.num_before - 1)
        for prefix, num_tokens in _prefixes(request, context.key):
            found += min(num_tokens, prefixes.meet(prefix, num_tokens))
        num_shared += max(found, min(context.num_known - 1, prompt_lens[-1]))
        turns.take(request, prompt_lens[-1])
        if request.session is not None:
            num_sessions += sessions.meet(xxh3_64_intdigest(request.session.encode()), 1) == 0
    if not prompt_lens:
        raise bad_value(trace.name, None, "at least one request")
    return Description(
        name=trace.name,
        format=trace.format,
        num_requests=len(prompt_lens),
        duration_s=gaps.last,
        rate_per_s=gaps.rate,
        gap_cv=gaps.cv,
        prompt_len=_lengths(prompt_lens),
        output_len=_lengths(output_lens),
        num_estimated=num_estimated,
        shared_prefix_share=num_shared / sum(prompt_lens),
        models=dict(models.most_common()),
        num_sessions=num_sessions,
        num_waiting=num_waiting,
        is_exact=prefixes.num_forgotten == sessions.num_forgotten == 0,
        num_skipped=trace.num_skipped,
        num_dropped=trace.num_dropped,
    )


class _Gaps:
    """Mean and variance of the times between arrivals, updated with each (Welford, 1962)."""

    def __init__(self) -> None:
        self.last = 0.0
        self._num_arrivals = 0
        self._mean = self._squares = 0.0

    def add(self, time: float) -> None:
        if self._num_arrivals > 0:
            gap = time - self.last
            deviation = gap - self._mean
            self._mean += deviation / self._num_arrivals
            self._squares += deviation * (gap - self._mean)
        self._num_arrivals += 1
        self.last = time

    @property
    def rate(self) -> float | None:
        return 1 / self._mean if self._mean > 0 else None

    @property
    def cv(self) -> float | None:
        return math.sqrt(self._squares / (self._num_arrivals - 1)) / self._mean if self._mean > 0 else None


class _Recent:
    """Values by key, of the keys that were met last; the one not met for longest is forgotten first."""

    def __init__(self) -> None:
        self._values: OrderedDict[int, int] = OrderedDict()
        self.num_forgotten = 0

    def meet(self, key: int, value: int) -> int:
        """The value at the key, 0 if there is none; the larger of it and the new one is kept."""
        before = self._values.pop(key, 0)
        self._values[key] = max(before, value)
        if len(self._values) > _MAX_REMEMBERED:
            self._values.popitem(last=False)
            self.num_forgotten += 1
        return before


@dataclass(frozen=True)
class _Context:
    """What a prompt goes on with: a key of it, and its tokens where the request's own fields leave them out.

    num_known: tokens of its prompt and answer, where these have them.
    """

    key: int = 0
    num_before: int = 0
    num_known: int = 0


class _Turns:
    """The requests that later ones may wait for and go on with, those met last."""

    def __init__(self) -> None:
        self._before: OrderedDict[str, TraceRequest] = OrderedDict()  # by session
        self._totals: OrderedDict[str, int] = OrderedDict()  # tokens of prompt and answer, by id

    def context(self, request: TraceRequest) -> tuple[_Context, bool]:
        """What a request goes on with, and whether it waits for any other."""
        before = None if request.session is None else self._before.get(request.session)
        if request.continues is not None:
            key = xxh3_64_intdigest(request.continues.encode())
            return _Context(key, self._totals.get(request.continues, 0)), True
        is_waiting = bool(request.after) or (request.after is None and before is not None)
        if before is not None and is_waiting and goes_on(request, before):
            return _Context(num_known=expected_len(before)), True
        return _Context(), is_waiting

    def take(self, request: TraceRequest, prompt_len: int) -> None:
        """Takes note of a request."""
        entries: list[tuple[OrderedDict[str, Any], str, Any]]
        entries = [(self._totals, request.id, prompt_len + request.output_len)]
        if request.session is not None:
            entries.append((self._before, request.session, request))
        for table, name, value in entries:
            table[name] = value
            table.move_to_end(name)
            if len(table) > _MAX_REMEMBERED // 8:
                table.popitem(last=False)


def _prefixes(request: TraceRequest, key: int) -> Iterator[tuple[int, int]]:
    """For each piece of a prompt: a hash of the prompt up to its end, and the piece's tokens."""
    pieces, size = _pieces(request)
    prefix = hash((size, key)) if key else size
    left = request.expected_prompt_len
    for piece in pieces:
        # Python's hash of integers is the same in every process.
        prefix = hash((prefix, piece))
        yield prefix, min(size, left)
        left -= size


def _pieces(request: TraceRequest) -> tuple[Iterator[Any], int]:
    """What identifies the content of each piece of a prompt, and the tokens of a whole piece."""
    if request.hash_ids is not None:
        assert request.hash_block_size is not None
        return iter(request.hash_ids), request.hash_block_size
    if request.prompt_token_ids is not None:
        ids = request.prompt_token_ids
        return (tuple(ids[i : i + _PIECE_TOKENS]) for i in range(0, len(ids), _PIECE_TOKENS)), _PIECE_TOKENS
    text = (request.prompt or "").encode()
    step = _PIECE_TOKENS * BYTES_PER_TOKEN
    return (xxh3_64_intdigest(text[i : i + step]) for i in range(0, len(text), step)), _PIECE_TOKENS


def _lengths(values: "array[int]") -> Lengths:
    ordered = array("i", sorted(values))
    p50, p90, p99 = quantiles(ordered, (0.5, 0.9, 0.99))
    return Lengths(sum(ordered), sum(ordered) / len(ordered), p50, p90, p99, ordered[-1])
