"""Tokenizers of directories as GGUF metadata: the same tokens, or a refusal."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pagellm.engine import CheckpointError
from pagellm.engine.tokenizer import load_tokenizer
from pagellm.engine.tokenizer.directory import read_directory
from pagellm.engine.tokenizer.families import PATTERNS
from pagellm.engine.tokenizer.sentencepiece import SentencePieceBpe
from pagellm.engine.tokenizer.to_gguf_metadata import tokenizer_metadata

FIXTURES = Path(__file__).parents[1] / "fixtures"
TEXT = (FIXTURES.parents[1] / "engine" / "quantization" / "text.txt").read_text("utf-8")[:4000]
TEXTS = [TEXT, "中文 and ñandú 1234567 <|im_end|> <tool>x</tool>\r\n\t\tif x:  # don't\n", "", "\n", "we'll"]
FAMILIES = {
    "llama3": "llama-bpe",
    "qwen2": "qwen2",
    "smollm": "smollm",
    "o200k": "gpt-4o",
    "tekken": "tekken",
    "deepseek-v3": "deepseek-v3",
    "qwen35": "qwen35",
}


def added(token_id: int, content: str, special: bool = True) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": content, "special": special, **flags}


def write(directory: Path, tokenizer: dict[str, Any] | None, config: dict[str, Any]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text("{}")
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    if tokenizer is not None:
        (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    return directory


def byte_level(pre: list[str], normalizer: Any = None, ignore_merges: bool = False) -> dict[str, Any]:
    merges = (FIXTURES / "gpt2" / "merges.txt").read_text("utf-8").split("\n")
    splits = [
        {"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False} for p in pre
    ]
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "added_tokens": [
            added(50256, "<|endoftext|>"),
            added(50257, "<|im_end|>"),
            added(50258, "<tool>", False),
        ],
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, last]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel"},
        "model": {
            "type": "BPE",
            "vocab": json.loads((FIXTURES / "gpt2" / "vocab.json").read_text("utf-8")),
            "merges": [line for line in merges if line and not line.startswith("#")],
            "ignore_merges": ignore_merges,
        },
    }


def assert_same_tokens(directory: Path, metadata: dict[str, Any]) -> None:
    own, other = load_tokenizer(directory), load_tokenizer(metadata)
    for text in TEXTS:
        assert own.encode(text) == other.encode(text), text
        assert own.decode(own.encode(text)) == other.decode(other.encode(text))
    assert own.eos_token_ids[:1] == other.eos_token_ids[:1]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pre_tokenizer_is_found_by_what_it_does(family: str, tmp_path: Path) -> None:
    normalizer = {"type": "NFC"} if family == "qwen2" else None
    tokenizer = byte_level(list(PATTERNS[family]), normalizer, family in ("llama3", "tekken"))
    directory = write(tmp_path / family, tokenizer, {"eos_token": "<|im_end|>"})
    metadata = tokenizer_metadata(directory, 50300)
    assert metadata["tokenizer.ggml.pre"] == FAMILIES[family]
    assert len(metadata["tokenizer.ggml.tokens"]) == 50300
    assert_same_tokens(directory, metadata)


def test_gpt2s_two_files_do(tmp_path: Path) -> None:
    directory = write(tmp_path / "gpt2", None, {})
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(FIXTURES / "gpt2" / name, directory)
    metadata = tokenizer_metadata(directory, 0)
    assert metadata["tokenizer.ggml.pre"] == "gpt-2"
    assert_same_tokens(directory, metadata)


def characters(tmp_path: Path, normalizer: Any, pre_tokenizer: Any) -> dict[str, Any]:
    """SentencePiece's vocabulary as it is converted: its scores become merges."""
    source = write(tmp_path / "source", None, {})
    shutil.copy(FIXTURES / "tokenizer" / "bpe.model", source / "tokenizer.model")
    spec = read_directory(source)
    assert isinstance(spec.model, SentencePieceBpe)
    scores, vocab = spec.model.scores, dict(spec.vocab)
    pairs = [
        (scores[piece], f"{piece[:i]} {piece[i:]}")
        for piece in scores
        for i in range(1, len(piece))
        if piece[:i] in scores and piece[i:] in scores
    ]
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if normalizer != REPLACE:  # something puts a space before a text
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    return {
        "added_tokens": [added(vocab[token], token) for token in ("<unk>", "<s>", "</s>")],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [vocab["<s>"]], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": [merge for _, merge in sorted(pairs, key=lambda pair: -pair[0])],
        },
    }


REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
ROLES = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("prefix", [True, False], ids=["llama2", "gemma"])
def test_merges_of_characters_become_scores(prefix: bool, tmp_path: Path) -> None:
    prepend = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, REPLACE]}
    directory = write(tmp_path / "model", characters(tmp_path, prepend if prefix else REPLACE, None), ROLES)
    metadata = tokenizer_metadata(directory, 0)
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.add_space_prefix"] is prefix
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert_same_tokens(directory, metadata)


def test_what_differs_at_a_leading_space_alone_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pre = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
    directory = write(tmp_path / "model", characters(tmp_path, None, pre), ROLES)
    metadata = tokenizer_metadata(directory, 0)
    assert "begins with a space gets other tokens" in capsys.readouterr().err
    assert_same_tokens(directory, metadata)


def test_a_tokenizer_that_has_no_form_is_refused(tmp_path: Path) -> None:
    directory = write(tmp_path / "words", byte_level([r"\w+x?|\W+"]), {})
    with pytest.raises(CheckpointError, match="tokenizer: found one that GGUF has no form for"):
        tokenizer_metadata(directory, 0)
    directory = write(tmp_path / "unigram", None, {})
    shutil.copy(FIXTURES / "tokenizer" / "unigram.model", directory / "tokenizer.model")
    with pytest.raises(CheckpointError, match="tokenizer: found one that GGUF has no form for"):
        tokenizer_metadata(directory, 0)


def test_where_there_is_none_there_is_none(tmp_path: Path) -> None:
    assert tokenizer_metadata(write(tmp_path / "none", None, {}), 0) == {"tokenizer.ggml.model": "none"}
