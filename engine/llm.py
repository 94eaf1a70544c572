"""LLM: the offline API. Prompts in, finished outputs (or a stream of text) out."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from os import PathLike
from types import TracebackType
from typing import Any, Generic, NamedTuple, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from pagellm.engine.beam_search import BeamSearch, BeamSearchParams
from pagellm.engine.config import DEFAULT_MODEL, EngineConfig
from pagellm.engine.errors import ConfigError, EngineError, PagellmError, RequestError, found
from pagellm.engine.llm_engine import LLMEngine
from pagellm.engine.requests.outputs import CompletionOutput, FinishReason, RequestOutput
from pagellm.engine.requests.prompts import Prompt, as_prompts, params_for_each
from pagellm.engine.requests.sampling_params import SamplingParams
from pagellm.engine.scheduling.policies.load import load_policy
from pagellm.engine.tokenizer import Tokenizer
from pagellm.engine.tokenizer.chat_template import as_mapping

Message = Mapping[str, Any]
_Result = TypeVar("_Result")
_Piece = TypeVar("_Piece")
_Stream = TypeVar("_Stream", bound="_Growing[Any]")


class LLM:
    """A model, ready to generate.

    model: a known name, a local path (a Hugging Face directory or a .gguf file) or a hub id. Further keyword
    arguments are those of `EngineConfig`. Raises `CheckpointError` and `ConfigError`; its methods raise
    `RequestError` before anything is computed if one of the requests cannot be served.

    Several threads may call it: their requests run together. An exception that comes in between, like a
    KeyboardInterrupt, gives the requests of its call up, and no others. After `close`, or the end of its
    `with` block, its methods raise `EngineError`.
    """

    def __init__(
        self,
        model: str | PathLike[str] = DEFAULT_MODEL,
        *,
        config: EngineConfig | None = None,
        show_progress: bool = True,
        **settings: Any,
    ) -> None:
        if config is not None and settings:
            raise TypeError(f"config and {', '.join(settings)} were both given, expected one or the other")
        config = config or EngineConfig(**settings)
        if getattr(load_policy(config.eviction, "eviction"), "needs_future", False):
            raise ConfigError(
                f"eviction: found {config.eviction!r}, which needs to know the requests to come, expected it "
                "in the replay of a trace, which alone does"
            )
        self.engine = LLMEngine(model, config, show_progress)
        self._numbers = count()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.engine.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """One finished output a prompt, in order.

        prompts: one or several, each a text, a list of token ids, {"prompt": text} or {"prompt_token_ids":
        ids}. sampling_params: one for all, or one for each; None is what the model's own configuration
        says. The output names what it was served with.
        """
        many = as_prompts(prompts)
        return self._serve(many, params_for_each(sampling_params, len(many)))

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        **options: Any,
    ) -> list[RequestOutput]:
        """Like `generate`, for one conversation or several.

        messages: a list of {"role": ..., "content": ...}, laid out by the model's own chat template.
        options: those of `chat_prompt`. What the model thinks before it answers is the output's `reasoning`,
        and no part of its text.
        """
        several = isinstance(messages, Sequence) and messages and isinstance(messages[0], list | tuple)
        conversations: list[Any] = list(messages) if several else [messages]
        prompts = [self.chat_prompt(conversation, **options) for conversation in conversations]
        chats = [
            self.opens_thought(conversation, prompt, options)
            for conversation, prompt in zip(conversations, prompts, strict=True)
        ]
        return self._serve(prompts, params_for_each(sampling_params, len(prompts)), chats=chats)

    def chat_stream(
        self, messages: Sequence[Message], sampling_params: SamplingParams | None = None, **options: Any
    ) -> "ChatStream":
        """The answer to one conversation piece by piece, thoughts told apart. options: see `chat_prompt`."""
        prompt = self.chat_prompt(messages, **options)
        [params] = params_for_each(sampling_params, 1)
        self._check_single(params)
        chats = [self.opens_thought(messages, prompt, options)]
        return self._streams(ChatStream, [prompt], [params], chats)[0][0]

    def chat_stream_all(
        self,
        conversations: Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        **options: Any,
    ) -> "list[list[ChatStream]]":
        """A stream for each completion of each conversation. All run together, whichever is being read."""
        prompts = [self.chat_prompt(messages, **options) for messages in conversations]
        chats = [
            self.opens_thought(messages, prompt, options)
            for messages, prompt in zip(conversations, prompts, strict=True)
        ]
        return self._streams(ChatStream, prompts, params_for_each(sampling_params, len(prompts)), chats)

    def chat_prompt(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        thinking: bool | None = None,
        reasoning_effort: str | None = None,
        sanitize_control_tokens: bool = False,
        most_tokens: int | None = None,
    ) -> list[int]:
        """The token ids of a conversation, up to where the model goes on.

        messages: each has a `role` and a `content`, a text or a list of {"type": "text", "text": ...}; one
        that calls tools or tells a thought may have no content. tools: JSON schemas of functions.
        add_generation_prompt: end where the assistant's answer begins; None: unless continue_final_message,
        with which the model goes on with the last message. chat_template: the name of one of the model's
        templates. thinking: whether the model is to think before it answers, and reasoning_effort: how much,
        such as "low"; None: as the template has it. Which variables of the template say so is found out.
        chat_template_kwargs: further names for the template, such as `enable_thinking`.
        sanitize_control_tokens: control tokens that users write out are plain text.
        most_tokens: more than these are refused before they are looked for, where a glance tells.
        Raises `RequestError` for what the template, or anything else here, does not take.
        """
        kwargs = {} if chat_template_kwargs is None else chat_template_kwargs
        if not isinstance(kwargs, Mapping) or not all(isinstance(name, str) for name in kwargs):
            raise RequestError(f"chat_template_kwargs: found {found(kwargs)}, expected names with values")
        taken = {"messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template"}
        for name in sorted(
            kwargs.keys() & (taken | {"control_tokens", "sanitize_control_tokens", "most_tokens"})
        ):
            raise RequestError(f"chat_template_kwargs: found {name!r}, expected it as an argument of its own")
        if thinking is not None or reasoning_effort is not None:
            asked = self.tokenizer.thinking_variables(chat_template, thinking, reasoning_effort)
            for name in sorted(kwargs.keys() & asked.keys()):
                raise RequestError(
                    f"chat_template_kwargs: found {name!r} beside thinking or reasoning_effort, which set it"
                )
            kwargs = {**kwargs, **asked}
        return self.tokenizer.encode_chat(
            messages, tools=tools, add_generation_prompt=add_generation_prompt, chat_template=chat_template,
            continue_final_message=continue_final_message, sanitize_control_tokens=sanitize_control_tokens,
            most_tokens=most_tokens, **kwargs,
        )  # fmt: skip

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> "CompletionStream":
        """A completion's text piece by piece, as soon as no stop string can take it back."""
        [params] = params_for_each(sampling_params, 1)
        self._check_single(params)
        if isinstance(prompt, list | tuple) and any(isinstance(p, str | Sequence | Mapping) for p in prompt):
            raise RequestError(
                f"prompt: found {len(prompt)} in a list, expected one; stream_all takes several"
            )
        return self._streams(CompletionStream, [prompt], [params])[0][0]

    def stream_all(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> "list[list[CompletionStream]]":
        """A stream for each completion of each prompt. All run together, whichever is being read.

        prompts, sampling_params: as in `generate`.
        """
        many = as_prompts(prompts)
        return self._streams(CompletionStream, many, params_for_each(sampling_params, len(many)))

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams | None = None
    ) -> list[RequestOutput]:
        """One output a prompt, whose completions are its best beams, the best one first."""
        params = BeamSearchParams() if params is None else params
        if not isinstance(params, BeamSearchParams):
            raise RequestError(f"params: found {found(params)}, expected a BeamSearchParams")
        searches = [
            BeamSearch(self.engine, self._new_request_id, prompt, params) for prompt in as_prompts(prompts)
        ]

        def search() -> list[RequestOutput]:
            for index, one in enumerate(searches):
                with _numbered(index, len(searches)):
                    one.start()
            while under_way := [one for one in searches if not one.output.finished]:
                self.engine.step_or_wait()
                for one in under_way:
                    one.advance()
            return self._checked([one.output for one in searches])

        def give_up() -> None:
            for one in searches:
                one.close()

        return _all_or_nothing(search, give_up)

    def logits(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """The logits after each of the tokens, [len(token_ids), vocab_size], through the paged path."""
        params = SamplingParams(temperature=0, max_tokens=1)
        [output] = self._serve([token_ids], [params], return_logits=True)
        if output.logits is None or output.finish_reason is FinishReason.ABORT:
            raise PagellmError(f"logits: {output.outputs[0].error or 'the request was aborted'}")
        return output.logits

    def close(self) -> None:
        """Gives up what is under way and ends the threads."""
        self.engine.close()

    def _new_request_id(self) -> str:
        return f"llm-{next(self._numbers)}"

    def _check_single(self, params: SamplingParams | None) -> None:
        n = (params or self.engine.default_sampling_params).n
        if n != 1:
            raise RequestError(f"n: found {n}, expected 1; stream_all gives a stream for each completion")

    def opens_thought(
        self, messages: Sequence[Message], prompt: Sequence[int], options: Mapping[str, Any]
    ) -> bool:
        """Whether a prompt that the chat template wrote has opened a thought."""
        thoughts = self.engine.thoughts
        if thoughts is None:
            return False
        if options.get("continue_final_message"):
            return thoughts.are_open_after(_text_of(messages[-1]))
        return options.get("add_generation_prompt") is not False and thoughts.begin_at_end_of(prompt)

    def _serve(
        self,
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams | None],
        return_logits: bool = False,
        chats: Sequence[bool] | None = None,
    ) -> list[RequestOutput]:
        request_ids = [self._new_request_id() for _ in prompts]

        def serve() -> list[RequestOutput]:
            outputs = self._add(request_ids, prompts, params, return_logits, chats)
            under_way = outputs
            while under_way := [output for output in under_way if not output.finished]:
                self.engine.step_or_wait()
            return self._checked(outputs)

        return _all_or_nothing(serve, lambda: self._give_up(request_ids))

    def _streams(
        self,
        kind: type[_Stream],
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams | None],
        chats: Sequence[bool] | None = None,
    ) -> list[list[_Stream]]:
        request_ids = [self._new_request_id() for _ in prompts]

        def add() -> list[list[_Stream]]:
            return [
                [kind(self.engine, output.request_id, one) for one in output.outputs]
                for output in self._add(request_ids, prompts, params, chats=chats)
            ]

        return _all_or_nothing(add, lambda: self._give_up(request_ids))

    def _checked(self, outputs: list[RequestOutput]) -> list[RequestOutput]:
        """Outputs that have ended. Raises `EngineError` if the engine was closed before."""
        reasons = {completion.finish_reason for output in outputs for completion in output.outputs}
        if FinishReason.ABORT in reasons and self.engine.is_closed:
            raise EngineError("the engine was closed before all requests had ended")
        return outputs

    def _add(
        self,
        request_ids: Sequence[str],
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams | None],
        return_logits: bool = False,
        chats: Sequence[bool] | None = None,
    ) -> list[RequestOutput]:
        """chats: of each prompt, if they are chats, whether it has opened a thought."""
        outputs = []
        for index, (request_id, prompt, param) in enumerate(zip(request_ids, prompts, params, strict=True)):
            with _numbered(index, len(prompts)):
                outputs.append(
                    self.engine.add_request(
                        request_id, prompt, param, return_logits,
                        separate_reasoning=chats is not None,
                        in_thought=None if chats is None else chats[index],
                    )
                )  # fmt: skip
        return outputs

    def _give_up(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self.engine.abort(request_id)


class _Growing(Generic[_Piece]):
    """One completion as it grows; reading it takes the engine's steps.

    Closing or dropping it before its end gives the completion up. Raises `PagellmError` if it cannot be
    computed, and `EngineError` if the engine was closed before its end.
    """

    def __init__(self, engine: LLMEngine, request_id: str, completion: CompletionOutput) -> None:
        self._engine = engine
        self._request_id = request_id
        self._completion = completion
        self._reading = threading.RLock()
        engine.abort_without(self, request_id, completion.index)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> _Piece:
        # Not `with`: where something is raised as one ends with a StopIteration, CPython goes on to take that
        # for the one being handled, and it keeps all other streams of the call alive.
        self._reading.acquire()
        try:
            return _all_or_nothing(self._next_piece, self.close)
        finally:
            self._reading.release()

    def close(self) -> None:
        """Gives the completion up if it has not ended."""
        if not self._completion.finished:
            self._engine.abort(self._request_id, self._completion.index)

    def _next_piece(self) -> _Piece:
        completion = self._completion
        while (piece := self._take_new(completion)) is None:
            if completion.finish_reason is FinishReason.ERROR:
                raise PagellmError(f"{self._request_id}: {completion.error}")
            if completion.finish_reason is FinishReason.ABORT and self._engine.is_closed:
                raise EngineError("the engine was closed before the completion had ended")
            if completion.finished:
                raise StopIteration
            self._engine.step_or_wait()
        return piece

    def _take_new(self, completion: CompletionOutput) -> _Piece | None:
        """What has come since the last time; None if nothing."""
        raise NotImplementedError


class CompletionStream(_Growing[str]):
    """The text of one completion piece by piece."""

    _sent = 0

    def _take_new(self, completion: CompletionOutput) -> str | None:
        piece = completion.text[self._sent :]
        self._sent += len(piece)
        return piece or None


class ChatDelta(NamedTuple):
    """What has come of an answer: of the thought before it, and of its text."""

    reasoning: str
    text: str


class ChatStream(_Growing[ChatDelta]):
    """The thought and the text of one answer piece by piece; joined, they are those of `chat`."""

    _sent = (0, 0)

    def _take_new(self, completion: CompletionOutput) -> ChatDelta | None:
        reasoning, text = self._sent
        delta = ChatDelta((completion.reasoning or "")[reasoning:], completion.text[text:])
        self._sent = reasoning + len(delta.reasoning), text + len(delta.text)
        return delta if any(delta) else None

    @property
    def so_far(self) -> ChatDelta:
        """All that has been read."""
        reasoning, text = self._sent
        return ChatDelta((self._completion.reasoning or "")[:reasoning], self._completion.text[:text])


def _text_of(message: Any) -> str:
    """The text of a message that a chat template has taken."""
    content = as_mapping(message).get("content")
    if isinstance(content, str):
        return content
    return "\n".join(as_mapping(part).get("text", "") for part in content or ())


@contextmanager
def _numbered(index: int, count: int) -> Iterator[None]:
    """Says of a refused request which of several it is, from 0 on."""
    try:
        yield
    except RequestError as error:
        if count == 1:
            raise
        raise RequestError(f"request {index}: {error}") from None


def _all_or_nothing(work: Callable[[], _Result], give_up: Callable[[], None]) -> _Result:
    """What `work` gives. If it raises, `give_up` follows, and once more if it was interrupted itself."""
    try:
        try:
            return work()
        except BaseException:
            give_up()
            raise
    except BaseException:
        give_up()
        raise
