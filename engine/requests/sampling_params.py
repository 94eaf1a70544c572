"""How a request's tokens are chosen and when it ends; validated on construction."""

import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pagellm.engine.checks import flag, integer, integers, number, text
from pagellm.engine.errors import RequestError, found
from pagellm.engine.requests.structured import StructuredOutputs

MAX_LOGPROBS = 100
# Stop strings are looked for with an automaton of a node for each of their characters.
MAX_STOP_CHARACTERS = 1 << 16
MAX_BAD_WORD_CHARACTERS = 1 << 16
# Keeps every product and sum of a logit within float32.
_LARGEST = 1e30
_PENALTY_RANGE = (1e-3, 1e3)
_LARGEST_TOKEN_ID = (1 << 31) - 1
# A draw has 64 bits of seed, with or without a sign.
_SEED_RANGE = (-(1 << 63), (1 << 64) - 1)


class LogitBias(Mapping[int, float]):
    """Token ids and what is added to their logits: checked and copied once, and changed by nobody.

    ids, values_f32: the same as arrays of int32 and float32, in which a step takes them over.
    """

    __slots__ = ("_bias_of", "ids", "values_f32")

    def __init__(self, biases: Mapping[Any, Any]) -> None:
        self._bias_of: dict[int, float] = {}
        for token, bias in biases.items():
            token_id = integer("logit_bias", token, 0, _LARGEST_TOKEN_ID)
            if type(bias) is not float or not -_LARGEST <= bias <= _LARGEST:
                bias = _bias_number(f"logit_bias[{token_id}]", bias)
            self._bias_of[token_id] = bias
        self.ids = array("i", self._bias_of)
        self.values_f32 = array("f", self._bias_of.values())

    def __getitem__(self, token_id: int) -> float:
        return self._bias_of[token_id]

    def __iter__(self) -> Iterator[int]:
        return iter(self._bias_of)

    def __len__(self) -> int:
        return len(self._bias_of)

    def __repr__(self) -> str:
        return repr(self._bias_of)

    def __copy__(self) -> "LogitBias":
        return self

    def __deepcopy__(self, memo: object) -> "LogitBias":
        return self


NO_BIAS = LogitBias({})


