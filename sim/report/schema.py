"""What a report is, and its check at the door: the shape of its JSON is the types below. Times are seconds.

A number is finite and not negative, unless its type says otherwise. Fields beyond these are let through.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,
    TypedDict,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from pagellm.engine import checks
from pagellm.engine.errors import ReportError
from pagellm.sim.costs.cost_model import CostConstant, FitError, Signed, StepTimeError
from pagellm.sim.fields import read_json
from pagellm.sim.outputs import write_whole
from pagellm.sim.quantiles import Distribution

VERSION: Literal[1] = 1
NUM_QUANTILES = 201

# The values below which 0, 0.5, 1, ... 100 percent lie; none if nothing was measured.
Quantiles = Annotated[list[float], "quantiles"]


class Goodput(TypedDict):
    """slo: the most seconds of a good request by the latency's name. share, requests_per_s: of good ones."""

    slo: dict[str, float | None]
    share: float | None
    requests_per_s: float | None


class Cache(TypedDict):
    """Tokens of prompts that the prefix cache was asked for, had, and forgot.

    host_hit_tokens: of those that it had, what lay in its second tier. offloaded_tokens: that went there.
    """

    query_tokens: int
    hit_tokens: int
    hit_rate: float | None
    evicted_tokens: int
    host_hit_tokens: NotRequired[int]
    offloaded_tokens: NotRequired[int]


class Preemptions(TypedDict):
    """How many there were of each kind, the requests that they met, and the most of one request."""

    recompute: int
    swap: int
    requests: int
    most_of_one_request: int


class KvCache(TypedDict):
    """KV blocks of all replicas together; means are weighted by time."""

    num_blocks: int
    block_bytes: float | None
    peak_blocks: int
    mean_blocks: float
    peak_bytes: float | None
    mean_bytes: float | None
    mean_unwritten_share: float | None


class Group(TypedDict):
    """The figures of one group of replicas, replica, tenant or class: by and name say which.

    cached_tokens: of prompts.
    """

    by: Literal["group", "replica", "tenant", "class"]
    name: str
    num_requests: int
    num_finished: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    output_tokens_per_s: float | None
    goodput_share: float | None
    ttft_s: Distribution
    tpot_s: Distribution
    e2e_s: Distribution


class Steady(TypedDict):
    """Whether the run was at a steady state, from its warm-up to the last arrival, and what was then.

    verdict: "overloaded" where requests were served more slowly than they came, "short" where that cannot be
    told; reason: why. offered_per_s, served_per_s: requests that came, and that ended. warm_up_s, window_s:
    how long the part that is left out and the part that is looked at were. num_measured: requests that came
    in it; attainment: the share of them that kept the SLO, null without one. in_system: requests that waited
    and ran, on average in the window's first half and in its second.
    """

    verdict: Literal["steady", "overloaded", "short"]
    reason: str
    offered_per_s: float
    served_per_s: float
    warm_up_s: float
    window_s: float
    num_measured: int
    attainment: float | None
    in_system: list[float]


class Summary(TypedDict):
    """The figures of the whole run.

    num_rejected: requests that could never be computed, or that the admission policy shed. num_failed: that
    were lost with a replica and did not go on elsewhere, where there are any.
    num_skipped, num_dropped: of the trace's records those that gave no request: bad ones, and ones with
    nothing to generate. duration_s: from the first arrival to the last token. wall_s: what the replay took.
    ttft_s: first token - arrival. e2e_s: last token - arrival. queue_s: first chunk scheduled - arrival.
    tpot_s: (last token - first token) / (output tokens - 1) of each request that has 2 or more.
    itl_s: each gap between a request's consecutive tokens.
    """

    num_requests: int
    num_finished: int
    num_timed_out: int
    num_rejected: int
    num_failed: NotRequired[int]
    num_skipped: int
    num_dropped: int
    duration_s: float
    prompt_tokens: int
    output_tokens: int
    num_steps: int
    requests_per_s: float | None
    output_tokens_per_s: float | None
    total_tokens_per_s: float | None
    ttft_s: Distribution
    tpot_s: Distribution
    itl_s: Distribution
    e2e_s: Distribution
    queue_s: Distribution
    goodput: Goodput | None
    cache: Cache
    preemptions: Preemptions
    kv: KvCache
    steady: NotRequired[Steady]
    wall_s: float


