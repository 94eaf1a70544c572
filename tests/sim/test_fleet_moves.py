"""Requests that go from replica to replica, and replicas that come and go: who does what when, by hand."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagellm.__main__ import main
from pagellm.engine import ConfigError, EngineConfig
from pagellm.sim import Simulator, Trace, TraceRequest
from pagellm.sim.fleet.file import read_fleet
from pagellm.sim.fleet.fleet import (
    Autoscale,
    Failure,
    Fleet,
    Group,
    Link,
    RandomFailures,
    known_link,
)
from pagellm.sim.fleet.moving import MovingReplay
from pagellm.sim.report.report import to_text
from tests.sim.test_fleet import CONFIG, TRACE, Seconds, ends, group, requests

# Of 20 bytes a second, where a token has 10, and half a second late.
LINK = Link("slow", 20.0, 0.5)


def apart(prefill: int = 1, decode: int = 1, link: Link = LINK, **options: Any) -> tuple[Group, Group]:
    return (
        group(name="p", role="prefill", count=prefill, link=link, **options),
        group(name="d", role="decode", count=decode, link=link, **options),
    )


def events(fleet: Fleet, trace: Trace, path: Path, **options: Any) -> list[tuple[int, float, Any]]:
    """(replica, start, [(sequence, tokens before, tokens)]) of each step that computes something."""
    log = path / "steps.jsonl"
    first, *others = fleet.groups
    first = replace(first, config=replace(first.config, step_log=str(log)))
    fleet = replace(fleet, groups=(first, *others))
    Simulator.of_fleet(fleet, **options).replay(trace)
    steps = [json.loads(line) for line in log.read_text().splitlines()]
    computed = [[(s, before, count) for s, before, count, _ in step["scheduled"]] for step in steps]
    found = zip(steps, computed, strict=True)
    return [(step["replica"], step["start_s"], what) for step, what in found if what]


def test_a_prompt_is_computed_here_its_kv_travels_and_the_answer_goes_on_there(tmp_path: Path) -> None:
    # 6 tokens of KV are 60 bytes: 3 s and a half.
    fleet = Fleet(apart())
    assert events(fleet, requests((0, 6, 3)), tmp_path) == [
        (0, 0.0, [(0, 0, 6)]), (1, 4.5, [(0, 6, 1)]), (1, 5.5, [(0, 7, 1)]),
    ]  # fmt: skip
    assert ends(fleet, requests((0, 6, 3)), tmp_path) == [("0", 1, 1.0, 6.5)]


def test_whoever_only_computes_prompts_keeps_no_slo_and_breaks_none() -> None:
    report = Simulator.of_fleet(Fleet(apart()), slo={"e2e_s": 99}).replay(requests((0, 6, 3)))
    shares = {one["name"]: one["goodput_share"] for one in report["groups"] if one["by"] == "group"}
    assert shares == {"p": None, "d": 1.0}


def test_an_answer_of_one_token_does_not_travel(tmp_path: Path) -> None:
    report = Simulator.of_fleet(Fleet(apart())).replay(requests((0, 6, 1)))
    assert report.summary["e2e_s"]["max"] == 1.0
    assert "links" not in report["fleet"]


def test_one_transfer_at_a_time_leaves_a_replica_and_comes_to_one(tmp_path: Path) -> None:
    # Both prompts are computed together, and their KV goes one after the other.
    one = Fleet(apart())
    assert ends(one, requests((0, 6, 2), (0, 6, 2)), tmp_path) == [("0", 1, 1.0, 5.5), ("1", 1, 1.0, 8.5)]
    # Two replicas receive, but one sends; two of each do not wait, unless they share the link.
    assert ends(Fleet(apart(1, 2)), requests((0, 6, 2), (0, 6, 2)), tmp_path)[1][3] == 8.5
    assert ends(Fleet(apart(2, 2)), requests((0, 6, 2), (0, 6, 2)), tmp_path)[1][3] == 5.5
    shared = Fleet(apart(2, 2, replace(LINK, shared=True)))
    assert ends(shared, requests((0, 6, 2), (0, 6, 2)), tmp_path)[1][3] == 8.5
    figures = Simulator.of_fleet(shared).replay(requests((0, 6, 2), (0, 6, 2)))["fleet"]["links"]
    assert figures == [
        {"name": "slow", "transfers": 2, "bytes": 120, "mean_wait_s": 1.5, "mean_transfer_s": 3.5}
    ]


def test_the_slower_end_of_two_links_counts_and_each_device_has_its_own(tmp_path: Path) -> None:
    fast = Link("fast", 100.0, 0.0)
    costs = Seconds(num_devices=2)
    p, d = apart()
    fleet = Fleet((replace(p, costs=costs, link=fast), replace(d, costs=costs)))
    # 60 bytes of two devices at 20 each, and half a second.
    assert ends(fleet, requests((0, 6, 2)), tmp_path) == [("0", 1, 1.0, 4.0)]


def test_what_the_other_side_has_in_its_cache_does_not_travel(tmp_path: Path) -> None:
    prompts = [[*range(8), 20, 21], [*range(8), 30, 31]]
    trace = Trace.from_requests(
        TraceRequest(arrival_time=20 * n, prompt_token_ids=ids, output_len=2) for n, ids in enumerate(prompts)
    )
    report = Simulator.of_fleet(Fleet(apart())).replay(trace)
    assert [link["bytes"] for link in report["fleet"]["links"]] == [100 + 20]
    assert report.summary["cache"]["hit_tokens"] == 8  # where the second prompt is computed


def test_blocks_stay_taken_until_the_other_side_has_taken_the_request_in(tmp_path: Path) -> None:
    # A prompt of 12 takes 4 of 6 blocks, with its first token: the second one has to wait until 1 + 6.5.
    config = replace(CONFIG, num_blocks=6, watermark=0.0, enable_prefix_caching=False)
    p, d = apart()
    fleet = Fleet((replace(p, config=config), d))
    assert events(fleet, requests((0, 12, 2), (0, 13, 2)), tmp_path) == [
        (0, 0.0, [(0, 0, 12)]), (0, 7.5, [(1, 0, 13)]), (1, 7.5, [(0, 12, 1)]), (1, 15.5, [(1, 13, 1)]),
    ]  # fmt: skip


def test_a_sequence_that_was_handed_over_is_preempted_and_computed_anew_as_any_other(tmp_path: Path) -> None:
    p, d = apart(link=Link("fast", 1e9))
    config = replace(CONFIG, num_blocks=5, watermark=0.0, preemption="recompute")
    fleet = Fleet((p, replace(d, config=config)))
    report = Simulator.of_fleet(fleet).replay(requests((0, 6, 8), (0, 6, 8)))
    assert report.summary["preemptions"]["recompute"] > 0
    assert (report.summary["num_finished"], report.summary["output_tokens"]) == (2, 16)


def test_a_client_that_gives_up_on_the_way_is_heard_of_on_arrival(tmp_path: Path) -> None:
    results = tmp_path / "r.jsonl"
    Simulator.of_fleet(Fleet(apart()), timeout_s=2.0, results=results).replay(requests((0, 6, 3), (9, 4, 1)))
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(row["id"], row["outcome"], row["output_tokens"]) for row in rows] == [
        ("0", "timed_out", 1), ("1", "finished", 1),
    ]  # fmt: skip


def test_those_that_do_both_enter_and_go_on_too(tmp_path: Path) -> None:
    p, d = apart(link=Link("fast", 1e9))
    fleet = Fleet((p, d, group(name="b", link=Link("fast", 1e9))))
    found = ends(fleet, requests(*[(0.0, 4, 3)] * 4), tmp_path)
    assert [replica for _, replica, *_ in found] == [1, 2, 2, 2]  # 0 and 2 enter in turn; 1 and 2 go on so


def test_a_replica_that_fails_loses_what_it_computed_and_its_requests_go_on_elsewhere(tmp_path: Path) -> None:
    fleet = Fleet((group(count=2, start_s=1.0),), (Failure(2.5, "all", 0, 2.0),))
    trace = requests((0, 4, 4), (0, 4, 4), (6, 4, 1))
    # The step from 2 on is lost; what the client has by then, two tokens, is computed with the prompt.
    assert events(fleet, trace, tmp_path) == [
        (0, 0.0, [(0, 0, 4)]), (1, 0.0, [(1, 0, 4)]), (0, 1.0, [(0, 4, 1)]), (1, 1.0, [(1, 4, 1)]),
        (1, 2.0, [(1, 5, 1)]), (1, 3.0, [(1, 6, 1), (0, 0, 6)]), (1, 4.0, [(0, 6, 1)]), (0, 6.0, [(2, 0, 4)]),
    ]  # fmt: skip
    assert ends(fleet, trace, tmp_path) == [("0", 1, 1.0, 5.0), ("1", 1, 1.0, 4.0), ("2", 0, 7.0, 7.0)]
    report = Simulator.of_fleet(fleet).replay(trace)
    assert report["fleet"]["failures"] == {
        "failures": 1, "lost_requests": 1, "lost_tokens": 5, "failed_requests": 0, "mean_down_s": 3.0,
    }  # fmt: skip
    assert (report.summary["num_requests"], report.summary["num_finished"]) == (3, 3)
    assert report.summary["output_tokens"] == 9
    by_replica = {one["name"]: one for one in report["groups"]}
    assert [by_replica[name]["output_tokens"] for name in ("0", "1")] == [3, 6]


@pytest.mark.parametrize(("limit", "outcomes"), [(0, "ff_"), (1, "f__"), (2, "___"), (None, "___")])
def test_a_request_goes_on_elsewhere_so_often_and_then_fails(
    limit: int | None, outcomes: str, tmp_path: Path
) -> None:
    # The first is lost at 1.5 and 3.5, the second, which came between, at 3.5, the third never.
    fleet = Fleet((group(count=1),), (Failure(1.5, "all"), Failure(3.5, "all")), migration_limit=limit)
    results, steps = tmp_path / "r.jsonl", tmp_path / "p.json"
    trace = requests((0, 4, 4), (2, 4, 4), (9, 4, 1))
    report = Simulator.of_fleet(fleet, results=results, perfetto=steps, slo={"e2e_s": 99}).replay(trace)
    rows = {row["id"]: row for row in map(json.loads, results.read_text().splitlines())}
    assert "".join("f" if rows[str(i)]["outcome"] == "failed" else "_" for i in range(3)) == outcomes
    failed = outcomes.count("f")
    assert report.summary.get("num_failed", 0) == report["fleet"]["failures"]["failed_requests"] == failed
    assert report.summary["num_finished"] == 3 - failed
    if limit == 0:  # the tokens that its client has by then
        assert (rows["0"]["output_tokens"], rows["0"]["last_token_s"]) == (1, 1.0)
        assert report["fleet"]["failures"]["lost_tokens"] == 0
    assert (f"{failed} failed" in to_text(report)) is (failed > 0)
    json.loads(steps.read_text())


def test_whoever_waits_for_a_request_that_fails_asks_all_the_same(tmp_path: Path) -> None:
    fleet = Fleet((group(),), (Failure(1.5, "all"),), migration_limit=0)
    trace = Trace.from_requests(
        TraceRequest(arrival_time=0, prompt_len=4, output_len=4, session="a", delay_s=delay)
        for delay in (None, 2.0)
    )
    assert [end for *_, end in ends(fleet, trace, tmp_path)] == [1.0, 7.5]
    closed = requests((0, 4, 4), (0, 4, 4))
    assert [end for *_, end in ends(fleet, closed, tmp_path, clients=1)] == [1.0, 5.5]


def test_requests_wait_where_nobody_is_there_and_a_client_may_give_up_meanwhile(tmp_path: Path) -> None:
    fleet = Fleet((group(),), (Failure(0.5, "all", 0, 4.0),))
    assert ends(fleet, requests((0, 4, 2), (1, 4, 1)), tmp_path) == [("0", 0, 5.5, 6.5), ("1", 0, 5.5, 5.5)]
    results = tmp_path / "r.jsonl"
    Simulator.of_fleet(fleet, timeout_s=2.0, results=results).replay(requests((0, 4, 2), (2, 4, 1)))
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(row["id"], row["outcome"]) for row in rows] == [("0", "timed_out"), ("1", "timed_out")]


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda one: Fleet((one,), (Failure(0.5, "b", 0, 4.0),)), "replicas that fail, or come and go"),
        (lambda one: Fleet((group(name="a"), one)), "2 replicas"),
    ],
)
def test_who_needs_to_know_the_prompts_to_come_is_refused_where_that_depends_on_the_run(
    make: Any, why: str
) -> None:
    belady = f"{Path(__file__).parents[2] / 'examples' / 'policies' / 'belady.py'}:Belady"
    fleet = make(group(name="b", config=replace(CONFIG, eviction=belady)))
    with pytest.raises(ConfigError, match=f"the requests to come with {why}, expected one engine"):
        Simulator.of_fleet(fleet, skip_bad=True).replay(requests((0, 6, 3)))


def test_replicas_that_stay_have_no_series_over_time() -> None:
    report = Simulator.of_fleet(Fleet(apart())).replay(requests((0, 4, 2)))
    assert "replicas" not in report["timeline"]
    fails = Fleet((group(count=2),), (Failure(0.5, "all", 0, 4.0),))
    report = Simulator.of_fleet(fails).replay(requests((0, 4, 2), (9, 4, 1)))
    width = report["timeline"]["bucket_s"]
    # From 0 to 10 two are up, but for four seconds one.
    assert sum(report["timeline"]["replicas"]) * width == pytest.approx(2 * 10 - 4, rel=1e-2)


def test_a_cache_is_cold_after_a_failure(tmp_path: Path) -> None:
    trace = Trace.from_requests(
        TraceRequest(arrival_time=time, prompt_token_ids=range(9), output_len=1) for time in (0, 2, 9)
    )
    fleet = Fleet((group(),), (Failure(5.0, "all"),))
    assert Simulator.of_fleet(fleet).replay(trace).summary["cache"]["hit_tokens"] == 8


def test_kv_is_lost_with_the_replica_that_sends_it(tmp_path: Path) -> None:
    fleet = Fleet(apart(2, 1), (Failure(2.0, "p", 0, 100.0),))
    # Prompt and first token are computed anew by the other one, and 7 tokens of KV travel; the end that
    # receives them is kept for what was lost until 4.
    assert ends(fleet, requests((0, 6, 3)), tmp_path) == [("0", 2, 1.0, 9.0)]


def test_kv_is_sent_again_where_the_replica_that_receives_it_fails(tmp_path: Path) -> None:
    fleet = Fleet(apart(1, 2), (Failure(3.0, "d", 0, 100.0),))
    # It is still kept where it was computed, which sends one thing at a time.
    assert ends(fleet, requests((0, 6, 3)), tmp_path) == [("0", 2, 1.0, 9.5)]
    assert Simulator.of_fleet(fleet).replay(requests((0, 6, 3)))["fleet"]["failures"]["lost_tokens"] == 0


def test_a_request_begins_anew_where_the_replica_that_has_taken_it_in_fails(tmp_path: Path) -> None:
    fleet = Fleet(apart(1, 2), (Failure(5.0, "d", 0, 100.0),))
    assert ends(fleet, requests((0, 6, 3)), tmp_path) == [("0", 2, 1.0, 11.0)]
    assert Simulator.of_fleet(fleet).replay(requests((0, 6, 3)))["fleet"]["failures"]["lost_tokens"] == 6


def test_failures_at_random_are_those_of_their_seed() -> None:
    trace = requests(*[(float(n), 4, 5) for n in range(100)])
    alike = (group(count=3, start_s=2.0),)
    found = []
    for seed in (1, 1, 2):
        fleet = Fleet(alike, random_failures=RandomFailures(mtbf_s=20.0, mttr_s=3.0, seed=seed))
        report = Simulator.of_fleet(fleet).replay(trace)
        report.summary["wall_s"] = 0.0
        assert report["fleet"]["failures"]["failures"] > 5
        assert report.summary["num_finished"] == 100
        found.append(report.to_json())
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("count", [1, 2])
def test_replicas_that_fail_before_any_prompt_is_computed_end_the_replay(count: int) -> None:
    """A step takes a second, and no replica lives as long."""
    fleet = Fleet((group(count=count),), random_failures=RandomFailures(mtbf_s=0.001))
    with pytest.raises(ConfigError, match=r"failures: found \d0,000 in a row in which no request got"):
        Simulator.of_fleet(fleet).replay(requests((0.0, 4, 5)))


SCALED = Autoscale(max=3, target=2.0, interval_s=10.0, down_after_s=20.0)


def test_replicas_are_started_and_stopped_as_the_rule_says(tmp_path: Path) -> None:
    fleet = Fleet((group(start_s=5.0, autoscale=SCALED),))
    trace = requests(*[(0.0, 4, 30)] * 6, (16, 4, 1), (16.5, 4, 1), (60, 4, 1))
    report = Simulator.of_fleet(fleet, router="least_loaded").replay(trace)
    # At 10 six are there, for whom three are wanted; at 50 nobody has been for as long as it takes.
    assert [(one["time_s"], one["replicas"]) for one in report["fleet"]["scaling"]] == [
        (10.0, 2), (10.0, 3), (50.0, 2), (50.0, 1),
    ]  # fmt: skip
    [figures] = report["fleet"]["groups"]
    assert (figures["replicas"], figures["paid_s"]) == (3, 61.0 + 40.0 + 40.0)
    timeline = report["timeline"]
    up = dict(zip(timeline["time_s"], timeline["replicas"], strict=True))
    means = {time: next(up[t] for t in up if t <= time < t + timeline["bucket_s"]) for time in (5, 20, 55)}
    assert means == pytest.approx({5: 1.0, 20: 3.0, 55: 1.0})
    # Those that came at 16 went to the two that were ready at 15.
    found = ends(fleet, trace, tmp_path, router="least_loaded")
    assert [(name, replica) for name, replica, *_ in found if name in "678"] == [("6", 1), ("7", 2), ("8", 0)]
    assert report["load"]["replicas"] == 1


def test_what_runs_is_never_stopped(tmp_path: Path) -> None:
    scaled = replace(SCALED, down_after_s=0.0, target=1.0)
    fleet = Fleet((group(start_s=1.0, autoscale=scaled),))
    trace = requests((0, 4, 12), (9, 4, 3), (11.5, 4, 80), (90, 4, 1))
    report = Simulator.of_fleet(fleet).replay(trace)
    assert report.summary["num_finished"] == 4
    assert {one["replicas"] for one in report["fleet"]["scaling"]} == {1, 2}
    second = [end for *_, end in ends(fleet, trace, tmp_path)][2]
    assert second == 92.0  # it began at 12, and nothing stopped it


def test_a_group_without_replicas_starts_one_for_a_request_that_waits(tmp_path: Path) -> None:
    # Nobody has asked for 10 s at 30, so nobody is there; the request of 32 has one started at 40.
    scaled = replace(SCALED, min=0, target=1.0, down_after_s=10.0)
    fleet = Fleet((group(start_s=5.0, autoscale=scaled),))
    assert ends(fleet, requests((0, 4, 1), (32, 4, 1)), tmp_path) == [
        ("0", 0, 1.0, 1.0), ("1", 0, 46.0, 46.0),
    ]  # fmt: skip


@pytest.mark.parametrize(("rule", "target"), [("waiting", 1.0), ("kv_usage", 0.1)])
def test_other_rules_see_those_that_wait_and_the_blocks_in_use(rule: str, target: float) -> None:
    config = replace(CONFIG, max_num_seqs=2)
    scaled = Autoscale(max=4, target=target, rule=rule, interval_s=5.0)
    fleet = Fleet((group(config=config, autoscale=scaled),))
    report = Simulator.of_fleet(fleet).replay(requests(*[(0.0, 40, 12)] * 5))
    # Three wait for two who run; these have 11 blocks each of 100, rounded up.
    assert report["fleet"]["scaling"][-1]["replicas"] == 3


class Stages(Seconds):
    """A pipeline of two stages."""

    num_stages = 2

    def stage_times(self, batch: Any) -> list[float]:
        return [0.25, 0.5]


class Together(Seconds):
    """Three ranks that have their steps together."""

    data_parallel = 3
    is_lockstep = True


@st.composite
def costs(draw: st.DrawFn) -> Seconds:
    kind = draw(st.sampled_from([Seconds, Seconds, Stages, Together]))
    return kind(draw(st.sampled_from([0.5, 1.0])))


@st.composite
def fleets(draw: st.DrawFn) -> Fleet:
    config = EngineConfig(
        block_size=4, num_blocks=draw(st.integers(12, 40)), max_num_seqs=4, max_num_batched_tokens=24,
        preemption=draw(st.sampled_from(["recompute", "swap"])),
    )  # fmt: skip
    link = Link("l", draw(st.sampled_from([5.0, 50.0, 1e6])), 0.25, draw(st.booleans()))
    roles = draw(
        st.sampled_from([("both",), ("both", "both"), ("prefill", "decode"), ("prefill", "decode", "both")])
    )
    groups = []
    for number, role in enumerate(roles):
        count = draw(st.integers(1, 3))
        scaled = Autoscale(
            min=draw(st.integers(0, count)), max=count + draw(st.integers(0, 2)),
            target=draw(st.sampled_from([0.5, 2.0])), interval_s=2.5,
            down_after_s=draw(st.sampled_from([0.0, 5.0])),
            rule=draw(st.sampled_from(["concurrency", "waiting", "kv_usage"])),
        )  # fmt: skip
        groups.append(
            group(
                draw(costs()), config, name=str(number), role=role, count=count,
                link=link, start_s=draw(st.sampled_from([0.0, 1.5])),
                autoscale=scaled if draw(st.booleans()) else None,
            )
        )  # fmt: skip
    failures = tuple(
        Failure(draw(st.integers(0, 60)) / 2, one.name, draw(st.integers(0, one.count - 1)), down_s)
        for one in groups
        for down_s in draw(st.lists(st.sampled_from([0.0, 2.25]), max_size=2))
    )
    at_random = draw(st.sampled_from([None, RandomFailures(8.0, 1.0, seed=draw(st.integers(0, 99)))]))
    limit = draw(st.sampled_from([None, None, 0, 1]))
    return Fleet(tuple(groups), failures, at_random, limit)


@settings(max_examples=150, deadline=None)
@given(
    fleet=fleets(),
    asked=st.lists(
        st.tuples(st.integers(0, 40), st.integers(1, 30), st.integers(1, 12)), min_size=1, max_size=12
    ),
    router=st.sampled_from(["round_robin", "least_loaded", "prefix_aware"]),
    timeout_s=st.sampled_from([None, None, 7.25]),
)  # fmt: skip
def test_no_request_is_lost_or_served_twice_whatever_befalls_a_fleet(
    fleet: Fleet, asked: list[tuple[int, int, int]], router: str, timeout_s: float | None
) -> None:
    trace = requests(*[(time / 2, prompt, output) for time, prompt, output in sorted(asked)])
    simulator = Simulator.of_fleet(fleet, router=router, timeout_s=timeout_s)
    fleet.begin()
    replay = simulator._new_replay(trace)
    replay.run()
    summary = replay.metrics.summary(0.0)
    failed = summary.get("num_failed", 0)
    assert (
        summary["num_finished"] + summary["num_timed_out"] + failed == summary["num_requests"] == len(asked)
    )
    if timeout_s is None and fleet.migration_limit is None:
        assert summary["num_finished"] == len(asked)
        assert summary["prompt_tokens"] == sum(prompt for _, prompt, _ in asked)
        assert summary["output_tokens"] == sum(output for *_, output in asked)
    told = [one for one in replay.metrics.groups() if one["by"] == "replica"]
    if told:
        assert sum(one["output_tokens"] for one in told) == summary["output_tokens"]
        assert sum(one["num_finished"] for one in told) == summary["num_finished"]
    run = replay.metrics._run
    assert (run.requests, run.last_token_s, run.used_blocks) == ({}, {}, 0)
    for replica in replay.replicas:
        replica.scheduler.check()
        manager = replica.scheduler.block_manager
        assert manager.num_free_blocks == manager.num_blocks
        assert (replica.unfinished, replica.inbox, replica.num_kept) == (set(), [], 0)
    if isinstance(replay, MovingReplay):
        assert (replay._journeys, replay._held_back) == ({}, {})


def test_every_form_of_a_report_tells_what_befell_a_fleet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "fleet.toml"
    file.write_text(
        """
        [[group]]
        name = "prefill"
        role = "prefill"
        count = 2
        link = "slow"
        start_s = 3.0
        [[group]]
        name = "decode"
        role = "decode"
        link = "infiniband-ndr"
        autoscale = {rule = "concurrency", target = 4, max = 3, interval_s = 5}
        [[link]]
        name = "slow"
        bytes_per_s = 1e9
        latency_s = 1e-3
        [[failure]]
        time_s = 20
        group = "prefill"
        replica = 1
        [failures]
        mtbf_s = 30
        groups = ["decode"]
        """
    )
    arguments = ["replay", TRACE, "--fleet", str(file), "--roofline", "h100-sxm,llama-3.1-8b"]
    page, perfetto = tmp_path / "page.html", tmp_path / "p.json"
    assert main([*arguments, "--report", str(page), "--perfetto", str(perfetto)]) == 0
    text = capsys.readouterr().out
    for words in ("transfers ", "over slow", "failures ", "scaling ", "energy ", "prefill       prefill "):
        assert words in text
    assert max(map(len, text.splitlines())) <= 80
    json.loads(perfetto.read_text())
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["summary"]["num_finished"] == 200
    assert {"links", "failures", "scaling"} <= report["fleet"].keys()


def test_the_command_takes_prefill_and_decode_apart(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["replay", TRACE, "--roofline", "h100-sxm,llama-3.1-8b", "--disaggregate", "2:1", "--json"]
    assert main([*arguments, "--link", "roce", "--price", "2"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [(one["role"], one["replicas"]) for one in report["fleet"]["groups"]] == [
        ("prefill", 2),
        ("decode", 1),
    ]
    assert report["fleet"]["links"][0]["name"] == "roce"
    assert report["fleet"]["cost"] > 0
    for wrong, message in (
        (["--link", "string"], "link: found 'string', expected one of nvlink"),
        ([], "--disaggregate: not without --link"),
        (["--link", "roce", "--disaggregate", "2"], "found '2', expected P:D"),
        (["--link", "roce", "--replicas", "2"], "replicas: found 2 with a fleet"),
    ):
        assert main([*arguments, *wrong]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p, d: Fleet((p,)), "found a prefill group, p, for 'a constant', expected a decode one, too"),
        (lambda p, d: Fleet((d,)), "found a decode group, d, for 'a constant', expected a prefill one"),
        (lambda p, d: Fleet((d, group(name="b"))), "found a decode group, d, for 'a constant'"),
        (lambda p, d: Fleet((p, replace(d, link=None))), "group d: link: found nothing, expected the name"),
        (lambda p, d: Fleet((replace(p, serves=("x",)), d)), "found a prefill group, p, for 'x', expected"),
        (lambda p, d: Fleet((p, d), (Failure(1.0, "q"),)), "failure: group: found 'q', expected one of p, d"),
        (lambda p, d: Fleet((p, d), (Failure(1.0, "d", 1),)), "failure: replica: found 1, expected an int"),
        (lambda p, d: Fleet((p, d), (Failure(-1.0, "d"),)), "failure: time_s: found -1.0, expected"),
        (lambda p, d: RandomFailures(1e-4), "failures: mtbf_s: found 0.0001, expected"),
        (lambda p, d: Autoscale(2, 1.0, interval_s=1e-9), "autoscale: interval_s: found 1e-09, expected"),
        (lambda p, d: Fleet((replace(p, count=10**9), d)), "replicas: found 1000000001 engines, data"),
        (
            lambda p, d: Fleet((replace(p, autoscale=Autoscale(10**9, 1.0)), d)),
            "replicas: found 1000000001 engines, data",
        ),
        (lambda p, d: Fleet((p, d), (), RandomFailures(1.0, groups=("q",))), "failures: groups: found 'q'"),
        (lambda p, d: Fleet((p, d), migration_limit=-1), "migration_limit: found -1, expected"),
        (lambda p, d: Link("l", 0.0), "link l: bytes_per_s: found 0.0, expected above 0"),
        (lambda p, d: Link("l", 1.0, -1.0), "link l: latency_s: found -1.0, expected"),
        (lambda p, d: known_link("rope"), "link: found 'rope', expected one of nvlink"),
        (lambda p, d: Autoscale(2, 1.0, rule="mood"), "autoscale: rule: found 'mood', expected one"),
        (lambda p, d: Autoscale(2, 0.0), "autoscale: target: found 0.0, expected above 0"),
        (lambda p, d: Autoscale(2, 1.0, min=3), "autoscale: max: found 2, expected an integer from 3"),
        (lambda p, d: replace(d, count=9, autoscale=SCALED), "count: found 9, expected a number from auto"),
        (lambda p, d: replace(d, start_s=-1), "group d: start_s: found -1, expected"),
    ],
)  # fmt: skip
def test_what_cannot_befall_a_fleet_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(*apart())


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"link": [{"name": "a"}]}, r"link\[0\].bytes_per_s: found nothing, expected a value"),
        ({"link": [{"name": "a", "bytes_per_s": 1, "speed": 2}]}, r"link\[0\].speed: found 2, expected no"),
        ({"link": [{"name": "a", "bytes_per_s": 1, "shared": 2}]}, r"link\[0\].shared: found 2, expected"),
        ({"link": [{"name": "a", "bytes_per_s": 1}] * 2}, "link: found two called 'a', expected one name"),
        ({"failure": [{"time_s": 1}]}, r"failure\[0\].group: found nothing"),
        ({"failures": {"mtbf": 1}}, r"failures.mtbf: found 1, expected no such key: one of mtbf_s"),
        ({"failures": {"mtbf_s": -1}}, r"failures.*mtbf_s: found -1"),
        ({"migration_limit": 0.5}, "migration_limit: found 0.5, expected an integer"),
        ({"group": [{"link": "rope"}]}, r"group\[0\].link: found 'rope', expected one of nvlink"),
        ({"group": [{"autoscale": {"max": 2}}]}, r"group\[0\].autoscale.target: found nothing"),
        ({"group": [{"autoscale": {"max": 2, "target": 1, "rule": 3}}]}, r"group\[0\].autoscale.rule: found"),
        ({"group": [{"start_s": "soon"}]}, r"group\[0\].start_s: found 'soon', expected a finite number of"),
    ],
)  # fmt: skip
def test_a_part_of_a_file_that_cannot_be_is_refused(
    described: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "fleet.json"
    file.write_text(json.dumps({"group": [{}]} | described))
    with pytest.raises(ConfigError, match=rf"fleet\.json: {message}"):
        read_fleet(str(file), Seconds(), {"num_blocks": 10})
