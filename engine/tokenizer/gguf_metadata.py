"""Reads a tokenizer from the metadata of a GGUF file, given as a plain mapping of its keys.

The keys are those of the GGUF specification (`tokenizer.ggml.*`). Of the models that it names: "gpt2"
(byte-level BPE), "llama" (SentencePiece BPE), "gemma4" (BPE with merges of characters) and "t5" (Unigram).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pagellm.engine.errors import CheckpointError, found
from pagellm.engine.progress import say
from pagellm.engine.tokenizer import pretokenizers
from pagellm.engine.tokenizer.added_tokens import AddedToken
from pagellm.engine.tokenizer.bpe import Bpe, CharacterBpe
from pagellm.engine.tokenizer.charsmap import Charsmap
from pagellm.engine.tokenizer.checks import expect
from pagellm.engine.tokenizer.decoders import SPACE, Decoder, spaced_bytes
from pagellm.engine.tokenizer.fallback import NO_BYTES, Fallback, byte_ids_of
from pagellm.engine.tokenizer.families import GgufPretokenizer
from pagellm.engine.tokenizer.normalization import Normalizer, to_nfc
from pagellm.engine.tokenizer.pretokenizers import Pretokenizer
from pagellm.engine.tokenizer.sentencepiece import SentencePieceBpe
from pagellm.engine.tokenizer.sentencepiece_normalizer import GgufNormalizer
from pagellm.engine.tokenizer.spec import NO_TOKENIZER, TokenizerSpec
from pagellm.engine.tokenizer.unigram import Unigram, as_single, unk_score

PREFIX = "tokenizer.ggml."

# Token types, by their numbers in the GGUF specification.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# A GGUF file names one end token, where the model's generation config may have named several. These end a
# turn in every model that has them, and are control tokens whatever type the file gives them (the list of
# llama.cpp's llama-vocab.cpp).
_END_OF_TURN = frozenset(
    [
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<end_of_turn>",
        "<|return|>",
        "<|call|>",
        "<|calls|>",
        "<|flush|>",
        "</s>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "[e~[",
        "<end_of_utterance>",
        "<eos>",
        "<turn|>",
        "<|tool_response>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
    ]
)
# Where all of the first are there, the second is no end of a turn.
_EXCEPTIONS = (
    (("<|return|>", "<|call|>"), "<|end|>"),
    (("<|calls|>", "<|flush|>"), "<|end|>"),
    (("<|tool_response>",), "</s>"),
)
# Of Phi-3, whose tokens take the whitespace behind them.
_PHI3_KEEPS_SPACE = ("<unk>", "<s>", "<|endoftext|>")


def _show_spaces(text: str) -> str:
    return text.replace(" ", SPACE)


def read_gguf_metadata(metadata: Mapping[str, Any]) -> TokenizerSpec:
    """The tokenizer that the metadata describes; where it describes none, one without a vocabulary.

    Raises `CheckpointError` if a key is missing, malformed, or names something that is not supported.
    """
    if f"{PREFIX}tokens" not in metadata:
        return NO_TOKENIZER
    model = metadata.get(f"{PREFIX}model")
    if model not in _READERS:
        raise CheckpointError(
            f"{PREFIX}model: found {found(model)}, expected one of {', '.join(map(repr, _READERS))}"
        )
    tokens = _strings(metadata, "tokens")
    types = expect(metadata.get(f"{PREFIX}token_type"), list, f"{PREFIX}token_type")
    if len(types) != len(tokens):
        raise CheckpointError(
            f"{PREFIX}token_type: found {len(types)} entries, expected {len(tokens)}, one for each token"
        )
    vocab = dict(zip(tokens, range(len(tokens)), strict=True))
    if len(vocab) != len(tokens):
        twice = next(token for index, token in enumerate(tokens) if vocab[token] != index)
        raise CheckpointError(f"{PREFIX}tokens: found {found(twice)} twice, expected each token once")
    spec = _READERS[model](metadata, vocab, types)
    # Of several, the "default" has the plain key, and each of the others has its name behind it.
    chat_templates = {
        key.removeprefix("tokenizer.chat_template").removeprefix(".") or "default": expect(value, str, key)
        for key, value in metadata.items()
        if key == "tokenizer.chat_template" or key.startswith("tokenizer.chat_template.")
    }
    return replace(
        spec,
        eos_token_ids=_end_ids(metadata, spec, len(tokens)),
        chat_templates=chat_templates,
        model_vocab_size=len(tokens),
    )


def _read_byte_level(
    metadata: Mapping[str, Any], vocab: dict[str, int], types: Sequence[int]
) -> TokenizerSpec:
    pre = expect(metadata.get(f"{PREFIX}pre"), str, f"{PREFIX}pre")
    pretokenizer, named = pretokenizers.from_gguf_name(pre)
    if pre == "default":
        say(f"{PREFIX}pre: 'default', of a converter that did not know the model: words may be cut wrongly")
    if named.characters:
        return _read_characters(metadata, vocab, types, pretokenizer, named)
    vocab = {token: id_ for token, id_ in vocab.items() if types[id_] != UNUSED}
    spec = TokenizerSpec(
        vocab=vocab,
        model=Bpe(vocab, _strings(metadata, "merges"), ignore_merges=named.ignore_merges),
        pretokenizer=pretokenizer,
        added_tokens=_added_tokens(metadata, vocab, types, UNUSED),
        normalizer=Normalizer([to_nfc] if named.normalize_nfc else []),
    )
    return _with_ends(spec, metadata, types, add_bos=named.add_bos)


def _read_sentencepiece(
    metadata: Mapping[str, Any], vocab: dict[str, int], types: Sequence[int]
) -> TokenizerSpec:
    """As llama.cpp: added tokens are cut out of the raw text; a space is put before what follows one."""
    added_tokens = _added_tokens(metadata, vocab, types, BYTE)
    pieces = {token: id_ for token, id_ in vocab.items() if types[id_] in (NORMAL, USER_DEFINED, UNUSED)}
    scores = _scores(metadata, len(types))
    add_prefix = expect(metadata.get(f"{PREFIX}add_space_prefix", True), bool, f"{PREFIX}add_space_prefix")
    spec = TokenizerSpec(
        vocab=vocab,
        model=SentencePieceBpe(pieces, scores, _fallback(metadata, vocab, len(types), default_unk=0)),
        pretokenizer=Pretokenizer([]),
        added_tokens=added_tokens,
        normalizer=Normalizer([_show_spaces, *([SPACE] if add_prefix else [])]),
        decoder=Decoder(spaced_bytes, byte_tokens=True, strip=(" ", 1) if add_prefix else ("", 0)),
    )
    return _with_ends(spec, metadata, types, add_bos=True, default_bos=1)


def _read_gemma4(metadata: Mapping[str, Any], vocab: dict[str, int], types: Sequence[int]) -> TokenizerSpec:
    return _read_byte_level({**metadata, f"{PREFIX}pre": "gemma4"}, vocab, types)


def _read_characters(
    metadata: Mapping[str, Any],
    vocab: dict[str, int],
    types: Sequence[int],
    pretokenizer: Pretokenizer,
    named: GgufPretokenizer,
) -> TokenizerSpec:
    """A vocabulary with merges that is not written in the byte-level alphabet."""
    fallback = Fallback(byte_ids_of(vocab), None)
    spec = TokenizerSpec(
        vocab=vocab,
        model=CharacterBpe(vocab, _strings(metadata, "merges"), fallback),
        pretokenizer=pretokenizer,
        added_tokens=_added_tokens(metadata, vocab, types, BYTE),
        normalizer=Normalizer([_show_spaces] if named.visible_spaces else []),
        decoder=Decoder(spaced_bytes if named.visible_spaces else str.encode, byte_tokens=True),
    )
    if named.add_bos:
        # Files of its first days say that it has no BOS.
        metadata = {**metadata, f"{PREFIX}add_bos_token": True}
    return _with_ends(spec, metadata, types, add_bos=named.add_bos)


def _read_unigram(metadata: Mapping[str, Any], vocab: dict[str, int], types: Sequence[int]) -> TokenizerSpec:
    flags = {}
    for name in ("add_space_prefix", "remove_extra_whitespaces"):
        flags[name] = expect(metadata.get(PREFIX + name, False), bool, PREFIX + name)
    scores = _scores(metadata, len(types))
    normal = [score for score, kind in zip(scores, types, strict=True) if kind == NORMAL]
    pieces = {token: id_ for token, id_ in vocab.items() if types[id_] in (NORMAL, USER_DEFINED)}
    user_defined = [token for token, id_ in pieces.items() if types[id_] == USER_DEFINED]
    for token in user_defined:
        scores[vocab[token]] = 0.0
    fallback = Fallback(NO_BYTES, _fallback(metadata, vocab, len(types), default_unk=2).unk_id)
    spec = TokenizerSpec(
        vocab=vocab,
        model=Unigram(pieces, scores, as_single(unk_score(normal)), fallback),
        pretokenizer=Pretokenizer([]),
        added_tokens=_added_tokens(metadata, vocab, types, BYTE),
        normalizer=GgufNormalizer(
            Charsmap(_charsmap(metadata), f"{PREFIX}precompiled_charsmap", user_defined),
            prefix=flags["add_space_prefix"],
            single=flags["remove_extra_whitespaces"],
        ),
        decoder=Decoder(
            spaced_bytes, byte_tokens=True, strip=(" ", 1) if flags["add_space_prefix"] else ("", 0)
        ),
    )
    return _with_ends(spec, metadata, types, add_bos=False, add_eos=True, default_eos=1)


def _charsmap(metadata: Mapping[str, Any]) -> bytes:
    where = f"{PREFIX}precompiled_charsmap"
    values = expect(metadata.get(where, []), list, where)
    if not set(map(type, values)) <= {int} or any(not -128 <= value < 256 for value in values):
        raise CheckpointError(f"{where}: found {found(values)}, expected bytes")
    return bytes([value & 0xFF for value in values])


_READERS = {
    "gpt2": _read_byte_level,
    "llama": _read_sentencepiece,
    "gemma4": _read_gemma4,
    "t5": _read_unigram,
}


def _added_tokens(
    metadata: Mapping[str, Any], vocab: Mapping[str, int], types: Sequence[int], highest: int
) -> tuple[AddedToken, ...]:
    """The tokens that are recognised in a text as a whole. highest: of the types that are expected."""
    expected = range(NORMAL, highest + 1)
    for token_id, kind in enumerate(types):
        if kind not in expected:
            raise CheckpointError(
                f"{PREFIX}token_type[{token_id}]: found {found(kind)}, expected 1 to {highest}"
            )
    special = _END_OF_TURN - _no_ends_of_turn(vocab)
    name = str(metadata.get("general.name", "")).lower()
    strips_right = "phi-3" in name or "phi3" in name
    return tuple(
        AddedToken(
            token_id,
            token,
            special=types[token_id] != USER_DEFINED or token in special,
            rstrip=strips_right and token not in _PHI3_KEEPS_SPACE,
        )
        for token, token_id in vocab.items()
        if token and (types[token_id] in (UNKNOWN, CONTROL, USER_DEFINED) or token in special)
    )


def _no_ends_of_turn(vocab: Mapping[str, int]) -> set[str]:
    return {token for others, token in _EXCEPTIONS if all(other in vocab for other in others)}


def _scores(metadata: Mapping[str, Any], num_tokens: int) -> list[float]:
    where = f"{PREFIX}scores"
    scores = expect(metadata.get(where), list, where)
    if len(scores) != num_tokens or not set(map(type, scores)) <= {float, int}:
        raise CheckpointError(
            f"{where}: found {len(scores)} entries, expected {num_tokens} numbers, one for each token"
        )
    return scores


def _fallback(
    metadata: Mapping[str, Any], vocab: Mapping[str, int], num_tokens: int, default_unk: int
) -> Fallback:
    unk_id = _token_id(metadata, "unknown", num_tokens)
    return Fallback(byte_ids_of(vocab), default_unk if unk_id is None else unk_id)


def _with_ends(
    spec: TokenizerSpec,
    metadata: Mapping[str, Any],
    types: Sequence[int],
    *,
    add_bos: bool,
    add_eos: bool = False,
    default_bos: int | None = None,
    default_eos: int | None = None,
) -> TokenizerSpec:
    """The description with what is put around a text."""
    ends: dict[str, tuple[int, ...]] = {}
    bos_id = _token_id(metadata, "bos", len(types))
    bos_id = default_bos if bos_id is None else bos_id
    eos_id = _token_id(metadata, "eos", len(types))
    eos_id = default_eos if eos_id is None else eos_id
    for role, token_id, default in (
        ("bos", bos_id, add_bos),
        ("eos", eos_id, add_eos),
    ):
        where = f"{PREFIX}add_{role}_token"
        added = expect(metadata.get(where, default), bool, where)
        if added and token_id is None:
            raise CheckpointError(
                f"{where}: found true without a token for it, expected a {PREFIX}{role}_token_id"
            )
        ends[role] = (token_id,) if added and token_id is not None else ()
    return replace(spec, bos_token_id=bos_id, prefix_ids=ends["bos"], suffix_ids=ends["eos"])


def _strings(metadata: Mapping[str, Any], name: str) -> list[str]:
    values = expect(metadata.get(PREFIX + name), list, PREFIX + name)
    if not set(map(type, values)) <= {str}:
        index = next(index for index, value in enumerate(values) if type(value) is not str)
        raise CheckpointError(f"{PREFIX}{name}[{index}]: found {found(values[index])}, expected a string")
    try:
        "".join(values).encode()
    except UnicodeEncodeError as error:
        char = error.object[error.start]
        raise CheckpointError(
            f"{PREFIX}{name}: found the lone surrogate U+{ord(char):04X}, expected valid Unicode"
        ) from error
    return values


def _token_id(metadata: Mapping[str, Any], role: str, num_tokens: int) -> int | None:
    where = f"{PREFIX}{role}_token_id"
    if metadata.get(where) is None:
        return None
    token_id = expect(metadata[where], int, where)
    if not 0 <= token_id < num_tokens:
        raise CheckpointError(f"{where}: found {token_id}, expected an id from 0 to {num_tokens - 1}")
    return token_id


def _end_ids(metadata: Mapping[str, Any], spec: TokenizerSpec, num_tokens: int) -> tuple[int, ...]:
    named = [_token_id(metadata, role, num_tokens) for role in ("eos", "eot", "eom")]
    ends = _END_OF_TURN - _no_ends_of_turn(spec.vocab)
    by_content = [token.id for token in spec.added_tokens if token.special and token.content in ends]
    return tuple(id_ for id_ in [*named, *by_content] if id_ is not None)