class TimelineData(TypedDict):
    """Lists of a value for each of equal buckets of bucket_s.

    time_s: where each begins. running, waiting, swapped, batch_tokens, used_blocks: means weighted by time.
    unwritten_share, of the slots of used blocks, and cached_share, of all blocks those that hold a known
    prefix: sampled. good: finished requests within the SLO. replicas: those that are up, on average, where
    they come and go. hit_rate: null where nothing was looked up. The others are counts and sums.
    """

    bucket_s: float
    time_s: list[float]
    running: list[float]
    waiting: list[float]
    swapped: list[float]
    batch_tokens: list[float]
    used_blocks: list[float]
    peak_blocks: list[float]
    unwritten_share: list[float]
    cached_share: list[float]
    hit_rate: list[float | None]
    preemptions: list[float]
    arrivals: list[float]
    finished: list[float]
    prefill_tokens: list[float]
    decode_tokens: list[float]
    good: NotRequired[list[float]]
    replicas: NotRequired[list[float]]


class Latencies(TypedDict):
    """The quantiles of each latency."""

    ttft_s: Quantiles
    tpot_s: Quantiles
    itl_s: Quantiles
    e2e_s: Quantiles
    queue_s: Quantiles


class Load(TypedDict):
    """How requests came, and who served them."""

    mode: Literal["open", "closed"]
    rate_factor: float | None
    clients: int | None
    replicas: int
    router: str | None
    timeout_s: float | None


class FleetGroup(TypedDict):
    """A group of alike replicas, and what it used.

    replicas: the most that there were at once; devices: of one. paid_s: seconds of all its replicas, from
    when they were started; busy_s: in which they had steps under way. energy_wh, cost: null where powers or
    prices are not known. powers: of a device, power_w as long as a step is under way and idle_power_w else,
    each with where it is from.
    """

    name: str
    role: str
    model: str
    replicas: int
    devices: int
    paid_s: float
    busy_s: float
    energy_wh: float | None
    cost: float | None
    powers: NotRequired[list[CostConstant]]


class LinkFigures(TypedDict):
    """What KV went over a link, how long each transfer waited for it, and how long it then took."""

    name: str
    transfers: int
    bytes: int
    mean_wait_s: float
    mean_transfer_s: float


class FailureFigures(TypedDict):
    """Replicas that failed, and what was lost with them.

    lost_requests: that were there, or whose KV was; lost_tokens: of theirs that were computed and had to be
    once more; failed_requests: that were not begun anew. mean_down_s: from a failure to being ready again.
    """

    failures: int
    lost_requests: int
    lost_tokens: int
    failed_requests: NotRequired[int]
    mean_down_s: float | None


class ScalingEvent(TypedDict):
    """A group has so many replicas from now on: started ones count, those that are to stop do not."""

    time_s: float
    group: str
    replicas: int


class FleetData(TypedDict):
    """What served, and what that took, from the first arrival to the last token.

    wh_per_million, cost_per_million: of output tokens. cost: in the unit of the prices. links, failures,
    scaling: where there are any.
    """

    groups: list[FleetGroup]
    links: NotRequired[list[LinkFigures]]
    failures: NotRequired[FailureFigures]
    scaling: NotRequired[list[ScalingEvent]]
    energy_wh: float | None
    wh_per_million: float | None
    cost: float | None
    cost_per_million: float | None


class ReportData(TypedDict):
    """A report as JSON.

    trace: its name. skipped: line and message of its first bad records, which were left out. model: what step
    times come from. profile_error, fit: null where nothing is known of it. constants: of estimated step
    times; none of measured ones. extrapolated: look-ups of step times outside of what was measured. config:
    every field of `EngineConfig`.
    """

    version: Literal[1]
    kind: Literal["simulated", "real"]
    trace: str
    skipped: list[dict[str, str | bool | float]]
    model: str
    extrapolated: NotRequired[int]
    profile_error: NotRequired[StepTimeError | None]
    fit: NotRequired[FitError | None]
    constants: NotRequired[list[CostConstant]]
    config: dict[str, str | bool | float | None]
    load: Load
    summary: Summary
    groups: NotRequired[list[Group]]
    fleet: NotRequired[FleetData]
    timeline: TimelineData
    latencies: Latencies


DISTRIBUTIONS = tuple(Latencies.__annotations__)


def short_name(text: str) -> str:
    """A name in which each path is the file's name alone."""
    return re.sub(r"(?<!\S)[^\s]*/(?=[^\s/]+)", "", text)


class Report(Mapping[str, Any]):
    """What a replay gives: `data` as it is written to JSON, which it can be indexed as."""

    def __init__(self, data: ReportData) -> None:
        self.data = data

    def __getitem__(self, name: str) -> Any:
        return cast(dict[str, Any], self.data)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.data)

    def __len__(self) -> int:
        return len(self.data)

    @property
    def summary(self) -> Summary:
        """The figures of the whole run."""
        return self.data["summary"]

    @property
    def profile_error(self) -> StepTimeError | None:
        """How far the profile's step times were from measured ones, None where that is not known."""
        return self.data.get("profile_error")

    @property
    def fit(self) -> FitError | None:
        """How far constants that were fitted to a recorded run are off, None where none were."""
        return self.data.get("fit")

    @property
    def title(self) -> str:
        """What was replayed, how and on what."""
        trace, model = short_name(self.data["trace"]), short_name(self.data["model"])
        return f"{trace}, {self.data['kind']} on {model}"

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Writes it as one page that needs nothing else. Raises `ReportError`."""
        from pagellm.sim.report.report import to_html

        to_html([self], path)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The report as JSON, written to a file as well if one is named. Raises `ReportError`."""
        text = json.dumps(self.data, allow_nan=False)
        if path is not None:
            write_whole("report", path, text + "\n", ReportError)
        return text


