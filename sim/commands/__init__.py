"""The simulator's commands, a module each. `add_commands` puts them into a parser."""

import argparse
from importlib import import_module
from typing import Any

# In the order in which the help shows them. The module of each has a function `add_` and its name.
COMMANDS = ("replay", "calibrate", "fit", "sweep", "capacity", "explore", "lab", "trace")


def add_commands(commands: "argparse._SubParsersAction[Any]", chosen: str | None = None) -> None:
    """Adds all commands, or where one of them is chosen that one alone: the others need not be imported.

    After parsing, `options.command(options)` runs the chosen one, which raises `PagellmError` for bad input.
    """
    for name in [chosen] if chosen in COMMANDS else COMMANDS:
        module = import_module(f"{__name__}.{name}")
        getattr(module, f"add_{name}")(commands)
