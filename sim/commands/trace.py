"""The command `pagellm trace`: traces read, described and made; and how any command is told of a trace."""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from random import Random
from typing import Any

from pagellm.engine.commands.flags import Flag, add_flags, given
from pagellm.sim.traces.describe import describe
from pagellm.sim.traces.distributions import arrivals
from pagellm.sim.traces.formats import FORMATS, format_text
from pagellm.sim.traces.request import TraceRequest
from pagellm.sim.traces.synth import Workload, synthesise
from pagellm.sim.traces.trace import Trace

_WORKLOAD_FLAGS = {
    "num_requests": Flag("requests of the trace"),
    "arrivals": Flag(
        "when conversations begin: poisson:RATE gamma:RATE,CV diurnal:RATE,AMPLITUDE,PERIOD", "SPEC"
    ),
    "prompt_len": Flag(
        "new tokens of each prompt: fixed:X uniform:LOW,HIGH lognormal:MEDIAN,SIGMA exponential:MEAN "
        "zipf:EXPONENT,MAX empirical:TRACE",
        "SPEC",
    ),
    "output_len": Flag("tokens of each answer, likewise", "SPEC"),
    "num_system_prompts": Flag("texts that conversations begin with"),
    "system_prompt_len": Flag("tokens of each"),
    "system_prompt_skew": Flag("exponent of their popularity"),
    "turns": Flag("requests of a conversation, as a length", "SPEC"),
    "think_time_s": Flag("seconds between them: fixed uniform lognormal exponential", "SPEC"),
    "models": Flag("models that conversations ask for", "NAME=SHARE,..."),
    "seed": Flag("the same seed gives the same trace"),
}
PROGRESS_INTERVAL_S = 0.2


def add_trace(commands: "argparse._SubParsersAction[Any]") -> None:
    """Adds `trace convert`, `trace describe` and `trace synth`."""
    trace = commands.add_parser("trace", help="read, describe and make traces")
    actions = trace.add_subparsers(required=True, metavar="ACTION")

    convert = actions.add_parser("convert", help="to JSON Lines", description=_convert.__doc__)
    add_trace_input(convert)
    _add_output(convert)
    convert.add_argument("--limit", type=int, metavar="N", help="only the first N requests")
    convert.add_argument(
        "--rate-factor", type=float, metavar="X", help="let requests arrive X times as often"
    )
    convert.add_argument("--arrivals", metavar="SPEC", help="let them arrive at other times, as in synth")
    convert.add_argument("--seed", type=int, default=0, metavar="N", help="of these times (default: 0)")
    convert.set_defaults(command=_convert)

    description = actions.add_parser("describe", help="what it is like", description=_describe.__doc__)
    add_trace_input(description)
    description.add_argument("--json", action="store_true", help="print JSON for machines")
    description.set_defaults(command=_describe)

    synth = actions.add_parser("synth", help="make a trace", description=_synth.__doc__)
    _add_output(synth)
    add_flags(synth, Workload, _WORKLOAD_FLAGS)
    synth.set_defaults(command=_synth)


def add_trace_input(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    """Adds a trace and how its file is read."""
    parser.add_argument("trace", metavar="TRACE", nargs=nargs, help="a file, .gz or not")
    parser.add_argument(
        "--format", metavar="NAME", help=f"{', '.join(FORMATS)} (default: as the content shows)"
    )
    parser.add_argument(
        "--output-len", type=int, metavar="N", help="tokens to generate where the trace does not say it"
    )
    parser.add_argument("--skip-bad", action="store_true", help="leave bad records out and count them")
    parser.add_argument("--sort", action="store_true", help="sort by arrival, in memory")


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", metavar="FILE", help="may end in .gz (default: standard output)")
    parser.add_argument("--json", action="store_true", help="say in JSON what was written")


def _convert(options: argparse.Namespace) -> None:
    """Read a trace in any format and write it as JSON Lines."""
    trace = load_trace(options)
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
    description = describe(load_trace(options).through(_counted))
    print(description.to_json() if options.json else description.to_text())


def _synth(options: argparse.Namespace) -> None:
    """Make a trace from distributions and a seed."""
    _write(synthesise(Workload(**given(options, Workload))), options)


def load_trace(options: argparse.Namespace) -> Trace:
    """The trace that the options of `add_trace_input` tell of. Raises `TraceError`."""
    return Trace.load(
        options.trace,
        format=options.format,
        skip_bad=options.skip_bad,
        sort=options.sort,
        output_len=options.output_len,
    )


def _write(trace: Trace, options: argparse.Namespace) -> None:
    """Writes a trace and says what was written, where it does not mix with the trace itself."""
    trace = trace.through(_counted)
    if options.output is None or _is_standard_output(options.output):
        number, report = trace.write(sys.stdout.buffer), sys.stderr
    else:
        number, report = trace.save(options.output), sys.stdout
    if options.json:
        counts = {"format": trace.format, "num_skipped": trace.num_skipped, "num_dropped": trace.num_dropped}
        written = {"output": options.output, "num_requests": number} | counts
        print(json.dumps(written | {"skipped": trace.skipped_records()}), file=report)
        return
    left_out = f"{trace.num_skipped:,} skipped, {trace.num_dropped:,} dropped"
    why = ", with nothing to generate" if trace.num_dropped else ""
    print(f"{number:,} requests written, {left_out}{why}", file=report)
    if trace.format == "mooncake-s":  # a choice that the file's content made
        print(f"read as {format_text(trace.format)}", file=report)
    list_skipped(trace)


def _is_standard_output(path: str) -> bool:
    """Whether a name stands for standard output: opened anew, what is written to both would be mixed up."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(sys.stdout.fileno()))
    except (OSError, ValueError):
        return False


def list_skipped(trace: Trace) -> None:
    """Names the bad records that were left out, on standard error."""
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
        if time.monotonic() - shown > PROGRESS_INTERVAL_S:
            shown = time.monotonic()
            print(f"\r{number:,} requests", end="", file=sys.stderr, flush=True)
    print("\r\x1b[K", end="", file=sys.stderr, flush=True)
