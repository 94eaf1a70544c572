"""Pipelines and data parallel ranks: several engines on the devices of one replica, to the exact second."""

import json
from pathlib import Path
from typing import Any

import pytest

from pagellm.__main__ import main
from pagellm.engine import ConfigError
from pagellm.sim import CostModel, Simulator
from pagellm.sim.costs.decoder import Layers, Model
from pagellm.sim.costs.roofline import _stage_shares
from pagellm.sim.costs.source import CostSource
from pagellm.sim.fleet.file import read_fleet
from pagellm.sim.fleet.fleet import Autoscale, Failure, Fleet
from tests.sim.batches import batch_of
from tests.sim.test_fleet import TRACE, Seconds, ends, group, requests
from tests.sim.test_roofline import bare


class Stages(Seconds):
    """A pipeline whose stages take so long."""

    def __init__(self, *times: float, **facts: Any) -> None:
        super().__init__(sum(times), num_stages=len(times), **facts)
        self._times = times

    def stage_times(self, batch: Any) -> list[float]:
        return list(self._times)


class Together(Seconds):
    """Two ranks whose steps take a second for each of them that has one."""

    data_parallel = 2
    is_lockstep = True

    def joint_time(self, batches: Any) -> float:
        return float(len(batches))


def test_batches_of_a_pipeline_follow_each_other_through_its_stages(tmp_path: Path) -> None:
    two = requests((0, 4, 2), (0, 4, 2))
    even = Fleet((group(Stages(1.0, 1.0)),))
    assert ends(even, two, tmp_path) == [("0", 0, 2.0, 4.0), ("1", 1, 3.0, 5.0)]
    # One alone has no use of the second stage while it is in the first.
    assert ends(even, requests((0, 4, 2)), tmp_path) == [("0", 0, 2.0, 4.0)]
    # The slower stage is waited for: 1-3, 3-5, 5-7 and 7-9.
    uneven = Fleet((group(Stages(1.0, 2.0)),))
    assert ends(uneven, two, tmp_path) == [("0", 0, 3.0, 7.0), ("1", 1, 5.0, 9.0)]


def test_a_pipeline_computes_where_a_stage_does(tmp_path: Path) -> None:
    costs = Stages(1.0, 1.0, num_devices=2, power_w=100.0, idle_power_w=10.0)
    report = Simulator.of_fleet(Fleet((group(costs, price_per_h=1.0),))).replay(
        requests((0, 4, 2), (0, 4, 2))
    )
    [figures] = report["fleet"]["groups"]
    # Four steps of two seconds, on one of two devices each.
    assert (figures["replicas"], figures["paid_s"], figures["busy_s"]) == (1, 5.0, 4.0)
    assert figures["energy_wh"] == pytest.approx(2 * (4 * 100 + 1 * 10) / 3600)
    assert figures["cost"] == pytest.approx(2 * 5 / 3600)
    assert report["load"]["replicas"] == 1
    assert [one["name"] for one in report["groups"]] == ["0", "1"]


def test_ranks_that_share_experts_have_their_steps_together(tmp_path: Path) -> None:
    fleet = Fleet((group(Together()),))
    # At 0 the first alone; at 1 both, for two seconds; at 3 the second.
    assert ends(fleet, requests((0, 4, 2), (0.5, 4, 2)), tmp_path) == [("0", 0, 1.0, 3.0), ("1", 1, 3.0, 4.0)]
    [figures] = Simulator.of_fleet(fleet).replay(requests((0, 4, 2), (0.5, 4, 2)))["fleet"]["groups"]
    assert (figures["paid_s"], figures["busy_s"]) == (4.0, 4.0)


def test_ranks_of_other_models_know_nothing_of_each_other(tmp_path: Path) -> None:
    fleet = Fleet((group(Seconds(data_parallel=2, num_devices=2)),))
    assert ends(fleet, requests((0, 4, 2), (0.5, 4, 2)), tmp_path) == [("0", 0, 1.0, 2.0), ("1", 1, 1.5, 2.5)]
    [figures] = Simulator.of_fleet(fleet).replay(requests((0, 4, 2), (0.5, 4, 2)))["fleet"]["groups"]
    assert (figures["replicas"], figures["devices"], figures["paid_s"], figures["busy_s"]) == (1, 2, 2.5, 2.0)


