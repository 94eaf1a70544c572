"""The simulator's commands: arguments in, text or JSON out. `add_commands` puts them into a parser."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

from engine.cli import add_model_options, engine_config
from engine.errors import ConfigError, TraceError
from sim.calibrate_cli import add_calibrate
from sim.cost_model import CostModel
from sim.describe import describe
from sim.distributions import arrivals
from sim.metrics import Report
from sim.perfetto import from_step_log
from sim.report import compare, compare_json, load_report, to_html, to_text
from sim.router import ROUTERS
from sim.simulator import Simulator
from sim.sweep import CostSource
from sim.sweep_cli import add_sweep, parse_roofline
from sim.synth import Workload, synthesise
from sim.trace import Trace
from sim.trace_formats import FORMATS
from sim.trace_request import TraceRequest

_WORKLOAD_HELP = {
    "num_requests": "requests of the trace",
    "arrivals": "when conversations begin: poisson:RATE gamma:RATE,CV diurnal:RATE,AMPLITUDE,PERIOD",
    "prompt_len": "new tokens of each prompt: fixed:X uniform:LOW,HIGH lognormal:MEDIAN,SIGMA "
    "exponential:MEAN zipf:EXPONENT,MAX empirical:TRACE",
    "output_len": "tokens of each answer, likewise",
    "num_system_prompts": "texts that conversations begin with",
    "system_prompt_len": "tokens of each",
    "system_prompt_skew": "exponent of their popularity",
    "turns": "requests of a conversation, as a length",
    "think_time_s": "seconds between them: fixed uniform lognormal exponential",
    "seed": "the same seed gives the same trace",
}
_PROGRESS_INTERVAL_S = 0.2


def add_commands(commands: "argparse._SubParsersAction[Any]") -> None:
    """Adds `replay`, `calibrate`, `sweep` and `trace convert`, `trace describe`, `trace synth`.

    After parsing, `options.command(options)` runs the chosen one, which raises `PagellmError` for bad input.
    """
    _add_replay(commands)
    add_calibrate(commands)
    add_sweep(commands)
    trace = commands.add_parser("trace", help="read, describe and make traces", description=__doc__)
    actions = trace.add_subparsers(required=True, metavar="ACTION")

    convert = actions.add_parser("convert", help="to JSON Lines", description=_convert.__doc__)
    _add_input(convert)
    _add_output(convert)
    convert.add_argument("--limit", type=int, metavar="N", help="only the first N requests")
    convert.add_argument(
        "--rate-factor", type=float, metavar="X", help="let requests arrive X times as often"
    )
    convert.add_argument("--arrivals", metavar="SPEC", help="let them arrive at other times, as in synth")
    convert.add_argument("--seed", type=int, default=0, metavar="N", help="of these times (default: 0)")
    convert.set_defaults(command=_convert)

    description = actions.add_parser("describe", help="what it is like", description=_describe.__doc__)
    _add_input(description)
    description.add_argument("--json", action="store_true", help="print JSON for machines")
    description.set_defaults(command=_describe)

    synth = actions.add_parser("synth", help="make a trace", description=_synth.__doc__)
    _add_output(synth)
    for option in fields(Workload):
        synth.add_argument(
            f"--{option.name.replace('_', '-')}", type=type(option.default), default=option.default,
            metavar="SPEC" if isinstance(option.default, str) else "N",
            help=f"{_WORKLOAD_HELP[option.name]} (default: %(default)s)",
        )  # fmt: skip
    synth.set_defaults(command=_synth)


def _add_replay(commands: "argparse._SubParsersAction[Any]") -> None:
    replay = commands.add_parser("replay", help="replay a trace", description=_replay.__doc__)
    _add_input(replay, nargs="?")
    replay.add_argument(
        "--compare", nargs=2, metavar=("A.json", "B.json"), help="instead: how far B's report is from A's"
    )
    times = replay.add_argument_group("what step times come from")
    times.add_argument("--profile", metavar="FILE", help="a measured profile, or the step log of a run")
    times.add_argument(
        "--roofline", metavar="HARDWARE,MODEL[,N]", help="the limits of N known devices for a known model"
    )
    times.add_argument("--real", action="store_true", help="the clock: serve the trace on the real engine")
    load = replay.add_argument_group("load")
    load.add_argument("--limit", type=int, metavar="N", help="only the first N requests")
    load.add_argument("--rate-factor", type=float, default=1.0, metavar="X", help="arrive X times as often")
    load.add_argument("--clients", type=int, metavar="N", help="closed loop: N clients in the place of times")
    load.add_argument("--replicas", type=int, default=1, metavar="N", help="engines behind a router")
    load.add_argument("--router", choices=list(ROUTERS), default="round_robin")
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
    replay.set_defaults(command=_replay)


def _add_input(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    parser.add_argument("trace", metavar="TRACE", nargs=nargs, help="a file, .gz or not")
    parser.add_argument(
        "--format", metavar="NAME", help=f"{', '.join(FORMATS)} (default: as the content shows)"
    )
    parser.add_argument("--skip-bad", action="store_true", help="leave bad records out and count them")
    parser.add_argument("--sort", action="store_true", help="sort by arrival, in memory")


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", metavar="FILE", help="may end in .gz (default: standard output)")
    parser.add_argument("--json", action="store_true", help="say in JSON what was written")


def _slo(text: str) -> dict[str, float]:
    try:
        pairs = [pair.split("=") for pair in text.split(",")]
        return {f"{name.strip()}_s": float(value) for name, value in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected such as ttft=1.0,tpot=0.1") from None


def _replay(options: argparse.Namespace) -> None:
    """Replay a trace against the scheduler, simulated or for real, and report what came of it."""
    if options.compare is not None:
        a, b = (load_report(path) for path in options.compare)
        print(compare_json(a, b) if options.json else compare(a, b))
        return
    if options.trace is None:
        raise TraceError("TRACE: found none, expected a file, or --compare")
    with TemporaryDirectory() as directory:
        if options.perfetto and not options.step_log:
            options.step_log = str(Path(directory) / "steps.jsonl")
        trace = _load(options)
        if options.limit is not None:
            trace = trace.limited(options.limit)
        report = (_replay_for_real if options.real else _simulate)(trace, options)
        if options.perfetto:
            from_step_log(options.step_log, options.perfetto)
    if options.output:
        report.to_json(options.output)
    if options.report:
        to_html([report.data], options.report)
    print(report.to_json() if options.json else to_text(report.data))


def _simulate(trace: Trace, options: argparse.Namespace) -> Report:
    return Simulator(
        engine_config(options),
        _cost_model(options),
        rate_factor=options.rate_factor,
        clients=options.clients,
        replicas=options.replicas,
        router=options.router,
        timeout_s=options.timeout_s,
        skip_bad=options.skip_bad,
        slo=options.slo,
        results=options.results,
        progress=_progress(),
    ).replay(trace)


def _cost_model(options: argparse.Namespace) -> CostModel:
    if (options.profile is None) == (options.roofline is None):
        raise ConfigError(
            "--profile, --roofline, --real: expected one of them, for what step times come from"
        )
    roofline = None if options.roofline is None else parse_roofline(options.roofline)
    return CostSource(options.profile, roofline).load()


def _replay_for_real(trace: Trace, options: argparse.Namespace) -> Report:
    for name in ("profile", "roofline", "clients", "timeout_s"):
        if getattr(options, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')}: not with --real, which serves at arrival times")
    if options.replicas != 1:
        raise ConfigError(f"--replicas: found {options.replicas} with --real, expected 1")
    config = engine_config(options)
    from engine.llm_engine import LLMEngine
    from sim.real_replay import replay_for_real

    engine = LLMEngine(options.model, config, show_progress=True)
    try:
        return replay_for_real(
            engine,
            trace,
            model=options.model,
            rate_factor=options.rate_factor,
            skip_bad=options.skip_bad,
            slo=options.slo,
            results=options.results,
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
        if time.monotonic() - shown > _PROGRESS_INTERVAL_S:
            shown = time.monotonic()
            print(f"\r\x1b[K{num_ended:,} requests, {now:,.1f} s", end="\r", file=sys.stderr, flush=True)

    return show


def _convert(options: argparse.Namespace) -> None:
    """Read a trace in any format and write it as JSON Lines."""
    trace = _load(options)
    if options.limit is not None:
        trace = trace.limited(options.limit)
    if options.rate_factor is not None:
        trace = trace.scaled(options.rate_factor)
    if options.arrivals is not None:
        begin = arrivals("arrivals", options.arrivals)
        trace = trace.retimed(lambda: begin(Random(options.seed)))
    _write(trace, options)


def _describe(options: argparse.Namespace) -> None:
    """Say what a trace is like."""
    description = describe(_load(options).through(_counted))
    print(description.to_json() if options.json else description.to_text())


def _synth(options: argparse.Namespace) -> None:
    """Make a trace from distributions and a seed."""
    workload = Workload(**{option.name: getattr(options, option.name) for option in fields(Workload)})
    _write(synthesise(workload), options)


def _load(options: argparse.Namespace) -> Trace:
    return Trace.load(options.trace, format=options.format, skip_bad=options.skip_bad, sort=options.sort)


def _write(trace: Trace, options: argparse.Namespace) -> None:
    """Writes a trace and says what was written, where it does not mix with the trace itself."""
    trace = trace.through(_counted)
    number = trace.save(options.output) if options.output else trace.write(sys.stdout.buffer)
    report = sys.stdout if options.output else sys.stderr
    if options.json:
        skipped = [{"line": line, "message": message} for line, message in trace.skipped]
        counts = {"num_skipped": trace.num_skipped, "num_dropped": trace.num_dropped, "skipped": skipped}
        print(json.dumps({"output": options.output, "num_requests": number} | counts), file=report)
        return
    left_out = f"{trace.num_skipped:,} skipped, {trace.num_dropped:,} dropped"
    print(f"{number:,} requests written, {left_out}", file=report)
    for line, message in trace.skipped:
        print(f"line {line}: {message}", file=sys.stderr)


def _counted(requests: Iterator[TraceRequest]) -> Iterator[TraceRequest]:
    """The same requests, their number so far on standard error if that is a terminal."""
    if not sys.stderr.isatty():
        yield from requests
        return
    shown = time.monotonic()
    for number, request in enumerate(requests, 1):
        yield request
        if time.monotonic() - shown > _PROGRESS_INTERVAL_S:
            shown = time.monotonic()
            print(f"\r{number:,} requests", end="", file=sys.stderr, flush=True)
    print("\r\x1b[K", end="", file=sys.stderr, flush=True)
