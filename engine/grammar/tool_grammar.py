"""Grammars, in llguidance's Lark, of answers that call tools, as each kind of model writes calls."""

import json
from dataclasses import asdict
from typing import Any, NamedTuple

from pagellm.engine.errors import RequestError
from pagellm.engine.grammar.forms import json_rule, json_schema
from pagellm.engine.requests.structured import StructuredOutputs
from pagellm.engine.tokenizer import Tokenizer


class Tool(NamedTuple):
    """A function that the model may call. parameters: a JSON schema. place: among the request's tools."""

    name: str
    parameters: dict[str, Any]
    is_strict: bool
    place: int


def answer_rule(form: StructuredOutputs) -> str:
    """What stands in a rule of Lark for the form of an answer."""
    if form.form in ("json", "json_object"):
        fields = asdict(form)
        return json_rule(json_schema(fields), fields)
    if form.choice is not None:
        return " | ".join(map(json.dumps, form.choice))
    raise RequestError(
        f"tools: found some beside a {form.form}, expected json, json_object or choice in structured_outputs"
    )


class ToolGrammars:
    """Writes grammars, in llguidance's Lark, of answers that call tools. sources: of the chat template."""

    def __init__(self, kind: str, tokenizer: Tokenizer, sources: str) -> None:
        self._kind = kind
        self._has_args_mark = "[ARGS]" in sources
        self._id_of = {text: token_id for token_id, text in tokenizer.special_texts.items()}

    def grammar(self, tools: list[Tool], may_say: bool, is_parallel: bool, answer: str | None) -> str:
        """may_say: whether the model may also say something. answer: what that is, or None."""
        rules = [f"args{n}: {json_rule(tool.parameters, {})}" for n, tool in enumerate(tools)]
        start, own = getattr(self, f"_{self._kind}")(tools, may_say, is_parallel, answer)
        answers = [] if answer is None else [f"answer: {answer}"]
        return "\n".join([f"start: {start}", *own, *answers, *rules, r"TEXT: /(.|\n)*/", ""])

    def _hermes(
        self, tools: list[Tool], may_say: bool, is_parallel: bool, answer: str | None
    ) -> tuple[str, list[str]]:
        head, end = self._marks("<tool_call>"), self._marks("</tool_call>")
        bodies = [
            f'"\\n{{\\"name\\": \\"{tool.name}\\", \\"arguments\\": " args{n} "}}\\n" {end}'
            for n, tool in enumerate(tools)
        ]
        rules = [f"body: {' | '.join(bodies)}", f"call: {head} body"]
        calls = 'call ("\\n" call)*' if is_parallel else "call"
        if not may_say:
            return calls, rules
        if answer is not None:
            return f"answer | {calls}", rules
        lazy = self._lazily("<tool_call>")
        return (
            ("said* TEXT" if is_parallel else "TEXT | said"),
            [rules[0], *lazy, "said: head body"],
        )

    def _llama3_json(
        self, tools: list[Tool], may_say: bool, is_parallel: bool, answer: str | None
    ) -> tuple[str, list[str]]:
        bodies = [
            f'"{{\\"name\\": \\"{tool.name}\\", \\"parameters\\": " args{n} "}}"'
            for n, tool in enumerate(tools)
        ]
        calls = 'call ("; " call)*' if is_parallel else "call"
        rules = [f"call: {' | '.join(bodies)}", r"SAID: /([^{](.|\n)*)?/"]
        if not may_say:
            return calls, rules[:1]
        return f"{calls} | {'SAID' if answer is None else 'answer'}", rules[: 1 if answer else 2]

    def _mistral(
        self, tools: list[Tool], may_say: bool, is_parallel: bool, answer: str | None
    ) -> tuple[str, list[str]]:
        mark = self._marks("[TOOL_CALLS]")
        if self._has_args_mark:
            bodies = [f'"{tool.name}" {self._marks("[ARGS]")} args{n}' for n, tool in enumerate(tools)]
            rules = [f"one: {' | '.join(bodies)}", f"calls: one{f' ({mark} one)*' * is_parallel}"]
        else:
            bodies = [
                f'"{{\\"name\\": \\"{tool.name}\\", \\"arguments\\": " args{n} "}}"'
                for n, tool in enumerate(tools)
            ]
            rules = [
                f"one: {' | '.join(bodies)}",
                'calls: "[" one' + ' (", " one)*' * is_parallel + ' "]"',
            ]
        if not may_say:
            return f"{mark} calls", rules
        if answer is not None:
            return f"answer | {mark} calls", rules
        return "TEXT | head calls", [*rules, *self._lazily("[TOOL_CALLS]")]

    def _gpt_oss(
        self, tools: list[Tool], may_say: bool, is_parallel: bool, answer: str | None
    ) -> tuple[str, list[str]]:
        channel, message, start = (self._marks(f"<|{name}|>") for name in ("channel", "message", "start"))
        json_type = f'{self._marks("<|constrain|>")} "json"'
        bodies = [
            f'{channel} "commentary to=functions.{tool.name} " {json_type} {message} args{n}'
            for n, tool in enumerate(tools)
        ]
        rules = [
            f'before: {channel} ("analysis" | "commentary") {message} head {start} "assistant"',
            *self._lazily("<|end|>"),
            f"call: {' | '.join(bodies)}",
        ]
        if not may_say:
            return "before* call", rules
        final = f'{channel} "final" {message} {"TEXT" if answer is None else "answer"}'
        return f"before* (call | {final})", rules

    def _marks(self, text: str) -> str:
        """A marker in a rule: a special token where it is one."""
        token_id = self._id_of.get(text)
        return json.dumps(text) if token_id is None else f"<[{token_id}]>"

    def _lazily(self, text: str) -> list[str]:
        """The rule `head`: any text up to the first such marker, and that."""
        if text in self._id_of:
            return [f"head: TEXT {self._marks(text)}"]
        return [f"head[lazy]: TEXT {json.dumps(text)}"]
