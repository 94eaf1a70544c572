"""The command `pagellm replay`: a trace simulated, or served for real, or reports compared."""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from pagellm.engine.commands.cli import add_model_options, engine_config, given_settings
from pagellm.engine.commands.flags import Flag, add_flags
from pagellm.engine.config import DEFAULT_MODEL, EngineConfig
from pagellm.engine.errors import ConfigError, TraceError
from pagellm.engine.user_policy import import_policy
from pagellm.sim.commands.sweep import (
    add_accept_profile_error,
    add_fleet,
    add_roofline,
    cost_source,
    flag,
    has_step_times,
    refuse,
)
from pagellm.sim.commands.trace import PROGRESS_INTERVAL_S, add_trace_input, list_skipped, load_trace
from pagellm.sim.costs.cost_model import CostModel
from pagellm.sim.costs.profile import ProfileCostModel
from pagellm.sim.fleet.file import read_fleet
from pagellm.sim.fleet.fleet import disaggregated, known_link, parse_disaggregation
from pagellm.sim.outputs import check_writable
from pagellm.sim.report.metrics import SLO_NAMES
from pagellm.sim.report.report import compare, compare_json, to_html, to_text
from pagellm.sim.report.schema import Report, load_report
from pagellm.sim.router import ROUTERS
from pagellm.sim.simulator import Simulator
from pagellm.sim.traces.trace import Trace


def add_replay(commands: "argparse._SubParsersAction[Any]") -> None:
    """Adds `replay`. After parsing, `options.command(options)` runs it; bad input is a `PagellmError`."""
    replay = commands.add_parser("replay", help="replay a trace", description=_replay.__doc__)
    add_trace_input(replay, nargs="?")
    replay.add_argument(
        "--compare", nargs="+", metavar="REPORT.json",
        help="instead: how far other reports are from the first, and with --report a page of them all",
    )  # fmt: skip
    times = replay.add_argument_group("what step times come from")
    times.add_argument("--profile", metavar="FILE", help="a measured profile, or the step log of a run")
    add_roofline(times, times)
    add_accept_profile_error(times)
    times.add_argument("--real", action="store_true", help="the clock: serve the trace on the real engine")
    load = replay.add_argument_group("load")
    load.add_argument("--limit", type=int, metavar="N", help="only the first N requests")
    load.add_argument("--rate-factor", type=float, default=1.0, metavar="X", help="arrive X times as often")
    load.add_argument("--clients", type=int, metavar="N", help="closed loop: N clients in the place of times")
    load.add_argument("--replicas", type=int, default=1, metavar="N", help="engines behind a router")
    load.add_argument(
        "--router", metavar="NAME",
        help=f"{', '.join(ROUTERS)} (default: round_robin), or a Router of your own as module:Class or "
        "path/file.py:Class",
    )  # fmt: skip
    add_fleet(load)
    load.add_argument("--price", type=float, metavar="X", help="of a device an hour, in any unit")
    load.add_argument("--timeout-s", type=float, metavar="S", help="seconds after which a client gives up")
    results = replay.add_argument_group("results")
    results.add_argument(
        "--slo", type=_slo, metavar="ttft=S,...", help="goodput: at most so many seconds of ttft, tpot, e2e"
    )
    results.add_argument("-o", "--output", metavar="FILE", help="the report as JSON")
    results.add_argument("--report", metavar="FILE", help="the report as one HTML page")
    results.add_argument("--perfetto", metavar="FILE", help="steps and requests for ui.perfetto.dev")
    results.add_argument("--results", metavar="FILE", help="a line of JSON for each request")
    add_model_options(replay)
    add_flags(times, EngineConfig, {"window": Flag("simulate a model all of whose layers see N tokens only")})
    # No default model, so that it shows whether one was given.
    replay.set_defaults(model=None, command=partial(_replay, replay))


def _slo(text: str) -> dict[str, float]:
    names = [name.removesuffix("_s") for name in SLO_NAMES]
    limits: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = part.partition("=")
        name = name.strip()
        if name not in names:
            raise argparse.ArgumentTypeError(
                f"found {name!r}, expected one of {', '.join(names)}, which good requests keep, and "
                "=seconds; limits on statistics of all requests, such as ttft_p99, are for `sweep`"
            )
        try:
            limits[f"{name}_s"] = float(number)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{name}: found {number!r}, expected seconds") from None
    return limits


