"""What a quantized model costs: how far its predictions are from its source's, over the tokens of a text.

The text is read in windows, each from an empty context; the distribution after every token counts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import NDArray

from pagellm.engine.config import EngineConfig
from pagellm.engine.errors import ConfigError
from pagellm.engine.llm import LLM
from pagellm.engine.progress import progress

WINDOW = 512  # tokens
_ROWS = 32  # that are turned to probabilities at a time


@dataclass(frozen=True)
class Divergence:
    """Mean Kullback-Leibler divergence in nats a token, its standard error, and how often the likeliest token
    is the same; perplexities are over the tokens that follow another in their window. None: of one token."""

    mean: float
    standard_error: float | None
    same_top_token: float
    num_tokens: int
    source_perplexity: float | None
    perplexity: float | None


def windows(llm: LLM, text: str, max_tokens: int | None) -> list[list[int]]:
    """The first tokens of a text, or all, at most `WINDOW` at a time, fewer where the model takes fewer.

    Raises `ConfigError` if there are none, or the model has no tokenizer.
    """
    if not llm.tokenizer.vocab_size:
        raise ConfigError(f"text: cannot become tokens: {llm.tokenizer.absence}")
    size = llm.engine.config.max_model_len - 1
    token_ids = [id_ for id_ in llm.tokenizer.encode(text) if id_ < llm.engine.spec.vocab_size][:max_tokens]
    if not token_ids:
        raise ConfigError("text: found nothing, expected some text")
    return [token_ids[first : first + size] for first in range(0, len(token_ids), size)]


def engine_settings(quantization: str, context: int) -> EngineConfig:
    """Of an engine that computes one window after the other."""
    length = min(WINDOW + 1, context)
    return EngineConfig(
        quantization=quantization,
        max_model_len=length,
        block_size=16,
        num_blocks=-(-length // 16),
        max_num_seqs=1,
        max_num_batched_tokens=length,
        enable_prefix_caching=False,
    )


def divergence(source: LLM, quantized: LLM, texts: Sequence[Sequence[int]], show: bool = False) -> Divergence:
    """How far the second's predictions are from the first's. texts: the windows' tokens."""
    each: list[NDArray[np.float64]] = []
    same: list[NDArray[np.bool_]] = []
    surprises: list[NDArray[np.float64]] = []
    with progress("Comparing with the source", sum(map(len, texts)), show=show) as advance:
        for token_ids in texts:
            for p, q, targets in _rows(source, quantized, token_ids):
                each.append((np.exp(p) * (p - q)).sum(axis=1))
                same.append(p.argmax(axis=1) == q.argmax(axis=1))
                at = np.arange(len(targets)), targets
                surprises.append(-np.stack([p[at], q[at]]))
                advance(len(p))
    values = np.concatenate(each)
    error = float(values.std(ddof=1) / sqrt(len(values))) if len(values) > 1 else None
    by_token = np.concatenate(surprises, axis=1)
    perplexities = np.exp(by_token.mean(axis=1)).tolist() if by_token.size else (None, None)
    return Divergence(
        float(values.mean()), error, float(np.concatenate(same).mean()), len(values), *perplexities
    )


def _rows(
    source: LLM, quantized: LLM, token_ids: Sequence[int]
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]]:
    """Log-probabilities of both after some tokens at a time, and the tokens that follow them."""
    both = source.logits(token_ids), quantized.logits(token_ids)
    for first in range(0, len(token_ids), _ROWS):
        p, q = (_log_probabilities(logits[first : first + _ROWS]) for logits in both)
        yield p, q, np.array(token_ids[first + 1 : first + 1 + _ROWS], np.int64)


def _log_probabilities(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted
