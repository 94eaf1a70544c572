"""Reads the `tokenizer.json` of the Hugging Face `tokenizers` library, where it holds a byte-level BPE.

What it describes beyond that (other models, other normalisers, other pre-tokenizers) is refused by name
rather than tokenized almost right.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pagellm.engine.errors import CheckpointError, found
from pagellm.engine.tokenizer import pretokenizers
from pagellm.engine.tokenizer.added_token_table import AddedTokenTable
from pagellm.engine.tokenizer.added_tokens import AddedToken
from pagellm.engine.tokenizer.byte_alphabet import CHAR_OF_BYTE
from pagellm.engine.tokenizer.checks import expect, read_json_object
from pagellm.engine.tokenizer.spec import MAX_ID, TokenizerSpec


def read_tokenizer_json(path: Path) -> TokenizerSpec:
    """The tokenizer that the file describes.

    Raises `CheckpointError` if the file cannot be read, or describes something that is not supported.
    """
    data = read_json_object(path)
    model = expect(data.get("model"), dict, f"{path}: model")
    # Files of old versions leave the type out.
    if model.get("type", "BPE") != "BPE":
        raise CheckpointError(
            f"{path}: model.type: found {found(model['type'])}, expected 'BPE' (byte-level)"
        )
    for field in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(field):
            raise CheckpointError(f"{path}: model.{field}: found {found(model[field])}, expected none")
    vocab = check_vocab(model.get("vocab"), f"{path}: model.vocab")
    unk_token = model.get("unk_token")
    if unk_token is not None and expect(unk_token, str, f"{path}: model.unk_token") not in vocab:
        raise CheckpointError(
            f"{path}: model.unk_token: found {found(unk_token)}, expected a token of model.vocab"
        )
    if unk_token is not None and model.get("fuse_unk") and not vocab.keys() >= set(CHAR_OF_BYTE):
        raise CheckpointError(
            f"{path}: model.fuse_unk: found true with a vocabulary that lacks bytes, expected false"
        )
    _check_decoder(data.get("decoder"), f"{path}: decoder")
    table = AddedTokenTable(vocab)
    for index, entry in enumerate(expect(data.get("added_tokens") or [], list, f"{path}: added_tokens")):
        where = f"{path}: added_tokens[{index}]"
        token = read_added_token(entry, where)
        if token.content in table:
            raise CheckpointError(f"{where}: found {found(token.content)} again, expected each token once")
        table.add(token, where)
    added_tokens = table.tokens
    bos_token_id = _read_bos(data.get("post_processor"), added_tokens, f"{path}: post_processor")
    return TokenizerSpec(
        vocab=vocab,
        merges=_read_merges(model.get("merges"), f"{path}: model.merges"),
        pretokenizer=pretokenizers.from_tokenizer_json(data.get("pre_tokenizer"), f"{path}: pre_tokenizer"),
        added_tokens=added_tokens,
        normalize_nfc=_read_normalizer(data.get("normalizer"), f"{path}: normalizer"),
        ignore_merges=bool(model.get("ignore_merges")),
        unk_token=unk_token,
        bos_token_id=bos_token_id,
        add_bos_token=bos_token_id is not None,
    )


def check_vocab(value: object, where: str) -> dict[str, int]:
    """A vocabulary: token to id, each id once.

    Raises `CheckpointError` if it is not one.
    """
    vocab = expect(value, dict, where)
    ids = vocab.values()
    if not set(map(type, ids)) <= {int} or min(ids, default=0) < 0 or max(ids, default=0) > MAX_ID:
        token, bad = next(
            (token, id_) for token, id_ in vocab.items() if type(id_) is not int or not 0 <= id_ <= MAX_ID
        )
        raise CheckpointError(
            f"{where}[{found(token)}]: found {found(bad)}, expected an id from 0 to {MAX_ID}"
        )
    if len(set(vocab.values())) != len(vocab):
        raise CheckpointError(f"{where}: found an id that two tokens share, expected each id once")
    return vocab


def read_added_token(entry: object, where: str, token_id: object = None) -> AddedToken:
    """One entry of `added_tokens`, or of `added_tokens_decoder`, where the id stands outside.

    Raises `CheckpointError` if a field is missing or of the wrong type.
    """
    entry = expect(entry, dict, where)
    content = expect(entry.get("content"), str, f"{where}.content")
    id_ = expect(entry.get("id") if token_id is None else token_id, int, f"{where}.id")
    if not content or not 0 <= id_ <= MAX_ID:
        raise CheckpointError(
            f"{where}: found {found(content)} with id {found(id_)}, expected some text and an id from 0 to"
            f" {MAX_ID}"
        )
    return AddedToken(id_, content, **read_flags(entry, where))


def read_flags(entry: Mapping[str, Any], where: str, *, special: bool = False) -> dict[str, bool]:
    """How an added token is recognised; `special` where the entry does not say.

    Raises `CheckpointError` if one is neither true nor false.
    """
    special = expect(entry.get("special", special), bool, f"{where}.special")
    flags = {"special": special}
    for name, default in (
        ("normalized", not special),
        ("lstrip", False),
        ("rstrip", False),
        ("single_word", False),
    ):
        flags[name] = expect(entry.get(name, default), bool, f"{where}.{name}")
    return flags


def _read_merges(value: object, where: str) -> list[str]:
    """The merges as "left right", whether the file writes them so or, as newer ones do, as pairs."""
    merges = expect(value, list, where)
    kinds = set(map(type, merges))
    if kinds <= {str}:
        return merges
    if kinds <= {list} and all(len(pair) == 2 and set(map(type, pair)) == {str} for pair in merges):
        if any(" " in left or " " in right for left, right in merges):
            raise CheckpointError(
                f"{where}: found a token with a space in it, expected the byte-level alphabet"
            )
        return list(map(" ".join, merges))
    odd = next(merge for merge in merges if type(merge) is not type(merges[0]) or not _is_pair(merge))
    raise CheckpointError(
        f'{where}: found {found(odd)}, expected "left right" or ["left", "right"] throughout'
    )


def _is_pair(merge: object) -> bool:
    if isinstance(merge, list):
        return len(merge) == 2 and all(isinstance(token, str) for token in merge)
    return isinstance(merge, str)


def _check_decoder(section: object, where: str) -> None:
    """Refuses every decoder but the one that turns the alphabet's characters back into bytes."""
    if section is None:
        return
    section = expect(section, dict, where)
    if section.get("type") == "Sequence":
        for index, step in enumerate(expect(section.get("decoders"), list, f"{where}.decoders")):
            _check_decoder(step, f"{where}.decoders[{index}]")
    elif section.get("type") != "ByteLevel":
        raise CheckpointError(f"{where}.type: found {found(section.get('type'))}, expected ByteLevel")


