"""The tokenizer: exact ids, round trips, every source it is read from, and bad sources refused by name."""

import json
import os
import random
import re
import string
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagellm.engine.errors import CheckpointError, RequestError
from pagellm.engine.tokenizer import Tokenizer, TokenizerSpec, load_tokenizer, long_texts
from pagellm.engine.tokenizer.bpe import Bpe, MergeTable
from pagellm.engine.tokenizer.byte_alphabet import CHAR_OF_BYTE
from pagellm.engine.tokenizer.families import GGUF_PRETOKENIZERS, PATTERNS
from pagellm.engine.tokenizer.normalization import to_nfc, to_nfd, to_nfkc, to_nfkd
from pagellm.engine.tokenizer.pretokenizers import Pretokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures"
GPT2 = FIXTURES / "gpt2"
EXPECTED = json.loads((FIXTURES / "tokenizer" / "expected.json").read_text(encoding="utf-8"))
FAMILIES = sorted(EXPECTED["families"])
HELLO = [{"role": "user", "content": "hi"}]


@cache
def gpt2() -> Tokenizer:
    return load_tokenizer(GPT2)


@cache
def gpt2_vocab() -> dict[str, int]:
    return json.loads((GPT2 / "vocab.json").read_text(encoding="utf-8"))


@cache
def gpt2_merges() -> list[str]:
    return (GPT2 / "merges.txt").read_text(encoding="utf-8").split("\n")[1:-1]


def tokenizer_json(family: str = "gpt2", *, pairs: bool = False) -> dict[str, Any]:
    """A `tokenizer.json` as the reference library wrote it, with GPT-2's vocabulary."""
    data = json.loads(json.dumps(EXPECTED["families"][family]["tokenizer_json"]))
    merges = [merge.split(" ") for merge in gpt2_merges()] if pairs else gpt2_merges()
    data["model"] |= {"vocab": gpt2_vocab(), "merges": merges}
    return data


@cache
def of_family(family: str) -> Tokenizer:
    """With added tokens none of which takes the whitespace beside it."""
    data = tokenizer_json(family)
    data["added_tokens"] = [token | {"lstrip": False, "rstrip": False} for token in data["added_tokens"]]
    with TemporaryDirectory() as directory:
        return load_json(Path(directory), data)


def small_json(**model: Any) -> dict[str, Any]:
    """A `tokenizer.json` of the 256 bytes and three merges: `h e`, `l l`, `he ll`."""
    tokens = [*CHAR_OF_BYTE, "he", "ll", "hell"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return {
        "model": {"type": "BPE", "vocab": vocab, "merges": ["h e", "l l", "he ll"]} | model,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
        "added_tokens": [],
    }


def small_gguf(**changes: Any) -> dict[str, Any]:
    """GGUF metadata of the 256 bytes, three merges, one control, one user-defined and one unused token."""
    metadata = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": [*CHAR_OF_BYTE, "he", "ll", "hell", "<|im_end|>", "<tool>", "[PAD261]"],
        "token_type": [1] * 259 + [3, 4, 5],
        "merges": ["h e", "l l", "he ll"],
        "bos_token_id": 259,
        "eos_token_id": 259,
    }
    named = {
        f"tokenizer.ggml.{key}": value for key, value in (metadata | changes).items() if value is not None
    }
    return named | {"tokenizer.chat_template": "{{ messages[0].content }}{{ eos_token }}"}


