"""Sampling: one token from a row of 49,152 logits, on one thread, whatever their shape and the filters.

Run: python -m pytest bench/bench_sampling.py --benchmark-group-by=param:logits --benchmark-columns=median
A round is `ROWS` rows in one call, so a median of 2 ms is 20 microseconds a row.
"""

from typing import NamedTuple

import numpy as np
import pytest

from pagellm.kernels.jit import entry_point
from pagellm.kernels.sampling import log_sum_exp, sample, top_tokens

VOCAB_SIZE = 49_152  # SmolLM2's
ROWS = 100


class Filters(NamedTuple):
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


FILTERS = {
    "greedy": Filters(temperature=0.0),
    "none": Filters(),
    "top_k 50": Filters(top_k=50),
    "top_k 1000": Filters(top_k=1000),
    "top_p 0.95": Filters(top_p=0.95),
    "min_p 0.05": Filters(min_p=0.05),
    "top_k 50, top_p 0.95": Filters(top_k=50, top_p=0.95),
    "top_k 20000, top_p 0.95, min_p 0.001": Filters(top_k=20_000, top_p=0.95, min_p=0.001),
}


def logits_like(kind):
    """A row of logits: like a language model's, or of a shape that is harder to filter."""
    rng = np.random.default_rng(0)
    if kind == "language":  # a bulk, and a Zipfian head of a few hundred tokens that reaches above it
        logits = rng.standard_normal(VOCAB_SIZE) * 2.5
        head = rng.choice(VOCAB_SIZE, 500, replace=False)
        logits[head] = 18 - 1.6 * np.log(np.arange(1, 501)) + rng.standard_normal(500) * 0.3
    elif kind == "peaked":
        logits = rng.standard_normal(VOCAB_SIZE) * 2.5
        logits[rng.integers(VOCAB_SIZE)] = 25
    elif kind == "flat":
        logits = rng.standard_normal(VOCAB_SIZE) * 0.5
    elif kind == "tied":
        logits = rng.integers(-12, 13, VOCAB_SIZE) / 4
    else:
        logits = np.zeros(VOCAB_SIZE)
    return logits.astype(np.float32)


@entry_point
def sample_rows(logits, temperature, top_k, top_p, min_p, scaled, weights, tokens):
    for position in range(tokens.size):
        tokens[position] = sample(
            logits, logits.size, temperature, top_k, top_p, min_p, np.uint64(7), np.uint64(position),
            scaled, weights,
        )  # fmt: skip


@entry_point
def score_rows(logits, ids, scratch, normalizers):
    for row in range(normalizers.size):
        normalizers[row] = log_sum_exp(logits, logits.size, scratch)
        top_tokens(logits, logits.size, ids)


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("logits", ["language", "peaked", "flat", "tied", "equal"])
def test_sample(benchmark, logits, filters):
    row = logits_like(logits)
    temperature, top_k, top_p, min_p = FILTERS[filters]
    scaled, weights = np.empty_like(row), np.empty_like(row)
    tokens = np.empty(ROWS, np.int64)
    benchmark(
        sample_rows, row, np.float32(temperature), np.int32(top_k), top_p, np.float32(min_p), scaled, weights,
        tokens,
    )  # fmt: skip
    assert (tokens >= 0).all()


@pytest.mark.parametrize("count", [0, 20])
@pytest.mark.parametrize("logits", ["language", "flat"])
def test_log_probabilities(benchmark, logits, count):
    row = logits_like(logits)
    ids, normalizers = np.empty(count, np.int32), np.empty(ROWS)
    benchmark(score_rows, row, ids, np.empty_like(row), normalizers)
