"""Chat templates: a conversation to the prompt text that a model was trained on.

A template is a Jinja program that comes with the checkpoint. This module checks the messages and says whose
fault a failure is: a `RequestError` for the messages, a `CheckpointError` for the template. How a foreign
program is kept in bounds is `template_sandbox`'s business, which is imported when the first template is
rendered.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pagellm.engine.errors import CheckpointError, RequestError
from pagellm.engine.tokenizer.checks import found

if TYPE_CHECKING:
    from pagellm.engine.tokenizer.template_sandbox import SandboxedTemplate


class ChatTemplate:
    """One model's chat template, rendered as `transformers` renders it.

    The template sees `messages`, `add_generation_prompt`, `tools`, and `bos_token` and `eos_token` where the
    model has them. It is compiled when first used.
    """

    def __init__(self, source: str, *, bos_token: str | None = None, eos_token: str | None = None) -> None:
        self.source = source
        tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._special_tokens = {name: token for name, token in tokens.items() if token is not None}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt text of the conversation.

        Args:
            messages: each a mapping with a string `role` and a string `content` (None is allowed beside
                `tool_calls`).
            add_generation_prompt: end with the header of the assistant's turn, so that the model answers.
            tools: tool descriptions, for templates that know them.
            variables: further names for the template to see.

        Raises:
            RequestError: malformed messages, or messages that the template refuses or fails on.
            CheckpointError: a template that does not parse, breaks out of the sandbox or runs without end.
        """
        check_messages(messages)
        return self._template.render(
            self._special_tokens
            | variables
            | {"messages": messages, "add_generation_prompt": add_generation_prompt, "tools": tools}
        )

    @cached_property
    def _template(self) -> "SandboxedTemplate":
        try:
            from pagellm.engine.tokenizer.template_sandbox import SandboxedTemplate
        except ImportError as error:
            raise CheckpointError(f"chat templates need jinja2 3.1 or later: {error}") from error
        return SandboxedTemplate(self.source)


def check_messages(messages: object) -> None:
    """Raises RequestError unless `messages` is a non-empty list of {"role": str, "content": str}."""
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise RequestError(f"messages: found {found(messages)}, expected a non-empty list of messages")
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise RequestError(f'{where}: found {found(message)}, expected {{"role": ..., "content": ...}}')
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str):
            raise RequestError(f"{where}.role: found {found(role)}, expected a string")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise RequestError(f"{where}.content: found {found(content)}, expected a string")
