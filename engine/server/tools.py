"""Tools of a request: what the model is told of them, what it may write, and how its calls are read.

Of use to every endpoint that takes tools. `plan_tools` checks a request's tools and `tool_choice` and gives a
`ToolPlan`; then

- `plan.form`, if any, is the request's `SamplingParams.structured`, in the place of what `answer_form` was;
- if `plan.parser` is not None, the request runs with `skip_special_tokens=False`, and with
  `separate_reasoning` only if `plan.separates_reasoning`; its text goes through `plan.parser()`, one for each
  completion: `append` with each new piece, `finish` at its end. They give texts that are said, `ToolCall`
  and `Thought`: see `engine/requests/tool_calls.py`. What is told apart as reasoning goes through
  `plan.thought_parser()` in the same way, which gives texts alone.

`tell_tools` makes of messages and tools what the chat template takes. Nothing here knows HTTP. All raise
`RequestError` for what cannot be had.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from uuid import uuid4

from pagellm.engine.checks import flag
from pagellm.engine.errors import RequestError, found
from pagellm.engine.grammar.forms import closed_where_unsaid
from pagellm.engine.grammar.tool_grammar import Tool, ToolGrammars, answer_rule
from pagellm.engine.grammar.trial import CostlyGrammarError
from pagellm.engine.llm import LLM
from pagellm.engine.requests.structured import StructuredOutputs
from pagellm.engine.requests.tool_calls import (
    GPT_OSS,
    HERMES,
    LLAMA3_JSON,
    MISTRAL,
    PARSERS,
    PlainText,
    ToolParser,
    new_parser,
)
from pagellm.engine.tokenizer.chat_template import ChatTemplate

AUTO = "auto"  # what the chat template says
MAX_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")
_INSTRUCTIONS = """You can call functions. These are the functions, one a line, as JSON:
<tools>
%s
</tools>
To call one, write a JSON object with its name and arguments between tags:
<tool_call>
{"name": "...", "arguments": {...}}
</tool_call>"""


@dataclass(frozen=True)
class ToolPlan:
    """What becomes of a request's tools. See the module."""

    form: StructuredOutputs | None = None
    parser: Callable[[], ToolParser] | None = None
    separates_reasoning: bool = True
    thought_parser: Callable[[], ToolParser] = PlainText


def tell_tools(
    llm: LLM, messages: Sequence[Mapping[str, Any]], tools: list[Any] | None, template_name: str | None = None
) -> tuple[list[dict[str, Any]], list[Any] | None]:
    """Messages, and tools, as this model's chat template takes them.

    Where it knows of no tools a system message tells of them, and calls and their results are text.
    """
    written = [dict(message) for message in messages]
    template = llm.tokenizer.chat_template
    if template is None:
        return written, tools
    if _kind_of(llm) == MISTRAL:
        written = [_with_short_ids(message) for message in written]
    if "tools" in _names_in(template, template_name):
        return written, tools
    if "tool_calls" not in _sources(template):
        written = [_as_text(message) for message in written]
    if tools:
        told = _INSTRUCTIONS % "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        first = written[0] if written else {}
        instructions = _joined(first.get("content"))
        if first.get("role") == "system" and isinstance(instructions, str):
            first["content"] = f"{instructions}\n\n{told}"
        else:
            written.insert(0, {"role": "system", "content": told})
    return written, None


def new_call_id() -> str:
    """An id that no other call has."""
    return f"call_{uuid4().hex[:24]}"


def plan_tools(
    llm: LLM,
    tools: Any,
    tool_choice: Any = None,
    parallel_tool_calls: bool | None = None,
    answer_form: StructuredOutputs | None = None,
    template_name: str | None = None,
    skip_special_tokens: bool = True,
) -> ToolPlan:
    """What becomes of a request's tools, in OpenAI's form ({"type": "function", "function": {...}}).

    answer_form: of what the model says where it calls no tool. template_name: of the chat template that is
    asked for. skip_special_tokens: as the request has it. Takes a while, as grammars are compiled.
    """
    known = read_tools(tools)
    mode, chosen = _choice(tool_choice, known)
    if not known or mode == "none":
        return ToolPlan(answer_form)
    template = llm.tokenizer.chat_template
    kind = _kind_of(llm)
    knows_tools = template is not None and "tools" in _names_in(template, template_name)
    if kind is None and knows_tools and mode == "auto":
        raise RequestError(
            "tool_choice: found 'auto', expected 'none', 'required' or a function: this model's template "
            f"does not say how it writes calls; the setting tool_call_parser does ({', '.join(PARSERS)})"
        )
    kind = kind or HERMES
    names = [tool.name for tool in known]
    unsaid = list(llm.tokenizer.special_texts.values()) if skip_special_tokens else []
    plan = ToolPlan(
        answer_form, partial(new_parser, kind, names, unsaid), kind != GPT_OSS, partial(PlainText, (), unsaid)
    )
    is_parallel = parallel_tool_calls is not False
    if mode == "auto" and is_parallel and answer_form is None and not any(tool.is_strict for tool in chosen):
        return plan
    writer = ToolGrammars(kind, llm.tokenizer, "" if template is None else _sources(template))
    return replace(plan, form=_form(llm, writer, chosen, mode == "auto", is_parallel, answer_form))


