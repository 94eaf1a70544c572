"""Pre-tokenizer patterns: cut where Oniguruma cuts, or refused by name; hostile ones end soon."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagellm.engine.errors import RequestError
from pagellm.engine.tokenizer import Tokenizer, load_tokenizer, pretokenizers
from pagellm.engine.tokenizer.families import (
    BETWEEN_THREES,
    GGUF_PRETOKENIZERS,
    PATTERNS,
    THREES,
    THREES_AT_END,
)
from pagellm.engine.tokenizer.oniguruma import PatternError, translate
from pagellm.engine.tokenizer.pretokenizers import Pretokenizer

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tokenizer" / "patterns.json"
EXPECTED = json.loads(FIXTURE.read_text(encoding="utf-8"))


def cut(pattern: str, text: str) -> list[str]:
    return Pretokenizer([translate(pattern)])(text)


@pytest.mark.parametrize("pattern", EXPECTED["lengths"])
def test_a_pattern_cuts_where_the_reference_library_cuts(pattern: str) -> None:
    lengths = [[len(piece) for piece in cut(pattern, text)] for text in EXPECTED["texts"]]

    assert lengths == EXPECTED["lengths"][pattern]


def test_a_match_without_characters_cuts() -> None:
    assert cut(r"(?=(\d{3})+(?!\d))", "1234567") == ["1", "234", "567"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", r"at character 0: found \( without \)"),
        ("a)", r"at character 1: found \) without \("),
        ("[a", r"at character 0: found \[ without \]"),
        ("*a", "a repeat of nothing"),
        ("a**", "a repeat of a repeat"),
        ("(?=a)*", "a repeat of an assertion"),
        ("(?:a?)*", "a repeat of what may be empty"),
        ("(?R)", r"found '\(\?R\)', which has no translation"),
        ("(?s:.)", "has no translation"),
        ("(?~a)", "has no translation"),
        ("(?(1)a)", "has no translation"),
        (r"(a)\1", r"found '\\1', which has no translation"),
        (r"\k<a>", r"found '\\k', which has no translation"),
        (r"\g<0>", r"found '\\g', which has no translation"),
        (r"\X", r"found '\\X', which has no translation"),
        (r"\xe9", r"found '\\x', which has no translation"),
        (r"\x{110000}", "expected a character"),
        (r"\x{d800}", "expected a character"),
        ("\ud800", r"found the lone surrogate U\+D800"),
        ("[\ud800]", r"found the lone surrogate U\+D800"),
        (r"\p{Klingon}", r"found '\\\\p\{Klingon\}', expected a property"),
        (r"\p{L", "expected a property"),
        ("[[:nope:]]", r"found '\[:nope:\]', expected one of alnum"),
        ("[]", "found ] first in a set"),
        ("[a&&]", "an empty set"),
        ("[z-a]", "found the range 'z' to 'a'"),
        (r"[\d-z]", "found - behind a set"),
        ("(?i)stra", "one character in another case"),
        ("(?i)s{2}", "one character in another case"),
        ("(?i)é", "under \\(\\?i\\), which has no translation"),
        (r"(?i)\w", "a set of letters under"),
        ("(?<=a+)b", "a repeat of no fixed number in a lookbehind"),
        ("(?<=(?=a)b)c", "a group in a lookbehind"),
        ("a{1000000000}", "more than 100000 repeats"),
        ("(?:a{1000}){1000}", "more than 100000 repeats"),
        ("a{" + "9" * 5000 + "}", "more than 100000 repeats"),
        ("a{3,2}", r"found '\{3,2\}', which has no translation"),
        ("a{,}", r"found '\{,\}', which has no translation"),
        ("(" * 5000, "nested more than 50 deep"),
        ("[" * 5000, "nested more than 50 deep"),
        ("|".join(f"a{index}" for index in range(5000)), "28889 characters, expected at most 10000"),
        (r"\b" * 1000, "more than 100 named sets and word boundaries"),
    ],
)
def test_a_pattern_without_a_translation_is_refused_by_name(pattern: str, message: str) -> None:
    with pytest.raises(PatternError, match=message) as caught:
        translate(pattern)
    assert len(str(caught.value)) < 200


@given(st.text(st.sampled_from("ab|()[]{}?*+^$.\\-&:<=!,12imxpPLwWdbkR#' \n"), max_size=30))
def test_any_pattern_is_translated_or_refused(pattern: str) -> None:
    try:
        words = cut(pattern, "ab 12\nb")
    except PatternError:
        return
    assert "".join(words) == "ab 12\nb"


def test_a_pattern_that_tries_exponentially_many_ways_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretokenizers, "_TIME_LIMIT_S", 0.1)
    with pytest.raises(RequestError, match=r"patterns took more than 0\.1 s on 42 characters"):
        cut(r"(?:(?:a|aa)+)+$(?<=b)", "a" * 40 + "\nb")


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("olmo", "it's 123", ["it", "'s", " 123"]),
        ("exaone", "it's 123", ["it", "'s", " ", "1", "2", "3"]),
        ("lfm2", "it'S 1234", ["it", "'S", " ", "123", "4"]),
        ("deepseek-r1-qwen", "it'S 12", ["it", "'S", " ", "1", "2"]),
        ("qwen35", "e\u0301a 12", ["e\u0301a", " ", "1", "2"]),
        ("gpt-4o", "camelCASEWords it's", ["camel", "CASEWords", " it's"]),
        ("tekken", "camelCASE 12", ["camel", "CASE", " ", "1", "2"]),
        ("deepseek-v3", "1234中文,abc d", ["123", "4", "中文", ",abc", " d"]),
        ("deepseek-coder", "a,b 12\n", ["a", ",", "b", " ", "1", "2", "\n"]),
        ("bailingmoe", "it'S\n\n", ["it", "'S", "\n\n"]),
        ("seed-coder", "a!\n\nb", ["a", "!", "\n\n", "b"]),
    ],
)
def test_a_gguf_name_is_its_familys_pattern(pre: str, text: str, words: list[str]) -> None:
    pretokenizer, _ = pretokenizers.from_gguf_name(pre)
    assert pretokenizer(text) == words


GGUF_NAMES = json.loads((FIXTURE.parent / "gguf_names.json").read_text(encoding="utf-8"))
# Where llama.cpp's pattern only approximates the one of the model's tokenizer.json, which is what is read: of
# normal form C it knows nothing, and its \b is one of ASCII.
APPROXIMATED = {"command-r": [9], "qwen2": [9], "tiny_aya": [29], "cohere2moe": [29]}


@cache
def gpt2_metadata() -> dict[str, Any]:
    vocab = json.loads((FIXTURE.parents[1] / "gpt2" / "vocab.json").read_text(encoding="utf-8"))
    merges = (FIXTURE.parents[1] / "gpt2" / "merges.txt").read_text(encoding="utf-8").split("\n")[1:-1]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": sorted(vocab, key=vocab.__getitem__),
        "tokenizer.ggml.token_type": [1] * (len(vocab) - 1) + [3],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": len(vocab) - 1,
    }


@pytest.mark.parametrize("group", GGUF_NAMES["groups"], ids=lambda group: group["names"][0])
def test_each_gguf_name_gives_the_ids_of_llama_cpp(group: dict[str, Any]) -> None:
    tokenizers: dict[tuple[Any, ...], Tokenizer] = {}
    for name in group["names"]:
        meaning = GGUF_PRETOKENIZERS[name]
        if meaning not in tokenizers:
            tokenizers[meaning] = load_tokenizer(gpt2_metadata() | {"tokenizer.ggml.pre": name})
        found = zip(GGUF_NAMES["texts"], group["ids"], strict=True)
        differing = [at for at, (text, ids) in enumerate(found) if tokenizers[meaning].encode(text) != ids]
        assert differing == APPROXIMATED.get(name, []), name


def test_every_gguf_name_of_llama_cpp_is_known() -> None:
    names = {name for group in GGUF_NAMES["groups"] for name in group["names"]}
    of_characters = {name for name, meaning in GGUF_PRETOKENIZERS.items() if meaning.characters}
    assert names | of_characters == set(GGUF_PRETOKENIZERS)
    assert of_characters == {"gemma4", "granite-embed-multi-311m", "sarvam-moe", "whitespace"}


@given(st.text(st.sampled_from("1234567890a_ .-\u0664\u00bd\u2b96"), max_size=30))
@pytest.mark.parametrize("pattern", [THREES, THREES_AT_END, BETWEEN_THREES])
def test_digits_in_threes_are_cut_as_the_pattern_cuts_them(pattern: str, text: str) -> None:
    # In a group the pattern is not recognised, and works by itself.
    assert cut(pattern, text) == cut(f"(?:{pattern})", text)


@given(
    st.text(
        st.one_of(
            st.sampled_from(
                "ab,. \n\r\t1=\u3000\u2009\u4e2d\u3042\u3001\u0966\u0902\u2167\u0301\xe9\xbd\xa0\u1680"
            ),
            st.characters(exclude_categories=["Cs"]),
        ),
        max_size=20,
    )
)
def test_several_patterns_in_one_cut_as_one_after_the_other(text: str) -> None:
    for family in ("deepseek-coder", "smollm"):
        words = [text] if text else []
        for pattern in PATTERNS[family]:
            words = [word for piece in words for word in cut(pattern, piece)]
        assert Pretokenizer.named(family)(text) == words


@pytest.mark.parametrize("pattern", [THREES, THREES_AT_END, BETWEEN_THREES])
def test_a_million_digits_are_cut_in_linear_time(pattern: str) -> None:
    assert len(cut(pattern, "1" * 1_000_000)) == 333_334


def test_what_goes_with_a_gguf_name_follows_llama_cpp() -> None:
    assert GGUF_PRETOKENIZERS["llama-bpe"].ignore_merges
    assert GGUF_PRETOKENIZERS["llama-bpe"].add_bos
    assert not GGUF_PRETOKENIZERS["dbrx"].ignore_merges
    assert not GGUF_PRETOKENIZERS["dbrx"].add_bos
    assert {named.family for named in GGUF_PRETOKENIZERS.values()} == set(PATTERNS)
