"""A ledger: recorded runs of real servers, and how far simulators are from each, ours and others'.

Each run under --runs, of any format that `pagellm fit` reads, is replayed three ways:

    assumed    with the constants that are assumed for every device: nothing is fitted
    fitted     with constants fitted to the earlier half of its requests, scored by the later half
    others     what has been published of the same run, in its own file or in published_runs.json

Errors are simulated / measured - 1 of the mean. Which device and model a run is of is read from the run
itself (meta.json, the stages), else from its path, else it is as --roofline says. --chunks TRACE shows
instead how chunk sizes rank.

Run: python bench/against_servers.py --runs DIR [--json], or --chunks TRACE [--json].
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from pagellm.engine.errors import PagellmError
from pagellm.sim import CostModel, Simulator, Trace
from pagellm.sim.commands.sweep import parse_roofline
from pagellm.sim.costs.cost_model import FIT_METRICS
from pagellm.sim.costs.devices import known
from pagellm.sim.fit.fit import Fit, relative_errors
from pagellm.sim.fit.formats import load_runs
from pagellm.sim.fit.recorded_run import Experiment, RecordedRun

PUBLISHED = json.loads(Path(__file__).with_name("published_runs.json").read_text())
CHUNKS = (512, 1024, 2048, 4096, 8192)
# Device, model and number of devices; None of what is not said.
Served = tuple[str | None, str | None, int | None]
_NOTHING: Served = (None, None, None)


def main() -> None:
    """Prints the ledger."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--runs", metavar="DIR", help="recorded runs")
    what.add_argument("--chunks", metavar="TRACE", help="a trace on which chunk sizes are ranked")
    parser.add_argument(
        "--roofline", metavar="HARDWARE,MODEL[,N]", help="of runs that do not say it, as in `pagellm replay`"
    )
    parser.add_argument("--no-fit", action="store_true", help="assumed constants only")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N requests of the trace")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.roofline and options.chunks:
        parser.error("--roofline: found it beside --chunks, expected it beside --runs")
    try:
        unsaid = parse_roofline(options.roofline) if options.roofline else _NOTHING
    except PagellmError as error:
        parser.error(str(error))
    if options.chunks:
        rows = list(chunks(options.chunks, options.limit))
    else:
        runs = find(Path(options.runs))
        rows = [row for run in runs for row in ledger(run, not options.no_fit, unsaid)]
    if options.json:
        print(json.dumps(rows, indent=1))
    elif options.chunks:
        print_chunks(rows)
    else:
        print_ledger(rows)


def find(folder: Path) -> Iterator[RecordedRun]:
    """The runs under a folder; files that are none are passed over, but for those that almost are."""
    if not folder.exists():
        sys.exit(f"{folder}: not found, expected recorded runs")
    paths = [folder] if folder.is_file() else sorted(p for p in folder.rglob("*") if p.is_file())
    for path in paths:
        name = path.name.removesuffix(".gz")
        if not name.endswith((".json", ".jsonl", ".csv")) or name in ("meta.json", "config.json"):
            continue
        try:
            yield from load_runs(path)
        except PagellmError as error:
            print(f"passed over: {error}", file=sys.stderr)


def ledger(run: RecordedRun, with_fit: bool, unsaid: Served = _NOTHING) -> Iterator[dict[str, Any]]:
    """The rows of a run. unsaid: device, model and number of devices of one that does not say them."""
    hardware, model, num_devices = identify(run)
    if hardware is None or model is None:  # of others it may be published how many devices they had
        hardware, model, num_devices = hardware or unsaid[0], model or unsaid[1], num_devices or unsaid[2]
    entry = next(
        (
            entry
            for entry in PUBLISHED["runs"]
            if (entry["hardware"], entry["model"]) == (hardware, model)
            and num_devices in (None, entry["num_devices"])
        ),
        {},
    )
    num_devices = num_devices or entry.get("num_devices", unsaid[2] or 1)
    about = {"run": run.path, "hardware": hardware, "model": model, "num_devices": num_devices}
    settings = entry.get("settings", {}) if run.format != "stages" else {}
    try:
        if hardware is None or model is None:
            missing = "device" if hardware is None else "model"
            raise PagellmError(
                f"{run.path}: found no {missing} that is known, in the run or in its path: --roofline may "
                "say it"
            )
        if entry.get("engines", 1) > 1:
            raise PagellmError(
                f"{run.path}: found {entry['engines']} engines that share experts, expected one"
            )
        # With what is known of the server beside the run.
        experiments = [replace(one, settings={**settings, **one.settings}) for one in run.experiments]
        run = replace(run, experiments=experiments)
        fit = Fit(run, hardware, model, num_devices)
        for experiment in run.experiments:
            yield about | {"what": experiment.name, "simulator": "pagellm, assumed"} | scored(fit, experiment)
            for simulator, figures in experiment.published.items():
                measured = (experiment.scored or experiment.fitted).measured
                errors = {name: figures[name] / measured[name] - 1 for name in FIT_METRICS if name in figures}
                yield about | {"what": experiment.name, "simulator": simulator} | errors
        if with_fit and run.num_fitted and run.num_scored:
            costs = fit.search()
            errors = {name: costs.error[name] for name in FIT_METRICS}
            what = f"{run.num_scored} requests that were not fitted to"
            row = about | {"what": what, "simulator": "pagellm, fitted", "constants": dict(costs.constants)}
            yield row | errors
    except PagellmError as error:
        yield about | {"what": "", "simulator": "pagellm", "refused": str(error)}
    for simulator, errors in entry.get("published", {}).items():
        yield about | {"what": f"as published: {entry['source']}", "simulator": simulator} | errors


