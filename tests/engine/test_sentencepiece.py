"""SentencePiece's vocabularies in all their carriers: the ids and texts of the reference libraries."""

import json
from base64 import b64encode
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagellm.engine.errors import CheckpointError, RequestError
from pagellm.engine.tokenizer import IncrementalDetokenizer, Tokenizer, load_tokenizer
from pagellm.engine.tokenizer.fallback import NO_BYTES, Fallback
from pagellm.engine.tokenizer.protobuf import Value, WireError, as_bytes, fields
from pagellm.engine.tokenizer.sentencepiece import SentencePieceBpe
from pagellm.engine.tokenizer.unigram import Precision, Unigram, as_single, unk_score
from tests.engine.test_tokenizer import any_text, naive_merge, write

FIXTURES = Path(__file__).parents[1] / "fixtures" / "tokenizer"
EXPECTED = json.loads((FIXTURES / "sentencepiece.json").read_text(encoding="utf-8"))
TEXTS = EXPECTED["texts"]


@cache
def gguf(name: str = "llama") -> Tokenizer:
    metadata = dict(EXPECTED["gguf"][name]["metadata"])
    if name == "t5_with_charsmap":
        metadata["tokenizer.ggml.precompiled_charsmap"] = list(charsmap("bpe_nmt"))
    return load_tokenizer(metadata)


def of_json(directory: Path, name: str) -> Tokenizer:
    data = json.loads(json.dumps(EXPECTED["tokenizers"][name]["tokenizer_json"]))
    for step in (data["normalizer"] or {}).get("normalizers", []):
        if step["type"] == "Precompiled":
            step["precompiled_charsmap"] = b64encode(charsmap("unigram")).decode()
    return load_tokenizer(write(directory, tokenizer=data))


def charsmap(name: str) -> bytes:
    [value] = (value for number, value in message(name, 3) if number == 2)
    return as_bytes(value)


def message(name: str, number: int) -> list[tuple[int, Value]]:
    """The fields of a message within a `tokenizer.model`."""
    data = (FIXTURES / f"{name}.model").read_bytes()
    [value] = (value for each, value in fields(data) if each == number)
    return list(fields(as_bytes(value)))


def changed(**changes: Any) -> dict[str, Any]:
    named = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    metadata = EXPECTED["gguf"]["llama"]["metadata"] | named
    return {key: value for key, value in metadata.items() if value is not None}


# Exact ids


@pytest.mark.parametrize("name", EXPECTED["gguf"])
def test_a_gguf_file_gives_the_ids_of_llama_cpp(name: str) -> None:
    assert [gguf(name).encode(text) for text in TEXTS] == EXPECTED["gguf"][name]["ids"]


def model_file(directory: Path, name: str, **files: Any) -> Tokenizer:
    """The tokenizer of a directory with a `tokenizer.model` and these other files."""
    (directory / "tokenizer.model").write_bytes((FIXTURES / f"{name}.model").read_bytes())
    return load_tokenizer(write(directory, **files))


@pytest.mark.parametrize("name", EXPECTED["sentencepiece"])
def test_a_tokenizer_model_gives_the_ids_and_texts_of_sentencepiece(tmp_path: Path, name: str) -> None:
    expected = EXPECTED["sentencepiece"][name]
    tokenizer = model_file(tmp_path, name)

    ids = [tokenizer.encode(text, add_special_tokens=False, parse_special=False) for text in TEXTS]

    assert ids == expected["ids"]
    assert list(map(tokenizer.decode, ids)) == expected["decoded"]


@pytest.mark.parametrize("name", EXPECTED["tokenizers"])
def test_a_tokenizer_json_gives_the_ids_of_the_reference_library(tmp_path: Path, name: str) -> None:
    expected = EXPECTED["tokenizers"][name]
    tokenizer = of_json(tmp_path, name)

    assert [tokenizer.encode(text) for text in TEXTS] == expected["ids"]


@pytest.mark.parametrize("name", EXPECTED["tokenizers"])
def test_a_tokenizer_json_gives_the_texts_of_the_reference_library(tmp_path: Path, name: str) -> None:
    expected = EXPECTED["tokenizers"][name]
    tokenizer = of_json(tmp_path, name)
    for skip, texts in ((False, expected["texts"]), (True, expected["texts_without_special"])):
        assert [tokenizer.decode(ids, skip_special_tokens=skip) for ids in expected["outputs"]] == texts
        streams = [IncrementalDetokenizer(tokenizer, skip_special_tokens=skip) for _ in texts]
        outputs = zip(streams, expected["outputs"], strict=True)
        assert ["".join(map(stream.append, ids)) + stream.finish() for stream, ids in outputs] == texts


