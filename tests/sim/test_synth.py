"""A synthetic trace follows its distributions, shares what it says, and is determined by its seed."""

import statistics
import tracemalloc
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest

from pagellm.engine import TraceError
from pagellm.sim import PromptTokens, Trace, TraceRequest, Workload, synthesise
from pagellm.sim.traces.distributions import arrivals, length


def lengths(spec: str, n: int = 20_000) -> list[int]:
    draw, random = length("prompt_len", spec), Random(1)
    return [draw(random) for _ in range(n)]


def gaps(spec: str, n: int = 20_000) -> list[float]:
    times = list(islice(arrivals("arrivals", spec)(Random(1)), n))
    assert times[0] == 0
    return [after - before for before, after in pairwise(times)]


def test_lengths_follow_their_distribution() -> None:
    assert set(lengths("fixed:7")) == {7}
    uniform = Counter(lengths("uniform:1,4"))
    assert set(uniform) == {1, 2, 3, 4}
    assert all(share == pytest.approx(5000, rel=0.06) for share in uniform.values())
    lognormal = lengths("lognormal:512,0.5")
    assert statistics.median(lognormal) == pytest.approx(512, rel=0.03)
    assert sum(n < 512 * 1.6487 for n in lognormal) / len(lognormal) == pytest.approx(0.8413, abs=0.01)
    assert statistics.mean(lengths("exponential:300")) == pytest.approx(300, rel=0.03)
    zipf = Counter(lengths("zipf:1,3"))
    assert [zipf[n] / 20_000 for n in (1, 2, 3)] == pytest.approx([6 / 11, 3 / 11, 2 / 11], abs=0.01)


def test_lengths_are_at_least_one_token() -> None:
    assert set(lengths("fixed:0")) == {1}
    assert min(lengths("exponential:0.5")) == 1


def test_empirical_lengths_are_those_of_another_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    Trace.from_requests(
        TraceRequest(arrival_time=i, prompt_len=prompt_len, output_len=output_len)
        for i, (prompt_len, output_len) in enumerate([(10, 1), (10, 1), (10, 2), (20, 3)])
    ).save(path)
    prompts = Counter(lengths(f"empirical:{path}"))
    assert set(prompts) == {10, 20}
    assert prompts[10] / 20_000 == pytest.approx(0.75, abs=0.01)
    draw, random = length("output_len", f"empirical:{path}"), Random(1)
    assert {draw(random) for _ in range(100)} == {1, 2, 3}


def test_poisson_and_gamma_gaps_have_their_mean_and_variation() -> None:
    for spec, cv in (("poisson:4", 1), ("gamma:4,0.5", 0.5), ("gamma:4,3", 3)):
        between = gaps(spec)
        assert statistics.mean(between) == pytest.approx(0.25, rel=0.08)
        assert statistics.stdev(between) / statistics.mean(between) == pytest.approx(cv, rel=0.08)


def test_diurnal_arrivals_follow_the_sine() -> None:
    times = list(islice(arrivals("arrivals", "diurnal:10,0.8,100")(Random(1)), 40_000))
    assert len(times) / times[-1] == pytest.approx(10, rel=0.03)
    quarters = Counter(int(time % 100 / 25) for time in times)
    # The sine's mean over its two rising quarters together is 2 / pi.
    high, low = quarters[0] + quarters[1], quarters[2] + quarters[3]
    assert high / low == pytest.approx((1 + 0.8 * 0.6366) / (1 - 0.8 * 0.6366), rel=0.05)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            ("arrivals", spec)
            for spec in ("", "poisson", "poisson:", "poisson:0", "poisson:-1", "poisson:nan")
        ),
        *(
            ("arrivals", spec)
            for spec in ("poisson:1,2", "gamma:1,0", "diurnal:1,1.5,10", "diurnal:1,0.5,0", "burst:1")
        ),
        *(
            ("prompt_len", spec)
            for spec in ("512", "fixed:x", "uniform:5,4", "uniform:1.5,4", "zipf:1,0", "zipf:1,1e9")
        ),
        *(("output_len", spec) for spec in ("lognormal:0,1", "exponential:0", "fixed:inf", "empirical:")),
        ("turns", "poisson:1"),
        ("think_time_s", "zipf:1,10"),
    ],
)
def test_a_description_out_of_range_is_an_error_that_names_it(name: str, value: str) -> None:
    with pytest.raises(TraceError, match=rf"^{name}: found '{value}', expected "):
        synthesise(Workload(**{name: value}))


