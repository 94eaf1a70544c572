"""Reads a tokenizer from a model's directory, as the Hugging Face hub lays it out.

The vocabulary comes from `tokenizer.json`, or else from SentencePiece's `tokenizer.model`, or from GPT-2's
pair `vocab.json` and `merges.txt`; further added tokens, the roles of tokens and the chat template come from
the small files beside it, each of which may be missing. Which of two files that speak of one thing is obeyed
is as in `transformers`.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pagellm.engine.errors import CheckpointError, found
from pagellm.engine.tokenizer.added_token_table import AddedTokenTable
from pagellm.engine.tokenizer.added_tokens import AddedToken
from pagellm.engine.tokenizer.bpe import Bpe
from pagellm.engine.tokenizer.chat_files import read_chat_templates, read_template_tokens
from pagellm.engine.tokenizer.checks import (
    expect,
    read_json_object,
    read_json_object_if_present,
    read_text,
)
from pagellm.engine.tokenizer.normalization import Normalizer, to_nfc
from pagellm.engine.tokenizer.pretokenizers import Pretokenizer
from pagellm.engine.tokenizer.sentencepiece_normalizer import Prefix
from pagellm.engine.tokenizer.spec import NO_TOKENIZER, TokenizerSpec
from pagellm.engine.tokenizer.tokenizer_json import (
    check_vocab,
    read_added_token,
    read_flags,
    read_tokenizer_json,
)
from pagellm.engine.tokenizer.tokenizer_model import read_tokenizer_model

# vocab.json and merges.txt say nothing of the pre-tokenizer; the class that wrote them does.
_FAMILY_OF_CLASS = {"GPT2Tokenizer": "gpt2", "Qwen2Tokenizer": "qwen2", "Qwen3_5Tokenizer": "qwen35"}
# Nor of special tokens, where the configuration names none.
_END_OF_TEXT = "<|endoftext|>"
_ROLES_OF_FAMILY = {
    "gpt2": ("bos_token", "eos_token", "unk_token"),
    "qwen2": ("eos_token", "unk_token", "pad_token"),
    "qwen35": ("eos_token", "unk_token", "pad_token"),
}

# Files of SentencePiece, whose ids are the model's, unless its class gives other ones.
_SENTENCEPIECE = ("tokenizer.model", "spiece.model")
_SHIFTED_IDS = (
    "XLMRoberta Camembert MBart MBart50 Barthez XGLM Nllb Pegasus M2M100 SeamlessM4T Fairseq Marian XLNet"
)
# Classes that put an EOS behind each text instead of a BOS before it.
_EOS_CLASSES = ("T5Tokenizer", "MT5Tokenizer")

# Vocabularies in formats that are not read.
_OTHER_FORMATS = {
    "sentencepiece.bpe.model": "SentencePiece with ids of fairseq",
    "tekken.json": "Mistral's",
    "tiktoken.model": "tiktoken",
    "vocab.txt": "WordPiece",
}


def read_directory(directory: Path) -> TokenizerSpec:
    """The tokenizer of a model's directory; where there is none, one without a vocabulary.

    Raises `CheckpointError` for a tokenizer that cannot be read or is not supported.
    """
    path = directory / "tokenizer_config.json"
    config = read_json_object_if_present(path)
    if (directory / "tokenizer.json").exists():
        spec = read_tokenizer_json(directory / "tokenizer.json")
    elif name := next((name for name in _SENTENCEPIECE if (directory / name).exists()), None):
        spec = _read_sentencepiece(directory / name, config)
    else:
        halves = [name for name in ("vocab.json", "merges.txt") if (directory / name).exists()]
        if not halves:
            return _without_vocabulary(directory)
        if len(halves) == 1:
            raise CheckpointError(f"{directory}: found {halves[0]} alone, expected vocab.json and merges.txt")
        spec, roles = _read_vocab_files(directory, config)
        config = {role: _END_OF_TEXT for role in roles if _END_OF_TEXT in spec.vocab} | config
    if config.get("split_special_tokens"):
        raise CheckpointError(
            f"{path}: split_special_tokens: found {found(config['split_special_tokens'])}, expected false"
        )
    named = dict.fromkeys(config, path)
    if "added_tokens_decoder" not in config:
        # What older versions wrote: `transformers` reads it only where the newer field is absent.
        path = directory / "special_tokens_map.json"
        special_tokens_map = read_json_object_if_present(path)
        config = config | special_tokens_map
        named |= dict.fromkeys(special_tokens_map, path)
    spec = replace(spec, added_tokens=_read_added_tokens(spec, directory, config, named))
    return _with_roles(spec, directory, config, named)


def _read_vocab_files(directory: Path, config: Mapping[str, Any]) -> tuple[TokenizerSpec, tuple[str, ...]]:
    """The tokenizer of `vocab.json` and `merges.txt`, and the roles that `<|endoftext|>` has in it."""
    config_path = directory / "tokenizer_config.json"
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
    merges = [
        line
        for line in read_text(directory / "merges.txt").split("\n")
        if line and not line.startswith("#version")
    ]
    spec = TokenizerSpec(
        vocab=vocab,
        model=Bpe(vocab, merges),
        pretokenizer=Pretokenizer.named(family, add_prefix_space=config.get("add_prefix_space") is True),
        normalizer=Normalizer([] if family == "gpt2" else [to_nfc]),
    )
    return spec, _ROLES_OF_FAMILY[family]


def _read_sentencepiece(path: Path, config: Mapping[str, Any]) -> TokenizerSpec:
    """The tokenizer of SentencePiece's own file, with what its class in `transformers` makes of it."""
    where = path.with_name("tokenizer_config.json")
    class_name = expect(config.get("tokenizer_class", ""), str, f"{where}: tokenizer_class")
    class_name = class_name.removesuffix("Fast")
    if class_name.removesuffix("Tokenizer") in _SHIFTED_IDS.split():
        raise CheckpointError(
            f"{where}: tokenizer_class: found {found(class_name)}, whose ids are not those of {path.name},"
            " expected a tokenizer.json"
        )
    flags = {}
    for name, default in (("legacy", True), ("add_prefix_space", True)):
        value = config.get(name)
        flags[name] = default if value is None else expect(value, bool, f"{where}: {name}")
    prefix = Prefix.EVERY_STRETCH if flags["legacy"] else Prefix.TEXT
    spec = read_tokenizer_model(path, prefix if flags["add_prefix_space"] else Prefix.NOWHERE)
    if class_name in _EOS_CLASSES:
        return replace(spec, suffix_ids=spec.eos_token_ids)
    return spec if spec.bos_token_id is None else replace(spec, prefix_ids=(spec.bos_token_id,))