def _replay(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Replay a trace against the scheduler, simulated or for real, and report what came of it."""
    for name in ("output", "report"):
        if getattr(options, name):
            check_writable(name, getattr(options, name), ConfigError)
    if options.compare is not None:
        _compare(parser, options)
        return
    if options.trace is None:
        raise TraceError("TRACE: found none, expected a file, or --compare")
    trace = load_trace(options)
    if options.limit is not None:
        trace = trace.limited(options.limit)
    report = (_replay_for_real if options.real else _simulate)(trace, options)
    list_skipped(trace)
    if options.output:
        report.to_json(options.output)
    if options.report:
        report.to_html(options.report)
    print(report.to_json() if options.json else to_text(report))


def _compare(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    for name, value in vars(options).items():
        if value != parser.get_default(name) and name not in ("compare", "report", "json"):
            shown = "TRACE" if name == "trace" else flag(name)
            raise ConfigError(f"{shown}: not with --compare, which reads reports")
    if len(options.compare) < 2:
        raise ConfigError(f"--compare: found one report, {options.compare[0]}, expected at least two")
    first, *others = reports = [load_report(path) for path in options.compare]
    if options.report:
        to_html(reports, options.report)
    texts = [compare_json(first, other) if options.json else compare(first, other) for other in others]
    print("\n".join(texts) if options.json else "\n\n\n".join(texts))


def _simulate(trace: Trace, options: argparse.Namespace) -> Report:
    router = "round_robin" if options.router is None else options.router
    import_policy(router, "router")
    return _simulator(
        options,
        rate_factor=options.rate_factor,
        clients=options.clients,
        replicas=options.replicas,
        price_per_h=options.price,
        router=router,
        timeout_s=options.timeout_s,
        skip_bad=options.skip_bad,
        slo=options.slo,
        results=options.results,
        perfetto=options.perfetto,
        accept_profile_error=options.accept_profile_error,
        progress=_progress(),
    ).replay(trace)


def _simulator(options: argparse.Namespace, **others: Any) -> Simulator:
    for name in ("disaggregate", "link"):
        other = "link" if name == "disaggregate" else "disaggregate"
        if getattr(options, name) is not None and getattr(options, other) is None:
            raise ConfigError(f"{flag(name)}: not without {flag(other)}")
    if options.fleet is None:
        alike = _cost_model(options)
        config = alike.settings(given_settings(options))
        if options.disaggregate is None:
            return Simulator(config, alike, **others)
        prefill, decode = parse_disaggregation(options.disaggregate)
        price = others.pop("price_per_h")
        fleet = disaggregated(alike, config, prefill, decode, known_link(options.link), price)
        return Simulator.of_fleet(fleet, **others)
    if options.disaggregate is not None:
        raise ConfigError("--disaggregate: not with --fleet, whose groups have roles")
    has_costs = has_step_times(options, "model", "quantization", "num_threads")
    costs = _cost_model(options) if has_costs else None
    fleet = read_fleet(options.fleet, costs, given_settings(options))
    return Simulator.of_fleet(fleet, **others)


def _cost_model(options: argparse.Namespace) -> CostModel:
    if options.profile is None and options.roofline is None:
        raise ConfigError("--profile, --roofline, --real: expected one of them")
    costs = cost_source(options).load()
    if isinstance(costs, ProfileCostModel):
        if options.model not in (None, costs.model):
            raise ConfigError(f"--model: found {options.model!r}, expected the profile's, {costs.model!r}")
        return costs
    why = "not with step times that are of one model and machine already"
    refuse(options, ("model", "quantization", "num_threads"), why)
    return costs


def _replay_for_real(trace: Trace, options: argparse.Namespace) -> Report:
    simulated = ("profile", "roofline", "set_cost", "costs", "timeout_s", "accept_profile_error")
    ways = "pipeline_parallel", "data_parallel", "disaggregate"
    why = "not with --real, which serves on this machine"
    refuse(options, (*simulated, *ways, "fleet", "link", "price"), why)
    if options.router is not None:
        raise ConfigError(
            "--router: not with --real, which is one engine: `lab --confirm` confirms routers on several"
        )
    if options.replicas != 1:
        raise ConfigError(f"--replicas: found {options.replicas} with --real, expected 1")
    config = engine_config(options)
    from pagellm.engine.llm_engine import LLMEngine
    from pagellm.sim.real_replay import replay_for_real

    model = options.model or DEFAULT_MODEL
    engine = LLMEngine(model, config, show_progress=True)
    try:
        return replay_for_real(
            engine,
            trace,
            model=model,
            rate_factor=options.rate_factor,
            clients=options.clients,
            skip_bad=options.skip_bad,
            slo=options.slo,
            results=options.results,
            perfetto=options.perfetto,
            progress=_progress(),
        )
    finally:
        engine.close()


def _progress() -> Callable[[int, float], None] | None:
    """Shows on a terminal how far a replay is."""
    if not sys.stderr.isatty():
        return None
    shown = 0.0

    def show(num_ended: int, now: float) -> None:
        nonlocal shown
        if time.monotonic() - shown > PROGRESS_INTERVAL_S:
            shown = time.monotonic()
            print(f"\r\x1b[K{num_ended:,} requests, {now:,.1f} s", end="\r", file=sys.stderr, flush=True)

    return show
