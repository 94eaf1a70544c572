"""The command `pagellm sweep`: arguments in; tables, JSON or a page out."""

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pagellm.engine.errors import ConfigError, PagellmError
from pagellm.sim.commands.trace import add_trace_input
from pagellm.sim.costs.constants import CHOICES, CONSTANTS, FORMATS, parse_constants
from pagellm.sim.costs.cost_model import MAX_PROFILE_ERROR
from pagellm.sim.costs.devices import known
from pagellm.sim.costs.source import CostSource
from pagellm.sim.outputs import check_writable
from pagellm.sim.sweep.file import Point
from pagellm.sim.sweep.grid import SLO_LATENCIES, SLO_STATISTICS, Grid, Slo
from pagellm.sim.sweep.report import to_html, to_json, to_text, words
from pagellm.sim.sweep.serving import REPLAY_SETTINGS, SWEEP_SETTINGS
from pagellm.sim.sweep.sweep import Sweep, SweepResult, TraceFile


def add_sweep(commands: "argparse._SubParsersAction[Any]") -> None:
    """Adds `sweep`. After parsing, `options.command(options)` runs it; bad input is a `PagellmError`."""
    sweep = commands.add_parser("sweep", help="replay a trace with many settings", description=_sweep.__doc__)
    add_trace_input(sweep)
    sweep.add_argument(
        "--set", action="append", default=[], metavar="KEY=V1,V2,...", dest="grid",
        help="values of a setting: any of the engine's, or "
        f"{', '.join((*REPLAY_SETTINGS, *SWEEP_SETTINGS))}, or of a fleet's file GROUP.KEY, such as "
        "large.count; may be given repeatedly, every combination is replayed",
    )  # fmt: skip
    add_step_times(sweep)
    add_fleet(sweep)
    sweep.add_argument(
        "--slo", metavar="NAME=SECONDS,...",
        help=f"limits that a good point keeps, such as ttft_p99=1.0,tpot_p99=0.1; of "
        f"{', '.join(SLO_LATENCIES)}, each as {', '.join(SLO_STATISTICS)}; or ttft=1.0,tpot=0.05, see "
        "--attainment",
    )  # fmt: skip
    sweep.add_argument(
        "--attainment", type=float, metavar="X",
        help="the share of requests that keep limits of each, such as --slo ttft=1,tpot=0.05",
    )  # fmt: skip
    sweep.add_argument(
        "--capacity", action="store_true", help="search the highest load at which the SLO holds"
    )
    add_replays(sweep)
    sweep.add_argument("--report", metavar="FILE", help="write a page with plots")
    sweep.set_defaults(command=_sweep)


def add_step_times(parser: argparse.ArgumentParser) -> None:
    """Adds what step times come from: --profile or --roofline, one of which is needed without a fleet."""
    costs = parser.add_mutually_exclusive_group()
    costs.add_argument("--profile", metavar="FILE", help="step times: a profile or a step log")
    add_roofline(costs, parser)
    add_accept_profile_error(parser)


def add_fleet(parser: "argparse._ActionsContainer") -> None:
    """Adds --fleet, --disaggregate and --link."""
    parser.add_argument(
        "--fleet", metavar="FILE",
        help="replicas that differ, as TOML or JSON; step times and settings are those of groups without any",
    )  # fmt: skip
    parser.add_argument(
        "--disaggregate", metavar="P:D",
        help="P replicas that compute prompts, and D that go on with them, over --link",
    )  # fmt: skip
    parser.add_argument("--link", metavar="NAME", help=f"what KV goes over: {', '.join(known()['links'])}")


def add_replays(parser: argparse.ArgumentParser) -> None:
    """Adds how many replays are made, of what, and where their results go; see `make_sweep`."""
    parser.add_argument(
        "--tolerance", type=float, default=0.02, metavar="X", help="of the load (default: %(default)s)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N requests")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes (default: one for each core)")
    parser.add_argument(
        "--ray", metavar="ADDRESS",
        help="replay on a Ray cluster, auto or HOST:PORT, where pagellm is installed and files are shared",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="replays as JSON Lines; what they have is not replayed again"
    )
    parser.add_argument("--json", action="store_true", help="print JSON for machines")


def make_sweep(options: argparse.Namespace, grid: Grid, slo: Slo | None, progress: "Progress") -> Sweep:
    """The sweep of the options of a trace, `add_step_times`, `add_fleet` and `add_replays`.

    Policies are imported. Raises `ConfigError`.
    """
    grid.import_policies()
    trace = TraceFile(
        options.trace, options.limit, options.format, options.skip_bad, options.sort, options.output_len
    )
    return Sweep(
        trace,
        cost_source(options) if has_step_times(options) else None,
        grid,
        slo,
        None if options.output is None else Path(options.output),
        options.jobs,
        progress,
        options.accept_profile_error,
        options.ray,
        options.fleet,
    )


def has_step_times(options: argparse.Namespace, *others: str) -> bool:
    """Whether step times are given; else there is a fleet, whose groups have their own.

    others: names of options that are of step times, too. Raises `ConfigError` for what is given without any.
    """
    if options.profile is not None or options.roofline is not None or options.fleet is None:
        return True
    of_them = ("set_cost", "costs", "pipeline_parallel", "data_parallel", *others)
    refuse(options, of_them, "not without step times of all groups; a group has its own")
    return False