@pytest.mark.parametrize("costs", [Stages(0.5, 0.5), Together(), Seconds(data_parallel=2)])
def test_engines_that_share_devices_fail_and_start_together(costs: CostModel, tmp_path: Path) -> None:
    scaled = Autoscale(max=3, target=2.0, interval_s=3.0, down_after_s=6.0)
    fleet = Fleet((group(costs, count=1, start_s=1.0, autoscale=scaled),), (Failure(2.5, "all", 0, 1.0),))
    trace = requests(*[(time, 5, 8) for time in (0.0, 0.0, 0.0, 1.0, 4.0, 30.0)])
    report = Simulator.of_fleet(fleet).replay(trace)
    assert (report.summary["num_finished"], report.summary["output_tokens"]) == (6, 48)
    assert report["fleet"]["failures"]["lost_requests"] == 4
    assert len(ends(fleet, trace, tmp_path)) == 6


@pytest.mark.parametrize(
    ("layers", "stages", "counts"),
    [(32, 4, [8, 8, 8, 8]), (30, 4, [7, 8, 8, 7]), (5, 2, [3, 2]), (7, 1, [7])],
)
def test_layers_are_divided_as_vllm_does(layers: int, stages: int, counts: list[int]) -> None:
    assert _stage_shares(layers, stages) == [count / layers for count in counts]


def test_a_stage_has_its_layers_and_the_last_the_head() -> None:
    batch = batch_of((1, 49), (1, 49))
    given = {"step_overhead_s": 3.0, "layer_overhead_s": 0.5, "sequence_overhead_s": 0.25}
    whole, piped = bare(**given), bare(pipeline_parallel=2, **given)
    first, last = piped.stage_times(batch)
    head = 2 * 160 / 1e4 + 2 * 3 * 4 * 40 / 1e4 + 2 * 0.25
    layers = whole.step_time(batch) - 3 - head
    # Two states of 4 numbers of 2 bytes at 1,000 bytes a second, a quarter of a second late.
    assert first == pytest.approx(3 + layers / 2 + 0.25 + 2 * 4 * 2 / 1e3)
    assert last == pytest.approx(3 + layers / 2 + head)
    assert (piped.num_devices, piped.num_engines) == (2, 2)
    assert piped.stride_times(batch, 1.0, 5, 99.0) == []


def test_stages_divide_weights_and_kv_and_engines_the_blocks() -> None:
    one, two = (CostModel.roofline("h100-sxm", "llama-3.1-8b", pipeline_parallel=p) for p in (1, 2))
    config = one.settings({})
    # The embedding and the head are of a gigabyte each; half of the layers is of 7.
    alone = one.num_blocks(config) * 16 * 131072
    piped = 2 * two.num_blocks(config) * 16 * 131072 / 2
    assert alone + 7e9 < piped < alone + 9e9
    # A model that one device does not hold is held by two.
    with pytest.raises(ConfigError, match=r"num_devices: found 1 for 141\.1 GB of weights, exp"):
        CostModel.roofline("h100-sxm", "llama-3.1-70b")
    assert CostModel.roofline("h100-sxm", "llama-3.1-70b", pipeline_parallel=2).num_devices == 2


MIXTURE = Model(
    num_parameters=160 + 100 + 200, hidden_size=4, vocab_size=40,
    layers=(
        Layers(
            1, num_heads=2, num_kv_heads=2, head_dim=5, intermediate_size=12, product_parameters=100,
            num_experts=4, experts_per_token=2, expert_parameters=50,
        ),
    ),
)  # fmt: skip


