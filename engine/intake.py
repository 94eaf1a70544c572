"""A request from outside, checked and copied: its prompt's tokens, its parameters, a sequence a completion.

Whether there is room for it is the scheduler's business.
"""

import math
import random
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import replace
from functools import cached_property, partial
from itertools import count
from typing import Any

import numpy as np

from pagellm.engine import checks
from pagellm.engine.checks import flag
from pagellm.engine.completion import Completion, Request
from pagellm.engine.errors import RequestError, found
from pagellm.engine.grammar.compiler import Grammar, GrammarCompiler
from pagellm.engine.grammar.state import GrammarState
from pagellm.engine.requests.bad_words import BadWords
from pagellm.engine.requests.outputs import RequestOutput
from pagellm.engine.requests.prompts import Prompt, read_prompt
from pagellm.engine.requests.sampling_params import SamplingParams
from pagellm.engine.scheduling.sequence import Sequence
from pagellm.engine.thoughts import Thinking, Thoughts
from pagellm.engine.tokenizer import Tokenizer


class Intake:
    """Takes in requests for one model.

    vocab_size: the ids that the model takes. reasoning_markers: as in `EngineConfig`. grammars: compiles the
    forms that requests ask for.
    """

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, reasoning_markers: str, grammars: GrammarCompiler
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._reasoning_markers = reasoning_markers
        self._grammars = grammars
        self._eos_token_ids = frozenset(tokenizer.eos_token_ids)
        self._seq_ids = count()

    @cached_property
    def thoughts(self) -> Thoughts | None:
        """How the model's thoughts are written; None if none are known."""
        return Thoughts.of_model(self._tokenizer, self._reasoning_markers)

    def request(
        self,
        request_id: str,
        prompt: Prompt,
        params: Any,
        arrival_s: float,
        return_logits: Any = False,
        separate_reasoning: Any = False,
        in_thought: Any = None,
    ) -> Request:
        """The request. Its parameters are as in `LLMEngine.add_request`; raises `RequestError`."""
        request_id = checks.text("request_id", request_id)
        if not isinstance(params, SamplingParams):
            raise RequestError(f"sampling_params: found {found(params)}, expected a SamplingParams")
        wants_logits = flag("return_logits", return_logits)
        is_separate = flag("separate_reasoning", separate_reasoning)
        if in_thought is not None:
            flag("in_thought", in_thought)
        text, token_ids = self._read_prompt(prompt)
        self._check_token_ids("logit_bias", params.bias.ids)
        self._check_token_ids("stop_token_ids", params.stop_token_ids)
        if params.stop and self._tokenizer.vocab_size == 0:
            raise RequestError(f"stop: found {found(params.stop)}, expected none: {self._tokenizer.absence}")
        if params.seed is None:
            params = replace(params, seed=random.getrandbits(63))
        thinking = self._thinking(params, token_ids, is_separate, in_thought)
        bad_words = BadWords(self._tokenizer, params.bad_words) if params.bad_words else None
        new_grammar = None
        if params.form is not None:
            grammar = self._grammars.compile(params.form)
            new_grammar = self._new_grammar(grammar, params, bad_words, thinking, token_ids)
        output = RequestOutput(request_id, text, token_ids, [], params)
        if params.prompt_logprobs is not None:
            output.prompt_logprobs = [None] * len(token_ids)
        request = Request(output, arrival_s)
        for index in range(params.n):
            own_params = params.of_completion(index)
            request.add(
                self._new_completion(
                    request, index, own_params, wants_logits, bad_words, thinking, new_grammar
                )
            )
        if wants_logits:
            request.logits = np.zeros((len(token_ids), self._vocab_size), np.float32)
        return request

    def _read_prompt(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """The prompt's text, where it came with one, and its token ids."""
        text, token_ids = read_prompt(prompt)
        if token_ids is None:
            assert text is not None
            token_ids = self._tokenizer.encode(text)
        else:
            self._check_token_ids("prompt", token_ids)
        return text, token_ids

    def _check_token_ids(self, name: str, token_ids: Items[int]) -> None:
        vocab_size = self._vocab_size
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
            place, token = next(
                (i, token) for i, token in enumerate(token_ids) if not 0 <= token < vocab_size
            )
            raise RequestError(
                f"{name}: found token id {found(token)} at {place}, expected 0 to {vocab_size - 1}"
            )

    def _new_completion(
        self,
        request: Request,
        index: int,
        params: SamplingParams,
        wants_logits: bool,
        bad_words: BadWords | None,
        thinking: Thinking | None,
        new_grammar: Callable[[], GrammarState] | None,
    ) -> Completion:
        sequence = Sequence(
            next(self._seq_ids),
            request.output.prompt_token_ids,
            params,
            self._eos_token_ids,
            reads_cache=not wants_logits and params.prompt_logprobs is None,
            request_id=request.output.request_id,
        )
        return Completion(
            index, sequence, self._tokenizer, request.arrival_s, bad_words, thinking, new_grammar
        )

    def _new_grammar(
        self,
        grammar: Grammar,
        params: SamplingParams,
        bad_words: BadWords | None,
        thinking: Thinking | None,
        prompt: list[int],
    ) -> Callable[[], GrammarState]:
        """What gives the state in which an output of this form begins."""
        never = [token_id for token_id in self._eos_token_ids if params.ignore_eos]
        banned = frozenset(token_id for token_id, bias in params.bias.items() if bias == -math.inf)
        if bad_words is not None:
            banned |= bad_words.last_ids
        opening: list[int] = []
        if thinking is not None and thinking.is_separate and not thinking.in_thought:
            opening = thinking.thoughts.opening_ids if thinking.thoughts.may_open_after(prompt) else []
        return partial(GrammarState, grammar, never, banned, opening)

    def _thinking(
        self, params: SamplingParams, token_ids: list[int], is_separate: bool, in_thought: bool | None
    ) -> Thinking | None:
        """How thoughts of a request are dealt with; None if nobody asks for them, or there are none."""
        if not is_separate and params.thinking_token_budget is None:
            return None
        thoughts = self.thoughts
        if params.thinking_token_budget is not None:
            if thoughts is None:
                raise RequestError(
                    f"thinking_token_budget: found {params.thinking_token_budget}, expected none: no markers "
                    "of thoughts are known for this model; the setting reasoning_markers names some"
                )
            thoughts.closing_ids()  # which there must be
        if thoughts is None:
            return None
        if in_thought is None:
            in_thought = thoughts.are_open_in(token_ids)
        return Thinking(thoughts, in_thought, is_separate)