def write(directory: Path, **files: Any) -> Path:
    """Writes `name=object` as `name.json`."""
    for name, value in files.items():
        (directory / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return directory


def load_json(directory: Path, data: dict[str, Any], **files: Any) -> Tokenizer:
    return load_tokenizer(write(directory, tokenizer=data, **files))


# Exact ids


def test_gpt2_gives_the_known_ids() -> None:
    assert gpt2().encode("The capital of France is") == [464, 3139, 286, 4881, 318]
    assert gpt2().encode("hello<|endoftext|>") == [31373, 50256]
    assert gpt2().decode([464, 3139, 286, 4881, 318]) == "The capital of France is"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pairs", [False, True])
def test_every_family_gives_the_ids_of_the_reference_library(
    tmp_path: Path, family: str, pairs: bool
) -> None:
    tokenizer = load_json(tmp_path, tokenizer_json(family, pairs=pairs))

    ids = [tokenizer.encode(text) for text in EXPECTED["texts"]]

    assert ids == EXPECTED["families"][family]["ids"]


# Laws

any_text = st.text(st.characters(exclude_categories=["Cs"]))


@given(any_text)
def test_any_text_comes_back(text: str) -> None:
    assert gpt2().decode(gpt2().encode(text)) == text
    assert gpt2().decode(gpt2().encode(text, parse_special=False)) == text


@given(any_text)
@pytest.mark.parametrize("name", sorted(PATTERNS))
def test_the_words_of_a_text_join_to_the_text(name: str, text: str) -> None:
    assert "".join(Pretokenizer.named(name)(text)) == text


SMALL_TOKENS = ["".join(chars) for size in range(1, 5) for chars in product("ab", repeat=size)]
SMALL_MERGES = [f"{a} {b}" for a, b in product(SMALL_TOKENS, repeat=2) if a + b in SMALL_TOKENS]


@given(st.text(st.sampled_from("ab"), max_size=120), st.lists(st.sampled_from(SMALL_MERGES), unique=True))
def test_merges_equal_a_naive_search_for_the_best_pair(word: str, merges: list[str]) -> None:
    """In any order of the merges, also where a merge makes a pair that goes before its own."""
    vocab = {token: token_id for token_id, token in enumerate(SMALL_TOKENS)}

    ids = MergeTable(vocab, merges).apply([vocab[char] for char in word])

    assert [SMALL_TOKENS[id_] for id_ in ids] == naive_merge(
        list(word), {merge: rank for rank, merge in enumerate(merges)}
    )


def naive_merge(symbols: list[str], ranks: dict[str, int]) -> list[str]:
    while True:
        candidates = [
            (ranks[" ".join(symbols[at : at + 2])], at)
            for at in range(len(symbols) - 1)
            if " ".join(symbols[at : at + 2]) in ranks
        ]
        if not candidates:
            return symbols
        _, at = min(candidates)
        symbols = [*symbols[:at], symbols[at] + symbols[at + 1], *symbols[at + 2 :]]


@given(any_text)
def test_smollm_is_digits_one_by_one_and_then_gpt2(text: str) -> None:
    words = []
    gpt2_words = Pretokenizer.named("gpt2")
    stretch = ""
    for char in text:
        if unicodedata.category(char)[0] == "N":
            words += gpt2_words(stretch) if stretch else []
            words.append(char)
            stretch = ""
        else:
            stretch += char
    words += gpt2_words(stretch) if stretch else []

    assert Pretokenizer.named("smollm")(text) == words


# Hostile texts


@pytest.mark.parametrize(
    "text", ["a" * 200_000, " " * 200_000, "".join(random.Random(0).choices(string.ascii_letters, k=200_000))]
)
def test_a_huge_word_is_encoded_and_not_cached(text: str) -> None:
    tokenizer = load_tokenizer(GPT2)

    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer._words) == 0


COMBINING = [chr(code) for code in range(0x110000) if unicodedata.combining(chr(code))]


@given(st.text(st.sampled_from([*COMBINING[:200], "a", "\u1ea5", "\uac00", "\u11a8"]), max_size=100))
def test_nfc_is_that_of_the_unicode_standard(text: str) -> None:
    known = text.replace("\u05c8", "").replace("\u05c9", "")
    assert to_nfc(known) == unicodedata.normalize("NFC", known)


def test_the_other_forms_know_the_characters_that_the_reference_library_knows() -> None:
    assert to_nfkc("\ufb01\u00bd\uff21\u1e9b\u0323") == "fi1\u20442A\u1e69"
    assert to_nfd("\u1e69") == to_nfkd("\u1e69") == "s\u0323\u0307"
    assert to_nfkd("\u3392\u00e9") == "MHze\u0301"
    # Of Unicode 12, 14 and 13.
    assert to_nfkc("\u32ff\ua7f2\U0001fbf5") == "\u32ff\ua7f2\U0001fbf5"