def read_tools(tools: Any) -> list[Tool]:
    """A request's tools, checked."""
    if not tools:
        return []
    if not isinstance(tools, list) or len(tools) > MAX_TOOLS:
        raise RequestError(f"tools: found {found(tools)}, expected a list of at most {MAX_TOOLS} functions")
    known: dict[str, Tool] = {}
    for index, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or tool.get("type", "function") != "function":
            raise RequestError(
                f'tools[{index}]: found {found(tool)}, expected {{"type": "function", "function": {{...}}}}'
            )
        name, parameters, strict = (function.get(key) for key in ("name", "parameters", "strict"))
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise RequestError(
                f"tools[{index}].function.name: found {found(name)}, expected up to 128 letters or digits"
            )
        if name in known:
            raise RequestError(f"tools[{index}].function.name: found {name} for the second time")
        if not isinstance(parameters, dict | None):
            raise RequestError(
                f"tools[{index}].function.parameters: found {found(parameters)}, expected a JSON schema"
            )
        is_strict = strict is not None and flag(f"tools[{index}].function.strict", strict)
        schema = parameters or {"type": "object", "properties": {}}
        whole = closed_where_unsaid({"type": "object", **schema})
        known[name] = Tool(name, whole, is_strict, index)
    return list(known.values())


def _kind_of(llm: LLM) -> str | None:
    """How the model writes calls, one of `PARSERS`; None if that is not known."""
    setting, template = llm.engine.config.tool_call_parser, llm.tokenizer.chat_template
    if setting != AUTO:
        return setting
    return None if template is None else parser_of_template(template)


def parser_of_template(template: ChatTemplate) -> str | None:
    """How a model with this chat template writes calls; None if that is not known."""
    sources = _sources(template)
    if "<|channel|>" in sources and " to=" in sources:
        return GPT_OSS
    if "[TOOL_CALLS]" in sources:
        return MISTRAL
    if re.search(r"<tool_call>\s*(\\n)*\s*\{\s*\\*['\"]name", sources):
        return HERMES
    if re.search(r"\{\\*\"name\\*\":.{0,200}\\*\"parameters\\*\":", sources, re.DOTALL):
        return LLAMA3_JSON
    return None


def _sources(template: ChatTemplate) -> str:
    return "\0".join(template.sources.values())


def _names_in(template: ChatTemplate, name: str | None) -> frozenset[str]:
    """The variables that the template reads where there are tools."""
    return frozenset(template.template(name, []).variables())


def _choice(choice: Any, tools: list[Tool]) -> tuple[str, list[Tool]]:
    """none, auto or required; and the tools that may be called."""
    if choice is None:
        return ("auto" if tools else "none"), tools
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        allowed = choice.get("allowed_tools")
        allowed = allowed if isinstance(allowed, dict) else choice
        mode, listed = allowed.get("mode", "auto"), allowed.get("tools")
        if mode not in ("auto", "required") or not isinstance(listed, list) or not listed:
            raise RequestError(
                f"tool_choice: found {found(choice)}, expected allowed_tools with mode and tools"
            )
        return mode, [_named(one, tools) for one in listed]
    if isinstance(choice, dict):
        return "required", [_named(choice, tools)]
    if choice not in ("none", "auto", "required"):
        raise RequestError(
            f"tool_choice: found {found(choice)}, expected 'none', 'auto', 'required' or a function"
        )
    if choice == "required" and not tools:
        raise RequestError("tool_choice: found 'required' without tools, expected 'none' or 'auto'")
    return choice, tools


