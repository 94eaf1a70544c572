"""A tokenizer in several files: each that exists is obeyed as `transformers` obeys it, or refused by name."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from pagellm.engine.errors import CheckpointError, RequestError
from pagellm.engine.tokenizer import load_tokenizer
from tests.engine.test_tokenizer import load_json, small_gguf, small_json, write

BOM = b"\xef\xbb\xbf"
MERGES = "#version: 0.2\nh e\nl l\nhe ll\n"


def token(content: str, **flags: Any) -> dict[str, Any]:
    return {"content": content, "special": True, "normalized": False} | flags


def write_vocab_files(directory: Path, merges: bytes = MERGES.encode(), **files: Any) -> Path:
    (directory / "merges.txt").write_bytes(merges)
    return write(directory, **({"vocab": small_json()["model"]["vocab"]} | files))


# Byte order marks and newlines


@pytest.mark.parametrize("mark", [b"", BOM])
def test_a_byte_order_mark_is_no_part_of_any_file(tmp_path: Path, mark: bytes) -> None:
    def write_marked(name: str, content: bytes) -> None:
        (tmp_path / name).write_bytes(mark + content)

    write_marked("tokenizer.json", json.dumps(small_json()).encode())
    write_marked("tokenizer_config.json", json.dumps({"eos_token": "<a>"}).encode())
    write_marked("special_tokens_map.json", json.dumps({"pad_token": "<a>"}).encode())
    write_marked("added_tokens.json", json.dumps({"<a>": 259}).encode())
    write_marked("chat_template.jinja", b"{{ messages[0].content }}")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode_chat([{"role": "user", "content": "hell<a>"}]) == [258, 259]


@pytest.mark.parametrize("merges", [BOM + MERGES.encode(), MERGES.replace("\n", "\r\n").encode()])
def test_merges_are_read_with_a_byte_order_mark_and_with_any_newlines(tmp_path: Path, merges: bytes) -> None:
    assert load_tokenizer(write_vocab_files(tmp_path, merges)).encode("hell") == [258]


# Added tokens


def test_added_tokens_json_is_obeyed(tmp_path: Path) -> None:
    added = {"<y>": 260, "<x>": 259}
    tokenizer = load_json(tmp_path, small_json(), added_tokens=added, tokenizer_config={"eos_token": "<y>"})
    assert tokenizer.encode("hell<x><y>") == [258, 259, 260]
    assert tokenizer.eos_token_ids == (260,)
    assert tokenizer.special_ids == {260}


def test_added_tokens_json_beside_vocab_and_merges_is_obeyed(tmp_path: Path) -> None:
    vocab = small_json()["model"]["vocab"] | {"<|endoftext|>": 259}
    tokenizer = load_tokenizer(write_vocab_files(tmp_path, vocab=vocab, added_tokens={"[PAD]": 260}))
    assert tokenizer.encode("hell<|endoftext|>[PAD]") == [258, 259, 260]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (259, (259,))


def test_added_tokens_decoder_adds_tokens_and_changes_how_they_are_recognised(tmp_path: Path) -> None:
    data = small_json() | {"added_tokens": [{"id": 259} | token("<x>")]}
    decoder = {"259": token("<x>", lstrip=True), "260": token("<y>")}
    tokenizer = load_json(tmp_path, data, tokenizer_config={"added_tokens_decoder": decoder})
    assert tokenizer.encode("hell  <x><y>") == [258, 259, 260]


def test_a_token_that_a_file_names_as_special_is_recognised(tmp_path: Path) -> None:
    named = {"eos_token": "he", "additional_special_tokens": ["ll"]}
    tokenizer = load_json(tmp_path, small_json(), special_tokens_map=named)
    assert tokenizer.encode("hell he") == [256, 257, 0x20, 256]
    assert tokenizer.special_ids == {256, 257}


def test_a_padding_token_that_is_nowhere_else_gets_the_next_id(tmp_path: Path) -> None:
    tokenizer = load_json(tmp_path, small_json(), tokenizer_config={"pad_token": "[PAD]"})
    assert tokenizer.encode("[PAD]he") == [259, 256]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"added_tokens": {"<x>": 300}},
            r"added_tokens.json: found id 300 for '<x>', expected 259, the next",
        ),
        ({"added_tokens": {"<x>": "1"}}, r"added_tokens.json\['<x>'\]: found '1', expected an id"),
        ({"added_tokens": {"he": 5}}, r"added_tokens.json: found id 5 for 'he', expected 256, which it has"),
        (
            {
                "added_tokens": {"<z>": 259},
                "tokenizer_config": {"added_tokens_decoder": {"259": token("<x>")}},
            },
            r"added_tokens.json: found '<z>', expected a token that tokenizer_config.json has too",
        ),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"9" * 5000: token("<x>")}}},
            r"added_tokens_decoder: found the key '999.*', expected an id",
        ),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"\u0663": token("<x>")}}},
            r"added_tokens_decoder: found the key '\u0663', expected an id",
        ),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"700": token("<x>")}}},
            r"added_tokens_decoder: found id 700 for '<x>', expected 259, the next one",
        ),
        ({"tokenizer_config": {"split_special_tokens": True}}, "split_special_tokens: found True"),
        ({"tokenizer_config": {"pad_token": {"content": 1}}}, "pad_token: found 1, expected a string"),
        ({"special_tokens_map": {"eos_token": "<no>"}}, r"special_tokens_map.json: eos_token: found '<no>'"),
        ({"config": {"vocab_size": 10**12}}, "vocab_size: found 1000000000000, expected at most 16777216"),
    ],
)
def test_files_that_contradict_each_other_are_refused_by_name(
    tmp_path: Path, files: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        load_json(tmp_path, small_json(), **files)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"added_tokens": [{"id": 300} | token("<a>")]},
            r"added_tokens\[0\]: found id 300 for '<a>', expected 259",
        ),
        ({"added_tokens": [{"id": 259} | token("<a>")] * 2}, r"added_tokens\[1\]: found '<a>' again"),
        ({"decoder": {"type": "Metaspace"}}, "decoder.type: found 'Metaspace', expected ByteLevel"),
        (
            {
                "added_tokens": [{"id": 259} | token("<a>")],
                "post_processor": {
                    "type": "TemplateProcessing",
                    "single": [{"SpecialToken": {"id": "<a>"}}, {"Sequence": {"id": "A"}}],
                    "special_tokens": {"<a>": {"id": "<a>", "ids": [5], "tokens": ["<a>"]}},
                },
            },
            r"special_tokens: found ids \[5\] for '<a>', expected \[259\]",
        ),
        (
            {"model": small_json()["model"] | {"vocab": {"a": 1 << 24}}},
            "found 16777216, expected an id from 0",
        ),
        (
            {"model": small_json()["model"] | {"vocab": {"\ud800": 0}}},
            r"json: found the lone surrogate U\+D800",
        ),
        ({"added_tokens": [{"id": 259} | token("\udc00")]}, r"json: found the lone surrogate U\+DC00"),
    ],
)
def test_what_the_reference_library_would_read_otherwise_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_json(tmp_path, small_json() | change)


# Files that are none


def test_half_of_a_vocabulary_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path, vocab={"a": 0})
    with pytest.raises(CheckpointError, match=r"found vocab.json alone, expected vocab.json and merges.txt"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json", "chat_template.jinja"]
)
def test_what_is_no_plain_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    write(tmp_path, tokenizer=small_json())
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match=rf"{name}: cannot be read: no plain file"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["merges.txt", "chat_template.jinja", "tokenizer_config.json"])
def test_a_file_that_is_no_utf_8_is_refused_by_name(tmp_path: Path, name: str) -> None:
    write_vocab_files(tmp_path)
    (tmp_path / name).write_bytes(b"abc\xff")
    with pytest.raises(CheckpointError, match=rf"{name}: found b'\\xff' at byte 4, expected UTF-8"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tekken.json", "tiktoken.model", "sentencepiece.bpe.model"])
def test_a_vocabulary_that_is_not_read_serves_ids_and_says_why_no_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"{}")
    write(tmp_path, tokenizer_config={"bos_token": "<s>"}, config={"vocab_size": 100, "eos_token_id": 2})
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.model_vocab_size, tokenizer.eos_token_ids) == (0, 100, (2,))
    with pytest.raises(RequestError, match=rf"token ids: .* {name} alone \(.*\) is not"):
        tokenizer.encode("a")


def test_ids_beyond_the_models_vocabulary_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    load_tokenizer(small_gguf(), model_vocab_size=262)
    assert capsys.readouterr().err == ""
    load_tokenizer(small_gguf(), model_vocab_size=100)
    assert "the tokenizer has ids up to 260, the model only up to 99" in capsys.readouterr().err
