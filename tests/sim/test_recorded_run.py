"""Law 1: the simulator takes the decisions that the engine took, step by step, if its steps take as long."""

import json
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from pagellm.engine import EngineConfig, LLMEngine, ProfileError, SamplingParams
from pagellm.sim import CostModel, PromptTokens, Simulator, Trace, TraceRequest
from tests.conftest import model_path

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
            params = SamplingParams(
                temperature=0,
                max_tokens=request.output_len,
                ignore_eos=True,
                priority=request.priority,
                tenant=request.tenant or "",
                deadline_s=request.deadline_s,
            )
            engine.add_request(str(number), list(request.prompt_token_ids), params)
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
