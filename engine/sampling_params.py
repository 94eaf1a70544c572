"""How a request's tokens are chosen and when it ends; validated on construction."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pagellm.engine.errors import RequestError

MAX_LOGPROBS = 100
# Keeps every product and sum of a logit within float32.
_LARGEST = 1e30
_PENALTY_RANGE = (1e-3, 1e3)


@dataclass(frozen=True)
class SamplingParams:
    """The parameters of one request; a bad value is a `RequestError` that names it.

    Order of application: repetition, frequency and presence penalty, logit_bias, temperature, top_k, top_p
    (over what top_k left), min_p.

    n: completions of the same prompt; the i-th is what seed + i gives alone.
    temperature: 0 is greedy, the lowest id among equals.
    top_k: 0 or -1 keeps all. top_p, min_p: 1 and 0 keep all.
    repetition_penalty: divides positive and multiplies negative logits of tokens of the prompt and output.
    presence_penalty, frequency_penalty: subtracted from the logits of tokens of the output, once or as often
    as they occur.
    logit_bias: token id to the number that is added to its logit.
    seed: any integer; without one a request draws its own.
    max_tokens: None is as many as `max_model_len` leaves. min_tokens: before so many, neither an end-of-text
    token nor a stop token or string ends the output.
    stop: strings that end the output; the text is cut before them unless include_stop_str_in_output.
    stop_token_ids: tokens that end it. ignore_eos: the model's own end-of-text tokens do not.
    logprobs: log-probabilities of each sampled token and so many of the likeliest ones (0: the sampled only),
    the model's own, before penalties and temperature. prompt_logprobs: the same for the prompt's tokens.
    skip_special_tokens: leaves them out of the text.
    cache_salt: only requests with the same one share cached prefixes, so that tenants can be kept apart.
    priority: the lowest goes first under the policy "priority". tenant: who is served fairly under "fair".
    deadline_s: seconds from arrival, for "slo".
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    cache_salt: str = ""
    priority: float = 0
    tenant: str = ""
    deadline_s: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name, nothing in (("stop", ()), ("stop_token_ids", ()), ("logit_bias", {})):
            if getattr(self, name) is None:  # as clients of other engines say "none"
                object.__setattr__(self, name, nothing)
        _integer("n", self.n, 1, 1024)
        _number("temperature", self.temperature, 0.0, _LARGEST)
        _integer("top_k", self.top_k, -1, None)
        if not (_is_number(self.top_p) and 0.0 < self.top_p <= 1.0):
            raise _error("top_p", self.top_p, "a number above 0 and up to 1")
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, *_PENALTY_RANGE)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.seed is not None:
            _integer("seed", self.seed, None, None)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, None)
        _integer("min_tokens", self.min_tokens, 0, self.max_tokens)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0, MAX_LOGPROBS)
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise _error(name, getattr(self, name), "True or False")
        for name in ("cache_salt", "tenant"):
            if not isinstance(getattr(self, name), str):
                raise _error(name, getattr(self, name), "a string")
        _number("priority", self.priority, -_LARGEST, _LARGEST)
        if self.deadline_s is not None:
            _number("deadline_s", self.deadline_s, 0.0, _LARGEST)
        self._check_collections()

    def _check_collections(self) -> None:
        if not isinstance(self.stop, Sequence) or not all(isinstance(s, str) and s for s in self.stop):
            raise _error("stop", self.stop, "a non-empty string or a list of them")
        if isinstance(self.stop_token_ids, str) or not isinstance(self.stop_token_ids, Sequence):
            raise _error("stop_token_ids", self.stop_token_ids, "a list of token ids")
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0, None)
        if not isinstance(self.logit_bias, Mapping):
            raise _error("logit_bias", self.logit_bias, "a mapping of token id to number")
        for token, bias in self.logit_bias.items():
            _integer("logit_bias", token, 0, None)
            if not _is_number(bias) or not (abs(bias) <= _LARGEST or bias == -math.inf):
                raise _error(f"logit_bias[{token}]", bias, f"a number up to {_LARGEST:g}, or minus infinity")

    @property
    def has_penalties(self) -> bool:
        """Whether sampling looks at the tokens so far."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def of_completion(self, index: int) -> "SamplingParams":
        """The parameters that give completion number `index` of an `n > 1` request alone."""
        return replace(self, n=1, seed=None if self.seed is None else self.seed + index)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _error(name: str, found: Any, expected: str) -> RequestError:
    return RequestError(f"{name}: found {found!r}, expected {expected}")


def _number(name: str, value: Any, low: float, high: float) -> None:
    if not _is_number(value) or not low <= value <= high:
        raise _error(name, value, f"a number from {low:g} to {high:g}")


def _integer(name: str, value: Any, low: int | None, high: int | None) -> None:
    fits = isinstance(value, int) and not isinstance(value, bool)
    if not fits or (low is not None and value < low) or (high is not None and value > high):
        bounds = " from " * (low is not None) + str("" if low is None else low)
        bounds += "" if high is None else f" to {high}"
        raise _error(name, value, f"an integer{bounds}" + (" on" if low is not None and high is None else ""))
