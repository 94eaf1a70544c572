"""How right the simulator is: the same traces simulated and served for real, metric by metric.

In each of several rounds the machine and the model are calibrated, and then traces are served that the
calibration has not seen: at 60 % of the load that can be served, at twice that load, and at twice that load
with so little KV memory that requests make way for each other. The error is that of the simulation with the
round's profile against the round's real run. The table has its median over the rounds and its range, and the
spread of the real runs from the lowest to the highest.

A machine that others use as well changes its speed for seconds or minutes at a time, and no calibration can
know that. So the pace of each real run is measured: the time of all its steps over what the profile has for
them. The last error is that of a simulation whose step times are all multiplied by this one number: what is
left if the calibration had met the machine at the pace at which it served.

Run: python bench/fidelity.py [--model M] [--quantization Q] [--rounds N] [--requests N] [--seconds X]
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

from pagellm.engine import EngineConfig, LLMEngine
from pagellm.engine.config import DEFAULT_MODEL, QUANTIZATIONS
from pagellm.engine.requests.outputs import RequestOutput
from pagellm.engine.scheduling.batch import ScheduledBatch
from pagellm.sim import CostModel, Simulator, Trace, Workload, synthesise
from pagellm.sim.calibration.calibrate import calibrate
from pagellm.sim.costs.profile import ProfileCostModel
from pagellm.sim.real_replay import replay_for_real
from pagellm.sim.report.report import METRICS, error_percent

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


@dataclass(frozen=True)
class Run:
    """The reports of a real run, of its simulation, and of one at the pace of the real run."""

    real: dict
    simulated: dict
    paced: dict
    pace: float


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
        for metric in METRICS:
            if metric.path not in TARGETS:
                continue
            real, simulated, paced = (
                [metric.value(getattr(run, name)) for run in self.runs]
                for name in ("real", "simulated", "paced")
            )
            metrics.append(
                {
                    "metric": metric.path,
                    "simulated": simulated,
                    "real": real,
                    "spread": 100 * (max(real) - min(real)) / median(real),
                    "errors": list(map(error_percent, real, simulated)),
                    "errors_at_pace": list(map(error_percent, real, paced)),
                    "target": TARGETS[metric.path],
                }
            )
        return {
            "case": self.name,
            "pace": [run.pace for run in self.runs],
            "preemptions": [
                sum(run.real["summary"]["preemptions"][by] for by in ("recompute", "swap"))
                for run in self.runs
            ],
            "metrics": metrics,
        }

    def to_text(self) -> str:
        """A table for people."""
        found = self.to_dict()
        paces = ", ".join(f"{pace:.2f}" for pace in found["pace"])
        lines = [
            f"{self.name}: {median(found['preemptions']):g} preemptions, pace {paces}",
            f"  {'':<20}{'simulated':>10}{'real':>10}{'spread':>9}{'error':>9}{'from':>8}{'to':>8}"
            f"{'at pace':>9}{'target':>8}",
        ]
        for metric in found["metrics"]:
            errors = metric["errors"]
            lines.append(
                f"  {metric['metric']:<20}{median(metric['simulated']):>10.4g}{median(metric['real']):>10.4g}"
                f"{metric['spread']:>7.1f} %{median(errors):>+7.1f} %{min(errors):>+8.1f}{max(errors):>+8.1f}"
                f"{median(metric['errors_at_pace']):>+7.1f} %{metric['target']:>6} %"
            )
        return "\n".join(lines)


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
            case.runs.append(measured(case, options.model, profile))
            print(f"  {case.name}: steps took {case.runs[-1].pace:.3f} of their profile's", file=sys.stderr)
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

    most = Simulator(config, model, accept_profile_error=True).replay(trace(1e6, 1)).summary["requests_per_s"]
    few = replace(config, num_blocks=FEW_BLOCKS)
    return [
        Case("60 % load", trace(0.6 * most, 2), config),
        Case("saturation", trace(2 * most, 3), config),
        Case("memory pressure", trace(2 * most, 4), few),
    ]


def measured(case: Case, name: str, profile: dict) -> Run:
    """A case served and simulated."""
    engine = LLMEngine(name, case.config)
    try:
        real, pace = served(engine, case.trace, name, ProfileCostModel(profile))
    finally:
        engine.close()
    simulated, paced = (
        Simulator(case.config, ProfileCostModel(each), accept_profile_error=True).replay(case.trace).data
        for each in (profile, at_pace(profile, pace))
    )
    return Run(real, simulated, paced, pace)


def served(engine: LLMEngine, trace: Trace, name: str, model: CostModel) -> tuple[dict, float]:
    """The report of a real run, and the time of its steps over what a model has for them."""
    step, run = engine.step, engine.runner.run
    taken_s = predicted_s = 0.0

    def timed_step() -> list[RequestOutput]:
        nonlocal taken_s
        begin = time.perf_counter()
        outputs = step()
        taken_s += time.perf_counter() - begin
        return outputs

    def priced_run(batch: ScheduledBatch, *rest: Any) -> Any:
        nonlocal predicted_s
        predicted_s += model.step_time(batch)
        return run(batch, *rest)

    engine.step, engine.runner.run = timed_step, priced_run  # type: ignore[method-assign]
    report = replay_for_real(engine, trace, model=name).data
    return report, taken_s / predicted_s


def at_pace(profile: dict, pace: float) -> dict:
    """The profile of a machine that takes so many times as long for everything."""

    def slowed(value: Any, is_time: bool = False) -> Any:
        if isinstance(value, dict):
            return {
                name: slowed(inner, name == "seconds" or name.endswith("_s")) for name, inner in value.items()
            }
        if isinstance(value, list):
            return [slowed(inner, is_time) for inner in value]
        return value * pace if is_time else value

    slower: dict = slowed(profile)
    return slower


if __name__ == "__main__":
    main()
