"""From logits to a token: what is kept, what is drawn, penalties, log-probabilities, and reproducibility.

The same uniform number goes through the oracle, so tokens are compared exactly. Only draws that float32
could not decide (within 1e-5 of a boundary) are passed over.
"""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pagellm.kernels.sampling import (
    argmax,
    greatest,
    has_softmax,
    log_sum_exp,
    penalize,
    philox,
    sample,
    top_tokens,
    uniform,
)
from pagellm.kernels.simd import LANES
from tests import oracles
from tests.oracles import Filters

Logits = NDArray[np.float32]

NO_FILTER = Filters()
UNDECIDED = 1e-5
SEED = 12345


def whole_vectors(size: int) -> int:
    return -(-size // LANES) * LANES


def row_of(logits: Any) -> tuple[Logits, int]:
    """Logits as a row of the step's buffer: filled up to whole vectors with what nobody may look at."""
    logits = np.asarray(logits, np.float32)
    row = np.full(whole_vectors(logits.size), np.nan, np.float32)
    row[: logits.size] = logits
    return row, logits.size


def drawn(
    logits: Any, temperature: float, filters: Filters = NO_FILTER, num: int = 1, seed: int = SEED
) -> NDArray[np.int64]:
    """The tokens that positions 0 .. num - 1 sample."""
    row, size = row_of(logits)
    scaled, scaled_end = np.split(np.full(row.size + LANES, np.nan, np.float32), [row.size])
    weights, weights_end = np.split(np.full(row.size + LANES, np.nan, np.float32), [row.size])
    before = row.copy()
    tokens = [
        sample(
            row, size, np.float32(temperature), np.int32(filters.top_k), filters.top_p,
            np.float32(filters.min_p), np.uint64(seed), np.uint64(position), scaled, weights,
        )
        for position in range(num)
    ]  # fmt: skip
    np.testing.assert_array_equal(row, before)
    assert np.isnan([scaled_end, weights_end]).all(), "written behind the end of the working memory"
    return np.array(tokens)


def assert_draws_agree(logits: Any, temperature: float, filters: Filters = NO_FILTER, num: int = 64) -> None:
    """Each position's token is the oracle's for the same uniform number."""
    ids, shares = oracles.cumulative(logits, temperature, filters)
    for position, token in enumerate(drawn(logits, temperature, filters, num)):
        at = oracles.uniform(SEED, position)
        if np.abs(shares[:-1] - at).min(initial=1.0) > UNDECIDED:
            assert token == ids[np.searchsorted(shares[:-1], at, side="right")]


def decided(logits: Any, temperature: float, filters: Filters) -> bool:
    """Whether rounding cannot move a token across the boundary of top-p or min-p."""
    by = UNDECIDED
    variants = [
        Filters(filters.top_k, filters.top_p * (1 + p), filters.min_p * (1 + m))
        for p in (-by, by * (filters.top_p < 1))
        for m in (-by, by * (filters.min_p < 1))
    ]
    kept = oracles.kept(logits, temperature, filters)
    return all(np.array_equal(kept, oracles.kept(logits, temperature, v)) for v in variants)


# Vocabularies smaller than a vector, of whole ones and of a few more, and around whole blocks of a sum.
BLOCK = 16 * LANES
SIZES = st.sampled_from(
    [1, 2, 3, LANES - 1, LANES, LANES + 1, 50, BLOCK - 1, BLOCK, BLOCK + 1, 333, 4 * BLOCK, 1030, 3000]
)
FILTERS = st.builds(
    Filters,
    top_k=st.sampled_from([0, 0, 1, 2, 5, 40, 1000]),
    top_p=st.sampled_from([1.0, 1.0, 0.999, 0.95, 0.7, 0.31, 0.05, 1e-9]),
    min_p=st.sampled_from([0.0, 0.0, 1e-4, 0.03, 0.4, 1.0]),
)
TEMPERATURES = st.sampled_from([1e-30, 1e-4, 0.1, 0.7, 1.0, 1.5, 30.0, 1e30])


@st.composite
def vocabulary(draw: st.DrawFn) -> Logits:
    """Logits: all equal, with many ties, or spread out, over all of float32 too, some of them impossible."""
    size, seed = draw(SIZES), draw(st.integers(0, 1000))
    rng = np.random.default_rng(seed)
    kind = draw(st.sampled_from(["equal", "grid", "two", "scales", "normal", "far apart", "huge"]))
    if kind == "equal":
        logits = np.full(size, draw(st.sampled_from([0.0, -7.25, 300.0])))
    elif kind == "grid":
        logits = rng.integers(-12, 13, size) / 4
    elif kind == "two":
        logits = np.where(rng.random(size) < draw(st.sampled_from([0.01, 0.5, 0.99])), 1.5, 1.25)
    elif kind == "scales":
        logits = rng.choice([-1.0, 1.0], size) * 2.0 ** rng.integers(-149, 100, size)
    else:
        logits = rng.standard_normal(size) * {"normal": 4.0, "far apart": 100.0, "huge": 1e8}[kind]
    impossible = draw(st.sampled_from([0.0, 0.0, 0.3, 0.95]))
    logits[rng.random(size) < impossible] = -np.inf
    if np.isneginf(logits).all():
        logits[rng.integers(size)] = 2.0
    return logits.astype(np.float32)


# Random numbers


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, (0,) * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_the_oracle_gives_the_published_vectors(
    counter: tuple[int, int, int, int], key: tuple[int, int], words: str
) -> None:
    """The known answers for philox4x32-10 that Random123 comes with."""
    assert " ".join(f"{word:08x}" for word in oracles.philox4x32(counter, key)) == words


def test_philox_gives_the_published_vector() -> None:
    assert philox(np.uint64(0), np.uint64(0)) == 0xE169C58D_6627E8D5


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_philox_agrees_with_the_oracle(seed: int, counter: int) -> None:
    word = 2**32 - 1
    low, high, _, _ = oracles.philox4x32((counter & word, counter >> 32, 0, 0), (seed & word, seed >> 32))
    assert philox(np.uint64(seed), np.uint64(counter)) == high << 32 | low
    assert uniform(np.uint64(seed), np.uint64(counter)) == oracles.uniform(seed, counter)


def test_uniform_numbers_are_uniform() -> None:
    numbers = np.array([uniform(np.uint64(7), np.uint64(position)) for position in range(20_000)])
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
    assert (np.abs(counts - 1000) < 6 * math.sqrt(1000)).all()


# The greatest


@given(vocabulary())
def test_greedy_takes_the_first_of_the_greatest(logits: Logits) -> None:
    row, size = row_of(logits)
    assert greatest(row, size) == logits.max()
    assert argmax(row, size) == oracles.sample(logits, 0, NO_FILTER, 0.0)
    assert drawn(logits, 0.0) == np.argmax(logits)


@pytest.mark.parametrize("size", [1, LANES - 1, LANES, LANES + 1, 3 * LANES + 5])
def test_the_greatest_is_found_anywhere(size: int) -> None:
    for place in range(size):
        logits = np.full(size, -3.0)
        logits[place] = -2.0
        assert argmax(*row_of(logits)) == place


def test_a_row_without_any_possible_token_gives_none() -> None:
    logits = np.full(5, -np.inf)
    assert drawn(logits, 0.0) == -1
    assert drawn(logits, 1.0) == -1


# Draws


@settings(max_examples=150)
@given(vocabulary(), TEMPERATURES)
def test_draws_agree_with_the_oracle(logits: Logits, temperature: float) -> None:
    assert_draws_agree(logits, temperature)


@settings(max_examples=400)
@given(vocabulary(), TEMPERATURES, FILTERS)
def test_filtered_draws_agree_with_the_oracle(logits: Logits, temperature: float, filters: Filters) -> None:
    if filters.top_p < 1 and len(np.unique(logits[logits > -np.inf])) == 1:
        filters = Filters(filters.top_k, 0.5, filters.min_p)  # among equals a share of one half is exact
    else:
        assume(decided(logits, temperature, filters))
    assert_draws_agree(logits, temperature, filters)


@pytest.mark.parametrize(
    "filters",
    [
        Filters(top_k=50),
        Filters(top_k=30_000),
        Filters(top_p=0.95),
        Filters(min_p=0.05),
        Filters(50, 0.95),
        Filters(30_000, 0.9, 1e-3),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["flat", "spread", "peaked", "tied"])
def test_draws_from_a_large_vocabulary_agree_with_the_oracle(kind: str, filters: Filters) -> None:
    rng = np.random.default_rng(1)
    logits = rng.standard_normal(49_157).astype(np.float32) * {"flat": 0.5}.get(kind, 3.0)
    if kind == "peaked":
        logits[40_000] = 25.0
    elif kind == "tied":
        logits = np.round(logits)
    assert_draws_agree(logits, 0.8, filters, num=200)


@pytest.mark.parametrize("size", [2, LANES, 100, 2050])
def test_a_share_exactly_at_the_boundary_of_top_p_is_enough(size: int) -> None:
    logits = np.zeros(size)
    tokens = drawn(logits, 1.0, Filters(top_p=0.5), num=400)
    assert tokens.max() < size // 2
    assert_draws_agree(logits, 1.0, Filters(top_p=0.5), num=400)


@pytest.mark.parametrize(
    "filters", [Filters(top_k=700), Filters(top_k=1500), Filters(top_p=0.7), Filters(1500, 0.9)], ids=str
)
def test_ties_go_to_the_lower_ids_over_many_blocks(filters: Filters) -> None:
    logits = np.tile([0.0, 0.0, 1.0, -1.0], 3 * BLOCK)
    assert decided(logits, 1.0, filters)
    assert_draws_agree(logits, 1.0, filters, num=2000)  # one token more or less would move many of them


@pytest.mark.parametrize("k", [1, 2, 7, 8, 9, 29, 30, 31])
def test_top_k_keeps_exactly_k_and_the_lower_ids_among_equals(k: int) -> None:
    logits = np.tile([1.0, 2.0, 1.0], 10)  # ten of the greatest, twenty that are equal
    tokens = drawn(logits, 1.0, Filters(top_k=k), num=1500)
    assert set(tokens) == set(oracles.kept(logits, 1.0, Filters(top_k=k)))
    assert len(set(tokens)) == min(k, 30)


def test_top_p_is_a_share_of_what_top_k_left() -> None:
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    assert set(drawn(logits, 1.0, Filters(top_p=0.6), num=300)) == {0, 1}
    assert set(drawn(logits, 1.0, Filters(top_k=2, top_p=0.5), num=300)) == {0}


def test_min_p_is_relative_to_the_greatest_at_the_temperature() -> None:
    logits = np.log([0.5, 0.3, 0.2])
    assert set(drawn(logits, 1.0, Filters(min_p=0.55), num=300)) == {0, 1}
    assert set(drawn(logits, 0.5, Filters(min_p=0.55), num=300)) == {0}


def test_the_smallest_top_p_and_the_greatest_min_p_leave_the_greatest() -> None:
    logits = np.random.default_rng(0).standard_normal(200)
    for filters in (Filters(top_p=1e-300), Filters(min_p=1.0), Filters(top_k=1)):
        assert set(drawn(logits, 5.0, filters, num=50)) == {np.argmax(logits)}


def test_a_tiny_temperature_is_greedy_and_a_huge_one_uniform() -> None:
    logits = np.array([1.0, 3.0, 2.999, -4.0])
    assert set(drawn(logits, 1e-30, num=100)) == {1}
    assert set(drawn(logits, 1e30, num=200)) == {0, 1, 2, 3}


@pytest.mark.parametrize("filters", [Filters(top_p=0.9), Filters(top_k=3), Filters(3, 0.9)], ids=str)
@pytest.mark.parametrize("temperature", [1e-20, 1.0])
def test_distances_beyond_all_bounds_are_the_least_likely(filters: Filters, temperature: float) -> None:
    """What a bias of -1e30, a large repetition penalty or a tiny temperature make of a logit."""
    logits = np.concatenate([[3.0], np.full(50, -1e30)])
    assert set(drawn(logits, temperature, filters, num=50)) == {0}


def test_impossible_tokens_are_never_drawn() -> None:
    logits = np.where(np.arange(100) % 10 == 3, 0.0, -np.inf)
    for filters in (NO_FILTER, Filters(top_k=50), Filters(top_p=0.9999), Filters(min_p=1e-9)):
        assert set(drawn(logits, 10.0, filters, num=300) % 10) == {3}


def test_frequencies_are_the_probabilities() -> None:
    logits = np.array([2.0, 0.0, -1.0, 1.0, -np.inf, 0.5])
    num = 20_000
    p = np.exp(oracles.log_softmax(logits / 0.8))
    counts = np.bincount(drawn(logits, 0.8, num=num), minlength=len(p))
    assert (np.abs(counts - num * p) <= 5 * np.sqrt(num * p * (1 - p))).all()


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    logits = np.zeros(1000)
    first = drawn(logits, 1.0, num=50)
    np.testing.assert_array_equal(drawn(logits, 1.0, num=50), first)
    assert (drawn(logits, 1.0, num=50, seed=SEED + 1) != first).any()
    assert len(set(first)) > 30


# Penalties


@given(
    prompt=st.lists(st.integers(0, 19), max_size=12),
    output=st.lists(st.integers(0, 19), max_size=12),
    repetition=st.sampled_from([1.0, 0.5, 1.3, 2.0]),
    frequency=st.sampled_from([0.0, 0.25, -0.5, 2.0]),
    presence=st.sampled_from([0.0, 0.75, -1.0, 2.0]),
)
def test_penalties_agree_with_the_oracle(
    prompt: list[int], output: list[int], repetition: float, frequency: float, presence: float
) -> None:
    logits = np.linspace(-3, 3, 20).astype(np.float32)
    logits[5] = -np.inf
    penalized, counts = logits.copy(), np.zeros(20, np.int32)
    penalize(
        penalized, np.array(prompt + output, np.int32), np.int32(len(prompt)), np.float32(repetition),
        np.float32(frequency), np.float32(presence), counts,
    )  # fmt: skip
    expected = oracles.penalize(logits, prompt, output, repetition, frequency, presence)
    np.testing.assert_allclose(penalized, expected, rtol=1e-6, atol=1e-6)
    untouched = sorted(set(range(20)) - set(prompt) - set(output))
    np.testing.assert_array_equal(penalized[untouched], logits[untouched])
    assert not counts.any(), "the next row would see this one's tokens"


# Log-probabilities


@settings(max_examples=150)
@given(vocabulary(), st.integers(0, 30))
def test_top_tokens_agree_with_the_oracle(logits: Logits, count: int) -> None:
    ids = np.full(min(count, logits.size), -1, np.int32)
    top_tokens(*row_of(logits), ids)
    assert ids.tolist() == oracles.top_tokens(logits, count)


def test_all_tokens_can_be_top_tokens() -> None:
    logits = np.random.default_rng(0).permutation(40) / 4
    ids = np.full(40, -1, np.int32)
    top_tokens(*row_of(logits), ids)
    np.testing.assert_array_equal(ids, np.argsort(-logits))


@settings(max_examples=100)
@given(vocabulary())
def test_log_probabilities_agree_with_the_oracle(logits: Logits) -> None:
    assume(abs(logits.max()) < 2.0**30)  # beyond, float64 has no room for the logarithm of a sum
    row, size = row_of(logits)
    found = logits.astype(np.float64) - log_sum_exp(row, size, np.full_like(row, np.nan))
    np.testing.assert_allclose(found, oracles.log_softmax(logits), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [1, LANES + 1, BLOCK, BLOCK + 3])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_the_normalizer_tells_of_logits_that_are_no_finite_numbers(value: float, size: int) -> None:
    for place in (0, size // 2, size - 1):
        row, _ = row_of(np.zeros(size))
        row[place] = value
        assert not np.isfinite(log_sum_exp(row, size, np.full_like(row, np.nan)))
        assert not has_softmax(row, size)


@pytest.mark.parametrize("size", [1, LANES + 1, BLOCK, BLOCK + 3])
def test_logits_have_a_softmax_if_one_token_is_possible(size: int) -> None:
    row, _ = row_of(np.full(size, -np.inf))
    assert not has_softmax(row, size)
    for place in (0, size // 2, size - 1):
        one, _ = row_of(np.full(size, -np.inf))
        one[place] = -3e38
        assert has_softmax(one, size)


def test_log_probabilities_of_a_large_vocabulary_keep_their_precision() -> None:
    logits = np.zeros(200_000)
    row, size = row_of(logits)
    assert log_sum_exp(row, size, np.zeros_like(row)) == pytest.approx(math.log(200_000), rel=1e-12)
