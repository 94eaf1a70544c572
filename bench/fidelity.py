"""How right the simulator is: the same traces simulated and served for real, metric by metric.

The machine and the model are calibrated. Then traces that the calibration has not seen are served: at 60 % of
the load that they can be served at, at twice that load, and at twice that load with so little KV memory that
requests make way for each other. An error is that of the simulation against the median of several real runs;
their spread, from the lowest to the highest, stands beside it.

A machine that others use as well changes its speed for minutes at a time, which no calibration can know.
So the speed is measured before and after each run, with steps of two shapes, and a run counts if these take
what they took in the calibration to within 5 %. How many did not count is printed.

Run: python bench/fidelity.py [--model M] [--quantization Q] [--seconds X] [--runs N] [--json]
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))

from engine import EngineConfig, LLMEngine
from engine.config import DEFAULT_MODEL, QUANTIZATIONS
from sim import CostModel, Simulator, Trace, Workload, synthesise
from sim.calibrate import calibrate
from sim.cost_profile import ProfileCostModel
from sim.real_replay import replay_for_real
from sim.staged_steps import Stage, StepShape

CONFIG = EngineConfig(max_model_len=2048, max_num_seqs=32, max_num_batched_tokens=512, num_blocks=2048)
FEW_BLOCKS = 200
WORKLOAD = {
    "prompt_len": "lognormal:150,0.7",
    "output_len": "uniform:16,64",
    "num_system_prompts": 4,
    "system_prompt_len": 48,
}
# The error in percent that is aimed at, by the metric's place in the summary.
TARGETS = {
    "output_tokens_per_s": 2,
    "ttft_s.mean": 4,
    "tpot_s.mean": 4,
    "ttft_s.p99": 8,
    "tpot_s.p99": 8,
    "e2e_s.p99": 8,
    "kv.peak_blocks": 1,
}
PROBES = (StepShape(chunks=(256,)), StepShape(decodes=(256,)))
NUM_PROBES = 5
TOLERANCE = 0.05


@dataclass(frozen=True)
class Case:
    """A trace and the settings that it is served with."""

    name: str
    trace: Trace
    config: EngineConfig


def main() -> None:
    """Prints a table for each case, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--quantization", choices=QUANTIZATIONS, default="auto")
    parser.add_argument("--seconds", type=float, default=100.0, metavar="X", help="of calibration")
    parser.add_argument("--requests", type=int, default=150, metavar="N", help="of each trace")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="that count, of each case")
    parser.add_argument("--attempts", type=int, default=10, metavar="N", help="at that, at most")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    config = replace(CONFIG, quantization=options.quantization)
    profile = calibrated(options.model, config, options.seconds)
    model = ProfileCostModel(profile)
    print(f"{model.name}\nfit of the profile: {profile['fit']}", file=sys.stderr)
    results = [
        measured(case, options.model, model, options.runs, options.attempts)
        for case in cases(config, model, options.requests)
    ]
    if options.json:
        print(json.dumps({"profile": model.name, "fit": profile["fit"], "cases": results}, indent=1))
        return
    for result in results:
        show(result)


def calibrated(model: str, config: EngineConfig, seconds: float) -> dict:
    """A profile of this machine."""
    engine = LLMEngine(model, config)
    try:
        return calibrate(engine, model=model, seconds=seconds)
    finally:
        engine.close()


def cases(config: EngineConfig, model: CostModel, num_requests: int) -> list[Case]:
    """Traces at loads in proportion to what can be served of them, by the simulator's account."""

    def trace(requests_per_s: float, seed: int) -> Trace:
        arrivals = f"poisson:{requests_per_s:.6g}"
        return synthesise(Workload(num_requests=num_requests, arrivals=arrivals, seed=seed, **WORKLOAD))

    most = Simulator(config, model).replay(trace(1e6, 1)).summary["requests_per_s"]
    few = replace(config, num_blocks=FEW_BLOCKS)
    return [
        Case("60 % load", trace(0.6 * most, 2), config),
        Case("saturation", trace(2 * most, 3), config),
        Case("memory pressure", trace(2 * most, 4), few),
    ]


def measured(case: Case, name: str, model: CostModel, num_runs: int, num_attempts: int) -> dict:
    """A case simulated, and served until enough runs count."""
    simulated = Simulator(case.config, model).replay(case.trace).summary
    runs: list[dict] = []
    speeds = []
    for _ in range(num_attempts):
        summary, before, after = served(case, name, model)
        counts = all(abs(slowness - 1) <= TOLERANCE for slowness in (*before, *after))
        speeds.append({"before": before, "after": after, "counts": counts})
        probes = ", ".join(f"{slowness:.2f}" for slowness in (*before, *after))
        print(f"{case.name}: step times over calibrated ones: {probes}: {counts}", file=sys.stderr)
        runs += [summary] * counts
        if len(runs) == num_runs:
            break
    return {
        "case": case.name,
        "runs": len(runs),
        "attempts": speeds,
        "preemptions": simulated["preemptions"]["recompute"] + simulated["preemptions"]["swap"],
        "metrics": [compared(path, simulated, runs) for path in TARGETS] if runs else [],
    }


def served(case: Case, name: str, model: CostModel) -> tuple[dict, list[float], list[float]]:
    """The summary of a real run, and how slow the machine was before and after it."""
    engine = LLMEngine(name, case.config)
    try:
        before = slowness(engine, model)
        summary = replay_for_real(engine, case.trace, model=name).summary
        return summary, before, slowness(engine, model)
    finally:
        engine.close()


def slowness(engine: LLMEngine, model: CostModel) -> list[float]:
    """What steps take over what they took in the calibration, for each shape that is tried."""
    stage = Stage(engine, time.perf_counter)
    stage.time(PROBES[0])
    return [
        median(
            seconds / priced
            for _ in range(NUM_PROBES)
            for priced, seconds in stage.time(shape, model.step_time)
        )
        for shape in PROBES
    ]


def compared(path: str, simulated: dict, runs: list[dict]) -> dict:
    """A metric's error and the spread of the real runs, in percent."""

    def value(summary: dict) -> float:
        for name in path.split("."):
            summary = summary[name]
        return summary  # type: ignore[return-value]

    real = [value(summary) for summary in runs]
    middle = median(real)
    return {
        "metric": path,
        "simulated": value(simulated),
        "real": real,
        "error_percent": 100 * (value(simulated) / middle - 1),
        "spread_percent": 100 * (max(real) - min(real)) / middle,
        "target_percent": TARGETS[path],
    }


def show(result: dict) -> None:
    """A case as a table."""
    left_out = len(result["attempts"]) - result["runs"]
    print(
        f"\n{result['case']}: {result['runs']} runs, {left_out} left out, {result['preemptions']} preemptions"
    )
    if not result["metrics"]:
        print("  in no run was the machine as fast as in the calibration")
        return
    print(f"  {'':<22}{'simulated':>11}{'real':>11}{'spread':>9}{'error':>9}{'target':>9}")
    for metric in result["metrics"]:
        print(
            f"  {metric['metric']:<22}{metric['simulated']:>11.4g}{median(metric['real']):>11.4g}"
            f"{metric['spread_percent']:>7.1f} %{metric['error_percent']:>+7.1f} %"
            f"{metric['target_percent']:>7} %"
        )


if __name__ == "__main__":
    main()
