"""How fast traces are replayed: seconds, requests and tokens a second, and the peak of memory.

Each trace is replayed in a process of its own, with the step times of a roofline: Llama 3.1 8B on one H100.
A synthetic trace of short requests, and half of it, shows how the time grows with their number.

--overhead prints instead how many times as much processor time a replay takes with a step log, and with a
trace for Perfetto: the ratios of medians of runs that take turns, so that whatever else runs meets all alike.

Run: python bench/replay_speed.py [TRACE ...] [--synthetic N] [--arrivals WHEN] [--overhead] [--json].
The README of examples/traces says where the whole traces are.
"""

import argparse
import json
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[1]))

from pagellm.engine.config import EngineConfig
from pagellm.sim import CostModel, Simulator, Trace, Workload, synthesise

CONFIG = EngineConfig(block_size=64, max_num_seqs=256, max_num_batched_tokens=8192)
NUM_RUNS = 7  # of each kind, for the ratios
SHORT = {"prompt_len": "lognormal:64,0.7", "output_len": "lognormal:16,0.5"}


def main() -> None:
    """Prints the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("traces", nargs="*", metavar="TRACE")
    parser.add_argument("--synthetic", type=int, default=1_000_000, metavar="N", help="requests; 0: none")
    parser.add_argument("--arrivals", default="poisson:100", help="of the synthetic requests")
    parser.add_argument("--overhead", action="store_true", help="what step log and Perfetto trace cost")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    sizes = [options.synthetic // 2, options.synthetic] if options.synthetic > 1 else []
    short = [Workload(num_requests=size, arrivals=options.arrivals, **SHORT) for size in sizes]
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as processes:
        rows = list(processes.map(overhead if options.overhead else speed, [*options.traces, *short]))
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        (print_overhead if options.overhead else print_speed)(rows)


def print_speed(rows: list[dict]) -> None:
    """A table of `speed`."""
    print(
        f"{'':<40}{'requests':>11}{'tokens':>14}{'steps':>11}{'s':>8}{'requests/s':>12}{'tokens/s':>13}{'MB':>7}"
    )
    for row in rows:
        print(
            f"{row['trace'][-39:]:<40}{row['requests']:>11,}{row['tokens']:>14,}{row['steps']:>11,}"
            f"{row['wall_s']:>8.1f}{row['requests_per_s']:>12,.0f}{row['tokens_per_s']:>13,.0f}{row['peak_mb']:>7,.0f}"
        )


def print_overhead(rows: list[dict]) -> None:
    """A table of `overhead`."""
    print(f"{'':<40}{'steps':>11}{'CPU s':>8}{'us/step':>9}{'--step-log':>12}{'--perfetto':>12}{'both':>8}")
    for row in rows:
        print(
            f"{row['trace'][-39:]:<40}{row['steps']:>11,}{row['cpu_s']:>8.2f}"
            f"{1e6 * row['cpu_s'] / row['steps']:>9.1f}{row['step_log']:>12.2f}{row['perfetto']:>12.2f}"
            f"{row['both']:>8.2f}"
        )


def load(source: str | Workload) -> tuple[str, Trace]:
    """A trace, from a file or made, and what it is called."""
    if isinstance(source, str):
        trace = Trace.load(source)
        return trace.name, trace
    return f"{source.num_requests:,} short requests, {source.arrivals}", synthesise(source)


def costs() -> CostModel:
    """Where step times come from."""
    return CostModel.roofline("h100-sxm", "llama-3.1-8b")


def overhead(source: str | Workload) -> dict:
    """How many times as much processor time a replay takes when it writes what its steps were."""
    name, trace = load(source)
    with TemporaryDirectory() as folder:
        logged, perfetto = replace(CONFIG, step_log=f"{folder}/log.jsonl"), f"{folder}/perfetto.json"
        simulators = {
            "plain": Simulator(CONFIG, costs()),
            "step_log": Simulator(logged, costs()),
            "perfetto": Simulator(CONFIG, costs(), perfetto=perfetto),
            "both": Simulator(logged, costs(), perfetto=perfetto),
        }
        taken_s: dict[str, list[float]] = {kind: [] for kind in simulators}
        for run in range(NUM_RUNS + 1):
            for kind, simulator in simulators.items():
                begin = time.process_time()
                summary = simulator.replay(trace).summary
                if run:  # the first warms up
                    taken_s[kind].append(time.process_time() - begin)
    plain_s = median(taken_s["plain"])
    ratios = {kind: median(times) / plain_s for kind, times in taken_s.items() if kind != "plain"}
    return {"trace": name, "steps": summary["num_steps"], "cpu_s": plain_s, **ratios}


def speed(source: str | Workload) -> dict:
    """What replaying a trace took."""
    name, trace = load(source)
    summary = Simulator(CONFIG, costs()).replay(trace).summary
    tokens, wall_s = summary["prompt_tokens"] + summary["output_tokens"], summary["wall_s"]
    return {
        "trace": name,
        "requests": summary["num_finished"],
        "tokens": tokens,
        "steps": summary["num_steps"],
        "wall_s": wall_s,
        "requests_per_s": summary["num_finished"] / wall_s,
        "tokens_per_s": tokens / wall_s,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }


if __name__ == "__main__":
    main()