@dataclass(frozen=True)
class SamplingParams:
    """The parameters of one request; a bad value is a `RequestError` that names it.

    What is given is copied: a list or mapping that is changed afterwards changes nothing here.

    Order of application: repetition, frequency and presence penalty, logit_bias, temperature, top_k, top_p
    (over what top_k left), min_p.

    n: completions of the same prompt; the i-th is what seed + i gives alone.
    temperature: 0 is greedy, the lowest id among equals.
    top_k: 0 or -1 keeps all. top_p, min_p: 1 and 0 keep all.
    repetition_penalty: divides positive and multiplies negative logits of tokens of the prompt and output.
    presence_penalty, frequency_penalty: subtracted from the logits of tokens of the output, once or as often
    as they occur.
    logit_bias: token id to the number that is added to its logit.
    seed: an integer of 64 bits, with or without a sign; without one a request draws its own.
    max_tokens: None is as many as `max_model_len` leaves. min_tokens: before so many, neither an end-of-text
    token nor a stop token or string ends the output.
    stop: strings that end the output; the text is cut before them unless include_stop_str_in_output. One that
    contains a whole special token ends it also where special tokens are left out of the text. Where thoughts
    are told apart, as in a chat, they are looked for in the answer alone. At most 65,536 characters in all.
    stop_token_ids: tokens that end it. ignore_eos: the model's own end-of-text tokens do not.
    bad_words: texts that the output does not contain: where it has all tokens of one but the last, that one
    is forbidden. Tokens are those of the text alone and behind a space. At most 65,536 characters in all.
    logprobs: log-probabilities of each sampled token and so many of the likeliest ones (0: the sampled only),
    the model's own, before penalties and temperature. prompt_logprobs: the same for the prompt's tokens.
    skip_special_tokens: leaves them out of the text.
    cache_salt: only requests with the same one share cached prefixes, so that tenants can be kept apart.
    priority: the lowest goes first under the policy "priority". tenant: who is served fairly under "fair".
    deadline_s: seconds from arrival, for "slo".
    thinking_token_budget: tokens of thoughts at most; when they are spent, the thought is closed as the
    model's own template closes one, with tokens that are taken as if they had been sampled. Markers, and the
    tokens that close a thought so, are not counted. None: as many as the model likes.
    structured: the form that the output must have, `StructuredOutputs` or a mapping of its fields. Where
    thoughts are told apart it is the form of the answer, and no end of text comes before that. A token that
    it does not allow has no chance, whatever the other parameters; the end of text is allowed where the form
    is complete. Where nothing else can follow the output ends by itself, also before min_tokens and with
    ignore_eos, which keep the end away only where more may follow. Tokens that no other can take the place
    of are taken without a step each, unless the request forbids one; their log-probabilities are the model's
    own. Stop strings, stop tokens and max_tokens end the output anywhere.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=lambda: NO_BIAS)
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    bad_words: Sequence[str] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    cache_salt: str = ""
    priority: float = 0
    tenant: str = ""
    deadline_s: float | None = None
    thinking_token_budget: int | None = None
    structured: StructuredOutputs | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        self._take("n", integer, 1, 1024)
        self._take("temperature", number, 0.0, _LARGEST)
        self._take("top_k", integer, -1, None)
        self._take("top_p", number, 0.0, 1.0)
        if self.top_p == 0:
            raise RequestError("top_p: found 0, expected a number above 0 and up to 1")
        self._take("min_p", number, 0.0, 1.0)
        self._take("repetition_penalty", number, *_PENALTY_RANGE)
        self._take("presence_penalty", number, -2.0, 2.0)
        self._take("frequency_penalty", number, -2.0, 2.0)
        self._take("seed", integer, *_SEED_RANGE, optional=True)
        self._take("max_tokens", integer, 1, None, optional=True)
        self._take("min_tokens", integer, 0, self.max_tokens)
        for name in ("logprobs", "prompt_logprobs"):
            self._take(name, integer, 0, MAX_LOGPROBS, optional=True)
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens"):
            self._take(name, flag)
        for name in ("cache_salt", "tenant"):
            self._take(name, text)
        self._take("priority", number, -_LARGEST, _LARGEST)
        self._take("deadline_s", number, 0.0, _LARGEST, optional=True)
        self._take("thinking_token_budget", integer, 0, None, optional=True)
        self._take("structured", StructuredOutputs.read, optional=True)
        self._take("stop", _stops)
        self._take("stop_token_ids", _stop_token_ids)
        self._take("bad_words", _bad_words)
        self._take("logit_bias", _bias)

    def _take(self, name: str, check: Any, *bounds: Any, optional: bool = False) -> None:
        """Puts what the check makes of a value in its place."""
        value = getattr(self, name)
        if not (optional and value is None):
            object.__setattr__(self, name, check(name, value, *bounds))

    @property
    def bias(self) -> LogitBias:
        """`logit_bias` as what it is kept as."""
        assert isinstance(self.logit_bias, LogitBias)
        return self.logit_bias

    @property
    def form(self) -> StructuredOutputs | None:
        """`structured` as what it is kept as."""
        assert not isinstance(self.structured, Mapping)
        return self.structured

    @property
    def has_penalties(self) -> bool:
        """Whether sampling looks at the tokens so far."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def of_completion(self, index: int) -> "SamplingParams":
        """The parameters that give completion number `index` of an `n > 1` request alone."""
        seed = self.seed
        if seed is not None:
            seed += index
            seed -= (1 << 64) * (seed > _SEED_RANGE[1])
        return replace(self, n=1, seed=seed)


# None is how clients of other engines say "none" of the following.


def _stops(name: str, value: Any) -> tuple[str, ...]:
    value = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(value, Sequence) or not all(isinstance(stop, str) and stop for stop in value):
        raise RequestError(f"{name}: found {found(value)}, expected a non-empty string or a list of them")
    return _texts(name, value, MAX_STOP_CHARACTERS)


def _bad_words(name: str, value: Any) -> tuple[str, ...]:
    value = () if value is None else value
    is_list = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    if not is_list or not all(isinstance(word, str) and word for word in value):
        raise RequestError(f"{name}: found {found(value)}, expected a list of non-empty strings")
    return _texts(name, value, MAX_BAD_WORD_CHARACTERS)


def _texts(name: str, value: Sequence[str], most: int) -> tuple[str, ...]:
    """Each of the texts once. most: characters that they may have together."""
    texts = tuple(dict.fromkeys(text(name, one) for one in value))
    num_characters = sum(map(len, texts))
    if num_characters > most:
        raise RequestError(f"{name}: found {num_characters} characters in all, expected at most {most}")
    return texts


def _stop_token_ids(name: str, value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    if isinstance(value, str | bytes) or not (isinstance(value, Sequence) or hasattr(value, "tolist")):
        raise RequestError(f"{name}: found {found(value)}, expected a list of token ids")
    return tuple(integer(name, token_id, 0) for token_id in integers(name, value))


def _bias_number(name: str, value: Any) -> float:
    bias = number(name, value, -math.inf, _LARGEST)
    if -math.inf < bias < -_LARGEST:
        raise RequestError(f"{name}: found {bias!r}, expected {-_LARGEST:g} or more, or minus infinity")
    return bias


def _bias(name: str, value: Any) -> LogitBias:
    if value is None:
        return NO_BIAS
    if isinstance(value, LogitBias):
        return value
    if not isinstance(value, Mapping):
        raise RequestError(f"{name}: found {found(value)}, expected a mapping of token id to number")
    return LogitBias(value)
