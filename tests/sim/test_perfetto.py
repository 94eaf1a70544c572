"""A step log of the real engine becomes a trace in which every track can be drawn."""

import json
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pagellm.engine import LLM, EngineConfig, ReportError, SamplingParams
from pagellm.sim import CostModel, Simulator, Workload, synthesise
from pagellm.sim.report.perfetto import PerfettoTrace, from_step_log
from tests.conftest import model_path

PROMPTS = [[i + 1] * 20 for i in range(6)]
Events = list[dict[str, Any]]


@pytest.fixture(scope="module", params=["recompute", "swap"])
def log(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
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
    llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
    llm.generate(PROMPTS[0], SamplingParams(n=3, max_tokens=4, ignore_eos=True, seed=1))
    llm.close()
    return path


def events_of(path: Path) -> Events:
    events: Events = json.loads(path.read_text())["traceEvents"]
    return events


@pytest.fixture(scope="module")
def events(log: Path) -> Events:
    from_step_log(log, log.with_suffix(".json"))
    return events_of(log.with_suffix(".json"))


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
    requests = {name: slices for name, slices in tracks(events).items() if name.startswith("request ")}
    assert len(requests) == 9
    for slices in requests.values():
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
    counted = [e["args"]["used"] for e in events if e["name"] == "blocks"]
    assert counted == [record["blocks"]["used"] for record in records]
    computed = sum(e["args"].get("tokens", 0) for e in slices if e["pid"] == 2)
    assert computed == sum(s["tokens"] for s in steps)


def test_time_begins_at_zero_in_microseconds(log: Path, events: Events) -> None:
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert min(e["ts"] for e in events if "ts" in e) == 0
    begin = records[0]["added"][0]["arrival_s"]
    last = max(e["ts"] + e["dur"] for e in events if e["ph"] == "X")
    expected = (records[-1]["start_s"] + records[-1]["duration_s"] - begin) * 1e6
    assert last == pytest.approx(expected, abs=2000)


def test_replicas_have_tracks_of_their_own_and_what_is_in_flight_ends_with_the_file(
    log: Path, tmp_path: Path
) -> None:
    records = [json.loads(line) for line in log.read_text().splitlines()]
    with PerfettoTrace(tmp_path / "out.json") as trace:
        for record in records[:10]:
            trace.step(record, replica=0)
            trace.step(record, replica=1)
    events = events_of(tmp_path / "out.json")
    assert {e["pid"] for e in events} == {1, 2, 3, 4}
    threads = [e["tid"] for e in events if e["name"] == "thread_name"]
    assert len(threads) == len(set(threads))
    ended = [e for e in events if e["ph"] == "X" and e["args"].get("ended") == "in flight"]
    assert {e["pid"] for e in ended} == {2, 4}


def test_a_run_without_steps_is_an_empty_trace(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("")
    from_step_log(tmp_path / "log", tmp_path / "out.json")
    assert events_of(tmp_path / "out.json") == []


def test_a_replay_writes_what_its_step_log_becomes(tmp_path: Path) -> None:
    config = EngineConfig(num_blocks=30, block_size=4, preemption="swap", step_log=str(tmp_path / "log"))
    workload = Workload(num_requests=40, prompt_len="uniform:5,60", output_len="uniform:1,40", seed=3)
    costs = CostModel.roofline("l4", "smollm2-135m", efficiency=1e-3)
    for replicas in (1, 2):
        simulator = Simulator(config, costs, replicas=replicas, perfetto=tmp_path / "direct", skip_bad=True)
        simulator.replay(synthesise(workload).scaled(50))
        from_step_log(tmp_path / "log", tmp_path / "later")
        assert events_of(tmp_path / "direct") == events_of(tmp_path / "later")
        without_log = replace(simulator, config=replace(config, step_log=None), perfetto=tmp_path / "alone")
        without_log.replay(synthesise(workload).scaled(50))
        assert events_of(tmp_path / "alone") == events_of(tmp_path / "later")
        assert {event["pid"] for event in events_of(tmp_path / "later")} == set(range(1, 2 * replicas + 1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("oops\n", r"log:1: found malformed JSON in line 1, column 1 \(.*\), expected a step record"),
        ("[" * 100_000, r"log:1: found JSON beyond limits \(.*\), expected a step record"),
        ("[]\n", r"log:1: found '\[\]\\n', expected a step record \(AttributeError"),
        ('{"step": 1}\n', r"log:1: found .*, expected a step record \(KeyError: 'added'\)"),
    ],
)
def test_what_is_no_step_log_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "log").write_text(content)
    with pytest.raises(ReportError, match=message):
        from_step_log(tmp_path / "log", tmp_path / "out.json")
    assert events_of(tmp_path / "out.json") == []


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs a device that is always full")
def test_a_trace_that_its_disk_does_not_take_is_named(log: Path) -> None:
    with pytest.raises(ReportError, match="/dev/full: cannot be written: No space left on device"):
        from_step_log(log, "/dev/full")


def test_files_that_cannot_be_opened_are_named(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"gone: cannot be read: No such file"):
        from_step_log(tmp_path / "gone", tmp_path / "out.json")
    (tmp_path / "log").write_text("")
    with pytest.raises(ReportError, match=r": cannot be written: Is a directory"):
        from_step_log(tmp_path / "log", tmp_path)
