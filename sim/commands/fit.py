"""The command `pagellm fit`: a recorded run of a server in, a file of constants with their error out."""

import argparse
import json
import sys
from typing import Any

from pagellm.engine.commands.cli import ENGINE_FLAGS, given_settings
from pagellm.engine.commands.flags import add_flags
from pagellm.engine.config import EngineConfig
from pagellm.engine.errors import ConfigError
from pagellm.sim.commands.sweep import parse_roofline
from pagellm.sim.costs.constants import parse_constants
from pagellm.sim.costs.fitted import FittedCosts
from pagellm.sim.fit.fit import FITTABLE, MAX_CONSTANTS, MIN_CONSTANTS, Fit
from pagellm.sim.fit.formats import load_run
from pagellm.sim.fit.recorded_run import RecordedRun
from pagellm.sim.outputs import check_writable
from pagellm.sim.report.report import fit_text

# Of the engine that served, where the run does not say.
_SETTINGS = (
    "block_size", "num_blocks", "max_num_seqs", "max_num_batched_tokens", "max_model_len",
    "enable_prefix_caching", "policy", "preemption",
)  # fmt: skip


def add_fit(commands: "argparse._SubParsersAction[Any]") -> None:
    """Adds `fit`. After parsing, `options.command(options)` runs it; bad input is a `PagellmError`."""
    parser = commands.add_parser(
        "fit", help="fit step times to a recorded run of a server", description=_fit.__doc__
    )
    parser.add_argument("run", metavar="RUN", help="what a benchmark recorded: a file, or its directory")
    parser.add_argument(
        "--roofline", required=True, metavar="HARDWARE,MODEL[,N]", help="what served, as in `replay`"
    )
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="for --costs, as JSON")
    parser.add_argument(
        "--constants", metavar="NAME,...",
        help=f"{MIN_CONSTANTS} to {MAX_CONSTANTS} that are fitted (default: as fits the run), of "
        f"{', '.join(FITTABLE)}",
    )  # fmt: skip
    parser.add_argument(
        "--set-cost", action="append", default=[], metavar="KEY=VALUE", help="a constant that is held"
    )
    parser.add_argument("--json", action="store_true", help="say in JSON what was written")
    group = parser.add_argument_group("the engine that served, where the run does not say")
    add_flags(group, EngineConfig, {name: ENGINE_FLAGS[name] for name in _SETTINGS})
    parser.set_defaults(command=_fit)


def _fit(options: argparse.Namespace) -> None:
    """Fit constants of estimated step times to one half of a recorded run, and score them by the other."""
    check_writable("output", options.output, ConfigError)
    run = load_run(options.run)
    hardware, model, num_devices = parse_roofline(options.roofline)
    if run.num_devices not in (None, num_devices):
        raise ConfigError(f"--roofline: found {num_devices} devices, expected {run.num_devices} of the run")
    names = tuple(filter(None, (options.constants or "").split(",")))
    fit = Fit(
        run,
        hardware,
        model,
        num_devices,
        constants=names,
        given=parse_constants(options.set_cost),
        settings=given_settings(options),
        progress=_show if sys.stderr.isatty() else None,
    )
    costs = fit.search()
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    costs.write(options.output)
    if options.json:
        print(json.dumps({"output": options.output, "format": run.format, **costs.to_json()}))
        return
    print(_text(run, costs, options.output))


def _text(run: RecordedRun, costs: FittedCosts, output: str) -> str:
    left_out = f", {run.num_left_out:,} left out" if run.num_left_out else ""
    lines = [f"{run.path}: {run.format}{left_out}"]
    lines += [f"{name:<22}{value:.4g}" for name, value in costs.constants.items()]
    lines += fit_text(costs.error)
    lines.append(f"{output}: written, for --costs")
    return "\n".join(lines)


def _show(num_replays: int) -> None:
    print(f"\r\x1b[K{num_replays} replays", end="", file=sys.stderr, flush=True)
