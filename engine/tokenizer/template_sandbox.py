"""A Jinja sandbox for chat templates, which are programs from whoever published the checkpoint.

Jinja's immutable sandbox keeps a template from Python's internals and from changing what it is given. On top
of it, everything that could take long or make something big is paid for out of a budget before it is done:
operators, slices, comparisons, calls, filters and tests, rounds of loops, and what is put out.
"""

import json
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import wraps
from threading import local
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes, pass_context, pass_eval_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.nodes import EvalContext
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro, markup_join, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from pagellm.engine.errors import CheckpointError, RequestError, found
from pagellm.engine.tokenizer import template_budget as costs
from pagellm.engine.tokenizer.template_budget import Budget, LimitError, words

_MAX_SOURCE_CHARS = 1 << 16
_MAX_INPUT_UNITS = 1 << 24
_MAX_OUTPUT_CHARS = 1 << 21  # and four times the input
_MAX_DATE_FORMAT_CHARS = 1000


class SandboxedTemplate:
    """One compiled template.

    takes_content_parts: whether it goes through a message's content as a list of parts.
    literals: all text that stands in it to be written, a NUL between any two.
    takes_thinking_parts: whether it takes what an assistant thought as a part of the content, and only so.

    Raises `CheckpointError` if the source does not parse.
    """

    def __init__(self, source: str) -> None:
        if len(source) > _MAX_SOURCE_CHARS:
            raise CheckpointError(
                f"chat template: found {len(source)} characters, expected at most {_MAX_SOURCE_CHARS}"
            )
        self._source = source
        self._environment = _Environment()
        try:
            tree = self._environment.parse(source)
            self.takes_content_parts = _loops_over_content(tree)
            self.literals = _literals(tree)
            self.takes_thinking_parts = "reasoning" not in source and _compares(tree, "thinking")
            code = self._environment.compile(_Metered().visit(tree))
        except (TemplateSyntaxError, SyntaxError, RecursionError, ValueError, MemoryError) as error:
            line = getattr(error, "lineno", None)
            at = f" at line {line}" if line else ""
            raise CheckpointError(f"chat template: does not parse{at}: {_short(error)}") from error
        self._template = Template.from_code(self._environment, code, dict(self._environment.globals))

    def variables(self) -> frozenset[str]:
        """The names that it reads and does not set, without those that every template has."""
        names = find_undeclared_variables(self._environment.parse(self._source))
        return frozenset(names - self._environment.globals.keys())

    def render(self, variables: dict[str, Any]) -> str:
        """The template's output. The variables are of JSON's types.

        Raises `RequestError` if the template refuses these variables, or fails on them, and `CheckpointError`
        if the template breaks the sandbox's rules.
        """
        try:
            input_size = Budget(0).size(variables)
        except RecursionError as error:
            raise RequestError("messages: found lists in lists too deep to render") from error
        except LimitError:
            input_size = _MAX_INPUT_UNITS + 1
        if input_size > _MAX_INPUT_UNITS:
            raise RequestError(f"messages: found more than {_MAX_INPUT_UNITS} characters in all")
        budget = self._environment.of_thread.budget = Budget(input_size)
        pieces: list[str] = []
        room = _MAX_OUTPUT_CHARS + 4 * input_size
        try:
            for piece in self._template.generate(variables):
                pieces.append(piece)
                budget.spend(1)
                room -= len(piece)
                if room < 0:
                    raise LimitError(f"more than {_MAX_OUTPUT_CHARS} characters of output")
        except _RefusalError as error:
            raise RequestError(f"messages: the chat template refuses them: {_short(error)}") from error
        except (SecurityError, LimitError, OverflowError, MemoryError, RecursionError) as error:
            raise CheckpointError(f"chat template: not allowed: {_short(error)}") from error
        except Exception as error:
            raise RequestError(
                f"messages: the chat template fails on them: {type(error).__name__}: {_short(error)}"
            ) from error
        return "".join(pieces)


class _RefusalError(TemplateError):
    """The template called `raise_exception`."""


