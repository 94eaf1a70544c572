"""Fleets: replicas that differ, several models, and what a replay took; each figure by hand."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pagellm.__main__ import main
from pagellm.engine import ConfigError, EngineConfig, TraceError
from pagellm.engine.scheduling.batch import ScheduledBatch
from pagellm.sim import CostModel, Simulator, Trace, TraceRequest, Workload, synthesise
from pagellm.sim.fleet.file import read_fleet
from pagellm.sim.fleet.fleet import Fleet, Group
from pagellm.sim.report.report import to_text

CONFIG = EngineConfig(block_size=4, num_blocks=100, max_num_seqs=8, max_num_batched_tokens=64)
TRACE = str(Path(__file__).parents[2] / "examples" / "traces" / "azure_2023_conversation.csv")


class Seconds(CostModel):
    """Every step takes so long."""

    name = "a constant"

    def __init__(self, seconds: float = 1.0, **facts: Any) -> None:
        self._seconds = seconds
        vars(self).update(facts)

    def step_time(self, batch: ScheduledBatch) -> float:
        return self._seconds

    def block_bytes(self, block_size: int) -> int:
        return 10 * block_size


def group(costs: CostModel | None = None, config: EngineConfig = CONFIG, **options: Any) -> Group:
    return Group(costs=costs or Seconds(), config=config, **options)


def requests(*given: tuple[float, int, int], **fields: Any) -> Trace:
    """Requests as (arrival, prompt tokens, output tokens)."""
    return Trace.from_requests(
        TraceRequest(arrival_time=time, prompt_len=prompt_len, output_len=output_len, **fields)
        for time, prompt_len, output_len in given
    )


def ends(fleet: Fleet, trace: Trace, path: Path, **options: Any) -> list[tuple[str, int, float, float]]:
    """(id, replica, first token, last token) of each request, by id."""
    results = path / "results.jsonl"
    Simulator.of_fleet(fleet, results=results, **options).replay(trace)
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    return sorted((r["id"], r["replica"], r["first_token_s"], r["last_token_s"]) for r in rows)


def test_replicas_that_differ_take_their_own_time(tmp_path: Path) -> None:
    fleet = Fleet((group(Seconds(1.0), name="slow"), group(Seconds(0.25), name="fast", count=2)))
    trace = requests((0, 4, 2), (0, 4, 2), (0, 4, 2), (5, 4, 1))
    assert ends(fleet, trace, tmp_path) == [
        ("0", 0, 1.0, 2.0), ("1", 1, 0.25, 0.5), ("2", 2, 0.25, 0.5), ("3", 0, 6.0, 6.0),
    ]  # fmt: skip


def test_each_replica_has_the_limits_of_its_group(tmp_path: Path) -> None:
    one_at_a_time = replace(CONFIG, max_num_seqs=1)
    fleet = Fleet((group(config=one_at_a_time, name="narrow"), group(name="wide")))
    trace = requests((0, 4, 1), (0, 4, 1), (0, 4, 1), (0, 4, 1))
    assert ends(fleet, trace, tmp_path) == [
        ("0", 0, 1.0, 1.0), ("1", 1, 1.0, 1.0), ("2", 0, 2.0, 2.0), ("3", 1, 1.0, 1.0),
    ]  # fmt: skip


def test_energy_and_cost_are_of_the_time_that_devices_compute_and_are_there() -> None:
    fleet = Fleet(
        (
            group(Seconds(num_devices=2, power_w=700.0, idle_power_w=100.0), name="a", price_per_h=3.0),
            group(Seconds(0.5), name="b", count=2, price_per_h=1.0, power_w=300.0, idle_power_w=50.0),
        )
    )
    # From 2 to 6: a computes 4 s; of b the first one and a half, the second none. 2 + 3 tokens, 4 and 3.
    trace = requests((2, 4, 4), (2, 4, 3))
    data = Simulator.of_fleet(fleet).replay(trace).data["fleet"]
    a, b = data["groups"]
    assert (a["replicas"], a["devices"], a["paid_s"], a["busy_s"]) == (1, 2, 4.0, 4.0)
    assert (b["replicas"], b["devices"], b["paid_s"], b["busy_s"]) == (2, 1, 8.0, 1.5)
    assert a["energy_wh"] == pytest.approx(2 * 4 * 700 / 3600)
    assert b["energy_wh"] == pytest.approx((1.5 * 300 + 6.5 * 50) / 3600)
    assert (a["cost"], b["cost"]) == (pytest.approx(2 * 3 * 4 / 3600), pytest.approx(8 / 3600))
    assert data["energy_wh"] == pytest.approx((a["energy_wh"] or 0) + (b["energy_wh"] or 0))
    assert data["wh_per_million"] == pytest.approx((data["energy_wh"] or 0) / 7e-6)
    assert data["cost_per_million"] == pytest.approx((data["cost"] or 0) / 7e-6)


def test_it_is_said_which_powers_are_assumed(tmp_path: Path) -> None:
    def powers(hardware: str, **options: Any) -> list[tuple[Any, ...]]:
        costs = CostModel.roofline(hardware, "smollm2-135m")
        fleet = Fleet((group(costs, name="a", **options),))
        report = Simulator.of_fleet(fleet).replay(requests((0, 4, 2)))
        told.append(to_text(report))
        return [tuple(one.values()) for one in report["fleet"]["groups"][0]["powers"]]

    told: list[str] = []
    most = "the most that a device may draw, so an upper bound"
    assert powers("h100-sxm") == [("power_w", 700, "device", most), ("idle_power_w", 140, "device", "")]
    assert powers("l4")[1] == ("idle_power_w", 11, "assumed", "15 % of power_w")
    assert powers("h200-sxm")[1] == ("idle_power_w", 140, "assumed", "an H100's")
    card = CARD | {"assumed": {"power_w": "a guess"}}
    (tmp_path / "card.json").write_text(json.dumps(card))
    assert powers(str(tmp_path / "card.json")) == [
        ("power_w", 200, "assumed", "a guess"), ("idle_power_w", 0, "assumed", "nothing is known of it"),
    ]  # fmt: skip
    assert powers("l4", power_w=50.0, idle_power_w=5.0) == [
        ("power_w", 50.0, "given", ""), ("idle_power_w", 5.0, "given", ""),
    ]  # fmt: skip
    is_bound = ["at most: as if each drew all that it may" in text for text in told]
    is_assumed = ["idle power is assumed, not measured" in text for text in told]
    assert (is_bound, is_assumed) == ([True, True, True, False, False], [False, True, True, True, False])
    (tmp_path / "card.json").write_text(json.dumps(CARD | {"assumed": {"price": "high"}}))
    with pytest.raises(
        ConfigError, match=r"assumed\.price: found 'high', expected no such field: power_w or"
    ):
        powers(str(tmp_path / "card.json"))


def test_what_is_not_known_of_one_group_is_not_known_of_all() -> None:
    fleet = Fleet((group(name="a", price_per_h=1.0, power_w=5.0), group(name="b")))
    data = Simulator.of_fleet(fleet).replay(requests((0, 4, 1))).data["fleet"]
    assert (data["energy_wh"], data["cost"], data["groups"][0]["cost"]) == (None, None, 1 / 3600)


def test_a_fleet_of_one_replica_is_a_plain_replay_to_the_byte(tmp_path: Path) -> None:
    workload = Workload(num_requests=200, arrivals="poisson:3", turns="uniform:1,3", seed=3)
    costs, reports, logs = CostModel.roofline("l4", "smollm2-135m"), [], []
    for name in ("plain", "fleet"):
        config = EngineConfig(num_blocks=300, max_num_seqs=16, step_log=str(tmp_path / "steps.jsonl"))
        if name == "plain":
            simulator = Simulator(config, costs, price_per_h=2.0, timeout_s=9.0, skip_bad=True)
        else:
            fleet = Fleet((Group(costs=costs, config=config, price_per_h=2.0),))
            simulator = Simulator.of_fleet(fleet, timeout_s=9.0, skip_bad=True)
        report = simulator.replay(synthesise(workload))
        report.summary["wall_s"] = 0.0
        reports.append(report.to_json())
        logs.append((tmp_path / "steps.jsonl").read_bytes())
    assert reports[0] == reports[1]
    assert logs[0] == logs[1]


def test_a_request_goes_to_a_replica_of_the_model_that_it_asks_for(tmp_path: Path) -> None:
    fleet = Fleet(
        (
            group(Seconds(model_name="small"), name="a", count=2),
            group(Seconds(model_name="large"), name="b", serves=("gpt-4", "gpt-5")),
        )
    )
    wanted = ["gpt-4", "small", "small", "gpt-5", "small"]
    trace = Trace.from_requests(
        TraceRequest(arrival_time=0, prompt_len=4, output_len=1, model=model) for model in wanted
    )
    assert [replica for _, replica, *_ in ends(fleet, trace, tmp_path)] == [2, 0, 1, 2, 0]
    for model, found in (("other", "'other'"), (None, "nothing"), ("large", "'large'")):
        with pytest.raises(
            TraceError, match=rf"request '0': model: found {found}, expected one of small, gpt-4"
        ):
            Simulator.of_fleet(fleet).replay(requests((0, 4, 1), model=model))


def test_where_all_replicas_serve_one_model_its_name_does_not_matter(tmp_path: Path) -> None:
    fleet = Fleet((group(name="a"), group(name="b")))
    assert len(ends(fleet, requests((0, 4, 1), (0, 4, 1), model="whatever"), tmp_path)) == 2


ROUTER = """
from pagellm.sim import Router