# Laws


@given(any_text.filter(lambda text: "\u2581" not in text))
def test_any_text_comes_back(text: str) -> None:
    tokenizer = gguf()
    for name in ("llama", "llama_without_prefix"):
        tokenizer = gguf(name)
        ids = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
        # Behind a token that is recognised as a whole there is a space that was not in the text.
        if not any(token_id in ids for token_id in range(3, 8)):
            assert tokenizer.decode(ids) == text


@given(st.lists(st.integers(0, 699)), st.booleans(), st.booleans(), st.sampled_from(sorted(EXPECTED["gguf"])))
def test_the_pieces_of_any_tokens_join_to_the_whole(
    ids: list[int], skip: bool, continues: bool, name: str
) -> None:
    tokenizer = gguf(name)
    ids = [token_id % tokenizer.vocab_size for token_id in ids]
    stream = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip, continues=continues)
    pieces = [stream.append(token_id) for token_id in ids]
    whole = tokenizer.decode(ids, skip_special_tokens=skip, continues=continues)
    assert "".join(pieces) + stream.finish() == whole


PIECES = ["".join(chars) for size in range(1, 5) for chars in product("ab", repeat=size)]


@given(st.text("ab", max_size=150), st.lists(st.integers(-5, 5), min_size=30, max_size=30))
def test_merges_by_score_equal_a_naive_search(text: str, scores: list[int]) -> None:
    """Also where pieces have one score, and where a merge makes a better one possible."""
    vocab = {piece: index for index, piece in enumerate(PIECES)}
    model = SentencePieceBpe(vocab, [float(score) for score in scores], Fallback(NO_BYTES, None))
    ranks = {
        f"{piece[:at]} {piece[at:]}": -scores[index]
        for piece, index in vocab.items()
        for at in range(1, len(piece))
    }
    assert [PIECES[id_] for id_ in model.encode_word(text)] == naive_merge(list(text), ranks)


def naive_unigram(pieces: dict[str, float], unk: float, text: str, single: bool) -> list[str]:
    """The definition: the best way to each place, sums rounded one by one from the beginning of the text."""

    def rounded(value: float) -> float:
        return float(np.float32(value)) if single else value

    best: list[tuple[float, list[str]] | None] = [(0.0, [])] + [None] * len(text)
    for start in range(len(text)):
        here = best[start]
        assert here is not None
        for stop in range(start + 1, len(text) + 1):
            score = pieces.get(text[start:stop], unk if stop == start + 1 else None)
            if score is None:
                continue
            total = rounded(here[0] + score)
            there = best[stop]
            if there is None or total > there[0]:
                best[stop] = total, [*here[1], text[start:stop]]
    last = best[-1]
    assert last is not None
    return last[1]


scores = st.integers(-80, -1).map(lambda value: value / 10)


@pytest.mark.parametrize("precision", Precision)
@given(
    st.dictionaries(
        st.text("ab\u2581c", min_size=1, max_size=4), scores.map(as_single), min_size=4, max_size=20
    ),
    st.lists(st.text("ab\u2581cd", max_size=6), max_size=60),
)
def test_the_best_pieces_are_those_of_a_naive_search(
    precision: Precision, pieces: dict[str, float], words: list[str]
) -> None:
    """Also where ways are as good as each other and rounding decides; and when parts are remembered."""
    text = "\u2581".join(words)
    names = [*pieces, *(set("ab\u2581cd") - pieces.keys())]  # each character is told apart in the ids
    vocab = {piece: names.index(piece) for piece in pieces}
    unk = unk_score(list(pieces.values()))
    fallback = Fallback(NO_BYTES, None)
    model = Unigram(vocab, [pieces.get(name, 0.0) for name in names], unk, fallback, precision=precision)
    expected = naive_unigram(pieces, unk, text, precision is Precision.SINGLE)
    ids = tuple(vocab[piece] for piece in expected if piece in vocab)
    assert model.encode_word(text) == ids
    assert model.encode_word(text) == ids


# Spaces


