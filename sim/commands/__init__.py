"""The simulator's commands. `add_commands` puts them into a parser."""

import argparse
from typing import Any

from pagellm.sim.commands.calibrate import add_calibrate
from pagellm.sim.commands.capacity import add_capacity
from pagellm.sim.commands.explore import add_explore
from pagellm.sim.commands.fit import add_fit
from pagellm.sim.commands.lab import add_lab
from pagellm.sim.commands.replay import add_replay
from pagellm.sim.commands.sweep import add_sweep
from pagellm.sim.commands.trace import add_trace


def add_commands(commands: "argparse._SubParsersAction[Any]") -> None:
    """Adds `replay`, `calibrate`, `fit`, `sweep`, `capacity`, `explore`, `lab` and `trace`.

    After parsing, `options.command(options)` runs the chosen one, which raises `PagellmError` for bad input.
    """
    add_replay(commands)
    add_calibrate(commands)
    add_fit(commands)
    add_sweep(commands)
    add_capacity(commands)
    add_explore(commands)
    add_lab(commands)
    add_trace(commands)
