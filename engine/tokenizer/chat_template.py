"""Chat templates: a conversation to the prompt text that a model was trained on.

A template is a Jinja program that comes with the checkpoint. This module checks the messages, gives the
template plain copies of them as `transformers` does, and says whose fault a failure is: a `RequestError` for
the messages, a `CheckpointError` for the template. How a foreign program is kept in bounds is
`template_sandbox`'s business, which is imported when the first template is rendered.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pagellm.engine.checks import flag
from pagellm.engine.errors import CheckpointError, RequestError, found

if TYPE_CHECKING:
    from pagellm.engine.tokenizer.control_tokens import ControlTokens
    from pagellm.engine.tokenizer.template_sandbox import SandboxedTemplate

# Under these names messages carry what a model thought; templates read one or another of them.
_REASONING = ("reasoning_content", "thinking", "reasoning")
# Roles that templates know. They compare them, and may write control tokens with them: they are not marked.
ROLES = frozenset({"system", "developer", "user", "assistant", "model", "tool", "function", "ipython"})
_END_OF_MESSAGE = "CONTINUE_FINAL_MESSAGE_TAG "


class ChatTemplate:
    """One model's chat template, or several with names, rendered as `transformers` renders them.

    A template sees `messages`, `tools`, `documents`, `add_generation_prompt`, and the special tokens that the
    model names, such as `bos_token`. It is compiled when first used.
    """

    def __init__(
        self, source: str | Mapping[str, str], special_tokens: Mapping[str, str] | None = None
    ) -> None:
        self.sources = {"default": source} if isinstance(source, str) else dict(source)
        self._special_tokens = dict(special_tokens or {})
        self._compiled: dict[str, SandboxedTemplate] = {}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        control_tokens: "ControlTokens | None" = None,
        **variables: Any,
    ) -> str:
        """The prompt text of the conversation.

        messages: each a mapping with a string `role` and a `content`: a string, or a list of parts
        {"type": "text", "text": ...}, which a template that does not go through parts sees joined
        by line ends. It may be left out beside `tool_calls` or what the model thought, which is its
        `reasoning`, `reasoning_content` or `thinking`, or parts {"type": "thinking", "thinking": ...}: a
        template finds it wherever it looks. Names whose value is None are left out.
        tools: descriptions of functions (JSON schemas), for templates that know tools.
        add_generation_prompt: end with the header of the assistant's turn, so that the model answers. None:
        unless the final message is continued.
        continue_final_message: end with the last message's content, so that the model goes on with it.
        chat_template: the name of one of several templates. None: "tool_use" with tools, if there is one,
        else "default".
        control_tokens: marks them in every string of messages, tools and variables.
        variables: further names for the template to see.

        Raises `RequestError` for malformed messages, or messages that the template refuses or fails on, and
        `CheckpointError` for a template that does not parse, breaks out of the sandbox or runs without end.
        """
        flag("continue_final_message", continue_final_message)
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        if flag("add_generation_prompt", add_generation_prompt) and continue_final_message:
            raise RequestError(
                "continue_final_message: found True with add_generation_prompt, expected one of them"
            )
        template = self.template(chat_template, tools)
        each_string = str if control_tokens is None else control_tokens.mark
        copied = [
            _plain_message(message, f"messages[{index}]", template, each_string)
            for index, message in enumerate(_listed(messages))
        ]
        for index, message in enumerate(copied if control_tokens else ()):
            if message["role"] not in ROLES:
                raise RequestError(
                    f"messages[{index}].role: found {found(message['role'])}, expected one of"
                    f" {', '.join(sorted(ROLES))}"
                )
        final = _marked_end(copied[-1]) if continue_final_message else None
        text = template.render(
            self._special_tokens
            | {"documents": None}
            | {name: _plain(value, name, each_string) for name, value in variables.items()}
            | {"messages": copied, "tools": _plain_tools(tools, each_string)}
            | {"add_generation_prompt": add_generation_prompt}
        )
        return text if final is None else _cut_after(text, final)

    def variables(self) -> frozenset[str]:
        """The names that its templates read from outside, `messages` among them.

        Raises `CheckpointError` for a template that does not parse.
        """
        templates = [self.template(name, None) for name in self.sources]
        return frozenset().union(*(template.variables() for template in templates))

    def template(self, name: str | None, tools: object) -> "SandboxedTemplate":
        """The template of that name, or the one that serves such a request."""
        if name is None:
            name = "tool_use" if tools is not None and "tool_use" in self.sources else "default"
        if not isinstance(name, str) or name not in self.sources:
            names = ", ".join(map(repr, sorted(self.sources)))
            raise RequestError(f"chat_template: found {found(name)}, expected one of this model's: {names}")
        if name not in self._compiled:
            try:
                from pagellm.engine.tokenizer.template_sandbox import SandboxedTemplate
            except ImportError as error:
                raise CheckpointError(f"chat templates need jinja2 3.1.6 or later: {error}") from error
            self._compiled[name] = SandboxedTemplate(self.sources[name])
        return self._compiled[name]


def _listed(messages: object) -> Sequence[Any]:
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise RequestError(f"messages: found {found(messages)}, expected a non-empty list of messages")
    return messages


def _plain_message(
    message: Any, where: str, template: "SandboxedTemplate", each_string: Callable[[str], str]
) -> Any:
    """A message as the template sees it, checked."""
    message = as_mapping(message)
    if not isinstance(message, Mapping):
        raise RequestError(f'{where}: found {found(message)}, expected {{"role": ..., "content": ...}}')
    given = {name: value for name, value in message.items() if value is not None}
    role, content = given.get("role"), given.get("content")
    if not isinstance(role, str):
        raise RequestError(f"{where}.role: found {found(role)}, expected a string")
    if isinstance(content, Sequence) and not isinstance(content, str | bytes):
        parts = [as_mapping(part) for part in content]
        _check_parts(parts, f"{where}.content")
        thoughts = [part["thinking"] for part in parts if part["type"] == "thinking"]
        if thoughts:
            given = {"reasoning_content": "\n".join(thoughts)} | given
            parts = given["content"] = [part for part in parts if part["type"] == "text"]
        if not template.takes_content_parts:
            given["content"] = "\n".join(part["text"] for part in parts)
    elif not isinstance(content, str):
        says_more = any(given.get(name) for name in ("tool_calls", "function_call", *_REASONING))
        if content is not None or not says_more:
            raise RequestError(
                f"{where}.content: found {found(content)}, expected a string or a list of text parts"
            )
    copied = {
        name: str(role) if name == "role" else _plain(value, f"{where}.{name}", each_string)
        for name, value in given.items()
    }
    reasoning = next((copied[name] for name in _REASONING if name in copied), None)
    if reasoning is not None:
        copied = dict.fromkeys(_REASONING, reasoning) | copied | {"reasoning_content": reasoning}
        if template.takes_thinking_parts:
            content = copied.get("content") or []
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            copied["content"] = [{"type": "thinking", "thinking": reasoning}, *parts]
    return copied


def _check_parts(parts: Sequence[Any], where: str) -> None:
    for index, part in enumerate(parts):
        if not isinstance(part, Mapping):
            raise RequestError(
                f'{where}[{index}]: found {found(part)}, expected {{"type": "text", "text": ...}}'
            )
        kind = part.get("type")
        if kind not in ("text", "thinking"):
            raise RequestError(f"{where}[{index}].type: found {found(kind)}, expected 'text' or 'thinking'")
        if not isinstance(part.get(kind), str):
            raise RequestError(f"{where}[{index}].{kind}: found {found(part.get(kind))}, expected a string")


def _plain_tools(tools: Any, each_string: Callable[[str], str]) -> Any:
    if tools is None:
        return None
    if not isinstance(tools, Sequence) or isinstance(tools, str | bytes):
        raise RequestError(f"tools: found {found(tools)}, expected a list of JSON schemas")
    for index, tool in enumerate(tools):
        if not isinstance(as_mapping(tool), Mapping):
            raise RequestError(
                f"tools[{index}]: found {found(tool)}, expected its JSON schema: "
                '{"type": "function", "function": {"name": ..., "parameters": ...}}'
            )
    return _plain(tools, "tools", each_string)


def _plain(value: Any, where: str, each_string: Callable[[str], str]) -> Any:
    """A copy of a value in JSON's types, which have no methods that a template could do harm with."""
    value = as_mapping(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return each_string(str.__str__(value))
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    try:
        if isinstance(value, Mapping):
            return {
                each_string(name) if isinstance(name, str) else _plain(name, where, each_string): _plain(
                    item, f"{where}.{name}" if isinstance(name, str) else where, each_string
                )
                for name, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [_plain(item, f"{where}[{index}]", each_string) for index, item in enumerate(value)]
    except RecursionError:
        raise RequestError(f"{where[:80]}: found lists in lists too deep to render") from None
    if callable(getattr(value, "item", None)) and getattr(value, "ndim", None) == 0:
        return _plain(value.item(), where, each_string)  # NumPy's numbers
    raise RequestError(
        f"{where[:80]}: found {found(value)}, expected text, a number, true, false, null, a list or an object"
    )


def as_mapping(value: Any) -> Any:
    """What clients' libraries return as objects of their own, as a mapping; anything else as it is."""
    if callable(getattr(value, "model_dump", None)):
        return value.model_dump()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return value


def _marked_end(message: dict[str, Any]) -> str:
    """Puts a mark behind the message's text, and returns the text."""
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + _END_OF_MESSAGE
        return content
    for part in reversed([part for part in content or [] if part["type"] == "text"]):
        text: str = part["text"]
        part["text"] = text + _END_OF_MESSAGE
        return text
    raise RequestError(
        "continue_final_message: found no content in the last message, expected some to continue"
    )


def _cut_after(text: str, final: str) -> str:
    """The text up to the mark behind the final message."""
    mark = _END_OF_MESSAGE.strip()
    if final.strip() not in text or mark not in text:
        raise RequestError(
            "continue_final_message: found a last message that the chat template does not write out, expected"
            " one that it does"
        )
    end = text.rindex(mark)
    # Where the space of the mark is gone, the template trims messages, and the text must end trimmed, too.
    return text[:end] if text.startswith(_END_OF_MESSAGE, end) else text[:end].rstrip()
