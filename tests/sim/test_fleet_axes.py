"""Fleets as axes of sweeps, and the fewest replicas and cheapest fleets for a load."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagellm.__main__ import main
from pagellm.engine import ConfigError
from pagellm.sim import (
    CostModel,
    CostSource,
    Grid,
    Simulator,
    Slo,
    Sweep,
    TraceFile,
    Workload,
    synthesise,
)
from pagellm.sim.fleet.file import read_fleet
from pagellm.sim.sweep.counts import MAX_REPLICAS, Counts, search_counts
from pagellm.sim.sweep.plan import plan
from tests.conftest import at_most

ALIKE = CostSource(roofline=("l4", "smollm2-135m", 1))
FLEET = """
[[group]]
name = "large"
hardware = "h100-sxm"
model = "smollm2-135m"
price_per_h = 2.5
engine = {max_num_seqs = 2}
[[group]]
name = "small"
hardware = "l4"
model = "smollm2-135m"
price_per_h = 0.7
engine = {max_num_seqs = 2}
"""
SLO = "ttft=0.5,tpot=0.05"


@pytest.fixture
def trace(tmp_path: Path) -> TraceFile:
    workload = Workload(
        num_requests=400, arrivals="poisson:40", prompt_len="fixed:300", output_len="fixed:20", seed=1
    )
    synthesise(workload).save(tmp_path / "trace.jsonl")
    return TraceFile(str(tmp_path / "trace.jsonl"))


@pytest.fixture
def fleet(tmp_path: Path) -> str:
    (tmp_path / "fleet.toml").write_text(FLEET)
    return str(tmp_path / "fleet.toml")


def sweep(trace: TraceFile, *axes: str, **options: Any) -> Sweep:
    options = {"costs": ALIKE, "jobs": 1, "slo": Slo.parse(SLO, 0.9)} | options
    return Sweep(trace, options.pop("costs"), Grid.parse(axes), **options)


def told(report: Any) -> dict[str, Any]:
    """What a point has of a report."""
    names = ("requests_per_s", "ttft_s", "num_steps", "num_finished")
    return {name: report["summary"][name] for name in names} | {"groups": report["fleet"]["groups"]}


# The search for counts


def answered(serves: Callable[[Counts], bool], costs: list[float], least: int = 1) -> tuple[Any, int]:
    """What the search finds, and how often it asks."""
    steps = search_counts(len(costs), lambda: (costs, least))
    counts, number = next(steps), 1
    while True:
        try:
            counts = steps.send(serves(counts))
            number += 1
        except StopIteration as end:
            return end.value, number


@given(st.integers(1, MAX_REPLICAS))
@at_most(100)
def test_the_fewest_of_one_group_are_found(needed: int) -> None:
    assert answered(lambda counts: counts[0] >= needed, [1.0])[0] == (needed,)


@given(
    st.integers(1, 12), st.integers(1, 12), st.integers(0, 60), st.integers(1, 5), st.integers(1, 5),
    st.sampled_from([1.0, 2.5]), st.sampled_from([0.7, 1.0, 4.0]), st.sampled_from([0, 1]),
)  # fmt: skip
@at_most(300)
def test_the_cheapest_counts_of_two_groups_are_found(
    a: int, b: int, needed: int, one: int, other: int, first_cost: float, second_cost: float, least: int
) -> None:
    """Something serves from so many of each on, whose shares of the work add up: no counts are cheaper."""

    def serves(counts: Counts) -> bool:
        x, y = counts
        enough = (x >= a and y >= b) if least else True
        return enough and one * x + other * y >= max(1, needed)

    costs = [first_cost, second_cost]
    found, _ = answered(serves, costs, least)
    spent = [first_cost * x + second_cost * y for x in range(65) for y in range(65) if serves((x, y))]
    assert serves(found)
    assert min(found) >= least
    assert sum(cost * count for cost, count in zip(costs, found, strict=True)) == pytest.approx(min(spent))


def test_what_no_number_serves_is_told() -> None:
    assert answered(lambda _: False, [1.0])[0] is None
    assert answered(lambda _: False, [])[0] is None
    assert answered(lambda _: True, [])[0] == ()


# Axes


def test_a_key_of_a_fleets_file_is_an_axis(trace: TraceFile, fleet: str) -> None:
    axes = ["large.count=0,2", "small.engine.max_num_seqs=2,8", "router=least_loaded"]
    points = sweep(trace, *axes, costs=None, fleet=fleet).run().points
    assert [list(point.settings.values()) for point in points] == [
        [0, 2, "least_loaded"], [0, 8, "least_loaded"], [2, 2, "least_loaded"], [2, 8, "least_loaded"],
    ]  # fmt: skip
    for point in points:
        others = {name: value for name, value in point.settings.items() if name != "router"}
        made = read_fleet(fleet, others=others)
        assert len(made.groups) == (1 if others["large.count"] == 0 else 2)
        simulator = Simulator.of_fleet(made, router="least_loaded", slo={"ttft_s": 0.5, "tpot_s": 0.05})
        assert point.summary is not None
        assert told({"summary": point.summary, "fleet": point.summary["fleet"]}) == json.loads(
            json.dumps(told(simulator.replay(trace.load())))
        )


@pytest.mark.parametrize(
    ("axes", "options"),
    [
        (["disaggregate=2:1", "link=roce"], {}),
        (["pipeline_parallel=2"], {"pipeline_parallel": 2}),
        (["data_parallel=3", "price_per_h=2"], {"data_parallel": 3}),
        (["hardware=h100-sxm*3", "data_parallel=2"], {"num_devices": 3, "data_parallel": 2}),
    ],
)
def test_how_devices_work_together_is_an_axis(
    axes: list[str], options: dict[str, int], trace: TraceFile
) -> None:
    [point] = sweep(trace, *axes).run().points
    device = "h100-sxm" if "num_devices" in options else "l4"
    costs = CostModel.roofline(device, "smollm2-135m", **options)
    assert point.summary is not None
    if "disaggregate" in point.settings:
        groups = point.summary["fleet"]["groups"]
        assert [(group["role"], group["replicas"]) for group in groups] == [("prefill", 2), ("decode", 1)]
        return
    price = point.settings.get("price_per_h")
    report = Simulator(costs.settings({}), costs, price_per_h=price).replay(trace.load())
    assert point.summary["ttft_s"] == report.summary["ttft_s"]
    assert point.summary["fleet"]["cost"] == report["fleet"]["cost"]


def test_a_sweep_over_a_fleet_resumes_and_knows_another_one(
    trace: TraceFile, fleet: str, tmp_path: Path
) -> None:
    results = tmp_path / "results.jsonl"
    made = sweep(trace, "small.count=1,2", costs=None, fleet=fleet, results=results)
    first = made.run().points
    before = results.read_bytes()
    assert made.run().points == first
    assert results.read_bytes() == before
    more = sweep(trace, "small.count=1,2,3", costs=None, fleet=fleet, results=results).run().points
    assert more[:2] == first
    assert results.read_bytes().count(b"\n") == 3
    Path(fleet).write_text(FLEET.replace("2.5", "2.6"))
    with pytest.raises(ConfigError, match=r"found a sweep of .*fleet\.toml: .*, expected one of .*another"):
        made.run()


def test_hardware_from_a_file_that_an_axis_names_is_a_part_of_what_is_swept(
    trace: TraceFile, fleet: str, tmp_path: Path
) -> None:
    card = {"flops_per_s": 1e14, "memory_bytes": 5e10, "memory_bytes_per_s": 1e12, "link_bytes_per_s": 1e10,
            "host_bytes_per_s": 1e10}  # fmt: skip
    (tmp_path / "card.json").write_text(json.dumps(card))
    results = tmp_path / "results.jsonl"
    made = sweep(trace, "small.hardware=l4,card.json", costs=None, fleet=fleet, results=results)
    assert all(point.error is None for point in made.run().points)
    (tmp_path / "card.json").write_text(json.dumps(card | {"flops_per_s": 2e14}))
    with pytest.raises(ConfigError, match="found a sweep of"):
        made.run()


def test_a_default_of_one_device_is_not_taken_for_that_of_another(trace: TraceFile, tmp_path: Path) -> None:
    """An H100 has 1,024 sequences where nobody says it, and an L4 has 256."""
    axes, results = "hardware=l4,h100-sxm", tmp_path / "results.jsonl"
    sweep(trace, axes, results=results).run()
    points = sweep(trace, axes, "max_num_seqs=256", results=results).run().points
    assert results.read_bytes().count(b"\n") == 3
    assert [point.error for point in points] == [None, None]


def test_a_file_of_an_older_version_is_told(trace: TraceFile, tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    results.write_text('{"pagellm_sweep":1,"key":"0"}\n')
    with pytest.raises(Exception, match=r"results.jsonl:1: found a line of version 1, expected 2: give"):
        sweep(trace, results=results).run()


@pytest.mark.parametrize(
    ("axes", "is_fleet", "message"),
    [
        (["large.count=1"], False, "large.count: found 1 without a fleet, expected one whose file has it"),
        (
            ["larger.count=1"],
            True,
            r"found no place for 'larger.count', expected a key of one of large, small",
        ),
        (["large.cuont=1"], True, r"group\[0\].cuont: found 1, expected no such key"),
        (["large.count.x=1"], True, r"large.count.x: found 1 before its end|group\[0\].count: found"),
        (
            ["hardware=l4"],
            True,
            "hardware: found 'l4', expected a fleet without step times of its own",
        ),
        (["disaggregate=1:1", "link=roce"], True, "disaggregate: found '1:1' with a fleet, whose groups say"),
        (["disaggregate=1:1"], False, "link: found nothing with disaggregate, expected a value"),
        (["disaggregate=1:0", "link=roce"], False, "disaggregate: found '1:0', expected P:D"),
        (["disaggregate=1:1", "link=rope"], False, "link: found 'rope', expected one of nvlink"),
        (["replicas=2"], True, "replicas: found 2 with a fleet, whose groups say that"),
        (["migration_limit=1"], False, "migration_limit: found 1 without a fleet"),
    ],
)
def test_an_axis_that_does_not_belong_is_refused(
    axes: list[str], is_fleet: bool, message: str, trace: TraceFile, fleet: str
) -> None:
    options = {"costs": None, "fleet": fleet} if is_fleet else {}
    with pytest.raises(ConfigError, match=message):
        sweep(trace, *axes, **options).run()


def test_what_is_said_of_a_group_goes_by_its_whole_name(tmp_path: Path) -> None:
    (tmp_path / "f.toml").write_text(FLEET.replace('"small"', '"large.eu"'))
    made = read_fleet(str(tmp_path / "f.toml"), others={"large.eu.count": 3, "large.price_per_h": None})
    assert [(group.count, group.price_per_h) for group in made.groups] == [(1, None), (3, 0.7)]


def test_failures_are_an_axis_whether_the_file_has_any_or_not(trace: TraceFile, fleet: str) -> None:
    axes = ["failures.mtbf_s=2,none", "failures.mttr_s=0.5", "migration_limit=0"]
    often, never = sweep(trace, *axes, costs=None, fleet=fleet).run().points
    assert (often.error, never.error) == (None, None)
    assert often.summary is not None
    assert never.summary is not None
    assert often.summary["fleet"]["failures"]["failures"] > 0
    assert often.summary["num_failed"] == often.summary["fleet"]["failures"]["failed_requests"] > 0
    assert "failures" not in never.summary["fleet"]
    Path(fleet).write_text(FLEET + "[failures]\nmtbf_s = 2\n")
    [again] = sweep(trace, *axes[1:], costs=None, fleet=fleet).run().points
    assert again.summary == often.summary


# What operators ask


def test_the_fewest_replicas_of_a_group_are_the_fewest(trace: TraceFile, fleet: str) -> None:
    made = sweep(trace, "router=least_loaded", costs=None, fleet=fleet)
    [answer] = plan(made, rate=200.0, seek=("small",), seeds=1)
    assert answer.refused is None
    assert answer.groups is not None
    count = answer.groups["small"]
    assert (answer.groups["large"], answer.replicas, answer.devices) == (1, 1 + count, 1 + count)
    assert answer.cost_per_h == pytest.approx(2.5 + 0.7 * count)
    assert answer.settings == {"router": "least_loaded"}
    factor = 200.0 / made.trace_rate()
    for number, holds in ((count, True), (count - 1, False)):
        axes = [f"rate_factor={factor}", f"small.count={number}", "router=least_loaded"]
        [point] = sweep(trace, *axes, costs=None, fleet=fleet).run().points
        assert made.needed_slo().holds(point.summary or {}) is holds


def test_the_cheapest_counts_of_two_groups_serve_and_no_cheaper_ones_do(trace: TraceFile, fleet: str) -> None:
    made = sweep(trace, "router=least_loaded", costs=None, fleet=fleet)
    [answer] = plan(made, rate=200.0, seek=("large", "small"), seeds=1)
    assert answer.refused is None
    assert answer.cost_per_h is not None
    factor = 200.0 / made.trace_rate()
    axes = [f"rate_factor={factor}", "router=least_loaded", "large.count=0,1,2", "small.count=0,1,2,3,4"]
    points = sweep(trace, *axes, costs=None, fleet=fleet).run().points
    holds = [p.settings for p in points if p.summary and made.needed_slo().holds(p.summary)]
    least = min(2.5 * one["large.count"] + 0.7 * one["small.count"] for one in holds)  # type: ignore[operator]
    assert answer.cost_per_h == pytest.approx(least)


def test_the_best_split_of_prefill_and_decode_is_sought(trace: TraceFile) -> None:
    axes = ["disaggregate=1:1", "link=infiniband-ndr", "max_num_seqs=2", "router=least_loaded"]
    made = sweep(trace, *axes)
    [answer] = plan(made, rate=150.0, seek=("prefill", "decode"), seeds=1)
    assert answer.refused is None
    assert answer.groups is not None
    assert set(answer.groups) == {"prefill", "decode"}
    assert answer.cost_per_h is None
    factor = 150.0 / made.trace_rate()
    splits = ",".join(f"{p}:{d}" for p in range(1, 4) for d in range(1, 5))
    points = sweep(trace, f"disaggregate={splits}", *axes[1:], f"rate_factor={factor}").run().points
    holds = [p.settings["disaggregate"] for p in points if p.summary and made.needed_slo().holds(p.summary)]
    assert answer.replicas == min(sum(map(int, str(split).split(":"))) for split in holds)


def test_fleets_as_they_are_are_asked_whether_they_serve(trace: TraceFile, fleet: str) -> None:
    made = sweep(trace, "small.count=1,6", "router=least_loaded", costs=None, fleet=fleet)
    few, enough = plan(made, rate=200.0, seeds=1)
    assert few.refused == "the SLO does not hold at this rate"
    assert (enough.refused, enough.groups) == (None, {"large": 1, "small": 6})


@pytest.mark.parametrize("objective", ["cost", "energy", "devices"])
def test_the_best_comes_first(objective: str, trace: TraceFile, fleet: str) -> None:
    made = sweep(trace, "small.count=2,6,4", "router=least_loaded", costs=None, fleet=fleet)
    answers = plan(made, rate=60.0, seeds=1, objective=objective)
    figures = {
        "cost": [answer.cost_per_m for answer in answers],
        "energy": [answer.wh_per_m for answer in answers],
        "devices": [answer.devices for answer in answers],
    }[objective]
    assert None not in figures
    assert figures == sorted(figures)  # type: ignore[type-var]
    for answer in answers:
        assert answer.cost_per_m == pytest.approx(
            (answer.cost_per_h or 0) / (answer.tokens_per_s or 0) / 3600 * 1e6
        )


@pytest.mark.parametrize(
    ("asked", "axes", "is_fleet", "message"),
    [
        ({"seek": ("small",)}, [], True, "seek: found 'small', expected --rate, which is to be served"),
        ({"rate": 1.0, "seek": ("all",)}, [], False, "seek: found 'all', expected a fleet, or prefill and"),
        ({"rate": 1.0, "seek": ("a", "b", "c")}, [], True, "seek: found 'a,b,c', expected one or two of the"),
        ({"rate": 1.0, "seek": ("",)}, [], True, "seek: found '', expected one or two of the fleet's groups"),
        ({"rate": 1.0, "seek": ("a", "a")}, [], True, "seek: found 'a,a', expected one or two of the"),
        (
            {"rate": 1.0, "seek": ("small",)}, ["small.count=1"], True,
            "small.count: found values, expected none where the fewest are sought",
        ),
        (
            {"rate": 1.0, "seek": ("both",)}, ["disaggregate=1:1", "link=roce"], False,
            "seek: found 'both', expected prefill, decode, or both",
        ),
        ({"rate": 1.0, "prices": {"l4": 1.0}}, [], True, "price: found 'l4' with a fleet, whose groups have"),
        ({"objective": "speed"}, [], False, "objective: found 'speed', expected one of cost, energy"),
    ],
)  # fmt: skip
def test_a_question_that_cannot_be_asked_is_refused(
    asked: dict[str, Any], axes: list[str], is_fleet: bool, message: str, trace: TraceFile, fleet: str
) -> None:
    options = {"costs": None, "fleet": fleet} if is_fleet else {}
    with pytest.raises(ConfigError, match=message):
        plan(sweep(trace, *axes, **options), seeds=1, **asked)


def test_the_commands(trace: TraceFile, fleet: str, capsys: pytest.CaptureFixture[str]) -> None:
    common = [trace.path, "--fleet", fleet, "--set", "router=least_loaded", "--slo", SLO, "--jobs", "1"]
    asked = ["capacity", *common, "--rate", "200", "--seek", "large,small", "--seeds", "1"]
    assert main([*asked, "--objective", "energy"]) == 0
    assert " a million output tokens" in capsys.readouterr().out
    assert main([*asked, "--json"]) == 0
    [answer] = json.loads(capsys.readouterr().out)["answers"]
    assert answer["groups"].keys() <= {"large", "small"}
    assert main(["sweep", *common, "--attainment", "0.9", "--set", "small.count=1,2", "--json"]) == 0
    points = json.loads(capsys.readouterr().out)["points"]
    assert [point["summary"]["fleet"]["groups"][1]["replicas"] for point in points] == [1, 2]
    assert main(["sweep", *common, "--attainment", "0.9", "--data-parallel", "2"]) == 2
    assert "--data-parallel: not without step times of all groups" in capsys.readouterr().err
    assert main(["sweep", trace.path]) == 2
    assert "step times: found neither of --profile and --roofline, expected one" in capsys.readouterr().err
