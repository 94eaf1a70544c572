"""What a report is, and its check at the door. A report says what a replay gave; it is one JSON object.

version: 1. kind: "simulated" or "real". trace: its name. model: what step times come from.
profile_error: null or missing where nothing was held against step times that were measured; else mean, p90,
  mean_signed: shares of what was measured, of the absolute error and of the error; num_steps. See
  `StepTimeError`.
extrapolated: look-ups of step times outside of what was measured; missing or 0 where there were none.
skipped: line and message of the trace's first bad records, which were left out.
config: every field of `EngineConfig`.
load: mode ("open" or "closed"), rate_factor, clients, replicas, router, timeout_s.
summary:
  num_requests, num_finished, num_timed_out, num_rejected; and of the trace's records those that gave no
    request: num_skipped, which are bad, and num_dropped, which have nothing to replay
  duration_s: from the first arrival to the last token. wall_s: what the replay itself took.
  prompt_tokens, output_tokens, num_steps, requests_per_s, output_tokens_per_s, total_tokens_per_s
  distributions: count, mean, min, p50, p90, p95, p99, max; all but count are null if nothing was measured
    ttft_s: first token - arrival. e2e_s: last token - arrival. queue_s: first chunk scheduled - arrival.
    tpot_s: (last token - first token) / (output tokens - 1) of each request that has 2 or more.
    itl_s: each gap between a request's consecutive tokens.
  goodput: null, or slo, share, requests_per_s
  cache: query_tokens, hit_tokens, hit_rate, evicted_tokens
  preemptions: recompute, swap, requests, most_of_one_request
  kv: num_blocks, block_bytes, peak_blocks, mean_blocks, peak_bytes, mean_bytes, mean_unwritten_share; means
    are time-weighted, over all replicas together
timeline: bucket_s, and lists of a value for each of equal buckets
  time_s: where each begins
  time-weighted means: running, waiting, swapped, batch_tokens, used_blocks
  sampled: unwritten_share, of the slots of used blocks; cached_share, of all blocks those that hold a known
    prefix
  peak_blocks, and hit_rate, null where nothing was looked up
  counts: preemptions, arrivals, finished. sums: prefill_tokens, decode_tokens.
latencies: of each distribution the quantiles at 0, 0.5, 1, ... 100 percent; none if nothing was measured.

Times are seconds. Fields beyond these are let through.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pagellm.engine.errors import ReportError

Report = dict[str, Any]

VERSION = 1
NUM_QUANTILES = 201
DISTRIBUTIONS = ("ttft_s", "tpot_s", "itl_s", "e2e_s", "queue_s")

_MISSING = object()
_SHOWN = 60


@dataclass(frozen=True)
class _Kind:
    """What a field may hold, in words and as a predicate."""

    expected: str
    accepts: Callable[[Any], bool]

    def or_null(self) -> "_Kind":
        return _Kind(f"{self.expected}, or null", lambda value: value is None or self.accepts(value))

    def each(self) -> "_Kind":
        def accepts(value: Any) -> bool:
            return isinstance(value, list) and all(map(self.accepts, value))

        return _Kind(f"a list, each item {self.expected}", accepts)

    def values(self) -> "_Kind":
        def accepts(value: Any) -> bool:
            return isinstance(value, dict) and all(map(self.accepts, value.values()))

        return _Kind(f"an object, each value {self.expected}", accepts)


@dataclass(frozen=True)
class _OrNull:
    shape: dict[str, Any]


def _is_number(value: Any) -> bool:
    # No isfinite: it fails on an integer that is too large for a float.
    return type(value) in (int, float) and 0 <= value < 1e300


def _is_quantiles(value: Any) -> bool:
    if not isinstance(value, list) or len(value) not in (0, NUM_QUANTILES):
        return False
    return all(map(_is_number, value)) and value == sorted(value)


def _one_of(*choices: object) -> _Kind:
    shown = " or ".join(map(json.dumps, choices))
    return _Kind(shown, lambda value: any(type(value) is type(c) and value == c for c in choices))


_NUMBER = _Kind("a finite number from 0", _is_number)
_COUNT = _Kind("an integer from 0", lambda value: type(value) is int and _is_number(value))
_TEXT = _Kind("a text", lambda value: isinstance(value, str))
_SCALAR = _Kind(
    "a text, a finite number, true or false",
    lambda value: isinstance(value, str | bool) or (type(value) in (int, float) and abs(value) < 1e300),
)
_QUANTILES = _Kind(f"no or {NUM_QUANTILES} finite numbers from 0 that do not decrease", _is_quantiles)
_DISTRIBUTION = {
    "count": _COUNT,
    **dict.fromkeys(("mean", "min", "p50", "p90", "p95", "p99", "max"), _NUMBER.or_null()),
}
_SHAPE = {
    "version": _one_of(VERSION),
    "kind": _one_of("simulated", "real"),
    "trace": _TEXT,
    "skipped": _SCALAR.values().each(),
    "model": _TEXT,
    "config": _SCALAR.or_null().values(),
    "load": {
        "mode": _one_of("open", "closed"),
        "rate_factor": _NUMBER.or_null(),
        "clients": _COUNT.or_null(),
        "replicas": _COUNT,
        "router": _TEXT.or_null(),
        "timeout_s": _NUMBER.or_null(),
    },
    "summary": {
        **dict.fromkeys(("num_requests", "num_finished", "num_timed_out", "num_rejected"), _COUNT),
        **dict.fromkeys(("num_skipped", "num_dropped"), _COUNT),
        "duration_s": _NUMBER,
        **dict.fromkeys(("prompt_tokens", "output_tokens", "num_steps"), _COUNT),
        **dict.fromkeys(("requests_per_s", "output_tokens_per_s", "total_tokens_per_s"), _NUMBER.or_null()),
        **dict.fromkeys(DISTRIBUTIONS, _DISTRIBUTION),
        "goodput": _OrNull(
            {
                "slo": _NUMBER.or_null().values(),
                "share": _NUMBER.or_null(),
                "requests_per_s": _NUMBER.or_null(),
            }
        ),
        "cache": {
            **dict.fromkeys(("query_tokens", "hit_tokens", "evicted_tokens"), _COUNT),
            "hit_rate": _NUMBER.or_null(),
        },
        "preemptions": dict.fromkeys(("recompute", "swap", "requests", "most_of_one_request"), _COUNT),
        "kv": {
            **dict.fromkeys(("num_blocks", "peak_blocks"), _COUNT),
            "mean_blocks": _NUMBER,
            **dict.fromkeys(("block_bytes", "peak_bytes", "mean_bytes"), _NUMBER.or_null()),
            "mean_unwritten_share": _NUMBER.or_null(),
        },
        "wall_s": _NUMBER,
    },
    "timeline": {
        "bucket_s": _NUMBER,
        **dict.fromkeys(("time_s", "running", "waiting", "swapped", "batch_tokens"), _NUMBER.each()),
        **dict.fromkeys(("used_blocks", "peak_blocks"), _NUMBER.each()),
        **dict.fromkeys(("unwritten_share", "cached_share"), _NUMBER.each()),
        "hit_rate": _NUMBER.or_null().each(),
        **dict.fromkeys(("preemptions", "arrivals", "finished"), _NUMBER.each()),
        **dict.fromkeys(("prefill_tokens", "decode_tokens"), _NUMBER.each()),
    },
    "latencies": dict.fromkeys(DISTRIBUTIONS, _QUANTILES),
}


def load_report(path: str | Path) -> Report:
    """The report in a file; a `ReportError` names the file, the field, what was found and expected."""
    try:
        text = Path(path).read_bytes().decode()
        report = json.loads(text)
    except OSError as error:
        raise ReportError(f"{path}: cannot be read: {error.strerror or error}") from None
    except json.JSONDecodeError as error:
        place = f"{path}:{error.lineno}: column {error.colno}"
        raise ReportError(f"{place}: found malformed JSON, expected a report ({error.msg})") from None
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{path}: found no JSON within limits, expected a report ({error})") from None
    return check_report(report, str(path))


def check_report(report: Any, source: str = "report") -> Report:
    """The report, if it has the shape above; else a `ReportError` that begins with its source."""
    _check(source, "", report, _SHAPE)
    timeline = report["timeline"]
    num_buckets = len(timeline["time_s"])
    for name, values in timeline.items():
        if isinstance(values, list) and len(values) != num_buckets:
            expected = f"{num_buckets} values, as many as timeline.time_s"
            raise ReportError(f"{source}: timeline.{name}: found {len(values)}, expected {expected}")
    checked: Report = report
    return checked


def _check(source: str, place: str, value: Any, shape: Any) -> None:
    if isinstance(shape, _OrNull):
        if value is None:
            return
        shape = shape.shape
    if isinstance(shape, _Kind):
        if not shape.accepts(value):
            raise _found(source, place, value, shape.expected)
        return
    if not isinstance(value, dict):
        raise _found(source, place, value, "an object")
    for name, inner in shape.items():
        _check(source, f"{place}.{name}" if place else name, value.get(name, _MISSING), inner)


def _found(source: str, place: str, value: Any, expected: str) -> ReportError:
    shown = "nothing" if value is _MISSING else json.dumps(value)
    if len(shown) > _SHOWN:
        shown = f"{shown[:_SHOWN]}..."
    return ReportError(f"{source}: {f'{place}: ' if place else ''}found {shown}, expected {expected}")
