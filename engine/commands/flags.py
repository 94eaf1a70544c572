"""Flags of a command made of the fields of a dataclass: its types and defaults, with a help text for each.

A flag that was not given leaves nothing behind, so that what was asked for can be told from a default.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

_METAVARS = {int: "N", float: "X", str: "TEXT"}


class Flag(NamedTuple):
    """What a field's type does not tell. names: in the place of `--field-name`."""

    help: str
    metavar: str | None = None
    choices: Sequence[str] | None = None
    names: tuple[str, ...] = ()


def add_flags(
    group: Any, kind: type[Any], flags: Mapping[str, Flag], defaults: Mapping[str, Any] | None = None
) -> None:
    """Adds a flag for each field of `flags` to a parser or a group of one.

    A switch that is on becomes `--no-...`; what has several values may be given repeatedly. defaults: those
    that the command has in the place of the class's own.
    """
    hints = get_type_hints(kind)
    all_defaults = {field.name: field.default for field in fields(kind)} | dict(defaults or {})
    for name, flag in flags.items():
        value, is_repeated = _type_of(hints[name])
        default = all_defaults[name]
        option, text = f"--{name.replace('_', '-')}", flag.help
        settings: dict[str, Any]
        if value is bool:
            settings = {"action": "store_false" if default else "store_true"}
            if default:
                option = f"--no-{name.removeprefix('enable_').replace('_', '-')}"
        else:
            settings = {"type": value, "metavar": flag.metavar or _METAVARS[value]}
            if flag.choices is not None:
                settings = {"choices": flag.choices}
            if is_repeated:
                settings["action"] = "append"
            elif default is not None and default != "":
                text += f" (default: {default})"
        group.add_argument(*(flag.names or (option,)), dest=name, default=None, help=text, **settings)


def given(options: argparse.Namespace, kind: type[Any]) -> dict[str, Any]:
    """The fields of a dataclass whose flags were given, by name."""
    values = {field.name: getattr(options, field.name, None) for field in fields(kind)}
    return {name: value for name, value in values.items() if value is not None}


def _type_of(hint: Any) -> tuple[type[Any], bool]:
    """The type of a field's value, or of each of its values, and whether it has several."""
    choices = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    for choice in choices:
        if get_origin(choice) is Sequence:
            return get_args(choice)[0], True
    [value] = [choice for choice in choices if choice is not NoneType]
    return value, False
