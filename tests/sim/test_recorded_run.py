"""Law 1: the simulator takes the decisions that the engine took, step by step, if its steps take as long."""

import json
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from pagellm.__main__ import main
from pagellm.engine import ConfigError, EngineConfig, LLMEngine, ProfileError
from pagellm.sim import CostModel, PromptTokens, Simulator, Trace, TraceRequest
from pagellm.sim.calibration.calibrate import calibrate
from pagellm.sim.costs.decoder import Layers, Model
from pagellm.sim.costs.devices import Hardware
from pagellm.sim.costs.profile import ProfileCostModel
from pagellm.sim.costs.roofline import RooflineCostModel
from pagellm.sim.real_replay import replay_for_real
from tests.conftest import model_path
from tests.sim.test_calibrate import Clock

VOCAB_SIZE = 101
# What is a measurement, and no decision.
MEASURED = ("transfer_s", "duration_s")


def requests() -> list[TraceRequest]:
    """Prompts of up to 40 tokens that often begin alike, and answers that outgrow the few blocks.

    Half of them come at once, so that there is a crowd however fast the machine is.
    """
    random = Random(7)
    shared = [[random.randrange(2, VOCAB_SIZE) for _ in range(24)] for _ in range(2)]
    made = []
    for number in range(24):
        tail = [random.randrange(2, VOCAB_SIZE) for _ in range(random.randint(1, 16))]
        made.append(
            TraceRequest(
                arrival_time=0.002 * max(0, number - 12),
                prompt_token_ids=shared[number % 2][: random.choice([0, 9, 24])] + tail,
                output_len=random.randint(1, 24) if number % 2 else 24,
                priority=random.randint(0, 2),
                tenant=random.choice("ab"),
                deadline_s=random.choice([None, 0.01, 0.05]),
            )
        )
    return made


def record(config: EngineConfig, path: Path, trace: list[TraceRequest]) -> EngineConfig:
    """Serves a trace in real time on a tiny model; returns the settings that the engine came to."""
    engine = LLMEngine(str(model_path("llama_gqa")), replace(config, step_log=str(path)))
    pending = list(enumerate(trace))
    while pending or engine.has_unfinished:
        while pending and pending[0][1].arrival_time <= engine.now():
            number, request = pending.pop(0)
            assert request.prompt_token_ids is not None
            engine.add_request(str(number), list(request.prompt_token_ids), request.sampling_params())
        if engine.has_unfinished:
            engine.step()
    engine.close()
    return engine.config


def steps(path: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in json.loads(line).items() if name not in MEASURED}
        for line in path.read_text().splitlines()
    ]


@pytest.mark.parametrize(
    ("preemption", "policy"),
    [
        ("recompute", "fcfs"),
        ("swap", "fcfs"),
        ("auto", "fcfs"),
        ("auto", "priority"),
        ("recompute", "prefill_first"),
        ("swap", "shortest_job"),
        ("auto", "fair"),
        ("swap", "slo"),
    ],
)
def test_the_simulator_takes_every_decision_of_a_recorded_run(
    preemption: str, policy: str, tmp_path: Path
) -> None:
    real, simulated = tmp_path / "real.jsonl", tmp_path / "simulated.jsonl"
    config = EngineConfig(
        block_size=4,
        num_blocks=20,
        max_num_seqs=8,
        max_num_batched_tokens=24,
        max_prefill_chunk=10,
        preemption=preemption,
        num_swap_blocks=None if preemption == "recompute" else 12,
        policy=policy,
        max_preemptions=2,
    )
    trace = requests()
    config = record(config, real, trace)
    happened = steps(real)
    arrivals = [added["arrival_s"] for step in happened for added in step["added"]]
    assert len(arrivals) == len(trace)
    replayed = Trace.from_requests(
        replace(request, arrival_time=time) for request, time in zip(trace, arrivals, strict=True)
    )
    simulator = Simulator(
        replace(config, step_log=str(simulated)),
        CostModel.load(real),
        prompt_tokens=PromptTokens(VOCAB_SIZE),
    )
    report = simulator.replay(replayed)

    assert steps(simulated) == happened

    summary = report.summary
    assert summary["num_finished"] == len(trace)
    assert summary["cache"]["hit_tokens"] > 0
    preemptions = summary["preemptions"]
    assert preemptions["recompute"] + preemptions["swap"] > 0
    assert preemptions["swap"] > 0 or preemption != "swap"
    assert any(count == 10 and not samples for step in happened for _, _, count, samples in step["scheduled"])


