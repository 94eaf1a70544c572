"""Beam search on top of the engine: each beam is a request, and a beam that branches is forked.

The branches share the blocks of what they have in common and copy a block only when one writes into it.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field

from pagellm.engine.checks import integer, number
from pagellm.engine.llm_engine import LLMEngine
from pagellm.engine.requests.outputs import CompletionOutput, FinishReason, RequestOutput
from pagellm.engine.requests.prompts import Prompt
from pagellm.engine.requests.sampling_params import MAX_LOGPROBS, SamplingParams


@dataclass(frozen=True)
class BeamSearchParams:
    """The parameters of a beam search; a bad value is a `RequestError` that names it.

    beam_width: beams kept at each step, and completions returned.
    length_penalty: completions are ranked by log-probability / length ** length_penalty.
    ignore_eos: the model's end-of-text tokens end no beam. cache_salt: as in `SamplingParams`.
    """

    beam_width: int = 4
    max_tokens: int = 16
    length_penalty: float = 1.0
    ignore_eos: bool = False
    cache_salt: str = ""

    def __post_init__(self) -> None:
        width = integer("beam_width", self.beam_width, 1, MAX_LOGPROBS // 2)
        penalty = number("length_penalty", self.length_penalty, 0.0, 10.0)
        max_tokens = integer("max_tokens", self.max_tokens, 1)
        for name, value in (("beam_width", width), ("length_penalty", penalty), ("max_tokens", max_tokens)):
            object.__setattr__(self, name, value)
        self.of_beam()  # checks the others

    def of_beam(self) -> SamplingParams:
        """What a beam's own request is served with: it goes on until the search ends it."""
        return SamplingParams(
            temperature=0,
            max_tokens=self.max_tokens,
            ignore_eos=True,
            logprobs=2 * self.beam_width,  # so many that beam_width go on if as many end
            cache_salt=self.cache_salt,
        )


@dataclass
class _Beam:
    request: RequestOutput
    token_ids: list[int] = field(default_factory=list)
    logprob: float = 0.0


class BeamSearch:
    """One prompt's search; `advance` after each of the engine's steps until `output` is finished."""

    def __init__(
        self,
        engine: LLMEngine,
        new_request_id: Callable[[], str],
        prompt: Prompt,
        params: BeamSearchParams,
    ) -> None:
        self._engine = engine
        self._new_request_id = new_request_id
        self._prompt = prompt
        self._params = params
        self._of_beam = params.of_beam()
        self._under_way: set[str] = set()  # requests that may have to be aborted
        self._beams: list[_Beam] = []
        self._ended: list[tuple[float, CompletionOutput]] = []
        self._max_tokens = 0
        self.output = RequestOutput(new_request_id(), None, [], [CompletionOutput(0)], self._of_beam)

    def start(self) -> None:
        """Takes the prompt in. Raises `RequestError` for one that cannot be served."""
        first = self._add(self._prompt)
        self.output.prompt, self.output.prompt_token_ids = first.prompt, first.prompt_token_ids
        room = (self._engine.config.max_model_len or 0) - len(first.prompt_token_ids)
        self._max_tokens = max(1, min(self._params.max_tokens, room))
        self._beams = [_Beam(first)]

    def advance(self) -> None:
        """Takes the search a token further if every beam has its next token's log-probabilities."""
        if self.output.finished:
            return
        for beam in self._beams:
            if beam.request.finished and not beam.request.token_ids:  # it failed, or somebody aborted it
                [ended] = beam.request.outputs
                self.close()
                self.output.outputs = [
                    CompletionOutput(0, finish_reason=ended.finish_reason, error=ended.error)
                ]
                return
        if all(beam.request.token_ids for beam in self._beams):
            self._branch()

    def close(self) -> None:
        """Gives the beams under way up."""
        self._abort(set(self._under_way))

    def _branch(self) -> None:
        width = self._params.beam_width
        eos = frozenset() if self._params.ignore_eos else frozenset(self._engine.tokenizer.eos_token_ids)
        going_on: list[_Beam] = []
        for rank, (logprob, beam, token_id) in enumerate(self._candidates(2 * width)):
            token_ids = [*beam.token_ids, token_id]
            if token_id in eos:
                if rank < width:
                    self._end(token_ids, logprob, FinishReason.STOP)
            elif len(going_on) < width:
                going_on.append(_Beam(beam.request, token_ids, logprob))
        is_full = bool(going_on) and len(going_on[0].token_ids) == self._max_tokens
        if is_full:
            for beam in going_on:
                self._end(beam.token_ids, beam.logprob, FinishReason.LENGTH)
        if is_full or not going_on or self._is_decided(going_on[0].logprob):
            self.close()
            self._rank()
            return
        parents = set(self._under_way)
        self._beams = [_Beam(self._add_fork(beam), beam.token_ids, beam.logprob) for beam in going_on]
        self._abort(parents)

    def _add_fork(self, beam: _Beam) -> RequestOutput:
        prompt = [*self.output.prompt_token_ids, *beam.token_ids]
        return self._add(prompt, fork_of=beam.request.request_id)

    def _add(self, prompt: Prompt, fork_of: str | None = None) -> RequestOutput:
        request_id = self._new_request_id()
        self._under_way.add(request_id)
        return self._engine.add_request(request_id, prompt, self._of_beam, fork_of=fork_of)

    def _abort(self, request_ids: set[str]) -> None:
        for request_id in request_ids:
            self._engine.abort(request_id)
        self._under_way -= request_ids

    def _candidates(self, count: int) -> list[tuple[float, _Beam, int]]:
        """The likeliest continuations of all beams, best first."""
        candidates = []
        for beam in self._beams:
            logprobs = beam.request.outputs[0].logprobs
            assert logprobs is not None
            candidates += [(beam.logprob + logprob, beam, token) for token, logprob in logprobs[0].top]
        return heapq.nlargest(count, candidates, key=lambda candidate: candidate[0])

    def _score(self, logprob: float, num_tokens: int) -> float:
        return logprob / float(num_tokens**self._params.length_penalty)

    def _is_decided(self, best_logprob: float) -> bool:
        """Whether nothing that goes on could become better than what has ended."""
        width = self._params.beam_width
        if len(self._ended) < width:
            return False
        worst = heapq.nlargest(width, (score for score, _ in self._ended))[-1]
        return self._score(best_logprob, self._max_tokens) <= worst

    def _end(self, token_ids: list[int], logprob: float, reason: FinishReason) -> None:
        text = self._engine.tokenizer.decode(token_ids, skip_special_tokens=True, continues=True)
        stop_reason = token_ids[-1] if reason is FinishReason.STOP else None
        completion = CompletionOutput(0, text, token_ids, reason, stop_reason, cumulative_logprob=logprob)
        self._ended.append((self._score(logprob, len(token_ids)), completion))

    def _rank(self) -> None:
        best = heapq.nlargest(self._params.beam_width, self._ended, key=lambda ended: ended[0])
        self.output.outputs = [completion for _, completion in best]
        for index, completion in enumerate(self.output.outputs):
            completion.index = index
