"""The metrics against naive ones, made from the step log and every single token of a run."""

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagellm.engine import ConfigError, EngineConfig
from pagellm.engine.requests.sampling_params import SamplingParams
from pagellm.engine.scheduling.block_manager import BlockManager
from pagellm.engine.scheduling.scheduler import Scheduler
from pagellm.engine.scheduling.sequence import Sequence
from pagellm.engine.scheduling.step_loop import StepEnd
from pagellm.sim import MetricsCollector, Report, Simulator, Workload, synthesise
from pagellm.sim.costs.decoder import Layers, Model
from pagellm.sim.costs.devices import Hardware
from pagellm.sim.costs.roofline import RooflineCostModel
from pagellm.sim.simulator import Replay
from tests.conftest import at_most

# A toy of which steps differ much in their length.
COSTS = RooflineCostModel(
    Hardware(1e9, 1e12, 1e8, 1e9, 1e7), Model(100_000, 64, (Layers(2, 4, 2, 16, 256, 50_000),)),
    step_overhead_s=1e-4, layer_overhead_s=0,
)  # fmt: skip
BLOCK_SIZE = 4
SLO = {"ttft_s": 0.05, "tpot_s": 0.01}


@dataclass
class Naive:
    """What a request got, token by token."""

    arrival_s: float
    first_scheduled_s: float | None = None
    tokens_s: list[float] = field(default_factory=list)
    ended: str = ""

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in pairwise(self.tokens_s)]


def naive_requests(steps: list[dict[str, Any]]) -> list[Naive]:
    """All requests of a step log, in the order in which they were added."""
    requests: dict[int, Naive] = {}
    for step in steps:
        for added in step["added"]:
            requests[added["sequence"]] = Naive(added["arrival_s"])
        for sequence, reason in step["ended"]:
            requests[sequence].ended = reason
        for sequence, _, _, samples in step["scheduled"]:
            request = requests[sequence]
            if request.first_scheduled_s is None:
                request.first_scheduled_s = step["start_s"]
            if samples:
                request.tokens_s.append(step["start_s"] + step["duration_s"])
        for sequence, reason in step["finished"]:
            requests[sequence].ended = reason
    return list(requests.values())


def replayed(config: EngineConfig, workload: Workload, **options: Any) -> tuple[Report, list[dict[str, Any]]]:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "steps.jsonl"
        config = replace(config, step_log=str(path))
        report = Simulator(config, COSTS, slo=SLO, **options).replay(synthesise(workload))
        return report, [json.loads(line) for line in path.read_text().splitlines()]


workloads = st.builds(
    Workload,
    num_requests=st.integers(1, 40),
    arrivals=st.sampled_from(["poisson:3", "poisson:30", "gamma:100,3"]),
    prompt_len=st.just("uniform:1,60"),
    output_len=st.sampled_from(["fixed:1", "uniform:1,40"]),
    num_system_prompts=st.just(2),
    system_prompt_len=st.just(9),
    seed=st.integers(0, 1000),
)
configs = st.builds(
    EngineConfig,
    block_size=st.just(BLOCK_SIZE),
    num_blocks=st.sampled_from([30, 60]),
    max_num_seqs=st.integers(1, 12),
    max_num_batched_tokens=st.integers(5, 40),
    preemption=st.sampled_from(["swap", "auto"]),
    num_swap_blocks=st.just(20),
    policy=st.sampled_from(["fcfs", "prefill_first", "fair"]),
    enable_prefix_caching=st.booleans(),
)


@at_most(60)
@given(workloads, configs, st.sampled_from([None, 0.4]))
def test_the_report_is_what_one_finds_token_by_token(
    workload: Workload, config: EngineConfig, timeout_s: float | None
) -> None:
    report, steps = replayed(config, workload, timeout_s=timeout_s)
    summary, requests = report.summary, naive_requests(steps)
    finished = [request for request in requests if request.ended == "length"]
    started = [request for request in requests if request.tokens_s]

    # Those who give up after the last step are in no step's record.
    assert summary["num_requests"] == len(requests) == workload.num_requests
    assert summary["num_finished"] == len(finished)
    assert summary["num_timed_out"] == len(requests) - len(finished)
    first, last = min(r.arrival_s for r in requests), max(r.tokens_s[-1] for r in started)
    assert summary["duration_s"] == pytest.approx(last - first)
    assert summary["output_tokens"] == sum(len(r.tokens_s) for r in requests)
    assert summary["requests_per_s"] == pytest.approx(len(finished) / (last - first))

    exactly = {
        "ttft_s": [r.tokens_s[0] - r.arrival_s for r in started],
        "e2e_s": [r.tokens_s[-1] - r.arrival_s for r in finished],
        "tpot_s": [np.mean(r.gaps) for r in finished if r.gaps],
        "queue_s": [r.first_scheduled_s - r.arrival_s for r in requests if r.first_scheduled_s is not None],
    }
    for name, values in exactly.items():
        check_distribution(summary[name], report.data["latencies"][name], values, 1e-6)
    gaps = [gap for r in requests for gap in r.gaps]
    check_distribution(summary["itl_s"], report.data["latencies"]["itl_s"], gaps, 0.005 + 1e-6)

    good = [r for r in finished if r.tokens_s[0] - r.arrival_s <= 0.05 and np.mean(r.gaps or [0]) <= 0.01]
    assert summary["goodput"]["share"] == pytest.approx(len(good) / len(requests))
    check_memory(summary, report.data["timeline"], steps, last - first)


