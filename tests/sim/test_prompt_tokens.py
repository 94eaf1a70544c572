"""Prompts share tokens exactly where their contents are equal."""

from array import array
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagellm.engine import TraceError
from pagellm.sim import PromptTokens, TraceRequest
from pagellm.sim.traces.request import MAX_HASH_ID

HASH_IDS = st.one_of(st.integers(0, 300), st.integers(0, 200_000), st.integers(0, MAX_HASH_ID))
VOCAB_SIZES = st.one_of(st.integers(17, 300), st.sampled_from([1000, 32000, 50257, 151936]))


def request(
    prompt_len: int, hash_ids: list[int] | None = None, size: int | None = None, index: int = 0
) -> TraceRequest:
    return TraceRequest(
        arrival_time=0,
        output_len=1,
        prompt_len=prompt_len,
        hash_ids=hash_ids,
        hash_block_size=size,
        index=index,
    )


def common_prefix(one: "array[int]", other: "array[int]") -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


@given(st.lists(HASH_IDS, min_size=1, max_size=8), st.integers(1, 40), st.data(), VOCAB_SIZES)
def test_tokens_are_as_many_as_the_prompt_has_and_within_the_vocabulary(
    hash_ids: list[int], size: int, data: st.DataObject, vocab_size: int
) -> None:
    prompt_len = (len(hash_ids) - 1) * size + data.draw(st.integers(1, size))
    tokens = PromptTokens(vocab_size)(request(prompt_len, hash_ids, size))
    assert tokens.typecode == "i"
    assert len(tokens) == prompt_len
    assert min(tokens) >= 0
    assert max(tokens) < vocab_size


@given(st.lists(HASH_IDS, max_size=3), HASH_IDS, HASH_IDS, VOCAB_SIZES)
def test_prompts_share_the_pieces_before_the_first_that_differs(
    shared: list[int], one: int, other: int, vocab_size: int
) -> None:
    tokens = PromptTokens(vocab_size)
    first, second = (tokens(request(16 * len(shared) + 16, [*shared, end], 16)) for end in (one, other))
    if one == other:
        assert first == second
    else:
        assert first[: 16 * len(shared)] == second[: 16 * len(shared)]
        assert 16 * len(shared) <= common_prefix(first, second) < 16 * len(shared) + 16


@given(st.sets(st.integers(0, MAX_HASH_ID), min_size=2, max_size=20), st.integers(0, 500))
def test_any_two_contents_differ_in_any_five_consecutive_tokens(contents: set[int], start: int) -> None:
    tokens = PromptTokens(50257)
    parts = [tokens(request(512, [content]))[start : start + 5].tobytes() for content in contents]
    assert all(one != other for one, other in combinations(parts, 2))


@given(st.sets(st.integers(0, 49_999), min_size=2, max_size=20), st.integers(0, 500))
def test_ids_below_the_vocabulary_differ_in_every_token(contents: set[int], start: int) -> None:
    tokens = PromptTokens(50257)
    parts = [tokens(request(512, [content]))[start] for content in contents]
    assert len(set(parts)) == len(contents)


@given(st.lists(st.integers(0, 2**40), min_size=2, max_size=10, unique=True), HASH_IDS)
def test_prompts_of_which_only_the_length_is_known_share_nothing(indices: list[int], hash_id: int) -> None:
    tokens = PromptTokens(32000)
    prompts = [tokens(request(100, index=index)) for index in indices]
    prompts.append(tokens(request(100, [hash_id], 100)))
    assert all(common_prefix(one, other) < 5 for one, other in combinations(prompts, 2))


def test_tokens_depend_on_nothing_that_was_asked_before() -> None:
    asked = PromptTokens(1000)
    requests = [request(40, [i, i + 1, i + 2], 16, index=i) for i in range(5)]
    forwards = [asked(r) for r in requests]
    assert [asked(r) for r in reversed(requests)] == forwards[::-1]
    assert [PromptTokens(1000)(r) for r in requests] == forwards


def test_one_piece_may_be_longer_than_the_prompt() -> None:
    assert PromptTokens(100)(request(3, [5], 2**31 - 1)) == array("i", [5, 5, 5])


class Words:
    """A tokenizer whose tokens are the lengths of words."""

    def encode(self, text: str) -> list[int]:
        return [len(word) for word in text.split()]


def test_texts_are_encoded_and_ids_stay_as_they_are() -> None:
    tokens = PromptTokens(100, Words())
    text = TraceRequest(arrival_time=0, output_len=1, prompt="to be or not")
    assert tokens(text) == array("i", [2, 2, 2, 3])
    assert tokens(TraceRequest(arrival_time=0, output_len=1, prompt_token_ids=[7, 99])) == array("i", [7, 99])


def test_what_cannot_become_tokens_is_an_error() -> None:
    text = TraceRequest(arrival_time=0, output_len=1, prompt="to be")
    with pytest.raises(TraceError, match="prompt: found 'to be', expected a tokenizer"):
        PromptTokens(100)(text)
    with pytest.raises(TraceError, match="prompt: found no tokens"):
        PromptTokens(100, Words())(TraceRequest(arrival_time=0, output_len=1, prompt=" "))
    with pytest.raises(TraceError, match=r"prompt_token_ids: found 100, expected ids below .* 100"):
        PromptTokens(100)(TraceRequest(arrival_time=0, output_len=1, prompt_token_ids=[100]))
    with pytest.raises(TraceError, match="vocab_size: found 16, expected an integer from 17"):
        PromptTokens(16)
