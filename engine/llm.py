"""LLM: the offline API. Prompts in, finished outputs (or a stream of text) out."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pagellm.engine.beam_search import BeamSearch, BeamSearchParams
from pagellm.engine.config import DEFAULT_MODEL, EngineConfig
from pagellm.engine.errors import PagellmError, RequestError
from pagellm.engine.llm_engine import LLMEngine
from pagellm.engine.outputs import CompletionOutput, FinishReason, RequestOutput
from pagellm.engine.prompts import Prompt, as_prompts, params_for_each
from pagellm.engine.sampling_params import SamplingParams
from pagellm.engine.tokenizer import Tokenizer

Message = Mapping[str, Any]


class LLM:
    """A model, ready to generate.

    model: a known name, a local path (a Hugging Face directory or a .gguf file) or a hub id. Further keyword
    arguments are those of `EngineConfig`. Raises `CheckpointError` and `ConfigError`; its methods raise
    `RequestError` before anything is computed if one of the requests cannot be served.
    """

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        *,
        config: EngineConfig | None = None,
        show_progress: bool = True,
        **settings: Any,
    ) -> None:
        if config is not None and settings:
            raise TypeError(f"config and {', '.join(settings)} were both given, expected one or the other")
        self.engine = LLMEngine(model, config or EngineConfig(**settings), show_progress)
        self._request_ids = (f"llm-{number}" for number in itertools.count())

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
        ids}. sampling_params: one for all, or one for each; None is what the model's `generation_config.json`
        says. The output names what it was served with.
        """
        many = as_prompts(prompts)
        return self._finish(self._add(many, params_for_each(sampling_params, len(many))))

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Like `generate`, for one conversation or several.

        messages: a list of {"role": ..., "content": ...}, laid out by the model's own chat template.
        """
        several = not isinstance(messages, str) and messages and isinstance(messages[0], list | tuple)
        conversations: list[Any] = list(messages) if several else [messages]
        return self.generate([self.chat_prompt(one) for one in conversations], sampling_params)

    def chat_prompt(self, messages: Sequence[Message]) -> list[int]:
        """The token ids of a conversation, up to where the assistant's answer begins."""
        return self.tokenizer.encode_chat(messages)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> "CompletionStream":
        """A completion's text piece by piece, as soon as no stop string can take it back."""
        [params] = params_for_each(sampling_params, 1)
        if (params or self.engine.default_sampling_params).n != 1:
            raise RequestError("n: found more than 1, expected 1 for a stream")
        return self._streams([prompt], [params])[0][0]

    def stream_all(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> "list[list[CompletionStream]]":
        """A stream for each completion of each prompt. All run together, whichever is being read.

        prompts, sampling_params: as in `generate`.
        """
        many = as_prompts(prompts)
        return self._streams(many, params_for_each(sampling_params, len(many)))

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams | None = None
    ) -> list[RequestOutput]:
        """One output a prompt, whose completions are its best beams, the best one first."""
        searches: list[BeamSearch] = []
        try:
            for prompt in as_prompts(prompts):
                searches.append(
                    BeamSearch(self.engine, self._request_ids.__next__, prompt, params or BeamSearchParams())
                )
            while not all(search.output.finished for search in searches):
                self.engine.step()
                for search in searches:
                    search.advance()
        finally:
            for search in searches:
                search.close()
        return [search.output for search in searches]

    def logits(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """The logits after each of the tokens, [len(token_ids), vocab_size], through the paged path."""
        params = SamplingParams(temperature=0, max_tokens=1)
        output = self.engine.add_request(next(self._request_ids), token_ids, params, return_logits=True)
        self._finish([output])
        assert output.logits is not None
        return output.logits

    def close(self) -> None:
        """Gives up what is under way and ends the threads."""
        self.engine.close()

    def _streams(
        self, prompts: Sequence[Prompt], params: Sequence[SamplingParams | None]
    ) -> "list[list[CompletionStream]]":
        return [
            [CompletionStream(self.engine, output.request_id, completion) for completion in output.outputs]
            for output in self._add(prompts, params)
        ]

    def _add(self, prompts: Sequence[Prompt], params: Sequence[SamplingParams | None]) -> list[RequestOutput]:
        """Adds all requests or, if one of them is bad, none."""
        outputs: list[RequestOutput] = []
        try:
            for prompt, param in zip(prompts, params, strict=True):
                outputs.append(self.engine.add_request(next(self._request_ids), prompt, param))
        except BaseException:
            self._give_up(outputs)
            raise
        return outputs

    def _finish(self, outputs: list[RequestOutput]) -> list[RequestOutput]:
        """Takes steps until all of the requests have ended; an interrupt gives them up."""
        try:
            while not all(output.finished for output in outputs):
                self.engine.step()
        finally:
            self._give_up(outputs)
        return outputs

    def _give_up(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            self.engine.abort(output.request_id)


class CompletionStream(Iterator[str]):
    """The text of one completion as it grows; reading it takes the engine's steps.

    Closing or dropping it before its end gives the completion up. Raises `PagellmError` if the model's logits
    stop being finite numbers.
    """

    def __init__(self, engine: LLMEngine, request_id: str, completion: CompletionOutput) -> None:
        self._engine = engine
        self._request_id = request_id
        self._completion = completion
        self._sent = 0

    def __next__(self) -> str:
        try:
            while len(self._completion.text) == self._sent:
                if self._completion.finish_reason is FinishReason.ERROR:
                    raise PagellmError("the model gave no finite logits, or every token was forbidden")
                if self._completion.finished:
                    raise StopIteration
                self._engine.step()
        except BaseException:
            self.close()
            raise
        piece = self._completion.text[self._sent :]
        self._sent += len(piece)
        return piece

    def close(self) -> None:
        """Gives the completion up if it has not ended."""
        if not self._completion.finished:
            self._engine.abort(self._request_id, self._completion.index)

    def __del__(self) -> None:
        self.close()