def load_report(path: str | os.PathLike[str]) -> Report:
    """The report in a file; a `ReportError` names the file, the field, what was found and expected."""
    path = checks.path("report", path, ReportError)
    return check_report(read_json(path, "a report", ReportError), str(path))


def check_report(report: Any, source: str = "report") -> Report:
    """A report from what JSON has for one; else a `ReportError` that begins with its source."""
    if isinstance(report, Report):
        return report
    _check(source, "", report, ReportData)
    timeline = report["timeline"]
    num_buckets = len(timeline["time_s"])
    for name, values in timeline.items():
        if isinstance(values, list) and len(values) != num_buckets:
            expected = f"{num_buckets} values, as many as timeline.time_s"
            raise ReportError(f"{source}: timeline.{name}: found {len(values)}, expected {expected}")
    return Report(report)


_MISSING = object()
_SHOWN = 60


def _check(source: str, place: str, value: Any, hint: Any) -> None:
    """Raises `ReportError` for a value that is not of a type; each field of an object is checked in turn."""
    if get_origin(hint) is list and is_typeddict(get_args(hint)[0]):
        if not isinstance(value, list):
            raise _found(source, place, value, "a list")
        for index, item in enumerate(value):
            _check(source, f"{place}[{index}]", item, get_args(hint)[0])
        return
    choices = get_args(hint) if _is_union(hint) else (hint,)
    shape = next(filter(is_typeddict, choices), None)
    if shape is None:
        if not _is(value, hint):
            raise _found(source, place, value, _words(hint))
        return
    if value is None and NoneType in choices:
        return
    if not isinstance(value, Mapping):
        raise _found(source, place, value, "an object")
    for name, inner in get_type_hints(shape, include_extras=True).items():
        if get_origin(inner) is NotRequired:
            if name not in value:
                continue
            [inner] = get_args(inner)
        _check(source, f"{place}.{name}" if place else name, value.get(name, _MISSING), inner)


def _is_union(hint: Any) -> bool:
    """Whether a type is one of several; one of annotated types is of another kind."""
    return isinstance(hint, UnionType) or get_origin(hint) is Union


def _is(value: Any, hint: Any) -> bool:
    """Whether a value of JSON is of a type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint == Signed:
        return type(value) in (int, float) and abs(value) < 1e300
    if hint == Quantiles:
        lengths = (0, NUM_QUANTILES)
        return _is(value, list[float]) and len(value) in lengths and value == sorted(value)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in arguments)
    if _is_union(hint):
        return any(_is(value, choice) for choice in arguments)
    if origin is list:
        return isinstance(value, list) and all(_is(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_is(item, arguments[1]) for item in value.values())
    if hint is float:  # no isfinite: it fails on an integer that is too large for a float
        return type(value) in (int, float) and 0 <= value < 1e300
    if hint is int:
        return type(value) is int and 0 <= value < 10**300
    return isinstance(value, hint)


def _words(hint: Any) -> str:
    """A type in words, as `_is` understands it."""
    names = {int: "an integer from 0", float: "a finite number from 0", str: "a text", bool: "true or false"}
    names |= {NoneType: "null"}
    origin, arguments = get_origin(hint), get_args(hint)
    if hint == Quantiles:
        return f"no or {NUM_QUANTILES} finite numbers from 0 that do not decrease"
    if hint == Signed:
        return "a finite number"
    if origin is Literal:
        return " or ".join(map(json.dumps, arguments))
    if _is_union(hint):
        *others, last = [names[choice] if choice in names else _words(choice) for choice in arguments]
        return f"{', '.join(others)}, or {last}"
    if origin is list:
        return f"a list, each item {_words(arguments[0])}"
    if origin is dict:
        return f"an object, each value {_words(arguments[1])}"
    return names[hint]


def _found(source: str, place: str, value: Any, expected: str) -> ReportError:
    shown = "nothing" if value is _MISSING else json.dumps(value)
    if len(shown) > _SHOWN:
        shown = f"{shown[:_SHOWN]}..."
    return ReportError(f"{source}: {f'{place}: ' if place else ''}found {shown}, expected {expected}")
