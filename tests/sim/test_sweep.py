"""Sweeps: every point is replayed once, wherever and whenever, and the capacity is the highest good load."""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagellm.engine import ConfigError, ReportError, TraceError
from pagellm.sim import Trace, TraceRequest, Workload, synthesise
from pagellm.sim.commands.sweep import add_sweep
from pagellm.sim.costs.source import CostSource
from pagellm.sim.sweep.capacity import HIGHEST, LOWEST, Bracket, search
from pagellm.sim.sweep.grid import Grid, Slo
from pagellm.sim.sweep.report import to_html, to_json
from pagellm.sim.sweep.sweep import Sweep, TraceFile
from tests.conftest import at_most
from tests.sim.test_report import Page

EXAMPLES = Path(__file__).parents[2] / "examples" / "traces"
TRACE = TraceFile(str(EXAMPLES / "azure_2023_conversation.csv"), 12)
COSTS = CostSource(roofline=("l4", "llama-3.1-8b", 1))
GRID = ["policy=fcfs,shortest_job", "max_num_seqs=1,8"]
SLO = "ttft_p99=1.0,tpot_p99=0.1"


def sweep(*grid: str, **options: Any) -> Sweep:
    options = {"slo": Slo.parse(SLO), "jobs": 1} | options
    return Sweep(options.pop("trace", TRACE), COSTS, Grid.parse(grid or GRID), **options)


def run_command(*arguments: str, trace: str = TRACE.path) -> None:
    parser = argparse.ArgumentParser()
    add_sweep(parser.add_subparsers(required=True))
    options = parser.parse_args(["sweep", trace, "--limit", "12", "--jobs", "1", *arguments])
    options.command(options)


# The grid


def test_a_grid_is_the_product_of_its_values() -> None:
    grid = Grid.parse(["num_blocks=8,none,8", "enable_prefix_caching=true,False", "watermark=0.5"])
    assert [tuple(settings.values()) for settings in grid] == [
        (8, True, 0.5), (8, False, 0.5), (None, True, 0.5), (None, False, 0.5),
    ]  # fmt: skip
    assert len(grid) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("policy", "set: found 'policy', expected key=value,value,..."),
        ("speed=1", "set: found key 'speed', expected one of block_size, .*, timeout_s, or of a fleet's .*"),
        ("step_log=x", "set: found key 'step_log', expected one of .*"),
        ("num_blocks=1.5", "num_blocks: found '1.5', expected an integer or none"),
        ("block_size=none", "block_size: found 'none', expected an integer"),
        ("watermark=nan", "watermark: found 'nan', expected a finite number"),
        ("enable_prefix_caching=1", "enable_prefix_caching: found '1', expected true or false"),
        ("policy=fcfs,", "policy: found '', expected a text"),
        ("block_size=16,0", "block_size: found 0, expected a positive integer"),
        ("policy=fastest", "policy: found 'fastest', expected fcfs, .*"),
        ("router=best", "router: found 'best', expected round_robin, .*"),
        ("rate_factor=0", "rate_factor: found 0.0, expected a number above 0"),
    ],
)
def test_a_bad_setting_is_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}$"):
        sweep(text).run()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ttft_p98=1", "slo: found 'ttft_p98=1', expected a statistic of all requests such as ttft_p99 .*"),
        ("ttft=1", "slo: found 'ttft=1', expected a statistic of all requests such as ttft_p99 .*"),
        ("ttft_p99=0", "slo: ttft_p99: found '0', expected seconds above 0"),
        ("ttft_p99", "slo: ttft_p99: found '', expected seconds above 0"),
        ("ttft_p99=1,ttft_p99=2", "slo: ttft_p99: found twice, expected one limit"),
    ],
)
def test_a_bad_slo_is_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}$"):
        Slo.parse(text)


def test_an_slo_holds_if_every_limit_is_kept_and_everybody_was_served() -> None:
    summary = {"num_timed_out": 0, "num_rejected": 0, "ttft_s": {"p99": 1.0}, "tpot_s": {"p99": None}}
    assert Slo.parse(SLO).holds(summary)
    assert not Slo.parse("ttft_p99=0.99").holds(summary)
    assert not Slo.parse(SLO).holds(summary | {"num_timed_out": 1})


