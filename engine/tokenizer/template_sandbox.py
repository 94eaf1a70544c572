"""A Jinja sandbox for chat templates, which are programs from whoever published the checkpoint.

Jinja's immutable sandbox keeps a template from Python's internals and from changing what it is given. On top
of it, loop rounds and macro calls are counted, products and powers are kept small, and the output has a
largest size, so that no template runs without end. Memory is not bounded in full: a template can still build
long strings by concatenation.
"""

import json
from datetime import datetime
from threading import local
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pagellm.engine.errors import CheckpointError, RequestError

_MAX_STEPS = 250_000
_MAX_CHARS = 1 << 26
_MAX_INTEGER_BITS = 1 << 12


class SandboxedTemplate:
    """One compiled template.

    Raises:
        CheckpointError: the source does not parse.
    """

    def __init__(self, source: str) -> None:
        self._environment = _Environment()
        try:
            tree = self._environment.parse(source)
            for node in list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))):
                assert isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock)
                node.body.insert(0, _count_a_step(node.lineno))
            code = self._environment.compile(tree)
        except (TemplateSyntaxError, SyntaxError, RecursionError) as error:
            line = getattr(error, "lineno", None)
            at = f" at line {line}" if line else ""
            raise CheckpointError(f"chat template: does not parse{at}: {error}") from error
        self._template = Template.from_code(self._environment, code, dict(self._environment.globals))

    def render(self, variables: dict[str, Any]) -> str:
        """The template's output.

        Raises:
            RequestError: the template refuses these variables, or fails on them.
            CheckpointError: the template breaks the sandbox's rules.
        """
        self._environment.budget.steps = _MAX_STEPS
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(variables):
                pieces.append(piece)
                size += len(piece)
                if size > _MAX_CHARS:
                    raise _LimitError(f"more than {_MAX_CHARS} characters of output")
        except _RefusalError as error:
            raise RequestError(f"messages: the chat template refuses them: {error}") from error
        except (SecurityError, _LimitError, OverflowError, MemoryError, RecursionError) as error:
            raise CheckpointError(f"chat template: not allowed: {error}") from error
        except Exception as error:
            raise RequestError(
                f"messages: the chat template fails on them: {type(error).__name__}: {error}"
            ) from error
        return "".join(pieces)


class _RefusalError(TemplateError):
    """The template called `raise_exception`."""


class _LimitError(Exception):
    """The template did more than any chat needs."""


class _Budget(local):
    """Steps left to the render that runs in this thread."""

    steps = _MAX_STEPS


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's words for training; in a prompt it is only its body."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """The environment that `transformers` gives a chat template, with limits."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag])
        self.budget = _Budget()
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def count_step(self) -> None:
        self.budget.steps -= 1
        if self.budget.steps < 0:
            raise _LimitError(f"more than {_MAX_STEPS} loop rounds and macro calls")

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            factor = abs(right) if operator == "**" else 1
            if left.bit_length() * factor > _MAX_INTEGER_BITS or right.bit_length() > _MAX_INTEGER_BITS:
                raise _LimitError(f"an integer of more than {_MAX_INTEGER_BITS} bits")
        elif operator == "*":
            count, repeated = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(count, int) and hasattr(repeated, "__len__") and count * len(repeated) > _MAX_CHARS:
                raise _LimitError(f"a repetition of more than {_MAX_CHARS} items")
        return super().call_binop(context, operator, left, right)


def _count_a_step(lineno: int) -> nodes.Node:
    count = nodes.Call(nodes.EnvironmentAttribute("count_step"), [], [], None, None)
    return nodes.ExprStmt(count).set_lineno(lineno)


def _raise_exception(message: object = "") -> NoReturn:
    raise _RefusalError(str(message))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as the models saw it in training, without the escapes for HTML of Jinja's own filter."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