def _read_normalizer(section: object, where: str) -> bool:
    """Whether the text is normalised to NFC."""
    if section is None:
        return False
    section = expect(section, dict, where)
    if section.get("type") == "Sequence":
        listed = expect(section.get("normalizers"), list, f"{where}.normalizers")
        names = [f"{where}.normalizers[{index}]" for index in range(len(listed))]
        return True in list(map(_read_normalizer, listed, names))
    if section.get("type") != "NFC":
        raise CheckpointError(
            f"{where}.type: found {found(section.get('type'))}, expected NFC or no normalizer"
        )
    return True


def _read_bos(section: object, added_tokens: tuple[AddedToken, ...], where: str) -> int | None:
    """The id that the post-processor puts before every text, if it does."""
    if section is None:
        return None
    section = expect(section, dict, where)
    match section.get("type"):
        case "ByteLevel":
            return None
        case "Sequence":
            steps = expect(section.get("processors"), list, f"{where}.processors")
            found_ids = [
                _read_bos(step, added_tokens, f"{where}.processors[{i}]") for i, step in enumerate(steps)
            ]
            bos_ids = [id_ for id_ in found_ids if id_ is not None]
            if len(bos_ids) > 1:
                raise CheckpointError(f"{where}.processors: found several that put a BOS first, expected one")
            return next(iter(bos_ids), None)
        case "TemplateProcessing":
            return _read_template(section, added_tokens, where)
        case other:
            raise CheckpointError(
                f"{where}.type: found {found(other)}, expected ByteLevel, TemplateProcessing or a Sequence"
            )


def _read_template(section: dict[str, Any], added_tokens: tuple[AddedToken, ...], where: str) -> int | None:
    pieces = expect(section.get("single"), list, f"{where}.single")
    before = [
        piece["SpecialToken"] for piece in pieces[:-1] if isinstance(piece, dict) and "SpecialToken" in piece
    ]
    ends_with_text = bool(pieces) and isinstance(pieces[-1], dict) and "Sequence" in pieces[-1]
    if not ends_with_text or len(before) != len(pieces) - 1 or len(before) > 1:
        raise CheckpointError(
            f"{where}.single: found {found(pieces)}, expected the text, or one BOS and the text"
        )
    if not before:
        return None
    content = expect(before[0], dict, f"{where}.single[0]").get("id")
    token = next((token for token in added_tokens if token.content == content), None)
    if token is None:
        raise CheckpointError(f"{where}.single[0]: found {found(content)}, expected one of added_tokens")
    listed = expect(section.get("special_tokens"), dict, f"{where}.special_tokens").get(token.content)
    ids = listed.get("ids") if isinstance(listed, dict) else None
    if ids != [token.id]:
        raise CheckpointError(
            f"{where}.special_tokens: found ids {found(ids)} for {found(content)}, expected [{token.id}]"
        )
    return token.id
