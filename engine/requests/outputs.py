"""What a request gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from pagellm.engine.requests.sampling_params import SamplingParams

if TYPE_CHECKING:  # the scheduler and the simulator import this module, and do without NumPy
    import numpy as np
    from numpy.typing import NDArray


class FinishReason(StrEnum):
    """Why an output ended."""

    STOP = "stop"  # an end-of-text token, a stop token or a stop string
    LENGTH = "length"  # max_tokens or max_model_len
    ABORT = "abort"  # the caller gave it up
    ERROR = "error"  # it cannot be computed; the output says why
    SHED = "shed"  # the admission policy did not let it in


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability of one token, and those of the likeliest tokens at its position, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Metrics:
    """Times of one completion, in seconds since its request was added, and what the cache spared it."""

    first_scheduled_s: float | None = None  # when its first chunk entered a step: the queueing time
    first_token_s: float | None = None  # TTFT
    finished_s: float | None = None
    num_cached_tokens: int = 0  # prompt tokens whose KV was found in the prefix cache
    num_host_tokens: int = 0  # of these, found in its second tier
    num_preemptions: int = 0


@dataclass
class CompletionOutput:
    """One completion of a request's prompt, so far."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token or string that ended it
    error: str | None = None  # why it ended, where that is an error
    logprobs: list[TokenLogprob] | None = None  # one a token, if asked for
    cumulative_logprob: float | None = None  # of all its tokens, from a beam search
    metrics: Metrics = field(default_factory=Metrics)
    reasoning: str | None = None  # what it thought before the text, in a chat; None if nothing
    num_reasoning_tokens: int = 0  # tokens of thoughts, where those are told apart or have a budget

    @property
    def finished(self) -> bool:
        """Whether it has ended."""
        return self.finish_reason is not None


@dataclass
class RequestOutput:
    """A request's state after a step; `text` and the like are those of its first completion."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    sampling_params: SamplingParams  # what it was served with, the seed that was drawn included
    prompt_logprobs: list[TokenLogprob | None] | None = None  # the first token has none
    logits: NDArray[np.float32] | None = None  # [prompt tokens, vocab_size] of a finished request that asked

    @property
    def finished(self) -> bool:
        """Whether all completions have ended."""
        return all(output.finished for output in self.outputs)

    @property
    def text(self) -> str:
        """The first completion's text."""
        return self.outputs[0].text

    @property
    def reasoning(self) -> str | None:
        """What the first completion thought before its text."""
        return self.outputs[0].reasoning

    @property
    def num_reasoning_tokens(self) -> int:
        """Tokens of the first completion's thoughts."""
        return self.outputs[0].num_reasoning_tokens

    @property
    def token_ids(self) -> list[int]:
        """The first completion's tokens."""
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the first completion ended."""
        return self.outputs[0].finish_reason

    @property
    def metrics(self) -> Metrics:
        """The first completion's times."""
        return self.outputs[0].metrics