def _named(choice: Any, tools: list[Tool]) -> Tool:
    function = choice.get("function", choice) if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    for tool in tools:
        if tool.name == name:
            return tool
    raise RequestError(f"tool_choice: found {found(choice)}, expected a function that is among the tools")


def _form(
    llm: LLM, writer: ToolGrammars, tools: list[Tool], may_say: bool, is_parallel: bool,
    answer_form: StructuredOutputs | None,
) -> StructuredOutputs:  # fmt: skip
    """The form of an answer that calls these tools; a schema that is not strict may go unheeded.

    One that is costly is refused, strict or not, before others are tried.
    """
    answer = None if answer_form is None or not may_say else answer_rule(answer_form)

    def written(tools: list[Tool]) -> StructuredOutputs:
        return StructuredOutputs(grammar=writer.grammar(tools, may_say, is_parallel, answer))

    bound = [_with_any_arguments(tool) if may_say and not tool.is_strict else tool for tool in tools]
    try:
        llm.engine.compile_form(written(bound))
    except CostlyGrammarError as whole:
        raise RequestError(f"tools: {str(whole).removeprefix('structured.grammar: ')}") from None
    except RequestError as whole:
        kept = []
        for tool in bound:
            try:
                llm.engine.compile_form(StructuredOutputs(json=tool.parameters))
                kept.append(tool)
            except RequestError as error:
                if tool.is_strict or isinstance(error, CostlyGrammarError):
                    message = str(error).removeprefix("structured.json: ")
                    place = f"tools[{tool.place}].function.parameters"
                    raise RequestError(f"{place}: {message}") from None
                kept.append(_with_any_arguments(tool))
        if kept == bound:
            raise RequestError(f"tools: {str(whole).removeprefix('structured.grammar: ')}") from None
        bound = kept
        llm.engine.compile_form(written(bound))
    return written(bound)


def _with_any_arguments(tool: Tool) -> Tool:
    """The tool, whose arguments may be any object."""
    return tool._replace(parameters={"type": "object"})


def _as_text(message: dict[str, Any]) -> dict[str, Any]:
    """A call, or what came of it, as text, for a template that knows neither."""
    if isinstance(message.get("tool_calls"), list):
        calls = []
        for call in message.pop("tool_calls"):
            function = call.get("function") if isinstance(call, dict) else None
            if not isinstance(function, dict):
                raise RequestError(f"messages: found the tool call {found(call)}, expected one of a function")
            arguments = function.get("arguments", {})
            if not isinstance(arguments, str):
                arguments = json.dumps(arguments, ensure_ascii=False)
            name = json.dumps(function.get("name"))
            calls.append(f'<tool_call>\n{{"name": {name}, "arguments": {arguments}}}\n</tool_call>')
        content = _joined(message.get("content"))
        if isinstance(content, list):  # of other parts, too
            content = [*content, *({"type": "text", "text": call} for call in calls)]
        elif content is None or isinstance(content, str):
            content = "\n".join([content, *calls] if content else calls)
        return {**message, "content": content}  # what is neither is refused where it is rendered
    if message.get("role") == "tool":
        content = _joined(message.get("content"))
        if isinstance(content, str):
            content = f"<tool_response>\n{content}\n</tool_response>"
        return {"role": "user", "content": content}
    return message


def _joined(content: Any) -> Any:
    """The text of a message whose parts are all text; any other content as it is."""
    if not isinstance(content, list):
        return content
    said = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
    texts = [text for text in said if isinstance(text, str)]
    return "\n".join(texts) if len(texts) == len(content) else content


def _with_short_ids(message: dict[str, Any]) -> dict[str, Any]:
    """The message, whose calls have ids of nine letters and digits: Mistral's templates insist."""
    if isinstance(message.get("tool_call_id"), str):
        message["tool_call_id"] = _short(message["tool_call_id"])
    if isinstance(message.get("tool_calls"), list):
        message["tool_calls"] = [
            {**call, "id": _short(call["id"])}
            if isinstance(call, dict) and isinstance(call.get("id"), str)
            else call
            for call in message["tool_calls"]
        ]
    return message


def _short(call_id: str) -> str:
    if re.fullmatch("[A-Za-z0-9]{9}", call_id):
        return call_id
    return hashlib.blake2s(call_id.encode("utf-8", "replace")).hexdigest()[:9]