def test_a_text_that_goes_on_keeps_its_space() -> None:
    ids = gguf().encode("the the", add_special_tokens=False)
    assert gguf().decode(ids) == "the the"
    assert gguf().decode(ids, continues=True) == " the the"
    detokenizer = IncrementalDetokenizer(gguf(), continues=True)
    assert "".join(map(detokenizer.append, ids)) == " the the"


def test_the_space_before_a_text_is_put_behind_each_added_token() -> None:
    def written(name: str) -> list[str]:
        tokenizer = gguf(name)
        return [tokenizer.decode([id_], continues=True) for id_ in tokenizer.encode("a</s>b")]

    assert written("llama") == ["<s>", " a", "</s>", " b"]
    assert written("llama_without_prefix") == ["<s>", "a", "</s>", "b"]


def test_a_forged_control_token_is_text_within_its_text() -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    tokenizer = load_tokenizer(changed() | {"tokenizer.chat_template": template})
    messages = [{"role": "user", "content": "a</s>b"}]
    ids = tokenizer.encode_chat(messages, sanitize_control_tokens=True)
    assert tokenizer.decode(ids) == "<s> a</s>b</s>"
    assert ids.count(2) == 1
    assert tokenizer.encode_chat(messages).count(2) == 2


# Bytes and unknown characters


def test_broken_bytes_become_replacement_characters() -> None:
    tokenizer = gguf()
    assert tokenizer.token_bytes(8 + 0xC3) == b"\xc3"
    assert tokenizer.decode([8 + 0xC3, 8 + 0xA9]) == "\u00e9"
    assert tokenizer.decode([8 + 0xC3]) == "\ufffd"
    stream = IncrementalDetokenizer(tokenizer)
    assert [stream.append(8 + 0xC3), stream.append(8 + 0xA9)] == ["", "\u00e9"]


def test_a_byte_token_is_never_recognised_in_a_text() -> None:
    assert 8 + 0x0A not in gguf().encode("<0x0A>")


def test_control_tokens_are_text_unless_they_are_to_be_recognised() -> None:
    assert 2 in gguf().encode("</s>")
    assert gguf().encode("</s>", parse_special=False).count(2) == 0


def test_a_huge_text_without_a_space_is_encoded() -> None:
    for text in ("a" * 200_000, "\u4e2d\u6587" * 50_000, "ab=-" * 50_000):
        assert gguf().decode(gguf().encode(text, add_special_tokens=False)) == text


def test_a_lone_surrogate_is_refused_with_its_place() -> None:
    with pytest.raises(RequestError, match=r"U\+D83D at character 3"):
        gguf().encode("abc\ud83ddef")


# Directories with a tokenizer.model


def test_a_tokenizer_model_has_its_own_ends(tmp_path: Path) -> None:
    tokenizer = model_file(tmp_path, "bpe")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (1, (2,))
    assert tokenizer.encode("the")[0] == 1
    assert tokenizer.encode("</s>", add_special_tokens=False) == [2]


def test_the_class_and_the_flags_of_a_configuration_are_obeyed(tmp_path: Path) -> None:
    def written(text: str, **config: Any) -> list[str]:
        tokenizer = model_file(tmp_path, "bpe", tokenizer_config=config)
        return [tokenizer.decode([id_], continues=True) for id_ in tokenizer.encode(text)]

    assert written("the</s>the") == ["<s>", " the", "</s>", " the"]
    assert "".join(written("the</s>the", legacy=False)) == "<s> the</s>the"
    assert "".join(written("the", add_prefix_space=False)) == "<s>the"
    assert written("the", add_bos_token=False) == [" the"]
    assert written("the", add_eos_token=True) == ["<s>", " the", "</s>"]
    assert written("the", tokenizer_class="T5Tokenizer") == [" the", "</s>"]
    with pytest.raises(CheckpointError, match="tokenizer_class: found 'XLMRobertaTokenizer', whose ids"):
        written("the", tokenizer_class="XLMRobertaTokenizer")
    with pytest.raises(CheckpointError, match="legacy: found 1, expected true or false"):
        written("the", legacy=1)


def test_a_tokenizer_json_goes_before_a_tokenizer_model(tmp_path: Path) -> None:
    files = {"tokenizer": EXPECTED["tokenizers"]["gemma"]["tokenizer_json"]}
    assert model_file(tmp_path, "bpe", **files).encode("the")[0] != 1


