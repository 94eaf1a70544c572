"""The command `pagellm capacity`: the highest load, the fewest replicas, the cheapest fleet."""

import argparse
import json
from dataclasses import asdict
from typing import Any

from pagellm.engine.errors import ConfigError
from pagellm.sim.commands.sweep import (
    Progress,
    add_fleet,
    add_replays,
    add_step_times,
    make_sweep,
    parse_grid,
)
from pagellm.sim.commands.trace import add_trace_input
from pagellm.sim.report.report import number_text, share_text, step_times_text
from pagellm.sim.sweep.grid import Slo
from pagellm.sim.sweep.plan import OBJECTIVES, Answer, check_any, plan
from pagellm.sim.sweep.report import words


def add_capacity(commands: "argparse._SubParsersAction[Any]") -> None:
    """Adds `capacity`. After parsing, `options.command(options)` runs it; bad input is a `PagellmError`."""
    capacity = commands.add_parser(
        "capacity", help="the highest load, the fewest replicas, the cheapest fleet",
        description=_capacity.__doc__,
    )  # fmt: skip
    add_trace_input(capacity)
    add_step_times(capacity)
    add_fleet(capacity)
    capacity.add_argument(
        "--slo", required=True, metavar="NAME=SECONDS,...",
        help="of each request, ttft=1,tpot=0.05, kept by --attainment of them; or of all, ttft_p99=1",
    )  # fmt: skip
    capacity.add_argument(
        "--attainment", type=float, default=0.9, metavar="X", help="that share (default: %(default)s)"
    )
    capacity.add_argument(
        "--rate", type=float, metavar="X", help="requests a second: seek the fewest replicas that serve them"
    )
    capacity.add_argument(
        "--seek", metavar="GROUP[,GROUP]",
        help="with --rate, of --fleet or --disaggregate: whose replicas are sought; else whether all as they "
        "are serve the rate",
    )  # fmt: skip
    capacity.add_argument(
        "--hardware",
        metavar="NAME,NAME*N,...",
        help="several kinds, or N devices of one, for --roofline's",
    )
    capacity.add_argument(
        "--price", action="append", default=[], metavar="NAME=X",
        help="of a device of that hardware an hour, in any unit; the cheapest comes first",
    )  # fmt: skip
    capacity.add_argument(
        "--objective", metavar="NAME",
        help=f"what comes first: {', '.join(OBJECTIVES)} (default: cost, where there are prices)",
    )  # fmt: skip
    capacity.add_argument(
        "--set", action="append", default=[], metavar="KEY=V1,V2,...", dest="grid", help="as in sweep"
    )
    capacity.add_argument(
        "--seeds", type=int, default=3, metavar="N",
        help="orders of the gaps between arrivals; the first is the trace's own (default: %(default)s)",
    )  # fmt: skip
    add_replays(capacity)
    capacity.set_defaults(command=_capacity)


def _capacity(options: argparse.Namespace) -> None:
    """Search the highest load under an SLO at a steady state, or the fewest replicas for a load."""
    grid = parse_grid(options, *([] if options.hardware is None else [f"hardware={options.hardware}"]))
    is_joint = any("_" not in part.partition("=")[0] for part in options.slo.split(","))
    slo = Slo.parse(options.slo, options.attainment if is_joint else None)
    progress = Progress()
    sweep = make_sweep(options, grid, slo, progress)
    try:
        answers = plan(
            sweep,
            rate=options.rate,
            seek=tuple(options.seek.split(",")) if options.seek is not None else (),
            seeds=options.seeds,
            tolerance=options.tolerance,
            prices=_prices(options.price),
            objective=options.objective,
        )
    finally:
        progress.end()
    error, fit = sweep.step_time_errors()
    if options.json:
        result = {"version": 1, "profile_error": error, "fit": fit, "slo": slo.to_dict()}
        result |= {"rate": options.rate, "seeds": options.seeds}
        print(json.dumps(result | {"answers": [asdict(answer) for answer in answers]}, allow_nan=False))
    else:
        head = [*step_times_text(error, fit), f"SLO: {slo.words()}; {options.seeds} seeds"]
        print("\n".join([*head, *map(_line, answers)]))
    check_any(answers)


def _prices(texts: list[str]) -> dict[str, float]:
    prices: dict[str, float] = {}
    for text in texts:
        name, _, price = text.partition("=")
        try:
            prices[name] = float(price)
        except ValueError:
            prices[name] = 0.0
        if not 0 < prices[name] < 1e9:
            raise ConfigError(f"price: found {text!r}, expected NAME=X, an hour of a device, above 0")
    return prices


def _line(answer: Answer) -> str:
    if answer.refused is not None:
        return f"{words(answer.settings)}: refused: {answer.refused}"
    assert answer.offered_per_s is not None
    interval = "" if answer.interval is None else f" +- {number_text(answer.interval)} (95 %)"
    parts = [_replicas(answer), f"{number_text(answer.offered_per_s)}{interval} requests/s offered"]
    if answer.attainment is not None:
        parts.append(f"at least {share_text(answer.attainment)} within the SLO")
    if answer.cost_per_h is not None:
        per_million = number_text(answer.cost_per_m)
        parts.append(f"{number_text(answer.cost_per_h)} an hour, {per_million} a million output tokens")
    if answer.wh_per_m is not None:
        parts.append(f"{number_text(answer.wh_per_m)} Wh a million output tokens")
    return f"{words(answer.settings)}: {', '.join(parts)}"


def _replicas(answer: Answer) -> str:
    groups = answer.groups or {}
    counts = " + ".join(f"{count} {name}" if name != "all" else f"{count}" for name, count in groups.items())
    return f"{counts} replica{'s' if answer.replicas != 1 else ''}"
