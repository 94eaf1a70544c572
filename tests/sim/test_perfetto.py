"""A run of the real engine, or a simulated one, becomes a trace in which every track can be drawn."""

import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pagellm.engine import LLM, EngineConfig, ReportError, SamplingParams
from pagellm.engine.scheduling.scheduler import Scheduler
from pagellm.engine.scheduling.sequence import Sequence
from pagellm.engine.scheduling.step_loop import StepLoop
from pagellm.sim import CostModel, Simulator, Workload, synthesise
from pagellm.sim.report.perfetto import PerfettoTrace
from tests.conftest import model_path

PROMPTS = [[i + 1] * 20 for i in range(6)]
Events = list[dict[str, Any]]


@pytest.fixture(scope="module", params=["recompute", "swap"])
def log(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The step log of a run; beside it is its trace, `out.json`."""
    path: Path = tmp_path_factory.mktemp("log") / "steps.jsonl"
    llm = LLM(
        str(model_path("llama_gqa")),
        block_size=4,
        num_blocks=30,
        max_num_batched_tokens=32,
        preemption=request.param,
        step_log=str(path),
        show_progress=False,
    )
    with PerfettoTrace(path.with_name("out.json")) as trace:
        llm.engine.loop.listen(trace.listener(llm.engine.scheduler))
        llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
        llm.generate(PROMPTS[0], SamplingParams(n=3, max_tokens=4, ignore_eos=True, seed=1))
    llm.close()
    return path


def events_of(path: Path) -> Events:
    events: Events = json.loads(path.read_text())["traceEvents"]
    return events


@pytest.fixture(scope="module")
def events(log: Path) -> Events:
    return events_of(log.with_name("out.json"))


def ns(microseconds: float) -> int:
    return round(microseconds * 1000)


def tracks(events: Events) -> dict[str, list[tuple[int, int, dict[str, Any]]]]:
    """The slices of each thread in the order of their beginnings, the longer first: begin, end, event."""
    threads = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    found = defaultdict(list)
    for e in events:
        if e["ph"] == "X":
            found[threads[e["tid"]]].append((ns(e["ts"]), ns(e["ts"]) + ns(e["dur"]), e))
    return {name: sorted(slices, key=lambda s: (s[0], -s[1])) for name, slices in found.items()}


def test_steps_do_not_overlap_and_hold_their_transfers(events: Events) -> None:
    slices = tracks(events)["steps"]
    steps = [s for s in slices if s[2]["name"] != "transfers"]
    assert [s[2]["name"] for s in steps] == [f"step {i}" for i in range(len(steps))]
    assert all(a[1] <= b[0] for a, b in pairwise(steps))
    for begin, end, _ in (s for s in slices if s[2]["name"] == "transfers"):
        assert any(s[0] == begin and end <= s[1] for s in steps)


def test_the_phases_of_a_request_follow_each_other_without_gap_or_overlap(events: Events) -> None:
    requests = defaultdict(list)
    for name, slices in tracks(events).items():
        if name.startswith("slot "):
            assert all(a[1] <= b[0] for a, b in pairwise(slices)), "requests share a slot at once"
            for one in slices:
                requests[one[2]["args"]["request"]].append(one)
    assert len(requests) == 9
    for slices in requests.values():
        assert len({one[2]["tid"] for one in slices}) == 1
        assert all(a[1] == b[0] for a, b in pairwise(slices))
        names = [s[2]["name"] for s in slices]
        assert names[-1] == "decode"
        assert set(names) <= {"queued", "prefill", "decode", "preempted", "swapped"}
        for a, b in pairwise(names):
            assert (
                b
                in {
                    "queued": ("queued", "prefill", "decode"),
                    "prefill": ("decode", "preempted", "swapped"),
                    "decode": ("preempted", "swapped"),
                    "preempted": ("prefill",),
                    "swapped": ("prefill", "decode"),
                }[a]
            )
        assert slices[-1][2]["args"]["ended"] == "length"


def test_the_trace_tells_what_the_log_tells(log: Path, events: Events) -> None:
    records = [json.loads(line) for line in log.read_text().splitlines()]
    slices = [e for e in events if e["ph"] == "X"]
    phases = [e["name"] for e in slices if e["pid"] == 2]
    preempted = [p["by"] for record in records for p in record["preempted"]]
    assert preempted
    assert phases.count("swapped") == preempted.count("swap")
    assert phases.count("preempted") == preempted.count("recompute")
    steps = [e["args"] for e in slices if e["name"].startswith("step ")]
    assert [s["tokens"] for s in steps] == [sum(s[2] for s in record["scheduled"]) for record in records]
    assert all(s["tokens"] == s["prefill_tokens"] + s["decode_tokens"] for s in steps)
    at = [e["ts"] for e in slices if e["name"].startswith("step ")]
    for name, expected in (
        ("blocks", [{"used": r["blocks"]["used"], "shared": r["blocks"]["shared"]} for r in records]),
        ("batch tokens", [{"prefill": s["prefill_tokens"], "decode": s["decode_tokens"]} for s in steps]),
        ("requests", [{key: r[key] for key in ("running", "waiting", "swapped")} for r in records]),
    ):
        counted = {e["ts"]: e["args"] for e in events if e["name"] == name}
        held = [max(time for time in counted if time <= begin) for begin in at]
        assert [counted[time] for time in held] == expected
    computed = sum(e["args"].get("tokens", 0) for e in slices if e["pid"] == 2)
    assert computed == sum(s["tokens"] for s in steps)


def test_time_begins_at_zero_in_microseconds(log: Path, events: Events) -> None:
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert min(e["ts"] for e in events if "ts" in e) == 0
    begin = records[0]["added"][0]["arrival_s"]
    last = max(e["ts"] + e["dur"] for e in events if e["ph"] == "X")
    expected = (records[-1]["start_s"] + records[-1]["duration_s"] - begin) * 1e6
    assert last == pytest.approx(expected, abs=2000)


def simulator(perfetto: Path, **options: Any) -> Simulator:
    config = EngineConfig(num_blocks=30, block_size=4, preemption="swap")
    costs = CostModel.roofline("l4", "smollm2-135m", product_flops=1e-3, product_bytes=1e-3)
    return Simulator(config, costs, perfetto=perfetto, skip_bad=True, **options)


@pytest.mark.parametrize("clients", [None, 3])
def test_there_are_as_many_slots_as_requests_were_in_flight_at_once(
    tmp_path: Path, clients: int | None
) -> None:
    simulator(tmp_path / "out.json", clients=clients).replay(synthesise(WORKLOAD).scaled(50))
    events = events_of(tmp_path / "out.json")
    slots = [slices for name, slices in tracks(events).items() if name.startswith("slot ")]
    assert sum("ended" in event["args"] for slices in slots for *_, event in slices) == 40
    for slices in slots:
        assert all(a[1] <= b[0] for a, b in pairwise(slices))
    lives: dict[int, tuple[int, int]] = {}
    for begin, end, event in (one for slices in slots for one in slices):
        number = event["args"]["request"]
        first, last = lives.get(number, (begin, end))
        lives[number] = min(first, begin), max(last, end)
    most = max(sum(begin <= at < end for begin, end in lives.values()) for at, _ in lives.values())
    assert most <= len(slots) <= most + 1, "one that comes while the last step of another runs has its own"


WORKLOAD = Workload(num_requests=40, prompt_len="uniform:5,60", output_len="uniform:1,40", seed=3)


@pytest.mark.parametrize("replicas", [1, 2])
def test_replicas_have_tracks_of_their_own(tmp_path: Path, replicas: int) -> None:
    report = simulator(tmp_path / "out.json", replicas=replicas).replay(synthesise(WORKLOAD).scaled(50))
    events = events_of(tmp_path / "out.json")
    assert {e["pid"] for e in events} == set(range(1, 2 * replicas + 1))
    threads = [e["tid"] for e in events if e["name"] == "thread_name"]
    assert len(threads) == len(set(threads))
    steps = [e for e in events if e["ph"] == "X" and e["name"].startswith("step ")]
    assert len(steps) == report.summary["num_steps"]
    ended = [e["args"]["ended"] for e in events if "ended" in e.get("args", ())]
    assert ended == ["length"] * report.summary["num_finished"]


def test_what_is_given_up_or_in_flight_ends_as_such(tmp_path: Path) -> None:
    simulator(tmp_path / "out.json", timeout_s=40).replay(synthesise(WORKLOAD).scaled(50))
    ended = {e["args"]["ended"] for e in events_of(tmp_path / "out.json") if "ended" in e.get("args", ())}
    assert ended == {"abort", "length"}
    loop = StepLoop(Scheduler.with_blocks(EngineConfig(num_blocks=8).complete()))
    with PerfettoTrace(tmp_path / "out.json") as trace:
        loop.listen(trace.listener(loop.scheduler))
        loop.add(Sequence(0, [1, 2], SamplingParams()), 0.5)
        loop.end(loop.begin(1.0), [[3]], 2.0)
    phases = [e for e in events_of(tmp_path / "out.json") if e["ph"] == "X" and e["pid"] == 2]
    assert [e["name"] for e in phases] == ["queued", "prefill"]
    assert phases[-1]["args"]["tokens"] == 2


def test_a_run_without_steps_is_an_empty_trace(tmp_path: Path) -> None:
    PerfettoTrace(tmp_path / "out.json").close()
    assert events_of(tmp_path / "out.json") == []


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs a device that is always full")
def test_a_trace_that_its_disk_does_not_take_is_named() -> None:
    with pytest.raises(ReportError, match="/dev/full: cannot be written: No space left on device"):
        simulator(Path("/dev/full")).replay(synthesise(WORKLOAD))


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r": cannot be written: Is a directory"):
        PerfettoTrace(tmp_path)
