"""How right the simulator is: the same traces simulated and served for real, metric by metric.

In each of several rounds the machine and the model are calibrated, and then traces are served that the
calibration has not seen: at 60 % of the load that can be served, at twice that load, and at twice that load
with so little KV memory that requests make way for each other. The error is that of the simulation with the
round's profile against the round's real run. The table has its median over the rounds and its range, and the
spread of the real runs from the lowest to the highest.

A machine that others use as well changes its speed for seconds or minutes at a time, and no calibration can
know that. So steps of two shapes are timed before and after each run, and beside the error over all rounds
stands that over the calm ones, in which these took what the calibration says to within 5 %.

Run: python bench/fidelity.py [--model M] [--quantization Q] [--rounds N] [--requests N] [--seconds X] [--json]
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

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
class Run:
    """The summaries of a simulated run and of a real one.

    slowness: what steps took before and after the real one, over what the calibration says.
    """

    simulated: dict
    real: dict
    slowness: list[float]

    @property
    def is_calm(self) -> bool:
        """Whether the machine was as in the calibration."""
        return all(abs(slowness - 1) <= TOLERANCE for slowness in self.slowness)

    def error(self, path: str) -> float:
        """Of the simulation, in percent."""
        return 100 * (value_at(self.simulated, path) / value_at(self.real, path) - 1)


@dataclass(frozen=True)
class Case:
    """A trace, the settings that it is served with, and a run of each round."""

    name: str
    trace: Trace
    config: EngineConfig
    runs: list[Run] = field(default_factory=list)

    def to_dict(self) -> dict:
        """For JSON; errors and the real runs' spread are in percent."""
        metrics = []
        for path, target in TARGETS.items():
            real = [value_at(run.real, path) for run in self.runs]
            metrics.append(
                {
                    "metric": path,
                    "simulated": [value_at(run.simulated, path) for run in self.runs],
                    "real": real,
                    "spread": 100 * (max(real) - min(real)) / median(real),
                    "errors": [run.error(path) for run in self.runs],
                    "target": target,
                }
            )
        return {
            "case": self.name,
            "preemptions": [
                run.real["preemptions"]["recompute"] + run.real["preemptions"]["swap"] for run in self.runs
            ],
            "slowness": [run.slowness for run in self.runs],
            "is_calm": [run.is_calm for run in self.runs],
            "metrics": metrics,
        }

    def to_text(self) -> str:
        """A table for people."""
        found = self.to_dict()
        calm = sum(found["is_calm"])
        rounds = f"{len(self.runs)} rounds, {calm} of them calm"
        lines = [
            f"{self.name}: {rounds}, {median(found['preemptions']):g} preemptions",
            f"  {'':<20}{'simulated':>10}{'real':>10}{'spread':>9}{'error':>9}{'from':>8}{'to':>8}"
            f"{'calm':>9}{'target':>8}",
        ]
        for metric in found["metrics"]:
            errors = metric["errors"]
            in_calm = [error for error, is_calm in zip(errors, found["is_calm"], strict=True) if is_calm]
            lines.append(
                f"  {metric['metric']:<20}{median(metric['simulated']):>10.4g}{median(metric['real']):>10.4g}"
                f"{metric['spread']:>7.1f} %{median(errors):>+7.1f} %{min(errors):>+8.1f}{max(errors):>+8.1f}"
                + (f"{median(in_calm):>+7.1f} %" if in_calm else f"{'-':>9}")
                + f"{metric['target']:>6} %"
            )
        return "\n".join(lines)


def value_at(summary: dict, path: str) -> float:
    """A metric by its place in a summary."""
    value: Any = summary
    for name in path.split("."):
        value = value[name]
    return float(value)


def main() -> None:
    """Prints a table for each case, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--quantization", choices=QUANTIZATIONS, default="auto")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--requests", type=int, default=100, metavar="N", help="of each trace")
    parser.add_argument("--seconds", type=float, default=60.0, metavar="X", help="of each calibration")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    config = replace(CONFIG, quantization=options.quantization)
    cases: list[Case] = []
    fits = []
    for number in range(1, options.rounds + 1):
        profile = calibrated(options.model, config, options.seconds)
        model = ProfileCostModel(profile)
        fits.append(profile["fit"])
        cases = cases or cases_for(config, model, options.requests)
        print(f"round {number}: {model.name}; fit of the profile: {profile['fit']}", file=sys.stderr)
        for case in cases:
            run = measured(case, options.model, model)
            case.runs.append(run)
            machine = ", ".join(f"{slowness:.2f}" for slowness in run.slowness)
            print(f"  {case.name}: steps take {machine} of what was calibrated", file=sys.stderr)
    if options.json:
        print(json.dumps({"machine": model.name, "fits": fits, "cases": [case.to_dict() for case in cases]}))
        return
    for case in cases:
        print(f"\n{case.to_text()}")


def calibrated(model: str, config: EngineConfig, seconds: float) -> dict:
    """A profile of this machine."""
    engine = LLMEngine(model, config)
    try:
        return calibrate(engine, model=model, seconds=seconds)
    finally:
        engine.close()


def cases_for(config: EngineConfig, model: CostModel, num_requests: int) -> list[Case]:
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


def measured(case: Case, name: str, model: CostModel) -> Run:
    """A case simulated and served."""
    engine = LLMEngine(name, case.config)
    try:
        before = slowness(engine, model)
        real = replay_for_real(engine, case.trace, model=name).summary
        after = slowness(engine, model)
    finally:
        engine.close()
    return Run(Simulator(case.config, model).replay(case.trace).summary, real, before + after)


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


if __name__ == "__main__":
    main()