def test_nfc_knows_the_marks_that_the_reference_library_knows() -> None:
    # U+1AC5 is a mark since Unicode 14; to the library's tables it is none, and nothing moves across it.
    assert to_nfc("a\u1ac5\u0323\u0301") == "a\u1ac5\u0323\u0301"
    assert to_nfc("e\u0323\u0301") == "\u1eb9\u0301"


def test_a_long_run_of_combining_marks_is_put_in_order() -> None:
    marks = random.Random(0).choices(COMBINING[:50], k=200_000)
    ordered = to_nfc("x" + "".join(marks))
    assert ordered == "x" + "".join(sorted(marks, key=unicodedata.combining))


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "smollm"])
@given(text=st.one_of(any_text, st.text(st.sampled_from([*COMBINING[:200], "a", " ", "\u1faf"]))))
def test_no_text_has_fewer_tokens_than_a_glance_tells(family: str, text: str) -> None:
    tokenizer = of_family(family)
    fewest = tokenizer.fewest_tokens(text)
    assert fewest <= len(tokenizer.encode(text, add_special_tokens=False))
    assert (fewest > 0) == bool(text)
    composed = unicodedata.normalize("NFD", "\u1faf" * 1000)  # four characters that become one
    assert tokenizer.fewest_tokens(composed) <= len(tokenizer.encode(composed))


def test_a_glance_tells_nothing_where_some_of_a_text_may_be_left_out(tmp_path: Path) -> None:
    data = small_json()
    assert load_json(tmp_path, data).fewest_tokens("h" * 100) == 25
    data["added_tokens"] = [{"id": 259, "content": "<m>", "lstrip": True, "special": True}]
    swallowing = load_json(tmp_path, data)
    assert (swallowing.fewest_tokens(" " * 100 + "<m>"), swallowing.encode(" " * 100 + "<m>")) == (0, [259])


@pytest.mark.parametrize("at_once", [1, 3, 1 << 16])
@given(text=st.text(st.sampled_from("ab \u05c8\u07fd\u0301")))
def test_long_texts_are_looked_through_in_parts(at_once: int, text: str) -> None:
    part, words = re.compile("[\u05c8\u07fd]+"), re.compile(" *[^ ]+| +")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_texts, "_AT_ONCE", at_once)
        assert long_texts.has(re.compile("[\u05c8\u07fd]"), text) == bool(part.search(text))
        assert long_texts.find_all(words, text) == words.findall(text)
        found = {place for start, stop in long_texts.spans(part, text) for place in range(start, stop)}
        assert found == {place for match in part.finditer(text) for place in range(*match.span())}
        assert long_texts.pairs_in(text) == {text[at : at + 2] for at in range(len(text) - 1)}
        assert list(long_texts.numbers(-1, len(text))) == list(range(-1, len(text) - 1))
        in_parts = to_nfc(text)
    assert in_parts == to_nfc(text)


def test_the_word_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(GPT2)
    monkeypatch.setattr(type(tokenizer._words), "_MAX_WORDS", 100)
    text = " ".join(map(str, range(10_000)))

    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer._words) <= 100


def test_a_lone_surrogate_is_refused_with_its_place() -> None:
    with pytest.raises(RequestError, match=r"U\+D83D at character 3"):
        gpt2().encode("abc\ud83ddef")


def test_what_is_no_text_is_refused() -> None:
    with pytest.raises(RequestError, match=r"text: found b'abc'"):
        gpt2().encode(b"abc")  # type: ignore[arg-type]


# Special tokens


def test_special_tokens_in_a_text_are_recognised_only_when_asked() -> None:
    assert gpt2().encode("a<|endoftext|>", parse_special=True) == [64, 50256]
    assert 50256 not in gpt2().encode("a<|endoftext|>", parse_special=False)


