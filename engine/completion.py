"""A request under way: the sequence of each of its completions, and the output that grows with it."""

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pagellm.engine.grammar.masks import Mask
from pagellm.engine.grammar.state import GrammarState
from pagellm.engine.requests.bad_words import BadWords
from pagellm.engine.requests.outputs import CompletionOutput, FinishReason, RequestOutput, TokenLogprob
from pagellm.engine.requests.reasoning import Piece
from pagellm.engine.requests.stopping import StopChecker
from pagellm.engine.scheduling.sequence import Sequence
from pagellm.engine.thoughts import Thinking, ThoughtTracker
from pagellm.engine.tokenizer import IncrementalDetokenizer, Tokenizer


class Completion:
    """One completion: takes over the tokens that its sequence gets, until they end it.

    A token counts when all that follows from it is in the output. Whatever an exception leaves beyond those,
    `take_back` takes away, to be computed and taken over again.

    arrival_s: on the clock of all times here. bad_words: None if there are none. thinking: None where nobody
    asks which of it is a thought. new_grammar: gives the state in which what comes after the thoughts begins;
    None where that has no form.
    """

    def __init__(
        self,
        index: int,
        sequence: Sequence,
        tokenizer: Tokenizer,
        arrival_s: float,
        bad_words: BadWords | None = None,
        thinking: Thinking | None = None,
        new_grammar: Callable[[], GrammarState] | None = None,
    ) -> None:
        params = sequence.sampling_params
        self.sequence = sequence
        self.output = CompletionOutput(index, logprobs=None if params.logprobs is None else [])
        self._tokenizer = tokenizer
        self._hidden_texts = tokenizer.special_texts if params.skip_special_tokens else {}
        self._arrival_s = arrival_s
        self._bad_words = bad_words
        self._thinking = thinking
        self._new_grammar = new_grammar
        self._num_tokens = 0
        self._begin_text()

    @property
    def forced_token(self) -> int | None:
        """The token that comes next, whatever would be sampled; None if that is free."""
        forced = None if self._thoughts is None else self._thoughts.forced_token
        grammar = self.grammar
        if forced is None and grammar is not None and grammar.forced:
            return grammar.forced[0]
        return forced

    @property
    def grammar(self) -> GrammarState | None:
        """What the next token must obey; None where it is free."""
        grammar, thoughts = self._grammar, self._thoughts
        if grammar is None or grammar.has_begun or thoughts is None:
            return grammar
        # What closes a thought may go on behind its marker.
        return None if thoughts.is_thinking or thoughts.forced_token is not None else grammar

    def mask(self) -> Mask | None:
        """The tokens that may be sampled next; None where all may. Raises `GrammarError`."""
        if self._grammar is None:
            return None
        # A thought that comes before a form does not end the output.
        return self._grammar.all_but_end if self.grammar is None else self.grammar.mask()

    def forbidden_tokens(self) -> list[int]:
        """The tokens that must not be sampled next, because a bad word would be complete."""
        return [] if self._bad_words is None else self._bad_words.forbidden(self.output.token_ids)

    def with_forced(self, token_id: int) -> list[int]:
        """Takes the grammar past the token that a sequence got in a step, and those that must follow it.

        Returns all of these. Where log-probabilities are wanted each takes a step of its own, for they are
        the model's. Raises `GrammarError`.
        """
        token_ids, grammar = [token_id], self.grammar
        if grammar is not None:
            grammar.append(token_id)
            # What opens a thought leaves the grammar at its beginning.
            while grammar.forced and grammar.has_begun and self.output.logprobs is None:
                token_ids.append(grammar.forced[0])
                grammar.append(grammar.forced[0])
        return token_ids

    def admitted(self, num_cached_tokens: int, num_host_tokens: int, time_s: float) -> None:
        """Takes note that its first chunk enters a step, on the engine's clock."""
        metrics = self.output.metrics
        if metrics.first_scheduled_s is None:
            self.output.metrics = replace(
                metrics,
                first_scheduled_s=time_s - self._arrival_s,
                num_cached_tokens=num_cached_tokens,
                num_host_tokens=num_host_tokens,
            )

    def append(self, logprobs: Items[TokenLogprob], time_s: float) -> FinishReason | None:
        """Takes the tokens over that the sequence got in a step; returns why they end it, if they do.

        logprobs: of these tokens, where they are wanted. Behind a stop string nothing is taken over. The
        grammar, if there is one, is past these tokens already: see `with_forced`.
        """
        output = self.output
        if output.metrics.first_token_s is None:
            output.metrics = replace(output.metrics, first_token_s=time_s - self._arrival_s)
        new = self.sequence.token_ids[self.sequence.num_prompt_tokens + len(output.token_ids) :]
        for index, token_id in enumerate(new):
            if output.logprobs is not None:
                output.logprobs.append(logprobs[index])
            reason = self._append_one(token_id, is_last=index == len(new) - 1)
            if reason is not None:
                return reason
        return None

    def _append_one(self, token_id: int, is_last: bool) -> FinishReason | None:
        output = self.output
        finish_reason = self.sequence.finish_reason if is_last else None
        output.token_ids.append(token_id)
        is_complete = is_last and self._grammar is not None and self._grammar.is_complete
        stop_string = self._add_text(
            token_id, len(output.token_ids), finish_reason is not None or is_complete
        )
        if stop_string is not None:
            output.stop_reason = stop_string
            return FinishReason.STOP
        if finish_reason is not None:
            if finish_reason is FinishReason.STOP:
                output.stop_reason = token_id
            return finish_reason
        if is_complete:
            return FinishReason.STOP
        output.text = self._stop.safe_text
        self._tell_thoughts()
        self._num_tokens = len(output.token_ids)
        return None

    def finish(self, reason: FinishReason, time_s: float, error: str | None = None) -> None:
        """Ends the output. Whoever sees its finish reason finds everything else in its place."""
        output = self.output
        if error is None:
            if self._thoughts is not None:
                self._add_pieces(self._thoughts.finish())
            output.text = self._stop.text
            self._tell_thoughts()
        else:
            self._drop_tokens()
            output.error = error
        output.metrics = replace(
            output.metrics,
            finished_s=time_s - self._arrival_s,
            num_preemptions=self.sequence.num_preemptions,
        )
        output.finish_reason = reason

    def take_back(self) -> int:
        """Leaves the tokens that count, in the output; returns how many the sequence has with them."""
        self._drop_tokens()
        self._begin_text()
        for number, token_id in enumerate(self.output.token_ids, 1):
            if self.grammar is not None:
                self.grammar.append(token_id)
            self._add_text(token_id, number)
        return self.sequence.num_prompt_tokens + self._num_tokens

    def _drop_tokens(self) -> None:
        """Takes the tokens that do not count out of the output."""
        output = self.output
        output.stop_reason = None
        del output.token_ids[self._num_tokens :]
        if output.logprobs is not None:
            del output.logprobs[self._num_tokens :]

    def _begin_text(self) -> None:
        params = self.sequence.sampling_params
        self._detokenizer = IncrementalDetokenizer(
            self._tokenizer, skip_special_tokens=params.skip_special_tokens, continues=True
        )
        self._stop = StopChecker(params)
        self._grammar = None if self._new_grammar is None else self._new_grammar()
        self._thoughts: ThoughtTracker | None = None
        if self._thinking is not None:
            self._thoughts = ThoughtTracker(self._thinking, params.thinking_token_budget)

    def _add_text(self, token_id: int, number: int, is_last: bool = False) -> str | None:
        """Adds what a token gives to the text; returns the stop string that this completed, if any."""
        text = self._detokenizer.append(token_id)
        if is_last:
            text += self._detokenizer.finish()
        hidden = self._hidden_texts.get(token_id, "")
        if self._thoughts is None:
            return self._stop.append(text, number, hidden)
        return self._add_pieces(self._thoughts.append(text, number, hidden, is_last))

    def _add_pieces(self, pieces: list[Piece]) -> str | None:
        for text, is_hidden, number, _ in pieces:
            stop = self._stop.append("" if is_hidden else text, number, text if is_hidden else "")
            if stop is not None:
                return stop
        return None

    def _tell_thoughts(self) -> None:
        if self._thoughts is not None:
            self.output.reasoning = self._thoughts.reasoning
            self.output.num_reasoning_tokens = self._thoughts.num_reasoning_tokens


