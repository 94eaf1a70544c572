"""What a generation has given, in the forms of OpenAI's and vLLM's answers: text, usage, log-probabilities.

Reads the states that `EngineThread` has delivered, and of the outputs only what stands by them.
"""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from pagellm import __version__
from pagellm.engine.requests.outputs import FinishReason, TokenLogprob
from pagellm.engine.server.engine_thread import Generation, LiveRequest, State
from pagellm.engine.server.errors import ApiError, not_ready, too_late
from pagellm.engine.tokenizer import IncrementalDetokenizer, Tokenizer

_LEAST_LOGPROB = -9999.0  # JSON has no infinity


class Delta(NamedTuple):
    """What has come of a completion since the last time. number: how many came before it."""

    text: str
    reasoning: str
    token_ids: list[int]
    logprobs: list[TokenLogprob]
    finish_reason: FinishReason | None
    number: int


class Reader:
    """Takes what is new of one completion, again and again. index: among all of the answer."""

    def __init__(self, live: LiveRequest, at: int, index: int, hides_output: bool) -> None:
        self.live = live
        self.index = index
        self.completion = live.output.outputs[at]
        self._at = at
        self._hides = hides_output
        self._seen = State()
        self._number = 0

    @property
    def ended(self) -> bool:
        """Whether all of it has been taken."""
        return self._seen.finish_reason is not None

    @property
    def num_tokens(self) -> int:
        """Tokens so far, those that are hidden left out."""
        return 0 if self._hides else self._seen.num_tokens

    def take(self) -> Delta | None:
        """What is new; None if nothing. Raises `ApiError` if the completion could not be computed."""
        new, old = self.live.states[self._at], self._seen
        if new == old:
            return None
        if new.finish_reason is FinishReason.ERROR:
            raise ApiError(500, new.error or "the completion could not be computed")
        if new.finish_reason is FinishReason.ABORT and self.live.generation.expired_s is not None:
            raise too_late(self.live.generation.expired_s)
        if new.finish_reason is FinishReason.ABORT:
            raise ApiError(503, "the server shut down before the completion had ended")
        if new.finish_reason is FinishReason.SHED:
            raise _shed()
        self._seen = new
        number, self._number = self._number, self._number + 1
        if self._hides:
            reason = None if new.finish_reason is None else FinishReason.LENGTH
            return Delta("", "", [], [], reason, number)
        start, end = old.num_tokens, new.num_tokens
        completion = self.completion
        return Delta(
            new.text[len(old.text) :],
            (new.reasoning or "")[len(old.reasoning or "") :],
            completion.token_ids[start:end],
            completion.logprobs[start:end] if completion.logprobs is not None else [],
            new.finish_reason,
            number,
        )

    def stop_reason(self, tokenizer: Tokenizer) -> int | str | None:
        """The stop string or token that ended it; None where the model's own end of text did."""
        reason = self.completion.stop_reason
        asked_for = self.live.output.sampling_params.stop_token_ids
        if self._hides or (reason in tokenizer.eos_token_ids and reason not in asked_for):
            return None
        return reason


def check_shed(generation: Generation) -> None:
    """Raises `ApiError` if any of it was not let in."""
    if any(s.finish_reason is FinishReason.SHED for live in generation.requests for s in live.states):
        raise _shed()


def _shed() -> ApiError:
    return not_ready("the admission policy of this server does not let the request in now")


def readers_of(generation: Generation, hides_output: bool) -> list[Reader]:
    """A reader for each completion: those of the first prompt, then those of the second, and so on."""
    pairs = [(live, at) for live in generation.requests for at in range(len(live.states))]
    return [Reader(live, at, index, hides_output) for index, (live, at) in enumerate(pairs)]


def usage_of(readers: Sequence[Reader]) -> dict[str, Any]:
    """The tokens of these completions so far; a prompt counts once, whatever its completions are."""
    prompts = {id(reader.live): reader.live.output for reader in readers}.values()
    num_prompt = sum(len(output.prompt_token_ids) for output in prompts)
    num_completion = sum(reader.num_tokens for reader in readers)
    cached = sum(output.outputs[0].metrics.num_cached_tokens for output in prompts)
    reasoning = sum(reader.completion.num_reasoning_tokens for reader in readers if reader.num_tokens)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }


def frame(answer_id: str, kind: str, model: str, created: int) -> dict[str, Any]:
    """What every answer, and every chunk of one, begins with."""
    return {
        "id": answer_id,
        "object": kind,
        "created": created,
        "model": model,
        "system_fingerprint": f"pagellm-{__version__}",
    }


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())