def test_added_tokens_that_are_not_special_are_recognised_always() -> None:
    tokenizer = load_tokenizer(small_gguf())
    assert tokenizer.encode("<tool><|im_end|>", parse_special=False)[0] == 260
    assert tokenizer.encode("<tool><|im_end|>") == [260, 259]
    assert tokenizer.special_ids == {259}


def test_bos_comes_first_only_where_the_tokenizer_says_so(tmp_path: Path) -> None:
    llama3 = load_json(tmp_path, tokenizer_json("llama3"))
    assert llama3.add_bos_token
    assert llama3.bos_token_id == 50256
    assert llama3.encode("a") == [50256, 64]
    assert llama3.encode("a", add_special_tokens=False) == [64]
    assert not gpt2().add_bos_token
    assert gpt2().encode("a") == [64]


def test_add_bos_token_of_the_configuration_decides(tmp_path: Path) -> None:
    config = {"add_bos_token": False, "bos_token": "<|im_start|>"}
    tokenizer = load_json(tmp_path, tokenizer_json("llama3"), tokenizer_config=config)
    assert tokenizer.encode("a") == [64]
    assert tokenizer.bos_token_id == 50257


def test_decoding_can_leave_special_tokens_out() -> None:
    ids = gpt2().encode("a<|endoftext|>b")
    assert gpt2().decode(ids) == "a<|endoftext|>b"
    assert gpt2().decode(ids, skip_special_tokens=True) == "ab"


def test_an_added_token_of_whitespace_survives_the_one_before_that_strips_its_right(tmp_path: Path) -> None:
    flags = {"special": True, "normalized": False}
    added = [
        {"id": 259, "content": "<a>", "rstrip": True} | flags,
        {"id": 260, "content": "  "} | flags,
        {"id": 261, "content": "\n", "lstrip": True} | flags,
    ]
    tokenizer = load_json(tmp_path, small_json() | {"added_tokens": added})
    assert tokenizer.encode("<a>  he") == [259, 260, 256]
    assert tokenizer.encode("<a>   he") == [259, 260, 0x20, 256]
    assert tokenizer.encode("<a> \nhe") == [259, 256]


def test_text_that_is_all_added_tokens_or_nearly_them_is_linear(tmp_path: Path) -> None:
    names = [f"<|reserved_special_token_{index}|>" for index in range(1000)]
    added = [{"id": 259 + index, "content": name, "special": True} for index, name in enumerate(names)]
    tokenizer = load_json(tmp_path, small_json() | {"added_tokens": added})
    assert len(tokenizer.encode("<|" * 300_000)) == 600_000
    assert len(tokenizer.encode("<|reserved_special_token_7|>" * 20_000)) == 20_000


def test_ignore_merges_takes_a_whole_word_that_is_a_token(tmp_path: Path) -> None:
    unreachable = small_json(merges=["h e", "l l"])
    assert load_json(tmp_path, unreachable).encode("hell") == [256, 257]
    unreachable["model"]["ignore_merges"] = True
    assert load_json(tmp_path, unreachable).encode("hell") == [258]


# Bytes and ids


def test_token_bytes_are_the_bytes_of_the_token() -> None:
    assert b"".join(map(gpt2().token_bytes, gpt2().encode("né 👍"))) == "né 👍".encode()
    assert gpt2().token_bytes(50256) == b"<|endoftext|>"


def test_an_added_token_is_decoded_as_the_reference_library_decodes_it(tmp_path: Path) -> None:
    flags = {"special": True, "normalized": False}
    added = [{"id": 259, "content": "h\u00e9"} | flags, {"id": 260, "content": "\u00e9 \u4e2d"} | flags]
    tokenizer = load_json(tmp_path, small_json() | {"added_tokens": added})
    # All of the first is in the byte alphabet, where "\u00e9" is the byte 0xE9.
    assert tokenizer.decode([259, 260]) == "h\ufffd\u00e9 \u4e2d"


@pytest.mark.parametrize("bad", [-1, 50257, 10**20, 1.0, "1", None, [1]])
def test_an_id_out_of_range_is_refused(bad: Any) -> None:
    with pytest.raises(RequestError, match=r"token id: found .* expected one from 0 to 50256"):
        gpt2().decode([bad], skip_special_tokens=True)


