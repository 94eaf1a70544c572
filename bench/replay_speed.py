"""How fast traces are replayed: seconds, requests and tokens a second, and the peak of memory.

Each trace is replayed in a process of its own, with the step times of a roofline: Llama 3.1 8B on one H100.
A synthetic trace of short requests, and half of it, shows how the time grows with their number.

Run: python bench/replay_speed.py [TRACE ...] [--synthetic N] [--json]. The README of examples/traces says
where the whole traces are.
"""

import argparse
import json
import resource
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from pagellm.engine.config import EngineConfig
from pagellm.sim import CostModel, Simulator, Trace, Workload, synthesise

CONFIG = EngineConfig(block_size=64, max_num_seqs=256, max_num_batched_tokens=8192)
EFFICIENCY = 0.6  # of the peak rates: about what serving engines reach
SHORT = {"arrivals": "poisson:100", "prompt_len": "lognormal:64,0.7", "output_len": "lognormal:16,0.5"}


def main() -> None:
    """Prints the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("traces", nargs="*", metavar="TRACE")
    parser.add_argument("--synthetic", type=int, default=1_000_000, metavar="N", help="requests; 0: none")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    sizes = [options.synthetic // 2, options.synthetic] if options.synthetic > 1 else []
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as processes:
        rows = list(processes.map(replay, [*options.traces, *sizes]))
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    print(
        f"{'':<40}{'requests':>11}{'tokens':>14}{'steps':>11}{'s':>8}{'requests/s':>12}{'tokens/s':>13}{'MB':>7}"
    )
    for row in rows:
        print(
            f"{row['trace'][-39:]:<40}{row['requests']:>11,}{row['tokens']:>14,}{row['steps']:>11,}"
            f"{row['wall_s']:>8.1f}{row['requests_per_s']:>12,.0f}{row['tokens_per_s']:>13,.0f}{row['peak_mb']:>7,.0f}"
        )


def replay(source: str | int) -> dict:
    """What replaying a trace's file, or so many synthetic requests, took."""
    if isinstance(source, str):
        trace = Trace.load(source)
    else:
        trace = synthesise(Workload(num_requests=source, **SHORT))
    costs = CostModel.roofline("h100-sxm", "llama-3.1-8b", efficiency=EFFICIENCY)
    summary = Simulator(CONFIG, costs).replay(trace).summary
    tokens, wall_s = summary["prompt_tokens"] + summary["output_tokens"], summary["wall_s"]
    return {
        "trace": trace.name if isinstance(source, str) else f"synthetic, {source:,} short requests",
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
