"""A recorded run of a server: what was asked of it, and when each request had its first and last token.

Split in two halves: constants are fitted to one and scored by the other. What a file of a benchmark's says is
the business of formats.py; times here are seconds from the first arrival.
"""

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean
from typing import Any, NamedTuple
from zlib import crc32

from pagellm.engine.errors import TraceError
from pagellm.sim.fields import Fields
from pagellm.sim.quantiles import quantiles
from pagellm.sim.traces.request import TraceRequest

_SHARES = (0.1, 0.5, 0.9, 0.99)
# Of an engine, what a run may say of the one that served.
_SETTINGS = ("block_size", "num_blocks", "max_num_seqs", "max_num_batched_tokens", "max_model_len")
# Fewer requests say nothing of a half.
MIN_REQUESTS = 8


class Served(NamedTuple):
    """A request as it was served.

    prefix: the name of a content that prompts begin with, and how many tokens of it this one has; prompts of
    one name share these. tokens: that stand for the prompt, where its text is known.
    """

    arrival_s: float
    prompt_len: int
    output_len: int
    first_token_s: float
    last_token_s: float
    prefix: tuple[str, int] = ("", 0)
    tokens: "array[int] | None" = None


# By name: output tokens a second, and seconds: means, and quantiles such as ttft_p90.
Figures = Mapping[str, float]


@dataclass(frozen=True)
class Half:
    """Requests of an experiment by their positions in it, and what was measured of them."""

    positions: Sequence[int]
    measured: Figures


@dataclass(frozen=True)
class Experiment:
    """Requests that one server had together.

    settings: of the engine that served, as far as they are known, by the names of `EngineConfig`. served:
    each request as it was measured, None where only figures of all are known. clients: where so many asked,
    each again when it had its answer; their requests came when they did because of that.
    published: what simulators have predicted of what was measured, by their names.
    """

    name: str
    requests: Sequence[TraceRequest]
    fitted: Half | None
    scored: Half | None
    settings: Mapping[str, Any] = field(default_factory=dict)
    served: Sequence[Served] | None = None
    clients: int | None = None
    published: Mapping[str, Figures] = field(default_factory=dict)


@dataclass(frozen=True)
class RecordedRun:
    """A run as a file has it.

    format: its name. at_client: whether a client took the times, so that they have HTTP and tokenizer in
    them. num_left_out: requests that failed, or were no part of what is measured. model, hardware,
    num_devices: as the file names them; None where it does not. constants: of step times, that are known of
    how it was served. samples_as_model: whether requests left it to the model how tokens are sampled.
    """

    path: str
    format: str
    at_client: bool
    experiments: Sequence[Experiment]
    num_left_out: int = 0
    model: str | None = None
    hardware: str | None = None
    num_devices: int | None = None
    constants: Mapping[str, float] = field(default_factory=dict)
    samples_as_model: bool = False

    @property
    def num_fitted(self) -> int:
        """Requests that constants are fitted to."""
        return sum(len(one.fitted.positions) for one in self.experiments if one.fitted is not None)

    @property
    def num_scored(self) -> int:
        """Requests that they are scored by."""
        return sum(len(one.scored.positions) for one in self.experiments if one.scored is not None)


def settings_of(fields: Fields) -> dict[str, int]:
    """The settings of the engine that served, as far as fields have them by our names."""
    return {name: fields.integer(name) for name in _SETTINGS if fields.has(name)}


def experiment_of(
    place: str,
    served: Iterable[Served],
    settings: Mapping[str, Any] | None = None,
    clients: int | None = None,
) -> Experiment:
    """The experiment of requests in any order: the earlier half of them is fitted to, the later one scores.

    Raises `TraceError` where they are too few.
    """
    ordered = sorted(served, key=lambda one: one.arrival_s)  # those that came together stay in order
    if len(ordered) < 2 * MIN_REQUESTS:
        raise TraceError(
            f"{place}: found {len(ordered)} requests that were served, expected {2 * MIN_REQUESTS} or more"
        )
    begin = ordered[0].arrival_s
    ordered = [
        one._replace(
            arrival_s=one.arrival_s - begin,
            first_token_s=one.first_token_s - begin,
            last_token_s=one.last_token_s - begin,
        )
        for one in ordered
    ]
    middle = len(ordered) // 2
    halves = range(middle), range(middle, len(ordered))
    fitted, scored = (Half(half, figures([ordered[i] for i in half])) for half in halves)
    return Experiment(place, requests_of(ordered), fitted, scored, settings or {}, ordered, clients)


def requests_of(served: Sequence[Served]) -> list[TraceRequest]:
    """What was asked, for a replay; prompts that share a prefix begin with the same tokens."""
    sizes: dict[str, int] = {}
    for one in served:
        name, size = one.prefix
        sizes[name] = max(size, sizes.get(name, 0))
    starts: dict[str, int] = {}
    upcoming = 0  # a token that nobody has yet
    for name, size in sizes.items():
        starts[name] = upcoming
        upcoming += size
    requests = []
    for index, one in enumerate(served):
        name, size = one.prefix
        prompt: dict[str, Any] = {"prompt_len": one.prompt_len}
        if size:
            own = one.prompt_len - size
            tokens = array("i", range(starts[name], starts[name] + size))
            tokens.extend(range(upcoming, upcoming + own))
            upcoming += own
            prompt = {"prompt_token_ids": tokens}
        if one.tokens is not None:
            prompt = {"prompt_token_ids": one.tokens}
        requests.append(
            TraceRequest(
                arrival_time=one.arrival_s, output_len=one.output_len, id=str(index), index=index, **prompt
            )
        )
    return requests


def with_texts(served: Sequence[Served], texts: Sequence[str]) -> list[Served]:
    """Requests with tokens that stand for their prompts, which begin alike as far as the texts do.

    No tokenizer is asked: all are cut into pieces as long as a token is on average, as many as a prompt has.
    """
    num_tokens, num_chars = sum(one.prompt_len for one in served), sum(map(len, texts))
    size = num_chars / num_tokens
    found = []
    for index, (one, text) in enumerate(zip(served, texts, strict=True)):
        cuts = [round(place * size) for place in range(one.prompt_len + 1)]
        pieces = (text[a:b] or f"{index}, {a}" for a, b in pairwise(cuts))
        tokens = array("i", (crc32(piece.encode("utf-8", "replace")) >> 2 for piece in pieces))
        found.append(one._replace(tokens=tokens))
    return found


def figures(served: Sequence[Served]) -> dict[str, float]:
    """What requests were like together.

    throughput: output tokens a second from the first arrival to the last token. ttft, tpot, e2e: means, and
    their quantiles; tpot is of the requests with two or more output tokens.
    """
    begin, end = min(one.arrival_s for one in served), max(one.last_token_s for one in served)
    found = {"throughput": sum(one.output_len for one in served) / max(end - begin, 1e-9)}
    latencies = {
        "ttft": [one.first_token_s - one.arrival_s for one in served],
        "tpot": [
            (one.last_token_s - one.first_token_s) / (one.output_len - 1)
            for one in served
            if one.output_len > 1
        ],
        "e2e": [one.last_token_s - one.arrival_s for one in served],
    }
    for name, values in latencies.items():
        if values:
            found[name] = fmean(values)
            for share, value in zip(_SHARES, quantiles(sorted(values), _SHARES), strict=True):
                found[f"{name}_p{100 * share:g}"] = value
    return found