def test_an_id_of_the_padded_vocabulary_decodes_to_nothing(tmp_path: Path) -> None:
    padded = load_tokenizer(GPT2, model_vocab_size=50304)
    assert (padded.vocab_size, padded.model_vocab_size) == (50257, 50304)
    assert padded.decode([64, 50303, 65]) == "ab"
    with pytest.raises(RequestError, match="50304"):
        padded.decode([50304])
    by_config = load_json(tmp_path, small_json(), config={"vocab_size": 320})
    assert by_config.decode([319]) == ""
    assert load_tokenizer(small_gguf()).decode([261]) == ""


def test_a_byte_that_the_vocabulary_lacks_is_dropped_or_unknown(tmp_path: Path) -> None:
    data = small_json()
    for byte in "é".encode():
        del data["model"]["vocab"][CHAR_OF_BYTE[byte]]
    assert load_json(tmp_path, data).encode("heéll") == [258]
    data["model"]["unk_token"] = "!"
    tokenizer = load_json(tmp_path, data)
    assert tokenizer.decode(tokenizer.encode("heéll")) == "he!!ll"


# Sources


def test_a_directory_says_which_tokens_begin_and_end(tmp_path: Path) -> None:
    tokenizer = load_json(
        tmp_path,
        tokenizer_json("qwen2"),
        special_tokens_map={"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
        tokenizer_config={
            "bos_token": None,
            "eos_token": {"content": "<|im_end|>"},
            "chat_template": "plain",
        },
        generation_config={"eos_token_id": [50258, 50256]},
        config={"eos_token_id": 50256, "vocab_size": 50304},
    )
    assert tokenizer.bos_token_id == 50256
    # As `transformers` has it, the map goes before a configuration that lists no added tokens.
    assert tokenizer.eos_token_id == 50256
    assert tokenizer.eos_token_ids == (50256, 50258)
    assert tokenizer.chat_template is not None
    assert tokenizer.chat_template.sources == {"default": "plain"}


def test_of_several_chat_templates_the_default_one_is_taken_and_a_file_wins(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    tokenizer = load_json(tmp_path, small_json(), tokenizer_config={"chat_template": named})
    assert tokenizer.chat_template is not None
    assert tokenizer.chat_template.sources == {"tool_use": "t", "default": "d"}
    (tmp_path / "chat_template.jinja").write_text("\ufefffrom the file", encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.chat_template is not None
    assert tokenizer.chat_template.sources == {"default": "from the file"}
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("of documents")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.chat_template is not None
    assert tokenizer.chat_template.sources == {"default": "from the file", "rag": "of documents"}


def test_a_template_sees_the_tokens_that_the_files_name_and_no_others(tmp_path: Path) -> None:
    config = {
        "bos_token": None, "eos_token": {"content": "<|im_end|>"}, "pad_token": "<|endoftext|>",
        "chat_template": "{{ bos_token is defined }} {{ eos_token }} {{ pad_token }}",
    }  # fmt: skip
    tokenizer = load_json(
        tmp_path, tokenizer_json("qwen2"), tokenizer_config=config, config={"bos_token_id": 50256}
    )
    assert tokenizer.apply_chat_template(HELLO) == "False <|im_end|> <|endoftext|>"


def test_a_chat_template_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"chat_template\[0\]: found {'name': 'x'}, expected"):
        load_json(tmp_path, small_json(), tokenizer_config={"chat_template": [{"name": "x"}]})


def test_gguf_metadata_may_have_several_chat_templates() -> None:
    tokenizer = load_tokenizer(small_gguf() | {"tokenizer.chat_template.tool_use": "tools"})
    assert tokenizer.apply_chat_template(HELLO, tools=[{}]) == "tools"
    assert tokenizer.apply_chat_template(HELLO).startswith("hi")


def test_vocab_and_merges_take_their_special_tokens_from_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "merges.txt").write_text("#version: 0.2\nh e\nl l\nhe ll\n", encoding="utf-8")
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "added_tokens_decoder": {"259": {"content": "<|im_end|>", "special": True}},
    }
    write(tmp_path, vocab=small_json()["model"]["vocab"], tokenizer_config=config)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("hell<|im_end|>") == [258, 259]
    assert tokenizer.eos_token_ids == (259,)
    assert tokenizer.decode(tokenizer.encode("e\u0301")) == "\u00e9"


