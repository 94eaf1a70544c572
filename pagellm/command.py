"""One command: the engine's and the simulator's in one parser, and errors as lines for people.

Standard output carries results alone; progress and errors go to standard error. Exit status 0, 2 with one
line for bad input, 130 after Ctrl-C.
"""

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from pagellm import __version__
from pagellm.engine.checks import is_path
from pagellm.engine.commands import cli
from pagellm.engine.errors import PagellmError
from pagellm.engine.progress import say
from pagellm.streams import STANDARD_OUTPUT, discard_output

# Characters of an error; what is longer repeats some input.
_LONGEST = 1000


def run(arguments: Sequence[str]) -> int:
    """Runs one command; returns the exit status. Raises `SystemExit` for what argparse answers itself."""
    if sys.stdout is None:
        return _refuse("standard output: found it closed, expected it open, at least to /dev/null")
    for argument in arguments:
        if not is_path(argument):
            return _refuse(
                f"arguments: found {argument!r}, expected text without null characters and lone surrogates"
            )
    try:
        parser = _parser(arguments)
        try:
            options = parser.parse_args(arguments)
            command: Callable[[argparse.Namespace], None] = options.command
            with warnings.catch_warnings():
                warnings.showwarning = _say_warning
                command(options)
            return 0
        except PagellmError as error:
            return _refuse(_with_flag(str(error), parser, arguments))
        except KeyboardInterrupt:
            print(file=sys.stderr)
            return 130
        except MemoryError as error:
            return _refuse(f"out of memory: {error}" if str(error) else "out of memory")
        finally:
            sys.stdout.flush()
    except OSError as error:
        is_output = error.filename == STANDARD_OUTPUT
        if is_output:
            discard_output()
            if isinstance(error, BrokenPipeError):  # the reader has gone (`pagellm ... | head`)
                return 0
        place = "" if error.filename is None else f"{error.filename}: "
        return _refuse(f"{place}{error.strerror or error}")


def _with_flag(message: str, parser: argparse.ArgumentParser, arguments: Sequence[str]) -> str:
    """The message, and the flag of the field that it is about where it begins with one."""
    field = message.partition(":")[0]
    actions = list(parser._actions)
    for argument in arguments:
        for action in actions:
            if isinstance(action, argparse._SubParsersAction) and argument in action.choices:
                actions = list(action.choices[argument]._actions)
    flags = [action.option_strings[0] for action in actions if action.dest == field and action.option_strings]
    return f"{message} ({flags[0]})" if flags else message


def _refuse(message: str) -> int:
    """Says what is wrong in one line of bounded length; returns the exit status."""
    say(_line(message))
    return 2


def _say_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """In the place of Python's own way, which shows the line of code that warns."""
    say(_line(str(message)))


def _line(message: str) -> str:
    line = " ".join(message.split())
    if len(line) > _LONGEST:
        line = f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"
    return line


class _Parser(argparse.ArgumentParser):
    """Takes whole names of options alone: what an abbreviation means changes with the next option."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        command = self.prog.partition(" ")[2]
        sys.exit(_refuse(f"{command}: {message}" if command else message))


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser. Of the simulator no more is imported than the command needs."""
    parser = _Parser(prog="pagellm", description="Serve small language models on CPUs.")
    parser.add_argument("--version", action="version", version=f"pagellm {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    cli.add_commands(commands)
    chosen = arguments[0] if arguments else None
    if chosen not in commands.choices:
        from pagellm.sim.commands import add_commands

        add_commands(commands, chosen)
    return parser
