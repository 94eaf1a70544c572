"""Reads a `tokenizer.model`, the file of SentencePiece itself.

It is a message of `sentencepiece_model.proto`: the pieces with scores and types, how the model was trained,
and how text is normalised. What it asks for beyond what is here is refused by name.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

from pagellm.engine.errors import CheckpointError, found
from pagellm.engine.files import read_plain
from pagellm.engine.tokenizer.added_tokens import AddedToken
from pagellm.engine.tokenizer.charsmap import Charsmap
from pagellm.engine.tokenizer.decoders import Decoder, Invalid, Lead, spaced_bytes
from pagellm.engine.tokenizer.fallback import NO_BYTES, Fallback, byte_ids_of
from pagellm.engine.tokenizer.pretokenizers import Literals, Pretokenizer
from pagellm.engine.tokenizer.protobuf import Value, WireError, as_bytes, as_float, as_int, fields
from pagellm.engine.tokenizer.sentencepiece import SentencePieceBpe
from pagellm.engine.tokenizer.sentencepiece_normalizer import Prefix, SentencePieceNormalizer, Spaces
from pagellm.engine.tokenizer.spec import TokenizerSpec, WordModel
from pagellm.engine.tokenizer.unigram import Precision, Unigram, as_single, unk_score

_MAX_BYTES = 1 << 28
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_UNIGRAM, _BPE = 1, 2
_MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
# Where the library begins its search for the highest score: above all that are below zero.
_SMALLEST_SINGLE = 2.0**-126


@dataclass
class _Model:
    """The fields of the messages that are understood, with the defaults of the format."""

    pieces: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    model_type: int = 1
    byte_fallback: bool = False
    whitespace_as_suffix: bool = False
    bos_id: int = 1
    eos_id: int = 2
    unk_surface: str = " \u2047 "
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True
    denormalizer: bytes = b""


def read_tokenizer_model(path: Path, prefix: Prefix = Prefix.EVERY_STRETCH) -> TokenizerSpec:
    """The tokenizer that the file describes.

    prefix: where a space is put before a text, if the file says that one is.

    Raises `CheckpointError` if the file cannot be read, or describes something that is not supported.
    """
    model = _read(path)
    if model.model_type not in (_UNIGRAM, _BPE):
        kind = _MODEL_TYPES.get(model.model_type, str(model.model_type))
        raise CheckpointError(f"{path}: model_type: found {kind}, expected unigram or bpe")
    for name, value in (
        ("treat_whitespace_as_suffix", model.whitespace_as_suffix),
        ("denormalizer_spec", model.denormalizer),
    ):
        if value:
            raise CheckpointError(f"{path}: {name}: found one, expected none")
    vocab = dict(zip(model.pieces, range(len(model.pieces)), strict=True))
    if len(vocab) != len(model.pieces):
        twice = next(piece for index, piece in enumerate(model.pieces) if vocab[piece] != index)
        raise CheckpointError(f"{path}: pieces: found {found(twice)} twice, expected each piece once")
    user_defined = [piece for piece, id_ in vocab.items() if model.types[id_] == _USER_DEFINED]
    unk = next((id_ for id_, kind in enumerate(model.types) if kind == _UNKNOWN), None)
    if unk is None:
        raise CheckpointError(f"{path}: pieces: found no unknown one, expected one")
    return TokenizerSpec(
        vocab=vocab,
        model=_read_words(model, vocab, unk, path),
        pretokenizer=Pretokenizer(
            [Literals(tuple(user_defined))] if user_defined and model.model_type == _BPE else []
        ),
        added_tokens=tuple(
            AddedToken(id_, piece)
            for piece, id_ in vocab.items()
            if piece and model.types[id_] in (_CONTROL, _UNKNOWN)
        ),
        normalizer=SentencePieceNormalizer(
            Charsmap(model.charsmap, f"{path}: precompiled_charsmap", user_defined),
            Spaces(
                prefix if model.add_dummy_prefix else Prefix.NOWHERE,
                model.remove_extra_whitespaces,
                model.escape_whitespaces,
            ),
        ),
        decoder=_decoder(model, model.pieces[unk]),
        bos_token_id=model.bos_id if 0 <= model.bos_id < len(vocab) else None,
        eos_token_ids=(model.eos_id,) if 0 <= model.eos_id < len(vocab) else (),
    )


def _read_words(model: _Model, vocab: dict[str, int], unk: int, path: Path) -> WordModel:
    fallback = Fallback(byte_ids_of(vocab) if model.byte_fallback else NO_BYTES, unk)
    pieces = {piece: id_ for piece, id_ in vocab.items() if model.types[id_] in (_NORMAL, _USER_DEFINED)}
    user_defined = {piece: id_ for piece, id_ in pieces.items() if model.types[id_] == _USER_DEFINED}
    if model.model_type == _UNIGRAM:
        # In the library's single precision.
        normal = [score for score, kind in zip(model.scores, model.types, strict=True) if kind == _NORMAL]
        highest = max([_SMALLEST_SINGLE, *normal])
        scores = list(model.scores)
        for piece, id_ in user_defined.items():
            scores[id_] = as_single(as_single(len(piece.encode()) * highest) - 0.1)
        lowest = as_single(unk_score(normal))
        return Unigram(pieces, scores, lowest, fallback, precision=Precision.SINGLE)
    if _UNUSED in model.types:
        unused = model.pieces[model.types.index(_UNUSED)]
        raise CheckpointError(f"{path}: pieces: found the unused one {found(unused)}, expected none")
    return SentencePieceBpe(pieces, model.scores, fallback, user_defined)


def _decoder(model: _Model, unk: str) -> Decoder:
    def token_bytes(token: str) -> bytes:
        return model.unk_surface.encode() if token == unk else spaced_bytes(token)

    def lead_bytes(token: str) -> bytes:
        return token_bytes(token if token == unk else token.removeprefix("\u2581"))

    takes_space = model.add_dummy_prefix or model.remove_extra_whitespaces
    return Decoder(
        token_bytes,
        byte_tokens=model.byte_fallback,
        invalid=Invalid.BYTE,
        lead_bytes=lead_bytes if takes_space else None,
        lead=Lead.UNTIL_TEXT if model.remove_extra_whitespaces else Lead.UNTIL_SPACE,
    )


def _read(path: Path) -> _Model:
    model = _Model()
    try:
        data = read_plain(path, _MAX_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    readers = {1: _read_piece, 2: _read_trainer, 3: _read_normalizer, 5: _read_denormalizer}
    try:
        for number, value in fields(data):
            if number in readers:
                for inner, each in _message(readers[number], model, as_bytes(value)):
                    readers[number](model, inner, each)
    except (WireError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: found {error}, expected a SentencePiece model") from error
    for index, (score, kind) in enumerate(zip(model.scores, model.types, strict=True)):
        if math.isnan(score) or kind not in range(_NORMAL, _BYTE + 1):
            raise CheckpointError(
                f"{path}: pieces[{index}]: found the score {score} and the type {kind}, expected a number"
                " and a type from 1 to 6"
            )
    return model


def _message(reader: object, model: _Model, data: bytes) -> list[tuple[int, Value]]:
    if reader is _read_piece:
        model.pieces.append("")
        model.scores.append(0.0)
        model.types.append(_NORMAL)
    return list(fields(data))


def _read_piece(model: _Model, number: int, value: Value) -> None:
    match number:
        case 1:
            model.pieces[-1] = as_bytes(value).decode()
        case 2:
            model.scores[-1] = as_float(value)
        case 3:
            model.types[-1] = as_int(value)


def _read_trainer(model: _Model, number: int, value: Value) -> None:
    match number:
        case 3:
            model.model_type = as_int(value)
        case 24:
            model.whitespace_as_suffix = as_int(value) != 0
        case 35:
            model.byte_fallback = as_int(value) != 0
        case 41:
            model.bos_id = as_int(value)
        case 42:
            model.eos_id = as_int(value)
        case 44:
            model.unk_surface = as_bytes(value).decode()


def _read_normalizer(model: _Model, number: int, value: Value) -> None:
    match number:
        case 2:
            model.charsmap = as_bytes(value)
        case 3:
            model.add_dummy_prefix = as_int(value) != 0
        case 4:
            model.remove_extra_whitespaces = as_int(value) != 0
        case 5:
            model.escape_whitespaces = as_int(value) != 0


def _read_denormalizer(model: _Model, number: int, value: Value) -> None:
    if number == 2:
        model.denormalizer = as_bytes(value)