def test_tokenizer_json_is_preferred_to_vocab_and_merges(tmp_path: Path) -> None:
    write(tmp_path, vocab={}, tokenizer=small_json())
    (tmp_path / "merges.txt").write_text("")
    assert load_tokenizer(tmp_path).encode("hell") == [258]


def test_gguf_metadata_makes_a_tokenizer() -> None:
    tokenizer = load_tokenizer(small_gguf(eot_token_id=258))
    assert tokenizer.encode("hell<|im_end|>12") == [258, 259, 0x31, 0x32]
    assert tokenizer.vocab_size == 261
    assert tokenizer.bos_token_id == 259
    assert tokenizer.eos_token_ids == (259, 258)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}]) == "hi<|im_end|>"
    assert tokenizer.encode_chat([{"role": "user", "content": "hell"}]) == [258, 259]


def test_gguf_adds_a_bos_as_the_metadata_or_else_the_family_says() -> None:
    assert load_tokenizer(small_gguf(pre="llama-bpe")).encode("a") == [259, 0x61]
    assert load_tokenizer(small_gguf(pre="llama-bpe", add_bos_token=False)).encode("a") == [0x61]
    assert load_tokenizer(small_gguf(add_bos_token=True)).encode("a") == [259, 0x61]


def test_gguf_ends_a_turn_at_the_usual_tokens_too() -> None:
    assert load_tokenizer(small_gguf(eos_token_id=258)).eos_token_ids == (258, 259)


@pytest.mark.parametrize("pre", sorted(GGUF_PRETOKENIZERS))
def test_every_gguf_pre_tokenizer_is_a_known_pattern(pre: str) -> None:
    assert load_tokenizer(small_gguf(pre=pre)).encode("hell", add_special_tokens=False) == [258]


# Bad sources


