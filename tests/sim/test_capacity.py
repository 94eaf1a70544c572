"""What operators ask: the highest load, the fewest replicas, the cheapest hardware, or why not."""

import json
import socket
import sys
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pagellm.__main__ import main
from pagellm.engine import ConfigError
from pagellm.engine.scheduling.batch import ScheduledBatch
from pagellm.sim import CostSource, Grid, Simulator, Slo, Sweep, Trace, TraceFile, Workload, synthesise
from pagellm.sim.report.steady import MIN_REQUESTS
from pagellm.sim.sweep.plan import plan
from tests.sim.test_simulator import CONFIG, Seconds

HARDWARE = CostSource(roofline=("l4", "smollm2-135m", 1))
LIMITS = "ttft=0.5,tpot=0.05"


def trace(tmp_path: Path, number: int = 1500, rate: float = 20.0) -> TraceFile:
    path = tmp_path / f"{number}.jsonl"
    workload = Workload(
        num_requests=number,
        arrivals=f"poisson:{rate}",
        prompt_len="fixed:500",
        output_len="fixed:40",
        num_system_prompts=0,
    )
    synthesise(workload).save(path)
    return TraceFile(str(path))


def sweep(trace: TraceFile, *axes: str, **options: Any) -> Sweep:
    options = {"jobs": 1, "slo": Slo.parse(LIMITS, 0.9)} | options
    return Sweep(trace, HARDWARE, Grid.parse(["max_num_seqs=16", *axes]), **options)


def verdict(rate: float, number: int = 400, seconds: float = 0.1) -> dict[str, Any]:
    """Of a server that takes 10 steps a second and so 10 requests of one step each, one at a time."""
    workload = Workload(
        num_requests=number, arrivals=f"poisson:{rate}", prompt_len="fixed:8", output_len="fixed:1"
    )
    config = replace(CONFIG, max_num_seqs=1)
    summary = Simulator(config, Seconds(seconds), slo={"ttft_s": 0.3}).replay(synthesise(workload)).summary
    return dict(summary["steady"])


def test_a_steady_run_an_overloaded_one_and_one_too_short() -> None:
    steady = verdict(5.0)
    assert steady["verdict"] == "steady"
    assert steady["offered_per_s"] == pytest.approx(5.0, rel=0.15)
    assert steady["served_per_s"] == pytest.approx(steady["offered_per_s"], rel=0.02)
    over = verdict(20.0)
    assert over["verdict"] == "overloaded"
    assert over["served_per_s"] == pytest.approx(10.0, rel=0.02)
    assert "from half to half" in over["reason"]
    short = verdict(5.0, number=MIN_REQUESTS)
    assert short["verdict"] == "short"
    assert f"expected at least {MIN_REQUESTS}" in short["reason"]


@pytest.mark.parametrize("max_num_seqs", [8, 1000])
def test_a_load_that_grows_is_no_overload_as_long_as_it_is_served(max_num_seqs: int) -> None:
    """A second of steps gives 10 tokens to each of those that run; at 1,000 nobody ever waits."""

    def replayed(rates: tuple[float, float]) -> dict[str, Any]:
        halves = [
            synthesise(
                Workload(
                    num_requests=300,
                    arrivals=f"poisson:{rate}",
                    prompt_len="fixed:8",
                    output_len="fixed:20",
                    seed=i,
                )
            )
            for i, rate in enumerate(rates)
        ]
        first, then = (list(half) for half in halves)
        start = first[-1].arrival_time
        then = [replace(r, arrival_time=start + r.arrival_time, id=f"b{r.id}") for r in then]
        config = replace(CONFIG, max_num_seqs=max_num_seqs, num_blocks=100_000)
        costs = Saturating(0.1, most=8)
        return dict(Simulator(config, costs).replay(Trace.from_requests([*first, *then])).summary["steady"])

    assert replayed((0.5, 3.0))["verdict"] != "overloaded", "at most 6 of 8 run on average"
    assert replayed((3.0, 3.0))["verdict"] == "steady"
    over = replayed((4.5, 4.5))
    assert over["verdict"] == "overloaded"


class Saturating(Seconds):
    """Steps of so many seconds for up to `most` sequences, and longer in proportion for more."""

    def __init__(self, seconds: float, most: int) -> None:
        super().__init__(seconds)
        self._most = most

    def step_time(self, batch: ScheduledBatch) -> float:
        return super().step_time(batch) * max(1.0, len(batch.sequences) / self._most)


def test_the_warm_up_is_left_out_of_the_attainment() -> None:
    """The M/D/1 queue at half load: a request waits 0.05 s on average."""
    steady = verdict(5.0, number=2000)
    assert steady["num_measured"] == pytest.approx(1600, abs=60)
    assert steady["warm_up_s"] + steady["window_s"] == pytest.approx(400, rel=0.1)
    assert steady["in_system"] == pytest.approx([0.75, 0.75], rel=0.25)  # 0.5 in service, and 0.25 wait
    assert 0.9 < steady["attainment"] <= 1


def test_the_highest_load_is_steady_and_the_next_one_is_not_served(tmp_path: Path) -> None:
    made = sweep(trace(tmp_path))
    [answer] = plan(made, seeds=2, tolerance=0.05)
    assert answer.refused is None
    assert answer.offered_per_s is not None
    assert answer.interval is not None
    assert answer.attainment is not None
    assert answer.attainment >= 0.9
    factor = answer.offered_per_s / made.trace_rate()
    [above] = sweep(trace(tmp_path), f"rate_factor={1.3 * factor}").run().points
    assert above.summary is not None
    assert not made.needed_slo().holds(above.summary)


