"""A model's tokens as llguidance takes them: the bytes that each stands for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the process that tries grammars needs bytes alone
    from pagellm.engine.tokenizer import Tokenizer


def token_bytes(tokenizer: Tokenizer, vocab_size: int) -> list[bytes]:
    """What each id of the model stands for; nothing where it is padding."""
    known = min(vocab_size, tokenizer.model_vocab_size)
    return [*map(tokenizer.token_bytes, range(known)), *[b""] * (vocab_size - known)]


class _Wrapped:
    """What `llguidance.TokenizerWrapper` asks of a tokenizer."""

    def __init__(
        self,
        tokens: Sequence[bytes],
        special_ids: Sequence[int],
        eos_ids: Sequence[int],
        encode: Callable[[str], list[int]],
    ) -> None:
        self.tokens = tokens
        self.special_token_ids = list(special_ids)
        self.eos_token_id = eos_ids[0]
        self.bos_token_id = None
        self._encode = encode

    def __call__(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise TypeError("expected a text")  # so that it is asked for texts, not bytes
        return list(self._encode(text))


def ll_tokenizer(
    tokens: Sequence[bytes],
    special_ids: Sequence[int],
    eos_ids: Sequence[int],
    encode: Callable[[str], list[int]],
) -> Any:
    """An `LLTokenizer`. encode: the token ids of a text that stands in the midst of another."""
    from llguidance import LLTokenizer, TokenizerWrapper

    wrapped = TokenizerWrapper(_Wrapped(tokens, special_ids, eos_ids, encode))
    return LLTokenizer(wrapped, n_vocab=len(tokens), eos_token=list(eos_ids))