def edit(*path: str | int, to: Any) -> Callable[[dict[str, Any]], None]:
    def apply(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = to

    return apply


ADDED = {"id": 259, "content": "<a>", "special": True}
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "<a>"}}],
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit("model", to=[]), "tokenizer.json: model: found .*, expected an object"),
        (edit("model", "type", to="WordPiece"), "model.type: found 'WordPiece', expected 'BPE'"),
        (edit("model", "vocab", to=None), "model.vocab: found None, expected an object"),
        (edit("model", "vocab", "he", to="x"), r"model.vocab\['he'\]: found 'x', expected an id"),
        (edit("model", "vocab", "he", to=True), r"model.vocab\['he'\]: found True, expected an id"),
        (edit("model", "vocab", "he", to=-1), r"model.vocab\['he'\]: found -1, expected an id"),
        (edit("model", "vocab", "he", to=0), "model.vocab: found an id that two tokens share"),
        (edit("model", "merges", to="h e"), "model.merges: found 'h e', expected a list"),
        (edit("model", "merges", to=["h e", 1]), "model.merges: found 1, expected"),
        (edit("model", "merges", to=["h e", ["l", "l"]]), r"model.merges: found \['l', 'l'\], expected"),
        (edit("model", "merges", to=[["h", "e", "l"]]), "model.merges: found .*, expected"),
        (edit("model", "merges", to=["he"]), r"merges\[0\]: found 'he', expected two tokens"),
        (edit("model", "merges", to=["h x"]), r"merges\[0\]: found 'h x', expected two tokens"),
        (edit("model", "dropout", to=0.1), "model.dropout: found 0.1, expected none"),
        (edit("model", "end_of_word_suffix", to="</w>"), "model.end_of_word_suffix: found '</w>'"),
        (edit("model", "unk_token", to="<unk>"), "model.unk_token: found '<unk>', expected a token"),
        (
            edit("normalizer", to={"type": "Lowercase"}),
            "normalizer.type: found 'Lowercase', expected Prepend",
        ),
        (
            edit("normalizer", to={"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Nmt"}]}),
            r"normalizer.normalizers\[1\].type: found 'Nmt'",
        ),
        (edit("pre_tokenizer", to=None), "decoder: found none, expected Replace"),
        (
            edit("pre_tokenizer", to={"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}] * 2}),
            r"pretokenizers\[1\]: found ByteLevel again, expected it once",
        ),
        (
            edit("pre_tokenizer", to={"type": "Sequence", "pretokenizers": [{"type": "BertPreTokenizer"}]}),
            "decoder: found none, expected Replace",
        ),
        (
            edit(
                "pre_tokenizer",
                to={"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, {"type": "ByteLevel"}]},
            ),
            r"pretokenizers\[0\].type: found 'Whitespace', expected ByteLevel, Digits",
        ),
        (
            edit("post_processor", to={"type": "RobertaProcessing"}),
            "post_processor.type: found 'RobertaProcessing'",
        ),
        (
            edit("post_processor", to=TEMPLATE | {"single": TEMPLATE["single"][1:]}),
            "post_processor.single: found .*, expected the text",
        ),
        (edit("added_tokens", to=[ADDED | {"content": ""}]), r"added_tokens\[0\]: found '' with id 259"),
        (
            edit("added_tokens", to=[ADDED | {"special": 1}]),
            r"added_tokens\[0\].special: found 1, expected true",
        ),
        (
            edit("added_tokens", to=[ADDED | {"id": None}]),
            r"added_tokens\[0\].id: found None, expected an integer",
        ),
    ],
)
def test_a_bad_tokenizer_json_is_refused_by_field(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    data = small_json()
    change(data)
    with pytest.raises(CheckpointError, match=message):
        load_json(tmp_path, data)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ({"pattern": {"Regex": "("}}, r"found .\(., expected a pattern .* at character 0: found \( without"),
        ({"pattern": {"Glob": "*"}}, r"pattern: found .*, expected Regex or String"),
        ({"pattern": "x"}, "pattern: found 'x', expected an object"),
        ({"behavior": "Dropped"}, "behavior: found 'Dropped', expected Isolated, or Removed"),
        ({"behavior": None}, "behavior: found None, expected a string"),
    ],
)
def test_a_bad_split_is_refused(tmp_path: Path, split: dict[str, Any], message: str) -> None:
    data = small_json()
    step = {"type": "Split", "pattern": {"Regex": "x"}, "behavior": "Isolated", "invert": False} | split
    data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [step, {"type": "ByteLevel"}]}
    with pytest.raises(CheckpointError, match=message):
        load_json(tmp_path, data)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", r"tokenizer.json: cannot be read as JSON"),
        ("tokenizer.json", "[]", r"tokenizer.json: found \[\], expected an object"),
        ("tokenizer.json", '{"model": ' + "[" * 100_000, "tokenizer.json: cannot be read as JSON"),
        (
            "tokenizer_config.json",
            '{"eos_token": "<no>"}',
            "eos_token: found '<no>', expected a token of the voc",
        ),
        (
            "tokenizer_config.json",
            '{"eos_token": 1}',
            "tokenizer_config.json: eos_token: found 1, expected a str",
        ),
        ("tokenizer_config.json", '{"add_bos_token": true}', "add_bos_token: found true without a BOS token"),
        ("tokenizer_config.json", '{"add_bos_token": 1}', "add_bos_token: found 1, expected true or false"),
        ("tokenizer_config.json", '{"chat_template": 1}', "chat_template: found 1, expected a string"),
        ("generation_config.json", '{"eos_token_id": "2"}', "eos_token_id: found '2', expected an integer"),
        ("config.json", '{"eos_token_id": [1000]}', "eos_token_id: found 1000, expected an id from 0 to 258"),
        ("config.json", '{"bos_token_id": -5}', "bos_token_id: found -5, expected an id from 0 to 258"),
        ("config.json", '{"vocab_size": "many"}', "vocab_size: found 'many', expected an integer"),
    ],
)
def test_a_bad_file_of_a_directory_is_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    write(tmp_path, tokenizer=small_json())
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("source", ["directory", "gguf"])
def test_a_checkpoint_without_a_tokenizer_serves_ids_but_no_text(tmp_path: Path, source: str) -> None:
    tokenizer = load_tokenizer(tmp_path if source == "directory" else {}, model_vocab_size=100)
    assert tokenizer.decode([0, 99]) == ""
    with pytest.raises(RequestError, match="expected token ids: this model came without a tokenizer"):
        tokenizer.encode("a")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
        "tokenizer_config.json",
        "config.json",
    ],
)
def test_what_is_no_plain_file_is_refused_at_once(tmp_path: Path, name: str) -> None:
    if name in ("vocab.json", "merges.txt"):
        (tmp_path / "vocab.json").write_text("{}")
        (tmp_path / "merges.txt").write_text("")
    elif name != "tokenizer.json":
        write(tmp_path, tokenizer=small_json())
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name}: cannot be read: .*no plain file"):
        load_tokenizer(tmp_path)


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="found no directory"):
        load_tokenizer(tmp_path / "missing")