def test_a_replay_of_more_than_was_recorded_says_so(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    costs = {"recompute_token_s": 0.0, "swap_block_s": 0.0}
    path.write_text(json.dumps({"step": 0, "start_s": 0.0, "duration_s": 0.5, "costs": costs}) + "\n")
    trace = Trace.from_requests([TraceRequest(arrival_time=0, prompt_len=3, output_len=2)])
    with pytest.raises(ProfileError, match=r"steps.jsonl: found 1 steps, expected more for this replay"):
        Simulator(EngineConfig(num_blocks=4), CostModel.load(path)).replay(trace)


TINY = str(model_path("llama_tiny"))  # of 256 positions
# What the caller's clock says, and how far the simulator's steps were from it.
TIMES = (*MEASURED, "start_s")


def decisions(path: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in record.items() if name not in TIMES} for record in records]


def replay(trace: Path, log: Path, *arguments: str) -> dict[str, Any]:
    output = log.with_suffix(".json")
    assert main(["replay", str(trace), "--step-log", str(log), "-o", str(output), *arguments]) == 0
    report: dict[str, Any] = json.loads(output.read_text())
    return report


def write_trace(path: Path, *requests: TraceRequest) -> Path:
    Trace.from_requests(requests).save(path)
    return path


LONG = TraceRequest(arrival_time=0, prompt_len=250, output_len=100)


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("--max-model-len", "200"),
        ("--num-blocks", "40", "--block-size", "4", "--no-prefix-caching"),
        ("--num-blocks", "8", "--max-num-seqs", "3", "--policy", "shortest_job"),
        ("--num-blocks", "8", "--preemption", "swap", "--swap-blocks", "5", "--watermark", "0"),
        ("--max-num-batched-tokens", "24", "--max-prefill-chunk", "9", "--max-preemptions", "1"),
    ],
)
def test_a_recorded_run_is_replayed_without_a_setting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: tuple[str, ...]
) -> None:
    """Its log knows the context of the model, the blocks and whatever else decisions follow from."""
    random = Random(3)
    requests = [
        TraceRequest(
            arrival_time=0.0003 * number,
            prompt_len=(length := random.randint(1, 60)),
            hash_ids=[number % 3, *range(100 * number, 100 * number + (length - 1) // 16)],
            hash_block_size=16,
            output_len=random.randint(1, 40) if number % 4 else 300,
        )
        for number in range(40)
    ]
    trace = write_trace(tmp_path / "t.jsonl", *requests)
    real_log, log = tmp_path / "real.jsonl", tmp_path / "simulated.jsonl"
    real = replay(trace, real_log, "--real", "--model", TINY, *settings)
    simulated = replay(trace, log, "--profile", str(real_log))
    assert decisions(log) == decisions(real_log)
    assert len(decisions(log)) == real["summary"]["num_steps"] == simulated["summary"]["num_steps"]
    assert simulated["summary"]["output_tokens"] == real["summary"]["output_tokens"]
    for name in ("num_blocks", "max_model_len", "policy", "block_size"):
        assert simulated["config"][name] == real["config"][name]


@pytest.mark.filterwarnings("ignore:.*continued linearly")
def test_a_run_is_cut_at_the_models_context_by_every_kind_of_step_times(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t.jsonl", LONG)
    real_log, log = tmp_path / "real.jsonl", tmp_path / "simulated.jsonl"
    real = replay(trace, real_log, "--real", "--model", TINY)
    assert real["summary"]["output_tokens"] == 6
    replay(trace, log, "--profile", str(real_log))
    assert decisions(log) == decisions(real_log)

    tiny = Model(10**6, 64, (Layers(2, 4, 2, 16, 256, 50_000),), max_model_len=256)
    device = Hardware(1e12, 4e9, 1e10, 1e9, 1e9)
    engine = LLMEngine(TINY, EngineConfig(max_num_seqs=2))
    profile = calibrate(engine, seconds=2.0, clock=Clock())
    engine.close()
    for costs in (RooflineCostModel(device, tiny), ProfileCostModel(profile)):
        config = EngineConfig(step_log=str(log))
        report = Simulator(config, costs, accept_profile_error=True).replay(Trace.load(trace))
        assert report.summary["output_tokens"] == 6
        assert report.data["config"]["max_model_len"] == 256
        for name in ("scheduled", "finished"):
            assert [step[name] for step in decisions(log)] == [step[name] for step in decisions(real_log)]
        with pytest.raises(ConfigError, match="max_model_len: found 300, expected at most 256, the context"):
            Simulator(EngineConfig(max_model_len=300), costs, accept_profile_error=True)


@pytest.mark.filterwarnings("ignore:.*recorded with policy")
def test_code_that_a_log_names_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, log = write_trace(tmp_path / "t.jsonl", LONG), tmp_path / "run.jsonl"
    replay(trace, log, "--roofline", "l4,smollm2-135m", "--num-blocks", "64")
    first, *others = log.read_text().splitlines()
    record = json.loads(first)
    record["config"]["policy"] = "os:system"
    log.write_text("\n".join([json.dumps(record), *others]))
    assert main(["replay", str(trace), "--profile", str(log)]) == 2
    assert "policy: found nothing, expected 'os:system', with which" in capsys.readouterr().err
    assert main(["replay", str(trace), "--profile", str(log), "--policy", "fcfs"]) == 0


def test_other_settings_than_the_recorded_ones_are_said(tmp_path: Path) -> None:
    trace, log = write_trace(tmp_path / "t.jsonl", LONG), tmp_path / "run.jsonl"
    step = "--max-num-seqs", "128", "--max-num-batched-tokens", "512"
    replay(trace, log, "--roofline", "l4,smollm2-135m", "--num-blocks", "64", *step)
    costs = CostModel.load(log)
    with pytest.warns(UserWarning, match="recorded with max_num_seqs 128, replayed with max_num_seqs 4: dec"):
        Simulator(EngineConfig(max_num_seqs=4), costs).replay(Trace.load(trace))


@pytest.mark.parametrize("config", [5, {}, {"num_blocks": 4}, {"num_blocks": 4, "max_model_len": 64, "a": 1}])
def test_settings_of_a_log_that_are_none_are_refused(tmp_path: Path, config: Any) -> None:
    path = tmp_path / "steps.jsonl"
    costs = {"recompute_token_s": 0.0, "swap_block_s": 0.0}
    record = {"step": 0, "start_s": 0.0, "duration_s": 0.5, "costs": costs, "config": config}
    path.write_text(json.dumps(record) + "\n")
    with pytest.raises(
        ProfileError, match=r"steps.jsonl:1: config: found .*, expected an object of block_size"
    ):
        CostModel.load(path)


@pytest.mark.parametrize("clients", [None, 2])
def test_sessions_on_the_real_engine_and_simulated_take_the_same_decisions(
    clients: int | None, tmp_path: Path
) -> None:
    """Turns wait for the engine's answers and go on with them; so do those of the simulation."""
    random = Random(3)
    trace = []
    for number in range(8):
        tokens = [random.randrange(2, VOCAB_SIZE) for _ in range(random.randint(4, 20))]
        common: dict[str, Any] = {"arrival_time": 0.001 * number, "output_len": random.randint(2, 9)}
        trace.append(TraceRequest(id=f"{number}", prompt_token_ids=tokens, **common))
        for turn in range(random.randint(0, 3)):
            before = f"{number}" if turn == 0 else f"{number}.{turn - 1}"
            new = [random.randrange(2, VOCAB_SIZE) for _ in range(random.randint(1, 6))]
            delay = random.choice([0.0, 0.001, None])
            name = f"{number}.{turn}"
            trace.append(
                TraceRequest(id=name, prompt_token_ids=new, continues=before, delay_s=delay, **common)
            )
    real, simulated = tmp_path / "real.jsonl", tmp_path / "simulated.jsonl"
    config = EngineConfig(block_size=4, num_blocks=60, max_num_seqs=4, max_num_batched_tokens=24)
    engine = LLMEngine(str(model_path("llama_gqa")), replace(config, step_log=str(real)))
    try:
        requests = Trace.from_requests(trace)
        report = replay_for_real(engine, requests, model="tiny", clients=clients)
        config = engine.config
    finally:
        engine.close()
    again = Simulator(
        replace(config, step_log=str(simulated)),
        CostModel.load(real),
        prompt_tokens=PromptTokens(VOCAB_SIZE),
        clients=clients,
    ).replay(requests)
    times = (*MEASURED, "start_s")
    happened, came = (
        [{k: v for k, v in step.items() if k not in times} for step in steps(path)]
        for path in (real, simulated)
    )
    for step in (*happened, *came):
        for added in step["added"]:
            del added["arrival_s"]
    assert came == happened
    assert again.summary["cache"] == report.summary["cache"]
    assert again.summary["cache"]["hit_tokens"] > 0