@dataclass
class Request:
    """A prompt's completions, and where they are given out; arrival_s on the engine's clock."""

    output: RequestOutput
    arrival_s: float
    completions: list[Completion] = field(default_factory=list)
    logits: NDArray[np.float32] | None = None  # [prompt tokens, vocab_size], where they are wanted
    owners: list[Any] = field(default_factory=list)  # what watches those who read it

    def add(self, completion: Completion) -> None:
        """Takes one more completion in."""
        self.completions.append(completion)
        self.output.outputs.append(completion.output)

    def unfinished(self) -> list[Completion]:
        """The completions that have not ended."""
        return [completion for completion in self.completions if not completion.output.finished]

    def collect_prompt(
        self,
        logprobs: Iterable[tuple[int, TokenLogprob]],
        logits: Iterable[tuple[int, NDArray[np.float32]]],
    ) -> None:
        """Takes over what was computed of the prompt: (index, log-probabilities), (position, logits)."""
        if self.output.prompt_logprobs is not None:
            for index, logprob in logprobs:
                self.output.prompt_logprobs[index] = logprob
        if self.logits is not None:
            for position, row in logits:
                if position < len(self.logits):
                    self.logits[position] = row

    def finish(
        self, completion: Completion, reason: FinishReason, time_s: float, error: str | None = None
    ) -> None:
        """Ends one of the completions; with the last one the logits are given out."""
        if all(other is completion or other.output.finished for other in self.completions):
            self.output.logits = self.logits
        completion.finish(reason, time_s, error)