def token_text(tokenizer: Tokenizer, token_id: int, as_id: bool) -> str:
    """A token as text, or as "token_id:17"."""
    return f"token_id:{token_id}" if as_id else tokenizer.decode([token_id], continues=True)


def finite(logprob: float) -> float:
    """A log-probability as JSON has it."""
    return max(logprob, _LEAST_LOGPROB)


class CompletionLogprobs:
    """Log-probabilities as /v1/completions gives them, which grow with the text. Offsets are in characters.

    With a token are the likeliest ones and itself. as_ids: tokens are named by their ids.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, as_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids
        self._offset = 0
        self._detokenizer = IncrementalDetokenizer(
            tokenizer, skip_special_tokens=skip_special_tokens, continues=True
        )

    def prompt(
        self, text: str, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob | None]
    ) -> dict[str, Any]:
        """Those of a prompt, which is said before the completion as this text.

        What the tokens say more than the text, such as a BOS, is before it.
        """
        detokenizer = IncrementalDetokenizer(self._tokenizer, skip_special_tokens=False)
        written = self._write(token_ids, logprobs, detokenizer)
        more = self._offset + len(detokenizer.finish()) - len(text)
        written["text_offset"] = [max(offset - more, 0) for offset in written["text_offset"]]
        self._offset = len(text)
        return written

    def write(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob | None]) -> dict[str, Any]:
        """Those of the next tokens."""
        return self._write(token_ids, logprobs, self._detokenizer)

    def _write(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprob | None],
        detokenizer: IncrementalDetokenizer,
    ) -> dict[str, Any]:
        offsets, values, tops, names = [], list[float | None](), list[dict[str, float] | None](), []
        for token_id, logprob in zip(token_ids, logprobs, strict=True):
            offsets.append(self._offset)
            self._offset += len(detokenizer.append(token_id))
            names.append(token_text(self._tokenizer, token_id, self._as_ids))
            values.append(None if logprob is None else finite(logprob.logprob))
            tops.append(None if logprob is None else self._top(logprob))
        return {"text_offset": offsets, "token_logprobs": values, "tokens": names, "top_logprobs": tops}

    def _top(self, logprob: TokenLogprob) -> dict[str, float]:
        top: dict[str, float] = {}
        for token_id, value in (*logprob.top, (logprob.token_id, logprob.logprob)):
            top.setdefault(token_text(self._tokenizer, token_id, self._as_ids), finite(value))
        return top


def joined_logprobs(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two of `CompletionLogprobs`, one after the other."""
    return {name: values + second[name] for name, values in first.items()}


def chat_logprobs(tokenizer: Tokenizer, logprobs: Sequence[TokenLogprob], as_ids: bool) -> dict[str, Any]:
    """Log-probabilities as /v1/chat/completions gives them."""

    def entry(token_id: int, value: float) -> dict[str, Any]:
        return {
            "token": token_text(tokenizer, token_id, as_ids),
            "logprob": finite(value),
            "bytes": list(tokenizer.token_bytes(token_id)),
        }

    return {
        "content": [
            {
                **entry(one.token_id, one.logprob),
                "top_logprobs": [entry(token_id, value) for token_id, value in one.top],
            }
            for one in logprobs
        ],
        "refusal": None,
    }


def prompt_logprobs(
    tokenizer: Tokenizer, logprobs: Sequence[TokenLogprob | None] | None
) -> list[dict[str, Any] | None] | None:
    """Log-probabilities of a prompt in vLLM's form: by token id. Only the likeliest have a rank."""
    if logprobs is None:
        return None
    return [None if one is None else _ranked(tokenizer, one) for one in logprobs]


def _ranked(tokenizer: Tokenizer, logprob: TokenLogprob) -> dict[str, Any]:
    ranked: dict[str, Any] = {}
    for rank, (token_id, value) in enumerate(logprob.top, 1):
        ranked[str(token_id)] = _one(tokenizer, token_id, value, rank)
    own = str(logprob.token_id)
    if own not in ranked:
        ranked[own] = _one(tokenizer, logprob.token_id, logprob.logprob, None)
    return {own: ranked.pop(own), **ranked}


def _one(tokenizer: Tokenizer, token_id: int, value: float, rank: int | None) -> dict[str, Any]:
    return {"logprob": finite(value), "rank": rank, "decoded_token": token_text(tokenizer, token_id, False)}