class _OfThread(local):
    """The budget of the rendering that runs in this thread."""

    budget = Budget(0)


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's words for training; in a prompt it is only its body."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Dict:
    """`dict`, without what the class itself has: methods that change the dict which they are given."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace()`, which keeps no names with an underscore, and shows nothing of what is in it."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that `namespace(self=...)` works
        self, *others = args
        Namespace.__init__(self)
        for name, value in dict(*others, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace with the name {found(name)}")
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


# What a template may call of Python's own types.
_METHODS: tuple[tuple[type, frozenset[str]], ...] = (
    (
        str,
        words(
            "capitalize casefold center count endswith find format index isalnum isalpha isascii isdecimal"
            " isdigit isidentifier islower isnumeric isprintable isspace istitle isupper join ljust lower"
            " lstrip partition removeprefix removesuffix replace rfind rindex rjust rpartition rsplit rstrip"
            " split splitlines startswith strip swapcase title upper zfill"
        ),
    ),
    (dict, words("copy fromkeys get items keys values")),
    (tuple, words("count grouper index list")),  # two of them are those of the filter groupby
    (list, words("copy count index")),
    (bytes, frozenset()),
    (int, frozenset()),
    (float, frozenset({"is_integer"})),
)

# Tests that cost the same whatever they are given.
_LIGHT_TESTS = words(
    "boolean callable defined divisibleby escaped even false filter float integer iterable mapping none"
    " number odd sameas sequence string test true undefined"
)


class _Environment(ImmutableSandboxedEnvironment):
    """The environment that `transformers` gives a chat template, every operation paid for."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols, _GenerationTag],
            # Without these two, expressions of constants would be computed when a template is compiled.
            optimized=False,
            finalize=_pay_for_output,
        )
        self.of_thread = _OfThread()
        self.filters["tojson"] = _to_json
        self.filters = {name: self._metered_filter(name, f) for name, f in self.filters.items()}
        self.filters |= {
            "_step": self._step,
            "_paid": self._paid,
            "_slice": self._slice,
            "_concat": self._concat,
        }
        self.tests = {
            name: test if name in _LIGHT_TESTS else self._metered_test(test)
            for name, test in self.tests.items()
        }
        del self.globals["lipsum"]
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        self.globals["namespace"] = _Namespace
        self.globals["dict"] = _Dict()

    @property
    def budget(self) -> Budget:
        """Of the rendering that runs in this thread."""
        return self.of_thread.budget

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.budget.spend(costs.binary_operation(self.budget, operator, left, right))
        return super().call_binop(context, operator, left, right)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if not isinstance(argument, str | int):
            self.budget.spend(self.budget.size(argument))
        return super().getitem(obj, argument)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        for kind, methods in _METHODS:
            if isinstance(obj, kind):
                return attr in methods
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        formatted = super().wrap_str_format(value)
        if formatted is None:
            return None

        def paid(*args: Any, **kwargs: Any) -> str:
            values = (*args, *kwargs.values())
            self.budget.spend(costs.brace_format(self.budget, value.__self__, values))
            return formatted(*args, **kwargs)

        return paid

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        budget = __self.budget
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            args = tuple(map(budget.unrolled, args))
            in_order = (*args, *kwargs.values())
            budget.spend(costs.string_method(budget, owner, __obj.__name__, in_order))
        elif isinstance(__obj, Macro):
            budget.spend(16)
        else:
            heavy = owner if isinstance(owner, list | tuple | range) else None
            budget.spend(budget.sizes((heavy, *args, *kwargs.values())))
        return budget.made(super().call(__context, __obj, *args, **kwargs))

    # What `_Metered` puts into a template.

    def _step(self, cost: int) -> bool:
        """Pays for a round of a loop, or the body of a macro."""
        self.budget.spend(cost)
        return True

    def _paid(self, value: Any) -> Any:
        """The value, paid for with all that is in it."""
        self.budget.spend(self.budget.size(value))
        return value

    def _slice(self, value: Any, start: Any, stop: Any, step: Any) -> Any:
        """`value[start:stop:step]`."""
        self.budget.spend(2 * len(value) if isinstance(value, str | list | tuple) else 1)
        return value[start:stop:step]

    @pass_eval_context
    def _concat(self, context: EvalContext, *values: Any) -> Any:
        """`a ~ b ~ c`."""
        self.budget.spend(4 * self.budget.sizes(values))
        return (markup_join if context.autoescape else str_join)(values)

    def _metered_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        passes = hasattr(function, "jinja_pass_arg")

        @wraps(function)
        def paid(*args: Any, **kwargs: Any) -> Any:
            budget = self.budget
            given = args[passes:]
            if given and name not in costs.LAZY_FILTERS:
                given = (budget.unrolled(given[0]), *given[1:])
            budget.spend(costs.filter_call(budget, name, given, kwargs))
            return budget.made(function(*args[:passes], *given, **kwargs))

        return paid

    def _metered_test(self, function: Any) -> Callable[..., Any]:
        @wraps(function)
        def paid(*args: Any) -> Any:
            self.budget.spend(self.budget.sizes(args))
            return function(*args)

        return paid


