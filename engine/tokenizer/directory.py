"""Reads a tokenizer from a model's directory, as the Hugging Face hub lays it out.

The vocabulary comes from `tokenizer.json` or else from GPT-2's pair `vocab.json` and `merges.txt`; the roles
of tokens and the chat template come from the small files beside it, each of which may be missing.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pagellm.engine.errors import CheckpointError
from pagellm.engine.files import read_plain_text
from pagellm.engine.tokenizer.added_tokens import AddedToken
from pagellm.engine.tokenizer.chat_files import read_chat_templates, read_template_tokens
from pagellm.engine.tokenizer.checks import expect, found, read_json_object, read_json_object_if_present
from pagellm.engine.tokenizer.pretokenizers import Pretokenizer
from pagellm.engine.tokenizer.spec import NO_TOKENIZER, TokenizerSpec
from pagellm.engine.tokenizer.tokenizer_json import check_vocab, read_added_token, read_tokenizer_json

# vocab.json and merges.txt say nothing of the pre-tokenizer; the class that wrote them does.
_FAMILY_OF_CLASS = {"GPT2Tokenizer": "gpt2", "Qwen2Tokenizer": "qwen2"}

_GPT2_END_OF_TEXT = "<|endoftext|>"


def read_directory(directory: Path) -> TokenizerSpec:
    """The tokenizer of a model's directory; where there is none, one without a vocabulary.

    Raises:
        CheckpointError: a tokenizer that cannot be read or is not supported.
    """
    if (directory / "tokenizer.json").exists():
        spec = read_tokenizer_json(directory / "tokenizer.json")
    elif (directory / "vocab.json").exists() and (directory / "merges.txt").exists():
        spec = read_vocab_files(directory)
    else:
        return _without_vocabulary(directory)
    return _with_roles(spec, directory)


def read_vocab_files(directory: Path) -> TokenizerSpec:
    """The tokenizer of `vocab.json` and `merges.txt` (GPT-2's format)."""
    config_path = directory / "tokenizer_config.json"
    config = read_json_object_if_present(config_path)
    class_name = expect(
        config.get("tokenizer_class", "GPT2Tokenizer"), str, f"{config_path}: tokenizer_class"
    )
    family = _FAMILY_OF_CLASS.get(class_name.removesuffix("Fast"))
    if family is None:
        raise CheckpointError(
            f"{config_path}: tokenizer_class: found {found(class_name)}, expected one of"
            f" {', '.join(_FAMILY_OF_CLASS)}, or a tokenizer.json"
        )
    vocab_path = directory / "vocab.json"
    vocab = check_vocab(read_json_object(vocab_path), str(vocab_path))
    added_tokens = _read_added_tokens_decoder(config, config_path)
    bos_token_id = None
    if not added_tokens and _GPT2_END_OF_TEXT in vocab:
        # OpenAI's release names no special tokens: this one both begins and ends a text.
        bos_token_id = vocab[_GPT2_END_OF_TEXT]
        added_tokens = (AddedToken(bos_token_id, _GPT2_END_OF_TEXT),)
    return TokenizerSpec(
        vocab=vocab,
        merges=_read_merges_txt(directory / "merges.txt"),
        pretokenizer=Pretokenizer.named(family, add_prefix_space=config.get("add_prefix_space") is True),
        added_tokens=added_tokens,
        normalize_nfc=family == "qwen2",
        bos_token_id=bos_token_id,
        eos_token_ids=() if bos_token_id is None else (bos_token_id,),
    )


def _read_merges_txt(path: Path) -> list[str]:
    try:
        lines = read_plain_text(path).split("\n")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    return [line for line in lines if line and not line.startswith("#version")]


def _read_added_tokens_decoder(config: Mapping[str, Any], path: Path) -> tuple[AddedToken, ...]:
    where = f"{path}: added_tokens_decoder"
    entries = expect(config.get("added_tokens_decoder", {}), dict, where)
    if not all(key.isdecimal() for key in entries):
        raise CheckpointError(f"{where}: found {found(list(entries))}, expected ids as keys")
    return tuple(read_added_token(entry, f"{where}[{key}]", int(key)) for key, entry in entries.items())


def _without_vocabulary(directory: Path) -> TokenizerSpec:
    """Token ids alone: what the model's configurations say of them; tokens that others name are not there."""
    ids = []
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        ids += _read_ids(read_json_object_if_present(path).get("eos_token_id"), f"{path}: eos_token_id")
    vocab_size = read_json_object_if_present(directory / "config.json").get("vocab_size")
    if type(vocab_size) is int:
        # A configuration written without a tokenizer keeps its class's default ids, which mean nothing.
        ids = [id_ for id_ in ids if 0 <= id_ < vocab_size]
    return replace(NO_TOKENIZER, eos_token_ids=tuple(ids))


def _with_roles(spec: TokenizerSpec, directory: Path) -> TokenizerSpec:
    """The description with what the small files add: BOS, EOS, chat template, the model's vocabulary size."""
    tokenizer_path = directory / "tokenizer_config.json"
    tokenizer_config = read_json_object_if_present(tokenizer_path)
    model_path = directory / "config.json"
    model_config = read_json_object_if_present(model_path)
    bos = _read_ids(model_config.get("bos_token_id"), f"{model_path}: bos_token_id")
    bos_token_id = spec.bos_token_id if spec.bos_token_id is not None else next(iter(bos), None)
    eos_token_ids = spec.eos_token_ids
    # The first file to name a token decides; the model's own configurations may add further ends of turn.
    naming = {
        str(path): read_json_object_if_present(path)
        for path in (directory / "special_tokens_map.json", tokenizer_path)
    }
    for where, named in naming.items():
        bos_token_id = _read_named(named.get("bos_token"), spec, f"{where}: bos_token", bos_token_id)
        eos_token_id = _read_named(named.get("eos_token"), spec, f"{where}: eos_token", None)
        eos_token_ids = eos_token_ids if eos_token_id is None else (eos_token_id,)
    for path in (directory / "generation_config.json", model_path):
        ids = _read_ids(read_json_object_if_present(path).get("eos_token_id"), f"{path}: eos_token_id")
        eos_token_ids += tuple(ids)
    model_vocab_size = model_config.get("vocab_size")
    if model_vocab_size is not None:
        expect(model_vocab_size, int, f"{model_path}: vocab_size")
    add_bos_token = tokenizer_config.get("add_bos_token")
    if add_bos_token is not None:
        expect(add_bos_token, bool, f"{tokenizer_path}: add_bos_token")
    return replace(
        spec,
        bos_token_id=bos_token_id,
        add_bos_token=spec.add_bos_token if add_bos_token is None else add_bos_token,
        eos_token_ids=eos_token_ids,
        chat_templates=read_chat_templates(directory, tokenizer_config),
        template_tokens=read_template_tokens(naming) or None,
        model_vocab_size=model_vocab_size,
    )


def _read_named(value: object, spec: TokenizerSpec, where: str, default: int | None) -> int | None:
    """The id of a token given as text, or as {"content": text}."""
    if value is None:
        return default
    content = expect(value.get("content") if isinstance(value, dict) else value, str, where)
    for token in spec.added_tokens:
        if token.content == content:
            return token.id
    if content not in spec.vocab:
        raise CheckpointError(f"{where}: found {found(content)}, expected a token of the vocabulary")
    return spec.vocab[content]


def _read_ids(value: object, where: str) -> list[int]:
    """None, one id or a list of ids, as a list."""
    if value is None:
        return []
    return [expect(id_, int, where) for id_ in (value if isinstance(value, list) else [value])]