def field(number: int, value: bytes | int) -> bytes:
    """A field of a message, with a number below 32 and a value or length below 128."""
    kind = 0 if isinstance(value, int) else 2
    low, high = (number << 3 | kind) & 0x7F, number >> 4
    key = bytes([low | 0x80, high]) if high else bytes([low])
    return key + (bytes([value]) if isinstance(value, int) else bytes([len(value)]) + value)


PIECES_OF_A_MODEL = field(1, field(1, b"<unk>") + field(3, 2)) + field(1, field(1, b"a"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "pieces: found no unknown one, expected one"),
        (b"\n\x0e", "found a field of 14 bytes at byte 0, 0 are left, expected a SentencePiece model"),
        (b"\x0b", "found a field of kind 3 at byte 0"),
        (b"\x80" * 11, "found an integer without an end at byte 0"),
        (field(1, 5), "found an integer in the place of bytes"),
        (field(1, field(1, b"\xff")), "invalid start byte"),
        (field(1, field(2, b"abcde")), "found a number that is not of 4 bytes"),
        (field(1, field(1, b"a") + field(3, 9)), r"pieces\[0\]: found the score 0.0 and the type 9"),
        (PIECES_OF_A_MODEL + field(1, field(1, b"a")), "pieces: found 'a' twice"),
        (PIECES_OF_A_MODEL + field(2, field(3, 3)), "model_type: found word, expected unigram or bpe"),
        (PIECES_OF_A_MODEL + field(2, field(24, 1)), "treat_whitespace_as_suffix: found one, expected none"),
        (PIECES_OF_A_MODEL + field(5, field(2, b"x")), "denormalizer_spec: found one, expected none"),
        (PIECES_OF_A_MODEL + field(3, field(2, b"abcdef")), "precompiled_charsmap: found a trie of"),
        (
            PIECES_OF_A_MODEL + field(1, field(1, b"b") + field(3, 5)) + field(2, field(3, 2)),
            "found the unused one 'b'",
        ),
    ],
)
def test_a_bad_tokenizer_model_is_refused_by_its_fault(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert len(str(caught.value)) < 400


@given(st.binary(max_size=60))
def test_any_bytes_are_a_message_or_none(data: bytes) -> None:
    for changed_data in (data, PIECES_OF_A_MODEL + data):
        try:
            list(fields(changed_data))
        except WireError:
            continue


# Bad sources


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"unk_id": None}, "model.unk_id: found None, expected an integer"),
        ({"unk_id": 10_000}, "model.unk_id: found 10000, expected an id from 0 to"),
        ({"vocab": {"a": 1}}, "model.vocab: found .*, expected a list"),
        ({"vocab": [["a"]]}, r"model.vocab\[0\]: found \['a'\], expected \[piece, score\]"),
        ({"vocab": [["a", 0], ["a", 1]]}, "model.vocab: found 'a' twice"),
    ],
)
def test_a_bad_unigram_is_refused_by_field(tmp_path: Path, model: dict[str, Any], message: str) -> None:
    data = json.loads(json.dumps(EXPECTED["tokenizers"]["t5"]["tokenizer_json"]))
    data["normalizer"] = None
    data["model"] |= model
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(write(tmp_path, tokenizer=data))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": None}, "tokenizer.ggml.scores: found None, expected a list"),
        ({"scores": [0.0]}, "tokenizer.ggml.scores: found 1 entries, expected"),
        ({"scores": ["0"] * 700}, "tokenizer.ggml.scores: found"),
        ({"add_space_prefix": 1}, "tokenizer.ggml.add_space_prefix: found 1, expected true or false"),
        ({"unknown_token_id": 10_000}, "tokenizer.ggml.unknown_token_id: found 10000, expected an id"),
        ({"add_eos_token": True, "eos_token_id": None}, "add_eos_token: found true without a token for it"),
    ],
)
def test_bad_gguf_metadata_is_refused_by_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(changed(**changes))


def test_a_score_that_is_no_number_is_refused() -> None:
    scored = EXPECTED["gguf"]["llama"]["metadata"]["tokenizer.ggml.scores"]
    with pytest.raises(CheckpointError, match=r"scores\[500\]: found nan, expected a number"):
        load_tokenizer(changed(scores=[*scored[:500], float("nan"), *scored[501:]]))