def check_distribution(summary: dict[str, Any], curve: list[float], values: list[Any], rel: float) -> None:
    assert summary["count"] == len(values)
    if not values:
        assert curve == []
        return
    names = {"p50": 50, "p90": 90, "p95": 95, "p99": 99}
    expected = {name: np.percentile(values, percent) for name, percent in names.items()}
    expected |= {"count": len(values), "mean": np.mean(values), "min": min(values), "max": max(values)}
    assert summary == pytest.approx(expected, rel=rel, abs=1e-12)
    assert curve == pytest.approx(np.percentile(values, np.arange(201) / 2).tolist(), rel=rel, abs=1e-12)


def check_memory(
    summary: dict[str, Any], timeline: dict[str, Any], steps: list[dict[str, Any]], duration_s: float
) -> None:
    kv, cache = summary["kv"], steps[-1]["cache"]
    assert kv["peak_blocks"] == max(step["blocks"]["used"] for step in steps)
    mean = sum(step["blocks"]["used"] * step["duration_s"] for step in steps) / duration_s
    assert kv["mean_blocks"] == pytest.approx(mean)
    assert kv["mean_bytes"] == pytest.approx(mean * COSTS.block_bytes(BLOCK_SIZE))
    assert 0 <= kv["mean_unwritten_share"] <= 1
    assert summary["cache"]["query_tokens"] == cache["queries"]
    assert summary["cache"]["hit_tokens"] == cache["hits"]
    assert summary["cache"]["evicted_tokens"] >= cache["evictions"]
    made_way: dict[str, list[int]] = defaultdict(list)
    for step in steps:
        for preempted in step["preempted"]:
            made_way[preempted["by"]].append(preempted["sequence"])
    preempted = [sequence for sequences in made_way.values() for sequence in sequences]
    assert summary["preemptions"] == {
        "recompute": len(made_way["recompute"]),
        "swap": len(made_way["swap"]),
        "requests": len(set(preempted)),
        "most_of_one_request": max(map(preempted.count, preempted), default=0),
    }

    lengths = {len(series) for series in timeline.values() if isinstance(series, list)}
    assert len(lengths) == 1
    assert sum(timeline["preemptions"]) == len(preempted)
    assert sum(timeline["arrivals"]) == summary["num_requests"]
    assert sum(timeline["finished"]) == summary["num_finished"]
    computed = [count for step in steps for _, _, count, _ in step["scheduled"]]
    assert sum(timeline["decode_tokens"]) == computed.count(1)
    assert sum(timeline["prefill_tokens"]) == sum(computed) - computed.count(1)
    assert max(timeline["peak_blocks"]) == kv["peak_blocks"]
    # A client that gives up after the last token of all may have had its request computed until then.
    end_s = max(step["start_s"] + step["duration_s"] for step in steps)
    for name in ("running", "waiting", "swapped"):
        integral = sum(step[name] * step["duration_s"] for step in steps)
        found = integral_of(timeline, name, end_s - timeline["time_s"][0])
        assert found == pytest.approx(integral, rel=1e-6, abs=1e-9)
        assert max(timeline[name]) <= max(step[name] for step in steps) + 1e-9


def integral_of(timeline: dict[str, Any], name: str, duration_s: float) -> float:
    def spans() -> Iterator[float]:
        first, width = timeline["time_s"][0], timeline["bucket_s"]
        for begin in timeline["time_s"]:
            yield min(width, max(0.0, first + duration_s - begin))

    return sum(value * span for value, span in zip(timeline[name], spans(), strict=True))


def test_a_run_of_no_tokens_has_no_figures() -> None:
    config = EngineConfig(num_blocks=1)
    simulator = Simulator(config, COSTS, skip_bad=True)
    report = simulator.replay(synthesise(Workload(num_requests=1, prompt_len="fixed:99")))
    assert report.summary["num_rejected"] == 1
    assert report.summary["requests_per_s"] is None
    assert report.summary["ttft_s"] == dict.fromkeys(report.summary["ttft_s"]) | {"count": 0}
    assert report.summary["kv"]["mean_unwritten_share"] == 0
    json.loads(report.to_json())


