"""Token ids that stand for a trace's prompts, so that prompts share tokens exactly where the trace says so.

A trace that gives hash ids or lengths in the place of texts says which contents are equal, not what they are.
Any tokens serve, if equal contents get equal tokens and different ones differ early and everywhere: then a
prefix cache with blocks of any size finds the shared prefixes and nothing else.
"""

from array import array
from math import isqrt
from typing import Protocol

from pagellm.engine.errors import TraceError
from pagellm.sim.traces.request import MAX_HASH_ID, TraceRequest, bad_value, check_integer

# Contents are numbered: hash ids as they are, and above them the prompts of which only the length is known.
_CONTENT_BITS = 65
_MIN_VOCAB_SIZE = 17


class Encoder(Protocol):
    """What is needed of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""


class PromptTokens:
    """Turns requests into token ids below vocab_size, always the same ones, in whatever order it is asked.

    A piece of content repeats a group of a few tokens, cut to the piece's length. The group is a Reed-Solomon
    code of the content's number: the number's digits in base p, the largest prime up to vocab_size, are the
    coefficients of a polynomial, which is evaluated at 0, 1, 2, ... modulo p. Two different polynomials of m
    coefficients agree at less than m points. So two contents whose numbers are below p ** m differ somewhere
    in any m consecutive tokens; for a vocabulary of 50,000 that is 5 tokens for any numbers, 2 for those up
    to 2.5 billion, and every single token for those below p.

    tokenizer: encodes prompts that are texts. A trace with texts needs one.
    """

    def __init__(self, vocab_size: int, tokenizer: Encoder | None = None) -> None:
        self.vocab_size = check_integer("vocab_size", vocab_size, _MIN_VOCAB_SIZE)
        self._tokenizer = tokenizer
        self._prime = next(n for n in range(vocab_size, 1, -1) if all(n % d for d in range(2, isqrt(n) + 1)))
        num_digits = 1
        while self._prime**num_digits < 2**_CONTENT_BITS:
            num_digits += 1
        self._points = range(num_digits)
        # What a content's digits but the lowest add at each point, of the content that was asked for last.
        self._rest, self._values = -1, [0]

    def __call__(self, request: TraceRequest) -> "array[int]":
        """The tokens of a request's prompt, `array("i")` of prompt_len items.

        Raises `TraceError` for a text without a tokenizer and for ids outside the vocabulary.
        """
        if request.prompt is not None:
            return self._checked(self.encode(request.prompt))
        if request.prompt_token_ids is not None:
            return self._checked(array("i", request.prompt_token_ids))
        assert request.prompt_len is not None
        if request.hash_ids is None:
            return self._piece(MAX_HASH_ID + 1 + request.index, request.prompt_len)
        assert request.hash_block_size is not None
        size = min(request.hash_block_size, request.prompt_len)
        tokens = array("i")
        for content in request.hash_ids:
            tokens.extend(self._piece(content, size))
        del tokens[request.prompt_len :]
        return tokens

    def encode(self, text: str, is_begin: bool = True) -> "array[int]":
        """The tokens of a text that begins a prompt, or goes on with one.

        Raises `TraceError` without a tokenizer.
        """
        if self._tokenizer is None:
            raise bad_value("prompt", text, "a tokenizer for it, or prompts as ids or lengths")
        tokens = array("i", self._tokenizer.encode(text))
        begin = array("i") if is_begin else array("i", self._tokenizer.encode(""))
        return tokens[len(begin) :] if begin and tokens[: len(begin)] == begin else tokens

    def _piece(self, content: int, size: int) -> "array[int]":
        if content < self._prime:  # a polynomial of one coefficient is the same everywhere
            return array("i", (content,)) * size
        rest, lowest = divmod(content, self._prime)
        if rest != self._rest:  # of contents that follow each other it is the same
            self._rest, self._values = rest, [point * self._value(rest, point) for point in self._points]
        group = array("i", [(value + lowest) % self._prime for value in self._values])
        return (group * -(-size // len(group)))[:size]

    def _value(self, content: int, point: int) -> int:
        """The polynomial of a content's digits at a point, modulo p."""
        digits = []
        while content:
            content, digit = divmod(content, self._prime)
            digits.append(digit)
        value = 0
        for digit in reversed(digits):
            value = (value * point + digit) % self._prime
        return value

    def _checked(self, tokens: "array[int]") -> "array[int]":
        if not tokens:
            raise TraceError("prompt: found no tokens, expected at least one")
        if not 0 <= min(tokens) <= max(tokens) < self.vocab_size:
            bad = min(tokens) if min(tokens) < 0 else max(tokens)
            raise bad_value("prompt_token_ids", bad, f"ids below the vocabulary's size, {self.vocab_size}")
        return tokens