def _read_added_tokens(
    spec: TokenizerSpec, directory: Path, config: Mapping[str, Any], named: Mapping[str, Path]
) -> tuple[AddedToken, ...]:
    """Those of the vocabulary's own file, and what the small files add or change.

    named: which file each key of `config` is from.
    """
    table = AddedTokenTable(spec.vocab)
    for token in spec.added_tokens:
        table.add(token, str(directory / "tokenizer.json"))
    special = list(_special_tokens(config, named))
    legacy_path = directory / "added_tokens.json"
    legacy = check_vocab(read_json_object_if_present(legacy_path), str(legacy_path))
    if "added_tokens_decoder" in config:
        where = f"{named['added_tokens_decoder']}: added_tokens_decoder"
        for token in _read_decoder(config["added_tokens_decoder"], where):
            table.add(token, where)
    else:
        contents = {content for _, content, _ in special}
        for content, token_id in sorted(legacy.items(), key=lambda item: item[1]):
            if not content:
                raise CheckpointError(f"{legacy_path}: found '' with id {token_id}, expected some text")
            if content not in table:
                is_special = content in contents
                table.add(
                    AddedToken(token_id, content, special=is_special, normalized=not is_special),
                    str(legacy_path),
                )
    for where, content, flags in special:
        is_role = where.endswith((": bos_token", ": eos_token"))
        if content not in table and (content in spec.vocab or not is_role):
            table.add(AddedToken(table.id_of(content), content, **flags), where)
    for content, token_id in legacy.items():
        if content not in table and content not in spec.vocab:
            raise CheckpointError(
                f"{legacy_path}: found {found(content)}, expected a token that tokenizer_config.json has too"
            )
        expected = table.id_of(content)
        if token_id != expected:
            raise CheckpointError(
                f"{legacy_path}: found id {token_id} for {found(content)}, expected {expected}, as elsewhere"
            )
    return table.tokens


def _read_decoder(value: object, where: str) -> list[AddedToken]:
    """`added_tokens_decoder`: id to token, in order of the ids."""
    tokens = []
    for key, entry in expect(value, dict, where).items():
        if not re.fullmatch("[0-9]{1,8}", key):
            raise CheckpointError(f"{where}: found the key {found(key)}, expected an id")
        tokens.append(read_added_token(entry, f"{where}[{key}]", int(key)))
    return sorted(tokens, key=lambda token: token.id)