def test_the_report_has_the_fields_that_it_says(tmp_path: Path) -> None:
    config = EngineConfig(num_blocks=40)
    report = Simulator(config, COSTS).replay(synthesise(Workload(num_requests=5, prompt_len="fixed:9")))
    data = json.loads(report.to_json(tmp_path / "report.json"))
    assert json.loads((tmp_path / "report.json").read_text()) == data == report.data
    assert (data["version"], data["kind"], data["model"]) == (1, "simulated", COSTS.name)
    assert data["trace"] == "synthetic, seed 0"
    assert data["config"]["num_blocks"] == 40
    assert data["summary"]["goodput"] is None
    assert set(data["latencies"]) == {"ttft_s", "tpot_s", "itl_s", "e2e_s", "queue_s"}
    assert {len(curve) for curve in data["latencies"].values()} == {201}
    assert set(data["timeline"]) == {
        "time_s", "bucket_s", "running", "waiting", "swapped", "batch_tokens", "used_blocks", "peak_blocks",
        "unwritten_share", "cached_share", "hit_rate", "preemptions", "arrivals", "finished",
        "prefill_tokens", "decode_tokens",
    }  # fmt: skip


def test_nothing_is_kept_of_requests_that_have_ended() -> None:
    config = EngineConfig(block_size=4, num_blocks=30, max_num_seqs=6, preemption="swap")
    simulator = Simulator(config, COSTS, timeout_s=0.3)
    workload = Workload(num_requests=200, arrivals="poisson:40", prompt_len="uniform:1,60")
    replay = Replay(simulator, synthesise(replace(workload, output_len="uniform:1,40")))
    simulator.cost_model.begin(config)
    replay.run()
    metrics = replay.metrics
    assert metrics.summary(0.0)["num_timed_out"] > 0
    assert metrics.summary(0.0)["preemptions"]["swap"] > 0
    run = metrics._run
    assert (run.requests, run.last_token_s) == ({}, {})
    assert [(seen.last_sampled, seen.swapped, seen.used_blocks) for seen in run.replicas] == [([], set(), 0)]


def test_the_unwritten_share_is_that_of_the_block_manager() -> None:
    config = EngineConfig(block_size=4, num_blocks=30).complete()
    scheduler = Scheduler(config, BlockManager(30, 4))
    metrics = MetricsCollector([scheduler])
    listener = metrics.listener()
    for number, length in enumerate((3, 10, 8)):
        sequence = Sequence(number, [number] * length, SamplingParams())
        scheduler.add(sequence, 1.0)
        listener.added(sequence)
    batch = scheduler.schedule(1.0)
    listener.scheduled(batch, 1.0)
    usage = scheduler.block_manager.usage()
    assert metrics.timeline()["unwritten_share"] == [usage.unwritten_slots / (4 * usage.used)] == [1.0]
    scheduler.commit(batch, [[0], [0], [0]])
    listener.committed(StepEnd(batch, batch.sampled, [], 1.5, 0.5, 0.0))
    listener.scheduled(scheduler.schedule(1.5), 1.5)
    usage = scheduler.block_manager.usage()
    assert metrics.timeline()["unwritten_share"][-1] == usage.unwritten_slots / (4 * usage.used)


def test_the_cached_share_is_that_of_blocks_that_hold_a_known_prefix() -> None:
    config = EngineConfig(block_size=4, num_blocks=30).complete()
    schedulers = [Scheduler(config, BlockManager(30, 4)) for _ in range(2)]
    metrics = MetricsCollector(schedulers)
    sequence = Sequence(0, list(range(10)), SamplingParams(max_tokens=1))
    schedulers[1].add(sequence, 1.0)
    listener = metrics.listener(1)
    listener.added(sequence)
    for time_s in (1.0, 1.5):
        batch = schedulers[1].schedule(time_s)
        listener.scheduled(batch, time_s)
        finished = schedulers[1].commit(batch, [[0]] * len(batch.sampled))
        listener.committed(StepEnd(batch, batch.sampled, finished, time_s + 0.1, 0.1, 0.0))
    shares = metrics.timeline()["cached_share"]
    assert (shares[0], shares[-1]) == (0.0, 2 / 60)


def test_without_the_prefix_cache_there_is_no_hit_rate() -> None:
    config = EngineConfig(num_blocks=40, enable_prefix_caching=False)
    timeline = Simulator(config, COSTS).replay(synthesise(Workload(num_requests=3))).data["timeline"]
    assert set(timeline["hit_rate"]) == {None}
    assert set(timeline["cached_share"]) == {0.0}


def test_an_slo_is_checked() -> None:
    with pytest.raises(
        ConfigError, match="slo: found 'latency_s', expected one of ttft_s, tpot_s, e2e_s, que"
    ):
        MetricsCollector([], {"latency_s": 1})
    for seconds in (0, True, "1", float("nan")):
        with pytest.raises(ConfigError, match=r"slo: e2e_s: found .*, expected seconds above 0"):
            MetricsCollector([], {"e2e_s": seconds})  # type: ignore[dict-item]