def test_a_trace_that_is_too_short_gives_no_answer(tmp_path: Path) -> None:
    [answer] = plan(sweep(trace(tmp_path, 40)), seeds=1, tolerance=0.1)
    assert answer.refused is not None
    assert "requests/s offered are no steady state" in answer.refused
    assert answer.offered_per_s is None


def test_limits_that_nobody_keeps_are_found_at_once(tmp_path: Path) -> None:
    """Where requests are alone, and even so too late, no lower load is tried."""
    made = sweep(trace(tmp_path, 100, rate=0.5), slo=Slo.parse("ttft=0.0001", 0.9))
    [capacity] = made.run_capacity().capacities or []
    assert capacity.bracket is not None
    assert capacity.bracket.holds is None
    assert len(capacity.probes) <= 3


def test_the_fewest_replicas_are_the_fewest(tmp_path: Path) -> None:
    made = sweep(trace(tmp_path))
    [answer] = plan(made, rate=60.0, seeds=1)
    assert answer.refused is None
    assert answer.replicas is not None
    factor = 60.0 / made.trace_rate()
    for replicas, holds in ((answer.replicas, True), (answer.replicas - 1, False)):
        if replicas:
            axes = (f"rate_factor={factor}", f"replicas={replicas}")
            [point] = sweep(trace(tmp_path), *axes).run().points
            assert made.needed_slo().holds(point.summary or {}) is holds


def test_the_cheapest_hardware_comes_first(tmp_path: Path) -> None:
    made = sweep(trace(tmp_path), "hardware=l4,h100-sxm,h100-sxm*3")
    answers = plan(made, rate=30.0, seeds=1, prices={"l4": 0.7, "h100-sxm": 2.0})
    costs = [answer.cost_per_m for answer in answers]
    assert costs == sorted(c for c in costs if c is not None)
    by_name = {answer.settings["hardware"]: answer for answer in answers}
    l4 = by_name["l4"]
    assert l4.cost_per_h == pytest.approx(0.7 * (l4.replicas or 0))
    three = by_name["h100-sxm*3"]
    assert three.cost_per_h == pytest.approx(3 * 2.0 * (three.replicas or 0), rel=1e-12)
    assert l4.cost_per_m == pytest.approx((l4.cost_per_h or 0) / (l4.tokens_per_s or 0) / 3600 * 1e6)
    with pytest.raises(ConfigError, match="price: found 'b200', expected the name of hardware"):
        plan(made, prices={"b200": 1.0})


def test_a_sweep_over_hardware_resumes(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    made = sweep(trace(tmp_path, 60), "hardware=l4,h100-sxm", results=results)
    first = made.run().points
    assert [point.settings["hardware"] for point in first] == ["l4", "h100-sxm"]
    assert first[0].summary != first[1].summary
    before = results.read_bytes()
    assert made.run().points == first
    assert results.read_bytes() == before


def test_seeds_reorder_the_gaps_alone(tmp_path: Path) -> None:
    points = sweep(trace(tmp_path, 60), "seed=0,1,2").run().points
    summaries = [point.summary or {} for point in points]
    assert len({summary["ttft_s"]["mean"] for summary in summaries}) == 3
    assert len({(s["num_requests"], s["prompt_tokens"]) for s in summaries}) == 1


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = trace(tmp_path).path
    common = ["capacity", path, "--roofline", "l4,smollm2-135m", "--slo", LIMITS, "--jobs", "1"]
    common += ["--set", "max_num_seqs=4"]
    assert main([*common, "--seeds", "2", "--tolerance", "0.2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["slo"] == {"attainment": 0.9, "ttft": 0.5, "tpot": 0.05}
    assert result["answers"][0]["attainment"] >= 0.9
    assert main([*common, "--limit", "30", "--seeds", "1"]) == 2
    assert "capacity: refused: seed 0" in capsys.readouterr().err
    assert main([*common, "--price", "l4=free"]) == 2
    assert "price: found 'l4=free', expected NAME=X" in capsys.readouterr().err


def test_a_ray_cluster_does_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of Ray: workers as many as it has cores, and the same points as here."""
    asked: list[Any] = []

    class Remote:
        def __init__(self, function: Any) -> None:
            self._function = function

        def remote(self, *arguments: Any) -> Any:
            done: Future[Any] = Future()
            done.set_result(self._function(*arguments))
            reference = ModuleType("reference")
            reference.future = lambda: done  # type: ignore[attr-defined]
            return reference

    fake = ModuleType("ray")
    fake.is_initialized = lambda: False  # type: ignore[attr-defined]
    fake.init = lambda **options: asked.append(options["address"])  # type: ignore[attr-defined]
    fake.cluster_resources = lambda: {"CPU": 2.0}  # type: ignore[attr-defined]
    fake.remote = lambda num_cpus: Remote  # type: ignore[attr-defined]
    fake.shutdown = lambda: asked.append("shutdown")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray", fake)
    made = sweep(trace(tmp_path, 60), "policy=fcfs,shortest_job")
    here = made.run().points
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        there = sweep(trace(tmp_path, 60), "policy=fcfs,shortest_job", ray=address, jobs=None).run().points
    assert there == here
    assert asked == [address, "shutdown"]
    refused = rf"^ray: {address}: .*[Cc]onnection refused, expected the address of a cluster"
    with pytest.raises(ConfigError, match=refused):
        sweep(trace(tmp_path, 60), ray=address).run()
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match="ray: found no package ray, expected it installed"):
        sweep(trace(tmp_path, 60), ray=address).run()