def _special_tokens(
    config: Mapping[str, Any], named: Mapping[str, Path]
) -> Iterator[tuple[str, str, dict[str, bool]]]:
    """Every token that the configuration names as special: where, its text, and how it is recognised."""
    for key, value in config.items():
        where = f"{named.get(key, 'tokenizer')}: {key}"
        if key in ("additional_special_tokens", "extra_special_tokens") and value:
            entries = value.values() if isinstance(value, dict) else expect(value, list, where)
        elif key.endswith("_token") and isinstance(value, str | dict):
            entries = [value]
        else:
            continue
        for entry in entries:
            content = _content(entry, where)
            if not content:
                continue
            flags = read_flags(entry if isinstance(entry, dict) else {}, where, special=True)
            yield where, content, flags | {"special": True}


def _without_vocabulary(directory: Path) -> TokenizerSpec:
    """Token ids alone: what the model's configurations say of them; tokens that others name are not there."""
    ids = []
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        ids += _read_ids(read_json_object_if_present(path).get("eos_token_id"), f"{path}: eos_token_id")
    vocab_size = read_json_object_if_present(directory / "config.json").get("vocab_size")
    if type(vocab_size) is not int:
        vocab_size = None
    else:
        # A configuration written without a tokenizer keeps its class's default ids, which mean nothing.
        ids = [id_ for id_ in ids if 0 <= id_ < vocab_size]
    spec = replace(NO_TOKENIZER, eos_token_ids=tuple(ids), model_vocab_size=vocab_size)
    for name, format_name in _OTHER_FORMATS.items():
        if (directory / name).exists():
            return replace(spec, absence=f"{spec.absence} that is read: {name} alone ({format_name}) is not")
    return spec


def _with_roles(
    spec: TokenizerSpec, directory: Path, config: Mapping[str, Any], named: Mapping[str, Path]
) -> TokenizerSpec:
    """The description with what the small files add: BOS, EOS, chat template, the model's vocabulary size."""
    model_path = directory / "config.json"
    model_config = read_json_object_if_present(model_path)
    bos = _read_ids(model_config.get("bos_token_id"), f"{model_path}: bos_token_id")
    bos_token_id = spec.bos_token_id if spec.bos_token_id is not None else next(iter(bos), None)
    roles: dict[str, int] = {}
    for role in ("bos_token", "eos_token"):
        if config.get(role) is not None:
            roles[role] = _read_named(config[role], spec, f"{named.get(role, directory)}: {role}")
    eos_token_ids = (roles["eos_token"],) if "eos_token" in roles else spec.eos_token_ids
    for path in (directory / "generation_config.json", model_path):
        ids = _read_ids(read_json_object_if_present(path).get("eos_token_id"), f"{path}: eos_token_id")
        eos_token_ids += tuple(ids)
    model_vocab_size = model_config.get("vocab_size")
    if model_vocab_size is not None:
        expect(model_vocab_size, int, f"{model_path}: vocab_size")
    bos_token_id = roles.get("bos_token", bos_token_id)
    return replace(
        spec,
        bos_token_id=bos_token_id,
        prefix_ids=_ends(config, named, "bos", bos_token_id, spec.prefix_ids),
        suffix_ids=_ends(config, named, "eos", next(iter(eos_token_ids), None), spec.suffix_ids),
        eos_token_ids=eos_token_ids,
        chat_templates=read_chat_templates(directory, config),
        template_tokens=read_template_tokens({"tokenizer_config.json": config}) or None,
        model_vocab_size=model_vocab_size,
    )


def _ends(
    config: Mapping[str, Any],
    named: Mapping[str, Path],
    role: str,
    token_id: int | None,
    own_ids: tuple[int, ...],
) -> tuple[int, ...]:
    """What is put before or behind a text: `add_bos_token` and `add_eos_token` go before the file's own."""
    key = f"add_{role}_token"
    if config.get(key) is None:
        return own_ids
    if not expect(config[key], bool, f"{named[key]}: {key}"):
        return ()
    if own_ids:
        return own_ids
    if token_id is None:
        raise CheckpointError(
            f"{named[key]}: {key}: found true without a {role.upper()} token, expected a {role}_token"
        )
    return (token_id,)


def _content(value: object, where: str) -> str:
    """A token's text, given as it is or as {"content": text}."""
    return expect(value.get("content") if isinstance(value, dict) else value, str, where)


def _read_named(value: object, spec: TokenizerSpec, where: str) -> int:
    content = _content(value, where)
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
