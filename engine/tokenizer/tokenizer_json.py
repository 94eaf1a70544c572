"""Reads the `tokenizer.json` of the Hugging Face `tokenizers` library.

Byte-level BPE, and what SentencePiece's vocabularies are converted to: BPE on characters, and Unigram. What a
file describes beyond that (other models, normalizers, pre-tokenizers or decoders) is refused by name rather
than tokenized almost right.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pagellm.engine.errors import CheckpointError, found
from pagellm.engine.tokenizer.added_token_table import AddedTokenTable
from pagellm.engine.tokenizer.added_tokens import AddedToken
from pagellm.engine.tokenizer.bpe import Bpe, CharacterBpe
from pagellm.engine.tokenizer.byte_alphabet import CHAR_OF_BYTE
from pagellm.engine.tokenizer.checks import expect, read_json_object
from pagellm.engine.tokenizer.decoder_json import read_decoder
from pagellm.engine.tokenizer.fallback import NO_BYTES, Fallback, byte_ids_of
from pagellm.engine.tokenizer.normalizer_json import read_normalizer
from pagellm.engine.tokenizer.post_processor_json import read_ends
from pagellm.engine.tokenizer.pretokenizer_json import is_byte_level, read_pretokenizer, sees_alphabet
from pagellm.engine.tokenizer.spec import MAX_ID, TokenizerSpec, WordModel
from pagellm.engine.tokenizer.unigram import Unigram, unk_score


def read_tokenizer_json(path: Path) -> TokenizerSpec:
    """The tokenizer that the file describes.

    Raises `CheckpointError` if the file cannot be read, or describes something that is not supported.
    """
    data = read_json_object(path)
    section = expect(data.get("model"), dict, f"{path}: model")
    # Files of old versions leave the type out.
    kind = section.get("type", "BPE")
    if kind not in ("BPE", "Unigram"):
        raise CheckpointError(f"{path}: model.type: found {found(kind)}, expected 'BPE' or 'Unigram'")
    byte_level = kind == "BPE" and is_byte_level(data.get("pre_tokenizer"))
    scores: list[float] = []
    if kind == "BPE":
        vocab = check_vocab(section.get("vocab"), f"{path}: model.vocab")
    else:
        vocab, scores = _read_scored_vocab(section.get("vocab"), f"{path}: model.vocab")
    decoder = read_decoder(data.get("decoder"), f"{path}: decoder", byte_level=byte_level)
    table = AddedTokenTable(vocab)
    for index, entry in enumerate(expect(data.get("added_tokens") or [], list, f"{path}: added_tokens")):
        where = f"{path}: added_tokens[{index}]"
        token = read_added_token(entry, where)
        if token.content in table:
            raise CheckpointError(f"{where}: found {found(token.content)} again, expected each token once")
        table.add(token, where)
    prefix_ids, suffix_ids = read_ends(data.get("post_processor"), table.tokens, f"{path}: post_processor")
    model = (
        _read_bpe(section, vocab, byte_level, data.get("pre_tokenizer"), f"{path}: model")
        if kind == "BPE"
        else _read_unigram(section, vocab, scores, table.tokens, f"{path}: model")
    )
    return TokenizerSpec(
        vocab=vocab,
        model=model,
        pretokenizer=read_pretokenizer(data.get("pre_tokenizer"), f"{path}: pre_tokenizer"),
        added_tokens=table.tokens,
        normalizer=read_normalizer(data.get("normalizer"), f"{path}: normalizer"),
        decoder=decoder,
        bos_token_id=next(iter(prefix_ids), None),
        prefix_ids=prefix_ids,
        suffix_ids=suffix_ids,
    )


def _read_bpe(
    section: Mapping[str, Any], vocab: dict[str, int], byte_level: bool, pretokenizer: Any, where: str
) -> WordModel:
    for field in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if section.get(field):
            raise CheckpointError(f"{where}.{field}: found {found(section[field])}, expected none")
    unk_token = section.get("unk_token")
    if unk_token is not None and expect(unk_token, str, f"{where}.unk_token") not in vocab:
        raise CheckpointError(f"{where}.unk_token: found {found(unk_token)}, expected a token of model.vocab")
    flags = {name: bool(section.get(name)) for name in ("byte_fallback", "fuse_unk", "ignore_merges")}
    merges = _read_merges(section.get("merges"), f"{where}.merges", byte_level)
    try:
        if not byte_level:
            byte_ids = byte_ids_of(vocab) if flags["byte_fallback"] else NO_BYTES
            fallback = Fallback(byte_ids, None if unk_token is None else vocab[unk_token])
            ignore_merges, fuse_unk = flags["ignore_merges"], flags["fuse_unk"]
            return CharacterBpe(vocab, merges, fallback, ignore_merges=ignore_merges, fuse_unk=fuse_unk)
        if unk_token is not None and flags["fuse_unk"] and not vocab.keys() >= set(CHAR_OF_BYTE):
            raise CheckpointError("fuse_unk: found true with a vocabulary that lacks bytes, expected false")
        if flags["byte_fallback"] and not vocab.keys() >= set(CHAR_OF_BYTE):
            raise CheckpointError(
                "byte_fallback: found true with a byte-level vocabulary that lacks bytes, expected false"
            )
        return Bpe(
            vocab,
            merges,
            ignore_merges=flags["ignore_merges"],
            unk_token=unk_token,
            in_alphabet=sees_alphabet(pretokenizer),
        )
    except CheckpointError as error:
        raise CheckpointError(f"{where}.{error}") from error


def _read_scored_vocab(value: object, where: str) -> tuple[dict[str, int], list[float]]:
    """A vocabulary of Unigram: a list of pieces with their scores, whose places are their ids."""
    entries = expect(value, list, where)
    for index, entry in enumerate(entries):
        is_entry = type(entry) is list and len(entry) == 2
        if not is_entry or type(entry[0]) is not str or type(entry[1]) not in (int, float):
            raise CheckpointError(f"{where}[{index}]: found {found(entry)}, expected [piece, score]")
    vocab = {piece: id_ for id_, (piece, _) in enumerate(entries)}
    if len(vocab) != len(entries):
        twice = next(piece for index, (piece, _) in enumerate(entries) if vocab[piece] != index)
        raise CheckpointError(f"{where}: found {found(twice)} twice, expected each piece once")
    return vocab, [float(score) for _, score in entries]


def _read_unigram(
    section: Mapping[str, Any],
    vocab: dict[str, int],
    scores: list[float],
    added_tokens: tuple[AddedToken, ...],
    where: str,
) -> WordModel:
    unk_id = expect(section.get("unk_id"), int, f"{where}.unk_id")
    if not 0 <= unk_id < len(vocab):
        raise CheckpointError(f"{where}.unk_id: found {unk_id}, expected an id from 0 to {len(vocab) - 1}")
    byte_ids = byte_ids_of(vocab) if section.get("byte_fallback") else NO_BYTES
    # Text that is not to be recognised as a control token does not become one by its letters either.
    special = {token.content for token in added_tokens if token.special}
    pieces = {piece: id_ for piece, id_ in vocab.items() if piece and piece not in special}
    try:
        return Unigram(pieces, scores, unk_score(scores), Fallback(byte_ids, unk_id))
    except CheckpointError as error:
        raise CheckpointError(f"{where}.{error}") from error


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


def _read_merges(value: object, where: str, byte_level: bool) -> list[str] | list[list[str]]:
    """The merges, whether the file writes them "left right" or, as newer ones do, as pairs."""
    merges = expect(value, list, where)
    kinds = set(map(type, merges))
    if kinds <= {str}:
        return merges
    if kinds <= {list} and all(len(pair) == 2 and set(map(type, pair)) == {str} for pair in merges):
        if byte_level and any(" " in left or " " in right for left, right in merges):
            raise CheckpointError(
                f"{where}: found a token with a space in it, expected the byte-level alphabet"
            )
        return merges
    odd = next(merge for merge in merges if type(merge) is not type(merges[0]) or not _is_pair(merge))
    raise CheckpointError(
        f'{where}: found {found(odd)}, expected "left right" or ["left", "right"] throughout'
    )


def _is_pair(merge: object) -> bool:
    if isinstance(merge, list):
        return len(merge) == 2 and all(isinstance(token, str) for token in merge)
    return isinstance(merge, str)