class _Metered(NodeTransformer):
    """Puts payments into a template where Jinja has no hook: loops, slices, comparisons, `~`, keys."""

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        has_body = isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock | nodes.Block)
        step = _step(node) if has_body else None
        node = self.generic_visit(node)
        if step is not None:
            if isinstance(node, nodes.For) and node.test is not None:
                node.test = nodes.And(step, node.test, lineno=node.lineno)
            node.body.insert(0, nodes.ExprStmt(step, lineno=node.lineno))  # type: ignore[attr-defined]
        match node:
            case nodes.Concat():
                return _filter("_concat", node.nodes[0], node.nodes[1:])
            case nodes.Compare():
                node.expr = _paid(node.expr)
                for operand in node.ops:
                    operand.expr = _paid(operand.expr)
            case nodes.Pair():
                node.key = _paid(node.key)
            case nodes.Getitem(arg=nodes.Slice() as arg):
                bounds = [bound or nodes.Const(None) for bound in (arg.start, arg.stop, arg.step)]
                return _filter("_slice", node.node, bounds)
        return node


def _filter(name: str, node: nodes.Expr, args: Sequence[nodes.Expr] = ()) -> nodes.Expr:
    """A call of one of the environment's own filters, which is cheaper than that of a method."""
    call = nodes.Filter(node, name, list(args), [], None, None)
    call.set_lineno(node.lineno)
    return call


def _paid(node: nodes.Expr) -> nodes.Expr:
    return node if isinstance(node, nodes.Const) else _filter("_paid", node)


def _step(node: nodes.Node) -> nodes.Expr:
    """The payment for one walk through the body, with all text that it may put out."""
    cost = 16
    for inner in node.find_all(nodes.Node):
        cost += 2 + (len(inner.data) if isinstance(inner, nodes.TemplateData) else 0)
    return _filter("_step", nodes.Const(cost, lineno=node.lineno))


def _loops_over_content(tree: nodes.Template) -> bool:
    """Whether the template goes through a message's content as a list of parts."""
    names = set()  # what holds a content: variables and parameters of macros
    for assign in tree.find_all(nodes.Assign):
        if isinstance(assign.target, nodes.Name) and _is_content(assign.node, frozenset()):
            names.add(assign.target.name)
    passed = {
        call.node.name
        for call in tree.find_all(nodes.Call)
        if isinstance(call.node, nodes.Name) and any(_is_content(arg, frozenset()) for arg in call.args)
    }
    for macro in tree.find_all(nodes.Macro):
        if macro.name in passed:
            names |= {parameter.name for parameter in macro.args}
    return any(_is_content(loop.iter, names) for loop in tree.find_all(nodes.For))


def _compares(tree: nodes.Template, text: str) -> bool:
    """Whether the template compares anything with this text."""
    operands = [operand.expr for operand in tree.find_all(nodes.Operand)]
    return any(isinstance(operand, nodes.Const) and operand.value == text for operand in operands)


def _literals(tree: nodes.Template) -> str:
    written = [node.data for node in tree.find_all(nodes.TemplateData)]
    written += [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
    return "\0".join(written)


def _is_content(node: nodes.Node | None, names: "frozenset[str] | set[str]") -> bool:
    while isinstance(node, nodes.Filter):
        node = node.node
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    return isinstance(node, nodes.Name) and node.name in names


@pass_context
def _pay_for_output(context: Context, value: Any) -> Any:
    environment = context.environment
    assert isinstance(environment, _Environment)
    budget = environment.budget
    budget.spend(budget.size(value) * (1 if isinstance(value, str) else 4))
    return value


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."


def _raise_exception(message: object = "") -> NoReturn:
    raise _RefusalError(str(message))


def _strftime_now(format: str) -> str:
    if not isinstance(format, str) or len(format) > _MAX_DATE_FORMAT_CHARS:
        raise LimitError(f"a format of a date of more than {_MAX_DATE_FORMAT_CHARS} characters")
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