def refuse(options: argparse.Namespace, names: Iterable[str], why: str) -> None:
    """Raises `ConfigError` for the first of some options that was used; a number that is 0 was."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value is not False and value != []:
            raise ConfigError(f"{flag(name)}: {why}")


def flag(name: str) -> str:
    """How an option is written."""
    return f"--{name.replace('_', '-')}"


def parse_grid(options: argparse.Namespace, *more: str) -> Grid:
    """The grid of --set, --disaggregate and --link, and of more texts. Raises `ConfigError`."""
    given = {name: getattr(options, name) for name in ("disaggregate", "link")}
    texts = [f"{name}={values}" for name, values in given.items() if values is not None]
    return Grid.parse([*options.grid, *texts, *more])


def add_accept_profile_error(parser: "argparse._ActionsContainer") -> None:
    """Adds --accept-profile-error."""
    parser.add_argument(
        "--accept-profile-error", action="store_true",
        help=f"use a profile even if its step times are off by more than {100 * MAX_PROFILE_ERROR:g} %%",
    )  # fmt: skip


def _sweep(options: argparse.Namespace) -> None:
    """Replay a trace with every combination of some settings, or search the highest load of each."""
    if options.report is not None:
        check_writable("report", options.report, ConfigError)
    grid, progress = parse_grid(options), Progress()
    slo = None if options.slo is None else Slo.parse(options.slo, options.attainment)
    sweep = make_sweep(options, grid, slo, progress)
    try:
        result = sweep.run_capacity(options.tolerance) if options.capacity else sweep.run()
    finally:
        progress.end()
    if options.report is not None:
        to_html(result, options.report)
    print(to_json(result) if options.json else to_text(result))
    _check_any(result)


def add_roofline(choice: "argparse._ActionsContainer", parser: "argparse._ActionsContainer") -> None:
    """Adds --roofline, which may be one of a choice, --set-cost and --costs."""
    choice.add_argument(
        "--roofline", metavar="HARDWARE,MODEL[,N]",
        help="estimated step times of N devices: HARDWARE is a name in hardware.json or a file of that form; "
        "MODEL a name there, a config.json or a GGUF file",
    )  # fmt: skip
    parser.add_argument(
        "--set-cost", action="append", default=[], metavar="KEY=VALUE",
        help=f"a constant of --roofline; may be given repeatedly: weights and kv ({', '.join(FORMATS)}), "
        f"experts ({', '.join(CHOICES['experts'])}), expert_loads (a file), or one of {', '.join(CONSTANTS)}",
    )  # fmt: skip
    parser.add_argument(
        "--pipeline-parallel",
        type=int,
        metavar="N",
        help="N stages of --roofline's devices have the layers in turn",
    )
    parser.add_argument(
        "--data-parallel", type=int, metavar="N",
        help="N ranks of --roofline's devices, each with a scheduler; of a mixture, they share the experts",
    )  # fmt: skip
    parser.add_argument(
        "--costs", metavar="FILE", help="constants of --roofline that `pagellm fit` has written"
    )


def cost_source(options: argparse.Namespace) -> CostSource:
    """What step times come from, of the options of a command. Raises `ConfigError`."""
    if (options.profile is None) == (options.roofline is None):
        found = "neither" if options.profile is None else "both"
        raise ConfigError(f"step times: found {found} of --profile and --roofline, expected one of them")
    roofline = None if options.roofline is None else parse_roofline(options.roofline)
    constants = tuple(parse_constants(options.set_cost).items())
    ways = options.pipeline_parallel, options.data_parallel
    pipeline, data = (1 if way is None else way for way in ways)
    return CostSource(options.profile, roofline, constants, options.costs, pipeline, data)


def parse_roofline(text: str) -> tuple[str, str, int]:
    """HARDWARE,MODEL or HARDWARE,MODEL,N as a `CostSource` has it. Raises `ConfigError`."""
    hardware, *rest = text.split(",")
    try:
        model, number = rest if len(rest) == 2 else (*rest, "1")
        return hardware, model, int(number)
    except ValueError:
        raise ConfigError(
            f"--roofline: found {text!r}, expected HARDWARE,MODEL or HARDWARE,MODEL,N"
        ) from None


def _check_any(result: SweepResult) -> None:
    """Raises `PagellmError` where every point failed."""
    errors = [point.error for point in result.points if point.error is not None]
    if len(errors) == len(result.points):
        raise PagellmError(f"sweep: every point failed; the first: {errors[0]}")


class Progress:
    """A line on standard error for each replay; on a terminal one that is written over."""

    def __init__(self) -> None:
        self._number = 0

    def __call__(self, point: Point) -> None:
        self._number += 1
        rate = None if point.summary is None else point.summary["requests_per_s"]
        found = point.error or ("done" if rate is None else f"{rate:.4g} requests/s")
        line = f"{self._number:,} replays; {words(point.settings)}: {found}"
        if sys.stderr.isatty():
            width = os.get_terminal_size(sys.stderr.fileno()).columns - 1
            print(f"\r\x1b[K{line[:width]}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def end(self) -> None:
        """Clears a terminal's line."""
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