@pytest.mark.parametrize(
    "settings",
    [
        {"num_requests": 0},
        {"num_requests": True},
        {"num_system_prompts": 2},
        {"system_prompt_len": 5},
        {"num_system_prompts": -1},
        {"system_prompt_skew": -1.0},
        {"system_prompt_skew": 101},
        {"seed": 1.5},
    ],
)
def test_a_setting_out_of_range_is_an_error(settings: dict[str, Any]) -> None:
    with pytest.raises(TraceError, match=r"^(num_requests|system_prompt_|num_system_prompts|seed).*: found "):
        Workload(**settings)


BUSY = Workload(
    num_requests=300,
    arrivals="gamma:2,2",
    prompt_len="uniform:1,700",
    output_len="uniform:1,300",
    num_system_prompts=3,
    system_prompt_len=37,
    turns="uniform:1,5",
    think_time_s="exponential:20",
    seed=5,
)


def test_a_seed_determines_the_trace() -> None:
    trace = synthesise(BUSY)
    requests = list(trace)
    assert list(trace) == list(synthesise(BUSY)) == requests
    assert len(requests) == 300
    assert [r.arrival_time for r in requests] == sorted(r.arrival_time for r in requests)
    assert (requests[0].arrival_time, [r.index for r in requests]) == (0, list(range(300)))
    assert list(synthesise(Workload(**vars(BUSY) | {"seed": 6}))) != requests


def test_conversations_ask_for_models_by_their_shares() -> None:
    found = list(synthesise(Workload(**vars(BUSY) | {"models": "large=1,small v2=3", "num_requests": 4000})))
    by_session: dict[str | None, set[str | None]] = {}
    for request in found:
        by_session.setdefault(request.session, set()).add(request.model)
    assert {len(models) for models in by_session.values()} == {1}
    share = sum(models == {"large"} for models in by_session.values()) / len(by_session)
    assert share == pytest.approx(0.25, abs=0.04)
    plain = synthesise(Workload(**vars(BUSY) | {"num_requests": 4000}))
    assert [replace(request, model=None) for request in found] == list(plain)


@pytest.mark.parametrize("models", ["large", "large=0", "=1", "a=1,a=2", "a=x", "a=1,"])
def test_shares_of_models_that_cannot_be_are_refused(models: str) -> None:
    with pytest.raises(TraceError, match=r"^models: found "):
        synthesise(Workload(models=models))


def test_other_lengths_leave_the_arrivals_as_they_are() -> None:
    other = synthesise(Workload(**vars(BUSY) | {"prompt_len": "fixed:3"}))
    assert [(r.arrival_time, r.session) for r in other] == [
        (r.arrival_time, r.session) for r in synthesise(BUSY)
    ]


@pytest.mark.parametrize("system", [{}, {"num_system_prompts": 0, "system_prompt_len": 0}])
def test_each_turn_begins_with_the_whole_conversation(system: dict[str, Any]) -> None:
    tokens = PromptTokens(50257)
    conversations = defaultdict(list)
    for request in synthesise(Workload(**vars(BUSY) | system)):
        conversations[request.session].append((request, tokens(request)))
    assert max(map(len, conversations.values())) == 5
    for turns in conversations.values():
        for (request, prompt), (later, later_prompt) in pairwise(turns):
            assert later_prompt[: len(prompt)] == prompt
            assert len(later_prompt) > len(prompt) + request.output_len
            assert later.arrival_time > request.arrival_time


def test_conversations_share_a_system_prompt_of_exactly_its_length() -> None:
    tokens = PromptTokens(50257)
    begins = {request.session: tokens(request) for request in synthesise(BUSY)}
    by_system_prompt = Counter(prompt[:37].tobytes() for prompt in begins.values())
    first, second, third = (number for _, number in by_system_prompt.most_common())
    assert first > second > third
    # Beyond it two conversations share nothing: whatever they have there is found in one of them only.
    after = [prompt[37:42].tobytes() for prompt in begins.values() if len(prompt) >= 42]
    assert len(set(after)) == len(after)


def test_requests_alone_are_lengths() -> None:
    request = next(iter(synthesise(Workload(prompt_len="fixed:9", output_len="fixed:4"))))
    assert (request.prompt_len, request.output_len, request.hash_ids) == (9, 4, None)


def test_memory_does_not_grow_with_the_trace() -> None:
    workload = Workload(num_requests=10**9, arrivals="poisson:5", turns="fixed:3", prompt_len="fixed:100")
    tracemalloc.start()
    requests = iter(synthesise(workload))
    for _ in islice(requests, 5_000):
        pass
    before, _ = tracemalloc.get_traced_memory()
    for _ in islice(requests, 15_000):
        pass
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < 200_000