def test_ranks_attend_each_to_its_own_and_meet_in_the_experts() -> None:
    costs = bare(model=MIXTURE, data_parallel=2)
    long, short = batch_of((1, 49)), batch_of((1, 9))
    # One token meets 2 experts, two meet 3, each of 100 bytes; two devices read them at once.
    assert costs.joint_time([long, short]) - costs.joint_time([long]) == pytest.approx(100 / 2e4)
    assert costs.joint_time([long]) - costs.joint_time([short]) == pytest.approx(40 * 40 / 1e4)
    # Half of what a token sends to its experts and gets back is for the other device, late twice.
    alone = bare(model=MIXTURE)
    exchange = 2 * 0.25 + 2 * 2 * (1 / 2) * 8 / 1e3
    assert costs.joint_time([long]) == pytest.approx(alone.step_time(long) - 2 * 100 / 2e4 + exchange)


def test_ranks_leave_more_room_where_they_share_experts() -> None:
    one, four = (CostModel.roofline("h100-sxm", "qwen3-30b-a3b", data_parallel=d) for d in (1, 4))
    config = one.settings({})
    token_bytes = one.block_bytes(16) / 16
    more = (four.num_blocks(config) - one.num_blocks(config)) * 16 * token_bytes
    experts = 48 * 128 * 4718592 * 2
    assert more == pytest.approx(experts * 3 / 4, rel=0.02)
    assert (four.num_devices, four.num_engines, four.is_lockstep) == (4, 4, True)
    dense = CostModel.roofline("h100-sxm", "llama-3.1-8b", data_parallel=4)
    assert (dense.num_devices, dense.num_engines, dense.is_lockstep) == (4, 4, False)


@pytest.mark.parametrize(
    ("model", "given", "message"),
    [
        ("llama-3.1-8b", {"pipeline_parallel": 33}, "pipeline_parallel: found 33, expected at most as"),
        ("llama-3.1-8b", {"pipeline_parallel": 0}, "pipeline_parallel: found 0, expected a posit"),
        ("llama-3.1-8b", {"data_parallel": 0}, "data_parallel: found 0, expected a positive integer"),
        ("qwen3-30b-a3b", {"data_parallel": 2, "experts": "tensor"}, "experts: found 'tensor' with data"),
        ("qwen3-30b-a3b", {"data_parallel": 2, "pipeline_parallel": 2}, "pipeline_parallel: found 2 with da"),
        ("qwen3-30b-a3b", {"data_parallel": 3}, "num_devices: found 3 for 128 experts, expected a number"),
    ],
)  # fmt: skip
def test_what_cannot_be_parallel_is_refused(model: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CostModel.roofline("h100-sxm", model, **given)


def test_commands_and_files_take_all_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ways = ["--pipeline-parallel", "2", "--data-parallel", "3"]
    assert main(["replay", TRACE, "--roofline", "l4,llama-3.1-8b,2", *ways, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["model"].startswith("llama-3.1-8b on 2 x l4, 2 stages, 3 data parallel, roofline")
    assert report["fleet"]["groups"][0]["devices"] == 12
    assert (report["summary"]["num_finished"], len(report["groups"])) == (200, 6)
    file = tmp_path / "fleet.json"
    described = {"hardware": "l4", "model": "llama-3.1-8b", "tensor_parallel": 2, "pipeline_parallel": 2}
    file.write_text(json.dumps({"group": [described | {"data_parallel": 3}]}))
    [found] = read_fleet(str(file)).groups
    assert (found.num_devices, found.engine_devices, found.costs.num_engines) == (12, 4, 6)
    assert main(["replay", TRACE, "--profile", "p.json", *ways]) == 2
    assert "pipeline_parallel: found 2 without --roofline, expected 1" in capsys.readouterr().err
    assert main(["replay", TRACE, "--real", "--data-parallel", "2"]) == 2
    assert "--data-parallel: not with --real" in capsys.readouterr().err
    first = CostSource(roofline=("l4", "llama-3.1-8b", 1))
    assert first.hash() != CostSource(roofline=("l4", "llama-3.1-8b", 1), pipeline_parallel=2).hash()
