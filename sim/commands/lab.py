"""The command `pagellm lab`: policies beside what is built in, in one table and page, and confirmed."""

import argparse
import json
import sys
from typing import Any

from pagellm.engine.checks import integer
from pagellm.engine.errors import ConfigError, PagellmError
from pagellm.sim.commands.sweep import add_accept_profile_error, add_roofline, cost_source
from pagellm.sim.lab import Confirmation, Entry, entries, replay, small
from pagellm.sim.outputs import check_writable
from pagellm.sim.report.report import number_text, seconds_text, step_times_text, to_html
from pagellm.sim.report.schema import Report
from pagellm.sim.sweep.grid import Grid
from pagellm.sim.sweep.serving import CONFIG_TYPES
from pagellm.sim.traces.trace import Trace


def add_lab(commands: "argparse._SubParsersAction[Any]") -> None:
    """Adds `lab`. After parsing, `options.command(options)` runs it; bad input is a `PagellmError`."""
    lab = commands.add_parser("lab", help="compare policies of your own", description=_lab.__doc__)
    lab.add_argument("policies", nargs="+", metavar="POLICY.py", help="files that define policies")
    lab.add_argument(
        "--trace", action="append", required=True, dest="traces", metavar="TRACE", help="may be repeated"
    )
    lab.add_argument("--limit", type=int, metavar="N", help="only the first N requests of each")
    times = lab.add_mutually_exclusive_group(required=True)
    times.add_argument("--profile", metavar="FILE", help="step times: a profile")
    add_roofline(times, lab)
    add_accept_profile_error(lab)
    lab.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="settings",
        help="a setting of the engine, for all policies; may be repeated",
    )  # fmt: skip
    lab.add_argument(
        "--replicas", type=int, default=4, metavar="N", help="engines behind a router (default: %(default)s)"
    )
    lab.add_argument(
        "--confirm", metavar="MODEL", help="and confirm each on the real engine, with so many requests:"
    )
    lab.add_argument(
        "--confirm-requests", type=int, default=12, metavar="N",
        help="the first of the first trace, made small (default: %(default)s)",
    )  # fmt: skip
    lab.add_argument("--report", metavar="FILE", help="all replays on one HTML page")
    lab.add_argument("--json", action="store_true", help="print JSON for machines")
    lab.set_defaults(command=_lab)


def _lab(options: argparse.Namespace) -> None:
    """Replay policies on traces beside what is built in, and confirm their decisions and bits for real."""
    if options.report:
        check_writable("report", options.report, ConfigError)
    given = _given(options.settings)
    integer("confirm_requests", options.confirm_requests, 1, error=ConfigError)
    found = list(entries(options.policies))
    chosen = [Entry("built in"), *found]
    if any(entry.setting == "router" for entry in found):
        chosen.append(Entry("round robin", "router", "round_robin"))
    costs = cost_source(options).load()
    traces = [Trace.load(path) for path in options.traces]
    if options.limit is not None:
        traces = [trace.limited(options.limit) for trace in traces]
    rows: list[dict[str, Any]] = []
    reports: list[Report] = []
    for trace in traces:
        for entry in chosen:
            try:
                report = replay(entry, trace, costs, given, options.replicas, options.accept_profile_error)
            except PagellmError as error:
                if entry.value is None:  # nobody's policy is to blame
                    raise
                rows.append(_row(trace.name, entry, None, str(error)))
                continue
            reports.append(report)
            rows.append(_row(trace.name, entry, report))
    confirmed = _confirm(options, traces[0], found) if options.confirm else []
    if options.report:
        to_html(reports, options.report)
    if options.json:
        result = {"version": 1, "profile_error": costs.error, "fit": costs.fit}
        print(json.dumps(result | {"rows": rows, "confirmed": confirmed}, allow_nan=False))
    else:
        head = step_times_text(costs.error, costs.fit)
        print("\n".join([*head, *_table(rows), *map(_confirmed_text, confirmed)]))
    failed = [row["error"] for row in rows if row["error"]]
    if failed:
        raise PagellmError(f"lab: {len(failed)} of {len(rows)} replays failed; the first: {failed[0]}")
    if any(one["error"] for one in confirmed):
        raise PagellmError("lab: not every policy was confirmed")


def _given(texts: list[str]) -> dict[str, Any]:
    """The settings of the engine that are for all policies. Raises `ConfigError`."""
    grid = Grid.parse(texts)
    for name in grid.axes:
        if name not in CONFIG_TYPES:
            raise ConfigError(f"set: found key {name!r}, expected a setting of the engine")
    if len(grid) != 1:
        raise ConfigError("set: found several values of a setting, expected one, which is for all policies")
    grid.import_policies()
    [given] = grid
    return given


def _row(trace: str, entry: Entry, report: Report | None, error: str | None = None) -> dict[str, Any]:
    """What a policy made of a trace, or why its replay failed."""
    row = {"trace": trace, "policy": entry.name, "kind": entry.setting, "error": error}
    if report is None:
        return row
    summary = report.summary
    return row | {
        "requests_per_s": summary["requests_per_s"],
        "ttft_mean_s": summary["ttft_s"]["mean"],
        "ttft_p99_s": summary["ttft_s"]["p99"],
        "tpot_p99_s": summary["tpot_s"]["p99"],
        "hit_rate": summary["cache"]["hit_rate"],
        "preemptions": summary["preemptions"]["recompute"] + summary["preemptions"]["swap"],
        "refused": summary["num_rejected"],
    }


def _confirm(options: argparse.Namespace, trace: Trace, found: list[Entry]) -> list[dict[str, Any]]:
    confirm = Confirmation(options.confirm, small(trace, options.confirm_requests))
    results = []
    for entry in found:
        result: dict[str, Any] = {"policy": entry.name, "steps": None, "tokens": None, "error": None}
        print(f"{entry.name} on {options.confirm} ...", file=sys.stderr, flush=True)
        try:
            result["steps"], result["tokens"] = confirm(entry)
        except PagellmError as error:
            result["error"] = str(error)
        results.append(result)
    return results


def _confirmed_text(result: dict[str, Any]) -> str:
    if result["error"]:
        return f"{result['policy']}: NOT confirmed: {result['error']}"
    return (
        f"{result['policy']}: confirmed: {result['steps']} steps decided alike, {result['tokens']} tokens to "
        "the bit"
    )


def _table(rows: list[dict[str, Any]]) -> list[str]:
    def seconds(value: float | None) -> str:
        return "-" if value is None else seconds_text(value)

    lines = []
    for trace in dict.fromkeys(row["trace"] for row in rows):
        lines.append(trace)
        lines.append(
            f"{'':<16}{'kind':<11}{'requests/s':>11}{'TTFT mean':>11}{'TTFT P99':>11}{'TPOT P99':>11}"
            f"{'hits':>8}{'preempted':>11}{'refused':>9}"
        )
        for row in rows:
            if row["trace"] == trace and row["error"]:
                lines.append(f"{row['policy'][:15]:<16}{row['kind'] or '':<11}failed: {row['error']}")
            elif row["trace"] == trace:
                hits = "-" if row["hit_rate"] is None else f"{row['hit_rate']:.1%}"
                lines.append(
                    f"{row['policy'][:15]:<16}{row['kind'] or '':<11}{number_text(row['requests_per_s']):>11}"
                    f"{seconds(row['ttft_mean_s']):>11}{seconds(row['ttft_p99_s']):>11}"
                    f"{seconds(row['tpot_p99_s']):>11}{hits:>8}{row['preemptions']:>11,}{row['refused']:>9,}"
                )
        lines.append("")
    return lines