class ByName(Router):
    def choose(self, sequence, replicas):
        assert sequence.model == "m"
        found = [(r.number, r.group, r.role, r.model) for r in replicas]
        assert found == [(0, "a", "both", "m"), (1, "b", "both", "m")], found
        return next(place for place, replica in enumerate(replicas) if replica.group == "b")
"""


def test_a_router_sees_what_tells_replicas_apart(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(ROUTER)
    fleet = Fleet((group(name="a", serves=("m",)), group(name="b", serves=("m",))))
    fleet = Fleet(tuple(replace(one, costs=Seconds(model_name="m")) for one in fleet.groups))
    found = ends(fleet, requests((0, 4, 1), model="m"), tmp_path, router=f"{tmp_path / 'mine.py'}:ByName")
    assert [replica for _, replica, *_ in found] == [1]


def test_figures_are_told_by_group() -> None:
    fleet = Fleet((group(name="a"), group(name="b", count=2)))
    report = Simulator.of_fleet(fleet).replay(requests(*[(0.0, 4, 2)] * 6))
    groups = [(one["by"], one["name"], one["num_requests"]) for one in report["groups"]]
    assert groups == [
        ("group", "a", 2), ("group", "b", 4), ("replica", "0", 2), ("replica", "1", 2), ("replica", "2", 2),
    ]  # fmt: skip
    text = to_text(report)
    assert "fleet         role      replicas  devices     busy        Wh      cost" in text
    assert max(map(len, text.splitlines())) <= 80


FLEET = """
[[group]]
name = "large"
hardware = "h100-sxm"
model = "llama-3.1-8b"
tensor_parallel = 2
set_cost = {product_flops = 0.5, weights = "fp8"}
engine = {max_num_seqs = 7}
price_per_h = 2.5
[[group]]
count = 3
hardware = "card.json"
model = "llama-3.1-8b"
"""
CARD = {"flops_per_s": 1e14, "memory_bytes": 5e10, "memory_bytes_per_s": 1e12, "link_bytes_per_s": 1e10,
        "host_bytes_per_s": 1e10, "power_w": 200}  # fmt: skip


def test_a_file_says_what_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "card.json").write_text(json.dumps(CARD))
    file = tmp_path / "fleet.toml"
    file.write_text(FLEET)
    large, small = read_fleet(str(file), settings={"max_num_seqs": 9, "block_size": 32}).groups
    assert (large.name, large.count, large.num_devices, large.config.max_num_seqs) == ("large", 1, 2, 7)
    assert (small.name, small.count, small.num_devices, small.config.max_num_seqs) == ("group 2", 3, 1, 9)
    assert (large.powers_w, small.powers_w) == ((140.0, 700.0), (0.0, 200.0))
    assert large.config.block_size == small.config.block_size == 32
    assert main(["replay", TRACE, "--fleet", str(file), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["load"]["replicas"] == 4
    assert [one["devices"] for one in report["fleet"]["groups"]] == [2, 1]
    assert "product_flops" in {one["name"] for one in report["constants"]}
    assert "group 2: product_flops" in {one["name"] for one in report["constants"]}


def test_the_fleet_in_the_readme_is_one(tmp_path: Path) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    [described] = re.findall(r"```toml\n(.*?)```", readme, re.DOTALL)
    (tmp_path / "fleet.toml").write_text(described)
    fleet = read_fleet(str(tmp_path / "fleet.toml"))
    assert [(one.name, one.count, one.num_devices) for one in fleet.groups] == [
        ("large", 2, 4),
        ("small", 1, 1),
    ]
    assert fleet.random_failures is not None


def test_the_trace_of_two_models_in_the_readme_is_served_by_its_fleet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    readme = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    [described] = re.findall(r"```toml\n(.*?)```", readme, re.DOTALL)
    Path("fleet.toml").write_text(described)
    [synth] = re.findall(r"pagellm (trace synth --models .*?) +#", readme)
    assert main(synth.split()) == 0
    models = [request.model for request in Trace.load("two.jsonl")]
    assert main(["replay", "two.jsonl", "--fleet", "fleet.toml", "--limit", "60", "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    by_group = {one["name"]: one["num_requests"] for one in report["groups"] if one["by"] == "group"}
    assert by_group == {
        "large": models[:60].count("llama-3.1-70b"), "small": models[:60].count("gpt-4o-mini"),
    }  # fmt: skip
    assert all(by_group.values())


def test_devices_are_not_busy_for_longer_than_they_are_paid_for() -> None:
    # The last token is there at 2; the step behind it is of a request whose client has given up by then.
    fleet = Fleet((group(),))
    report = Simulator.of_fleet(fleet, timeout_s=2.5).replay(requests((0, 4, 2), (1.5, 100, 9)))
    [figures] = report["fleet"]["groups"]
    assert figures["busy_s"] <= figures["paid_s"]


def test_groups_without_step_times_have_those_of_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "fleet.json"
    file.write_text(json.dumps({"group": [{"engine": {"max_num_seqs": 4}}, {"count": 2, "name": "rest"}]}))
    arguments = ["replay", TRACE, "--fleet", str(file), "--json"]
    assert main([*arguments, "--roofline", "l40s,llama-3.1-8b"]) == 0
    assert json.loads(capsys.readouterr().out)["load"]["replicas"] == 3
    assert main(arguments) == 2
    assert "group[0].hardware: found nothing, expected the name of a device" in capsys.readouterr().err


L4 = {"hardware": "l4", "model": "smollm2-135m"}


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({}, "group: found nothing, expected at least one"),
        ({"groups": []}, r"groups: found \[\], expected no such key: one of group"),
        ({"group": [{"hardwear": "l4"}]}, r"group\[0\].hardwear: found 'l4', expected no such key: one"),
        ({"group": [L4 | {"count": -1}]}, r"group\[0\].count: found -1, expected a positive integer"),
        (
            {"group": [L4 | {"count": 0, "autoscale": {"max": 2, "target": 1, "min": 0}}]},
            r"group\[0\].count: found 0, expected a positive integer",
        ),
        ({"group": [L4 | {"count": 0}]}, r"group: found groups of no replica, expected at least one"),
        ({"group": [L4 | {"role": "draft"}]}, r"group\[0\].*role: found 'draft', expected one of both"),
        ({"group": [L4 | {"price_per_h": -1}]}, r"group\[0\].price_per_h: found -1, expected a finite"),
        ({"group": [L4 | {"serves": [1]}]}, r"group\[0\].serves: found 1, expected a list of names"),
        ({"group": [L4 | {"engine": {"max_seqs": 1}}]}, r"group\[0\].engine.max_seqs: found 1, expected no"),
        ({"group": [L4 | {"engine": {"max_num_seqs": 0}}]}, r"group\[0\].*max_num_seqs: found 0, expected"),
        ({"group": [L4 | {"profile": "p.json"}]}, r"group\[0\].hardware: found 'l4', expected no such key"),
        ({"group": [L4 | {"set_cost": {"speed": 1}}]}, r"group\[0\].*found 'speed', expected one of"),
        ({"group": [L4 | {"hardware": "l5"}]}, r"group\[0\].*hardware: found 'l5', expected one of a100"),
        ({"group": [L4 | {"tensor_parallel": 2}]}, r"group\[0\].*num_devices: found 2 for 9 heads and 3 KV"),
        ({"group": [{"hardware": "l4"}]}, r"group\[0\].model: found nothing, expected a string"),
        ({"group": [L4 | {"name": "a"}, L4 | {"name": "a"}]}, "found two groups called "),
        ({"group": [L4, L4 | {"engine": {"block_size": 32}}]}, "found block_size 16 and 32 for "),
        (
            {"group": [L4, L4 | {"set_cost": {"frontend_s": 0.5}}]},
            "found frontend_s 0 and 0.5, expected one for all groups",
        ),
        ({"group": 5}, "group: found 5, expected a list"),
        ({"group": [5]}, r"group\[0\]: found 5, expected an object with named fields"),
    ],
)  # fmt: skip
def test_a_fleet_that_cannot_be_is_refused(described: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = tmp_path / "fleet.json"
    file.write_text(json.dumps(described))
    with pytest.raises(ConfigError, match=rf"^.*fleet\.json: {message}"):
        read_fleet(str(file))


def test_a_file_that_is_no_fleet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("[[group]\n")
    with pytest.raises(ConfigError, match=r"bad\.toml: found .* expected a fleet as TOML"):
        read_fleet(str(tmp_path / "bad.toml"))
    with pytest.raises(ConfigError, match=r"^\S*none\.toml: cannot be read: No such file"):
        read_fleet(str(tmp_path / "none.toml"))


@pytest.mark.parametrize("option", ["--fleet", "--costs", "--set-cost=expert_loads", "--compare"])
def test_a_device_without_an_end_is_not_read(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    value = ["/dev/zero", "/dev/zero"] if option == "--compare" else ["/dev/zero"]
    given = [f"{option}=/dev/zero"] if "=" in option else [option, *value]
    trace = [] if option == "--compare" else [TRACE, "--roofline", "h200-sxm,mixtral-8x7b"]
    assert main(["replay", *trace, *given]) == 2
    assert "/dev/zero: found a device, expected a file or a pipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fleet", "f.toml", "--replicas", "2"], "replicas: found 2 with a fleet, whose groups say that"),
        (["--fleet", "f.toml", "--price", "2"], "price_per_h: found 2.0 with a fleet, whose groups say that"),
        (["--fleet", "f.toml", "--set-cost", "weights=fp8"], "--set-cost: not without step times of all"),
        (["--fleet", "f.toml", "--model", "x"], "--model: not without step times of all groups"),
        (["--fleet", "f.toml", "--num-threads", "3"], "--num-threads: not without step times of all groups"),
        (["--fleet", "f.toml", "--data-parallel", "3"], "--data-parallel: not without step times of all"),
        (["--fleet", "f.toml", "--data-parallel", "0"], "--data-parallel: not without step times of all"),
        (["--fleet", "f.toml", "--roofline", "l4,smollm2-135m"], "found step times of its own in every"),
        (["--real", "--router", "least_loaded"], "--router: not with --real, which is one engine"),
        (["--fleet", "f.toml", "--real"], "--fleet: not with --real"),
        (["--roofline", "l4,smollm2-135m", "--price", "-2"], "price_per_h: found -2.0, expected"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_a_fleet_is_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("f.toml").write_text('[[group]]\nhardware = "l4"\nmodel = "smollm2-135m"\n')
    assert main(["replay", TRACE, *arguments]) == 2
    assert message in capsys.readouterr().err