def scored(fit: Fit, experiment: Experiment) -> dict[str, float]:
    """The errors of the assumed constants on an experiment: of both halves alike, where there are two."""
    simulated = fit.replay(experiment, {})
    halves = [half for half in (experiment.fitted, experiment.scored) if half is not None]
    errors = [relative_errors(simulated, half) for half in halves]
    return {name: sum(one[name] for one in errors) / len(errors) for name in FIT_METRICS if name in errors[0]}


def identify(run: RecordedRun) -> Served:
    """Device, model and number of devices, by the names of hardware.json; None for what is not said."""
    where = run.path.replace("\\", "/")
    hardware = match(run.hardware or where, known()["hardware"], HARDWARE)
    model = match(run.model or where, known()["models"], {})
    tensor = re.search(r"tp[-_]?(\d+)", where.lower())
    return hardware, model, run.num_devices or (int(tensor[1]) if tensor else None)


# What devices are called elsewhere.
HARDWARE = {
    "h100": "h100-sxm",
    "h200": "h200-sxm",
    "a100": "a100-80gb",
    "a100sxm440gb": "a100-40gb",
    "a100pcie40gb": "a100-40gb",
    # LLMServingSim's is the Server Edition, as its meta.json has it.
    "rtxpro6000": "rtx-pro-6000-server",
    "rtxpro6000blackwellserveredition": "rtx-pro-6000-server",
    "rtxpro6000blackwellworkstationedition": "rtx-pro-6000",
}


def match(text: str, names: dict[str, Any], others: dict[str, str]) -> str | None:
    """The longest known name that a text has in it, whatever its punctuation."""
    # An alias goes before a known name that is spelled alike.
    plain = {re.sub(r"[^a-z0-9]", "", name): name for name in names} | others
    lowered = text.lower().replace("meta-", "")

    def is_in(alias: str) -> bool:
        # A model of another size begins alike: 7b is no 70b.
        spelled = "[^a-z0-9]*".join(map(re.escape, alias))
        return re.search(rf"(?<![a-z0-9]){spelled}(?![0-9])", lowered) is not None

    found = [alias for alias in plain if is_in(alias)]
    return plain[max(found, key=len)] if found else None


def print_ledger(rows: list[dict[str, Any]]) -> None:
    """Tables, one a run, and what is reached on average."""
    for run in dict.fromkeys((row["run"], row["model"], row["hardware"], row["num_devices"]) for row in rows):
        path, model, hardware, num_devices = run
        print(f"\n{path}: {model} on {num_devices} x {hardware}")
        print(f"{'':<28}" + "".join(f"{name:>12}" for name in FIT_METRICS))
        shown = None
        for row in rows:
            if (row["run"], row["model"], row["hardware"], row["num_devices"]) != run:
                continue
            if row["what"] != shown:
                shown = row["what"]
                print(f"  {shown}")
            if "refused" in row:
                print(f"  {row['refused']}")
            else:
                print(f"    {row['simulator']:<24}" + "".join(percent(row.get(name)) for name in FIT_METRICS))
    print("\nmean of the absolute errors")
    for simulator in dict.fromkeys(row["simulator"] for row in rows if "refused" not in row):
        own = [row for row in rows if row["simulator"] == simulator and "refused" not in row]
        print(f"    {simulator:<24}" + "".join(percent(mean(own, name), "") for name in FIT_METRICS))


def mean(rows: list[dict[str, Any]], name: str) -> float | None:
    """Of the absolute errors of a metric."""
    values = [abs(row[name]) for row in rows if row.get(name) is not None]
    return sum(values) / len(values) if values else None


def percent(value: float | None, sign: str = "+") -> str:
    """A cell."""
    return f"{'-':>12}" if value is None else f"{100 * value:{sign}.1f} %".rjust(12)


def chunks(path: str, limit: int | None) -> Iterator[dict[str, Any]]:
    """Throughput and mean TTFT with each chunk size, ours and those published of the Mooncake trace."""
    about = PUBLISHED["chunks"]
    trace = Trace.load(path) if limit is None else Trace.load(path).limited(limit)
    costs = CostModel.roofline(about["hardware"], about["model"], about["num_devices"])
    for size in CHUNKS:
        config = costs.settings({"max_num_batched_tokens": size, "block_size": about["block_size"]})
        summary = Simulator(config, costs).replay(trace).summary
        ours = {"throughput": summary["output_tokens_per_s"], "ttft": summary["ttft_s"]["mean"]}
        yield {"chunk": size, "simulator": "pagellm"} | ours
        for simulator, figures in about["published"].items():
            if str(size) in figures:
                yield {"chunk": size, "simulator": simulator} | figures[str(size)]


def print_chunks(rows: list[dict[str, Any]]) -> None:
    """A table of `chunks`."""
    print(f"{'chunk':>6}  {'':<46}{'output tokens/s':>16}{'mean TTFT, s':>14}")
    for row in rows:
        print(f"{row['chunk']:>6}  {row['simulator']:<46}{row['throughput']:>16,.0f}{row['ttft']:>14,.1f}")


if __name__ == "__main__":
    main()
