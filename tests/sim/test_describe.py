"""A description's numbers are exact, and say where they are not."""

import json
from itertools import pairwise
from statistics import mean, quantiles, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagellm.engine import TraceError
from pagellm.sim import Trace, TraceRequest
from pagellm.sim.traces import describe as describe_module
from pagellm.sim.traces.describe import describe


def request(time: float = 0, **fields: object) -> TraceRequest:
    return TraceRequest(**{"arrival_time": time, "output_len": 1, "prompt_len": 1} | fields)  # type: ignore[arg-type]


def hashed(prompt_len: int, *hash_ids: int) -> TraceRequest:
    return request(prompt_len=prompt_len, hash_ids=hash_ids, hash_block_size=10)


def test_models_are_counted() -> None:
    models = ["b", "a", "b", None]
    found = describe(Trace.from_requests(request(model=model) for model in models))
    assert found.models == {"b": 2, "a": 1}
    assert "models         b 2, a 1" in found.to_text().splitlines()
    assert "models" not in describe(Trace.from_requests([request()])).to_text()


@given(st.lists(st.integers(1, 10**6), min_size=2))
def test_lengths(values: list[int]) -> None:
    found = describe(Trace.from_requests(request(output_len=value) for value in values)).output_len
    percentiles = quantiles(values, n=100, method="inclusive")
    assert (found.total, found.mean, found.max) == (sum(values), pytest.approx(mean(values)), max(values))
    assert (found.p50, found.p90, found.p99) == pytest.approx(
        (percentiles[49], percentiles[89], percentiles[98])
    )


def test_rate_and_gaps() -> None:
    times = [1, 2, 2, 5, 9]
    found = describe(Trace.from_requests(map(request, times)))
    between = [after - before for before, after in pairwise(times)]
    assert (found.num_requests, found.duration_s, found.rate_per_s) == (5, 9, 0.5)
    assert found.gap_cv == pytest.approx(stdev(between) * (3 / 4) ** 0.5 / 2)
    at_once = describe(Trace.from_requests([request(), request()]))
    assert (at_once.rate_per_s, at_once.gap_cv) == (None, None)


def test_shared_prefixes_are_counted_to_the_token() -> None:
    requests = [
        hashed(25, 1, 2, 3),
        hashed(25, 1, 2, 4),  # shares 20
        hashed(30, 1, 2, 3),  # shares 25, the last piece as far as it was there
        hashed(20, 9, 2),  # shares nothing: what comes before the piece is different
        request(prompt_len=100),
        request(prompt_len=100),
    ]
    assert describe(Trace.from_requests(requests)).shared_prefix_share == pytest.approx(45 / 300)


def test_ids_and_texts_share_prefixes_by_pieces() -> None:
    ids = list(range(40))
    requests = [request(prompt_len=None, prompt_token_ids=tokens) for tokens in (ids, [*ids[:32], 7])]
    assert describe(Trace.from_requests(requests)).shared_prefix_share == pytest.approx(32 / 73)
    text = "x" * 200
    requests = [request(prompt_len=None, prompt=prompt) for prompt in (text, text[:150] + "y" * 50)]
    found = describe(Trace.from_requests(requests))
    assert (found.shared_prefix_share, found.num_estimated) == (pytest.approx(32 / 100), 2)


def test_what_was_met_too_long_ago_counts_as_new(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [hashed(10, i % 5) for i in range(20)]
    requests += [request(session=str(i % 3)) for i in range(9)]
    exact = describe(Trace.from_requests(requests))
    assert (exact.is_exact, exact.num_sessions) == (True, 3)
    assert exact.shared_prefix_share == 150 / 209
    monkeypatch.setattr(describe_module, "_MAX_REMEMBERED", 2)
    bounds = describe(Trace.from_requests(requests))
    assert (bounds.is_exact, bounds.num_sessions, bounds.shared_prefix_share) == (False, 9, 0)
    assert "at least 0.0% of prompt tokens" in bounds.to_text()
    assert "at most 9" in bounds.to_text()


def test_both_forms_say_the_same() -> None:
    found = describe(Trace.from_requests([hashed(25, 1, 2, 3), hashed(25, 1, 2, 4)], name="two"))
    document = json.loads(found.to_json())
    assert document["name"] == "two"
    assert document["prompt_len"] == {"total": 50, "mean": 25, "p50": 25, "p90": 25, "p99": 25, "max": 25}
    text = found.to_text()
    assert "two" in text
    assert "shared prefix  40.0% of prompt tokens" in text
    assert text.splitlines()[-2].split() == ["prompt", "50", "25.0", "25.0", "25.0", "25.0", "25"]


def test_nothing_cannot_be_described() -> None:
    with pytest.raises(TraceError, match="found nothing, expected at least one request"):
        describe(Trace(lambda: iter(())))
