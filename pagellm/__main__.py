"""The command `pagellm`, also as `python -m pagellm`: the engine's commands and the simulator's.

Standard output carries results alone; progress and errors go to standard error. Exit status 0, 2 with one
line for bad input, 130 after Ctrl-C.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from io import TextIOWrapper
from typing import NoReturn

from pagellm.engine import cli
from pagellm.engine.errors import PagellmError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows a ?
    try:
        arguments = sys.argv[1:] if arguments is None else arguments
        options = _parser(arguments).parse_args(arguments)
        command: Callable[[argparse.Namespace], None] = options.command
        command(options)
        if sys.stdout is not None:
            sys.stdout.flush()
    except PagellmError as error:
        print(f"pagellm: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except (OSError, UnicodeError) as error:
        if isinstance(error, OSError):
            # What is still in the buffer cannot be written at exit either.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # otherwise the reader has gone (`pagellm ... | head`)
            print(f"pagellm: standard input or output: {error}", file=sys.stderr)
            return 2
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}", file=sys.stderr)
        sys.exit(2)


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser; the simulator is imported only where the command is none of the engine's."""
    parser = _Parser(prog="pagellm", description="Serve small language models on CPUs.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    cli.add_commands(commands)
    if not (arguments and arguments[0] in commands.choices):
        from pagellm.sim.commands import add_commands

        add_commands(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
