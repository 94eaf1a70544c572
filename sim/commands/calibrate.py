"""The command `pagellm calibrate`: an engine as it was asked for, measured into a file."""

import argparse
import json
from typing import Any

from pagellm.engine.commands.cli import ENGINE_FLAGS, given_settings
from pagellm.engine.commands.flags import add_flags
from pagellm.engine.config import DEFAULT_MODEL, EngineConfig
from pagellm.engine.errors import ConfigError
from pagellm.sim.calibration.calibrate import DEFAULT_SECONDS, calibrate
from pagellm.sim.costs.cost_model import MAX_PROFILE_ERROR
from pagellm.sim.costs.profile import ProfileCostModel, write_profile
from pagellm.sim.outputs import check_writable

# Of the engine; the others change nothing that is measured.
_SETTINGS = (
    "quantization", "num_threads", "block_size", "num_blocks", "max_num_seqs", "max_num_batched_tokens",
)  # fmt: skip
_NUM_SWAP_BLOCKS = 8  # of a second tier in memory, so that moving blocks there can be timed
_MOST_DISTURBED, _MOST_ERROR = 0.1, 0.1  # beyond these it is better to measure again


def add_calibrate(commands: "argparse._SubParsersAction[Any]") -> None:
    """Adds `calibrate`. After parsing, `options.command(options)` runs it; it raises `PagellmError`."""
    parser = commands.add_parser(
        "calibrate", help="measure step times for the simulator", description=_calibrate.__doc__
    )
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, help="a known name, a path or a hub id (default: %(default)s)"
    )
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="the profile, as JSON")
    parser.add_argument(
        "--seconds", type=float, default=DEFAULT_SECONDS, metavar="X",
        help="how long to measure; more is more precise (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="say in JSON what was written")
    group = parser.add_argument_group("engine")
    add_flags(group, EngineConfig, {name: ENGINE_FLAGS[name] for name in _SETTINGS})
    parser.set_defaults(command=_calibrate)


def _calibrate(options: argparse.Namespace) -> None:
    """Measure how long the steps of a model take on this machine, for `pagellm replay --profile`."""
    check_writable("output", options.output, ConfigError)
    config = EngineConfig(num_swap_blocks=_NUM_SWAP_BLOCKS, **given_settings(options))
    from pagellm.engine.llm_engine import LLMEngine
    from pagellm.engine.progress import progress

    engine = LLMEngine(options.model, config, show_progress=True)
    try:
        with progress("Calibrating", options.seconds) as advance:
            profile = calibrate(engine, model=options.model, seconds=options.seconds, progress=advance)
    finally:
        engine.close()
    write_profile(profile, options.output)
    if options.json:
        named = {name: profile[name] for name in ("model", "quantization", "num_threads", "machine", "fit")}
        print(json.dumps({"output": options.output} | named))
        return
    fit = profile["fit"]
    print(
        f"{options.output}: {ProfileCostModel(profile).name}\n"
        f"each step measured {fit['passes']:.1f} times; {fit['num_steps']} other steps predicted with a mean "
        f"error of {fit['mean_error']:.1%}, 9 of 10 within {fit['p90_error']:.1%}"
    )
    if fit["disturbed_share"] > _MOST_DISTURBED:
        print(
            f"the machine was slower than it can be for {fit['disturbed_share']:.0%} of the time; the "
            "profile is of what it was mostly like; measure again when it is idle"
        )
    if fit["mean_error"] > MAX_PROFILE_ERROR:
        print(
            "that is too much: measure again when the machine is idle; `replay` and `sweep` use this profile "
            "only with --accept-profile-error"
        )
    elif fit["mean_error"] > _MOST_ERROR:
        print("that is much: measure again when the machine is idle, or for more seconds")