def test_an_unknown_tokenizer_class_is_refused_where_only_it_tells_the_pattern(tmp_path: Path) -> None:
    (tmp_path / "merges.txt").write_text("")
    write(tmp_path, vocab={}, tokenizer_config={"tokenizer_class": "LlamaTokenizer"})
    with pytest.raises(
        CheckpointError, match="tokenizer_class: found 'LlamaTokenizer', expected one of GPT2"
    ):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "rwkv"}, "tokenizer.ggml.model: found 'rwkv', expected one of 'gpt2', 'llama'"),
        ({"model": None}, "tokenizer.ggml.model: found None, expected one of 'gpt2', 'llama'"),
        ({"pre": "unheard-of"}, "tokenizer.ggml.pre: found 'unheard-of', expected one of a.x-4.0"),
        ({"pre": None}, "tokenizer.ggml.pre: found None, expected a string"),
        ({"tokens": ["a", 1]}, r"tokenizer.ggml.tokens\[1\]: found 1, expected a string"),
        ({"tokens": ["a", "a"], "token_type": [1, 1]}, "tokenizer.ggml.tokens: found 'a' twice"),
        ({"token_type": [1]}, "tokenizer.ggml.token_type: found 1 entries, expected 262"),
        ({"token_type": [1] * 261 + [9]}, r"tokenizer.ggml.token_type\[261\]: found 9"),
        ({"merges": None}, "tokenizer.ggml.merges: found None, expected a list"),
        ({"merges": ["h x"]}, r"merges\[0\]: found 'h x', expected two tokens"),
        ({"eos_token_id": 262}, "tokenizer.ggml.eos_token_id: found 262, expected an id from 0 to 261"),
        (
            {"add_eos_token": True, "eos_token_id": None},
            "add_eos_token: found true without a token for it, expected a tokenizer.ggml.eos_token_id",
        ),
        ({"add_bos_token": 1}, "tokenizer.ggml.add_bos_token: found 1, expected true or false"),
        ({"add_bos_token": True, "bos_token_id": None}, "add_bos_token: found true without a token for it"),
    ],
)
def test_bad_gguf_metadata_is_refused_by_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(small_gguf(**changes))


# Cheapness


def test_importing_the_package_does_not_import_jinja2() -> None:
    program = "import sys, pagellm.engine.tokenizer; print('jinja2' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_a_description_alone_makes_a_tokenizer() -> None:
    vocab = {char: byte for byte, char in enumerate(CHAR_OF_BYTE)}
    tokenizer = Tokenizer(TokenizerSpec(vocab, Bpe(vocab, []), Pretokenizer.named("gpt2")))
    assert tokenizer.encode("é") == [0xC3, 0xA9]
    assert tokenizer.eos_token_id is None
