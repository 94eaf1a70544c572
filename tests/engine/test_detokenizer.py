"""The incremental detokenizer: the pieces join to the whole, and no piece holds half a character."""

from collections.abc import Iterable
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagellm.engine.errors import RequestError
from pagellm.engine.tokenizer import IncrementalDetokenizer, Tokenizer, TokenizerSpec, load_tokenizer
from pagellm.engine.tokenizer.added_tokens import AddedToken
from pagellm.engine.tokenizer.bpe import Bpe
from pagellm.engine.tokenizer.byte_alphabet import CHAR_OF_BYTE
from pagellm.engine.tokenizer.pretokenizers import Pretokenizer
from tests.engine.test_tokenizer import GPT2, any_text


@cache
def gpt2() -> Tokenizer:
    return load_tokenizer(GPT2)


@cache
def raw_bytes() -> Tokenizer:
    """One token for each byte, and a special token 256."""
    vocab = {char: byte for byte, char in enumerate(CHAR_OF_BYTE)}
    added = (AddedToken(256, "<end>"),)
    return Tokenizer(TokenizerSpec(vocab, Bpe(vocab, []), Pretokenizer.named("gpt2"), added))


def appended(detokenizer: IncrementalDetokenizer, token_ids: Iterable[int]) -> str:
    return "".join(map(detokenizer.append, token_ids))


@given(st.lists(st.integers(0, 256)), st.booleans())
def test_the_pieces_of_any_bytes_join_to_the_decoded_whole(ids: list[int], skip: bool) -> None:
    detokenizer = IncrementalDetokenizer(raw_bytes(), skip_special_tokens=skip)

    pieces = [detokenizer.append(token_id) for token_id in ids]

    assert "".join(pieces) + detokenizer.finish() == raw_bytes().decode(ids, skip_special_tokens=skip)


@given(st.lists(st.integers(0, 50256)))
def test_the_pieces_of_any_tokens_join_to_the_decoded_whole(ids: list[int]) -> None:
    detokenizer = IncrementalDetokenizer(gpt2(), skip_special_tokens=False)
    assert appended(detokenizer, ids) + detokenizer.finish() == gpt2().decode(ids)


@given(any_text)
def test_a_valid_text_streams_without_a_replacement_character(text: str) -> None:
    text = text.replace("\ufffd", "")
    detokenizer = IncrementalDetokenizer(gpt2())
    pieces = [detokenizer.append(token_id) for token_id in gpt2().encode(text, parse_special=False)]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == text
    assert detokenizer.finish() == ""


def test_a_character_is_held_back_until_it_is_complete() -> None:
    detokenizer = IncrementalDetokenizer(raw_bytes())
    assert [detokenizer.append(byte) for byte in "a👍".encode()] == ["a", "", "", "", "👍"]


def test_an_unfinished_character_comes_out_at_the_end_as_a_replacement() -> None:
    detokenizer = IncrementalDetokenizer(raw_bytes())
    assert appended(detokenizer, "👍".encode()[:3]) == ""
    assert detokenizer.finish() == "\ufffd"
    assert detokenizer.append(ord("a")) == "a"


def test_special_tokens_are_left_out_unless_wanted() -> None:
    assert IncrementalDetokenizer(raw_bytes()).append(256) == ""
    assert IncrementalDetokenizer(raw_bytes(), skip_special_tokens=False).append(256) == "<end>"


def test_an_id_out_of_range_is_refused() -> None:
    with pytest.raises(RequestError, match="token id: found 257, expected one from 0 to 256"):
        IncrementalDetokenizer(raw_bytes()).append(257)