# Replays


def test_processes_give_what_one_gives() -> None:
    assert sweep(jobs=2).run().points == sweep().run().points


def test_a_point_that_fails_has_its_error_and_the_others_go_on() -> None:
    failed, good = sweep("num_blocks=2,1000").run().points
    assert failed.summary is None
    assert re.search(r"request '0': prompt: found 374 tokens, expected at most 32", failed.error or "")
    assert good.error is None


@pytest.mark.parametrize("capacity", [False, True], ids=["grid", "capacity"])
def test_a_sweep_goes_on_wherever_its_file_was_torn(tmp_path: Path, capacity: bool) -> None:
    path = tmp_path / "results.jsonl"

    def run() -> int:
        made = sweep("policy=fcfs,fair", results=path)
        result = made.run_capacity(0.5) if capacity else made.run()
        return sum(len(c.probes) for c in result.capacities or []) or len(result.points)

    number = run()
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == number
    for kept in {0, 1, number // 2, number - 1, number}:
        following = lines[kept] if kept < number else b""
        for torn in (b"", following[:10], following[:-1]):
            path.write_bytes(b"".join(lines[:kept]) + torn)
            assert run() == number
            assert sorted(path.read_bytes().splitlines(keepends=True)) == sorted(lines)


def test_what_is_in_the_file_is_not_replayed(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    first = sweep("policy=fcfs", results=path).run()
    line = json.loads(path.read_text())
    line["summary"]["num_steps"] = -1
    path.write_text(json.dumps(line) + "\n")
    again = sweep("policy=fcfs,fair", "block_size=16", results=path).run()
    assert [(p.summary or {})["num_steps"] == -1 for p in again.points] == [True, False]
    assert again.points[0].settings == first.points[0].settings | {"block_size": 16}


def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    sweep("policy=fcfs", results=path).run()
    content = path.read_bytes()
    for trace, read in (
        (TraceFile(TRACE.path, 13), "the first 13 requests"),
        (TraceFile(TRACE.path, 12, "azure", True, True), "requests, read as azure, sorted, without bad ones"),
    ):
        again = sweep("policy=fcfs", results=path, trace=trace)
        with pytest.raises(ConfigError, match=rf":1: found a sweep of .*the first 12 requests\).*{read}\)"):
            again.run()
    assert path.read_bytes() == content
    for other in ("notes", "notes\n", '{"pagellm_sweep":1}\n'):
        path.write_text(other)
        with pytest.raises(ReportError, match=r"results.jsonl:1: found something else, expected a line"):
            sweep("policy=fcfs", results=path).run()
        assert path.read_text() == other


def test_a_trace_is_read_as_a_replay_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace.jsonl"
    lines = ['{"arrival_time": 1, "prompt_len": 100000, "output_len": 1}', "oops"]
    lines += ['{"arrival_time": 0, "prompt_len": 3, "output_len": 2}']
    path.write_text("\n".join(lines))
    costs = ["--roofline", "l4,llama-3.1-8b", "--set", "num_blocks=9", "--jobs", "1"]
    with pytest.raises(TraceError, match=r"trace.jsonl:2: column 1: found 'oops'"):
        run_command(*costs, "--format", "jsonl", "--sort", trace=str(path))
    run_command(*costs, "--skip-bad", "--sort", trace=str(path))
    left_out = "left out: 1 bad records, 0 without a request, up to 1 rejected"
    assert left_out in capsys.readouterr().out.splitlines()
    with pytest.raises(TraceError, match="format: found 'csv', expected one of json, jsonl, mooncake"):
        run_command(*costs, "--format", "csv", trace=str(path))


# A suite that a shell runs in the background is born to ignore interrupts, and so would be what it starts.
RUN = """
import signal, sys
from pagellm.__main__ import main
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main())
"""


def started(path: Path, program: str) -> "subprocess.Popen[str]":
    """A sweep of a thousand replays on two lanes, in a process of its own."""
    workload = Workload(num_requests=300, arrivals="poisson:50", seed=1)
    synthesise(workload).save(path.with_name("trace.jsonl"))
    command = [sys.executable, "-c", program, "sweep", str(path.with_name("trace.jsonl")), "--jobs", "2"]
    command += ["--roofline", "l4,llama-3.1-8b", "-o", str(path), "--set"]
    command += ["rate_factor=" + ",".join(str(1 + number / 1000) for number in range(1000))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@contextmanager
def running(path: Path) -> Iterator[tuple["subprocess.Popen[str]", list[int]]]:
    """A sweep that takes long, once it has finished something; and its workers."""
    process = started(path, RUN)
    try:
        waited_for(lambda: path.exists() and path.read_bytes().count(b"\n") >= 2)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        workers = [
            int(pid)
            for pid in children.read_text().split()
            if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        assert len(workers) == 2
        yield process, workers
    finally:
        process.kill()
        process.communicate()


def waited_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux to see processes")
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_a_sweep_that_is_ended_leaves_whole_lines_and_no_process(tmp_path: Path, end: signal.Signals) -> None:
    path = tmp_path / "results.jsonl"
    with running(path) as (process, workers):
        process.send_signal(end)
        _, err = process.communicate(timeout=60)
        assert process.returncode == (130 if end == signal.SIGINT else -end)
        assert "Traceback" not in err
        waited_for(lambda: not any(map(is_running, workers)))
    *lines, torn = path.read_bytes().split(b"\n")
    assert torn == b""
    assert all(json.loads(line)["summary"]["num_finished"] == 300 for line in lines)


INTERRUPTED_AT_A_LOCK = """
import signal
from pagellm.sim.sweep import sweep

def interrupted(futures, *arguments, **options):
    lock = next(iter(futures))._condition
    lock.acquire()
    signal.raise_signal(signal.SIGINT)
    lock.release()
    return wait(futures, *arguments, **options)

wait, sweep.wait = sweep.wait, interrupted
"""


def test_an_interrupt_leaves_no_lock_behind_that_ending_needs(tmp_path: Path) -> None:
    """For a moment `wait` holds the locks of all futures; who ends a lane needs them, too."""
    process = started(tmp_path / "results.jsonl", INTERRUPTED_AT_A_LOCK + RUN)
    try:
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in err


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux to see processes")
def test_a_worker_that_is_killed_costs_its_point_alone(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    with running(path) as (process, workers):
        os.kill(workers[0], signal.SIGKILL)
        assert process.stderr is not None
        errors = (line for line in process.stderr if "its process ended: killed, or out of memory" in line)
        assert next(errors)
        number = path.read_bytes().count(b"\n")
        waited_for(lambda: path.read_bytes().count(b"\n") > number + 4)
        process.send_signal(signal.SIGINT)


# Capacity


def answered(capacity: float, tolerance: float) -> tuple[Bracket, list[float]]:
    """The bracket of a search whose answer is yes up to a capacity, and what it tried."""
    steps = search(tolerance)
    tried = [next(steps)]
    while True:
        try:
            tried.append(steps.send(tried[-1] <= capacity))
        except StopIteration as end:
            return end.value, tried


@given(st.floats(LOWEST, HIGHEST, exclude_max=True), st.sampled_from([0.001, 0.02, 0.5]))
@at_most(100)
def test_the_search_finds_any_capacity(capacity: float, tolerance: float) -> None:
    bracket, tried = answered(capacity, tolerance)
    assert bracket.holds is not None
    assert bracket.fails is not None
    assert bracket.holds <= capacity < bracket.fails <= bracket.holds * (1 + tolerance)
    assert {bracket.holds, bracket.fails} <= set(tried)
    assert len(tried) == len(set(tried)) <= 23


def test_the_search_says_where_it_ends() -> None:
    assert answered(0, 0.02)[0] == (None, LOWEST)
    assert answered(1e9, 0.02)[0] == (HIGHEST, None)
    with pytest.raises(ConfigError, match=r"^tolerance: found 0, expected a number from 0.0001 to 1$"):
        next(search(0))


def test_the_capacity_is_the_highest_load_that_keeps_the_slo() -> None:
    made = sweep("policy=fcfs", "max_num_seqs=1,8", jobs=2)
    result = made.run_capacity(0.05)
    assert result.points == sweep("policy=fcfs", "max_num_seqs=1,8").run().points
    for capacity in result.capacities or []:
        assert capacity.bracket is not None
        holds = {
            p.settings["rate_factor"]: made.slo and made.slo.holds(p.summary or {}) for p in capacity.probes
        }
        assert holds[capacity.bracket.holds] is True
        assert holds[capacity.bracket.fails] is False
        assert capacity.at in capacity.probes


@pytest.mark.parametrize(
    ("grid", "slo", "message"),
    [
        ("policy=fcfs", None, "slo: found none, expected limits that the capacity is to keep"),
        ("rate_factor=1", SLO, "rate_factor: found values, expected none where the capacity is searched"),
        ("clients=none,4", SLO, "clients: found 4, expected none where the capacity is searched"),
    ],
)
def test_what_has_no_capacity_is_named(grid: str, slo: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}$"):
        sweep(grid, slo=slo and Slo.parse(slo)).run_capacity()


# What is shown


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--roofline", "l4,llama-3.1-8b", "--set", "policy=fcfs,fair", "--slo", "ttft_p99=1"]
    run_command(*arguments, "--json", "--report", str(tmp_path / "page.html"))
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert (found["grid"], found["slo"]) == ({"policy": ["fcfs", "fair"]}, {"ttft_p99": 1.0})
    assert [(point["settings"], point["slo_holds"]) for point in found["points"]] == [
        ({"policy": "fcfs"}, True), ({"policy": "fair"}, True),
    ]  # fmt: skip
    assert found["capacities"] is None
    assert len(err.splitlines()) == 2
    run_command(*arguments, "--capacity", "--tolerance", "1")
    assert "the highest load at which the SLO holds" in capsys.readouterr().out


@pytest.mark.parametrize("capacity", [False, True], ids=["grid", "capacity"])
def test_the_page_asks_for_nothing_and_no_name_breaks_out_of_it(tmp_path: Path, capacity: bool) -> None:
    evil = tmp_path / "<script>alert(1)<"
    evil.mkdir()
    trace = evil / "trace.csv"
    shutil.copy(TRACE.path, trace)
    made = sweep("max_num_seqs=1,8", "num_blocks=2,1000", trace=TraceFile(str(trace), 12))
    result = made.run_capacity(1) if capacity else made.run()
    to_html(result, tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert page.links == ["data:,"]
    data, _ = page.texts["script"]
    assert json.loads(data)["trace"] == json.loads(to_json(result))["trace"] == str(trace)


def test_the_second_tier_of_the_prefix_cache_is_an_axis(tmp_path: Path) -> None:
    """Eight prompts of 12 blocks in turns, of which the first tier holds two."""
    path = tmp_path / "turns.jsonl"
    Trace.from_requests(
        TraceRequest(
            arrival_time=10.0 * i, prompt_len=192, hash_ids=[i % 8] * 12, hash_block_size=16, output_len=2
        )
        for i in range(24)
    ).save(path)
    grid = Grid.parse(["num_blocks=30", "enable_hierarchical_cache=false,true", "num_swap_blocks=50,200"])
    points = (
        Sweep(TraceFile(str(path)), CostSource(roofline=("l4", "smollm2-135m", 1)), grid, jobs=1).run().points
    )
    found = [point.summary["cache"] for point in points if point.summary is not None]
    assert [cache.get("host_hit_tokens", 0) for cache in found] == [0, 0, 0, 16 * 11 * 16]
    assert [round(cache["hit_rate"] or 0, 3) for cache in found] == [0, 0, 0, round(16 * 176 / (24 * 192), 3)]
    off, small, large = (points[i].summary["ttft_s"]["mean"] for i in (0, 2, 3))  # type: ignore[index]
    assert small > off > large, "blocks that go out for nothing cost time, and hits gain it"
