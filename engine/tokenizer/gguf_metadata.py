"""Reads a tokenizer from the metadata of a GGUF file, given as a plain mapping of its keys.

The keys are those of the GGUF specification (`tokenizer.ggml.*`). Only byte-level BPE, which GGUF calls
"gpt2".
"""

from collections.abc import Mapping
from typing import Any

from pagellm.engine.errors import CheckpointError, found
from pagellm.engine.tokenizer import pretokenizers
from pagellm.engine.tokenizer.added_tokens import AddedToken
from pagellm.engine.tokenizer.checks import expect
from pagellm.engine.tokenizer.spec import NO_TOKENIZER, TokenizerSpec

_PREFIX = "tokenizer.ggml."

# Token types, by their numbers in the GGUF specification.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5

# A GGUF file names one end token, where the model's generation config may have named several. These end a
# turn in every model that has them.
_END_OF_TURN = frozenset(
    {"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>"}
)


def read_gguf_metadata(metadata: Mapping[str, Any]) -> TokenizerSpec:
    """The tokenizer that the metadata describes; where it describes none, one without a vocabulary.

    Raises `CheckpointError` if a key is missing, malformed, or names something that is not supported.
    """
    if f"{_PREFIX}tokens" not in metadata:
        return NO_TOKENIZER
    model = metadata.get(f"{_PREFIX}model")
    if model != "gpt2":
        raise CheckpointError(
            f"{_PREFIX}model: found {found(model)}, expected 'gpt2' (byte-level BPE; SentencePiece, WordPiece"
            " and Unigram are not supported)"
        )
    pre = expect(metadata.get(f"{_PREFIX}pre"), str, f"{_PREFIX}pre")
    tokens = _strings(metadata, "tokens")
    types = expect(metadata.get(f"{_PREFIX}token_type"), list, f"{_PREFIX}token_type")
    if len(types) != len(tokens):
        raise CheckpointError(
            f"{_PREFIX}token_type: found {len(types)} entries, expected {len(tokens)}, one for each token"
        )
    vocab = dict(zip(tokens, range(len(tokens)), strict=True))
    if len(vocab) != len(tokens):
        twice = next(token for index, token in enumerate(tokens) if vocab[token] != index)
        raise CheckpointError(f"{_PREFIX}tokens: found {found(twice)} twice, expected each token once")
    added_tokens = []
    for token_id, kind in enumerate(types):
        if kind == _NORMAL:
            continue
        if kind == _UNUSED:
            del vocab[tokens[token_id]]
        elif kind not in (_UNKNOWN, _CONTROL, _USER_DEFINED):
            raise CheckpointError(f"{_PREFIX}token_type[{token_id}]: found {found(kind)}, expected 1 to 5")
        elif tokens[token_id]:
            added_tokens.append(AddedToken(token_id, tokens[token_id], special=kind != _USER_DEFINED))
    pretokenizer, named = pretokenizers.from_gguf_name(pre)
    # Of several, the "default" has the plain key, and each of the others has its name behind it.
    chat_templates = {
        key.removeprefix("tokenizer.chat_template").removeprefix(".") or "default": expect(value, str, key)
        for key, value in metadata.items()
        if key == "tokenizer.chat_template" or key.startswith("tokenizer.chat_template.")
    }
    add_bos_token = metadata.get(f"{_PREFIX}add_bos_token", named.add_bos)
    if metadata.get(f"{_PREFIX}add_eos_token", False) is not False:
        # It would end every prompt before it is answered.
        raise CheckpointError(
            f"{_PREFIX}add_eos_token: found {found(metadata[f'{_PREFIX}add_eos_token'])}, expected false"
        )
    return TokenizerSpec(
        vocab=vocab,
        merges=_strings(metadata, "merges"),
        pretokenizer=pretokenizer,
        added_tokens=tuple(added_tokens),
        normalize_nfc=named.normalize_nfc,
        ignore_merges=named.ignore_merges,
        bos_token_id=_token_id(metadata, "bos", len(tokens)),
        add_bos_token=expect(add_bos_token, bool, f"{_PREFIX}add_bos_token"),
        eos_token_ids=_end_ids(metadata, added_tokens, len(tokens)),
        chat_templates=chat_templates,
        model_vocab_size=len(tokens),
    )


def _strings(metadata: Mapping[str, Any], name: str) -> list[str]:
    values = expect(metadata.get(_PREFIX + name), list, _PREFIX + name)
    if not set(map(type, values)) <= {str}:
        index = next(index for index, value in enumerate(values) if type(value) is not str)
        raise CheckpointError(f"{_PREFIX}{name}[{index}]: found {found(values[index])}, expected a string")
    try:
        "".join(values).encode()
    except UnicodeEncodeError as error:
        char = error.object[error.start]
        raise CheckpointError(
            f"{_PREFIX}{name}: found the lone surrogate U+{ord(char):04X}, expected valid Unicode"
        ) from error
    return values


def _token_id(metadata: Mapping[str, Any], role: str, num_tokens: int) -> int | None:
    where = f"{_PREFIX}{role}_token_id"
    if metadata.get(where) is None:
        return None
    token_id = expect(metadata[where], int, where)
    if not 0 <= token_id < num_tokens:
        raise CheckpointError(f"{where}: found {token_id}, expected an id from 0 to {num_tokens - 1}")
    return token_id


def _end_ids(metadata: Mapping[str, Any], added_tokens: list[AddedToken], num_tokens: int) -> tuple[int, ...]:
    named = [_token_id(metadata, role, num_tokens) for role in ("eos", "eot", "eom")]
    by_content = [token.id for token in added_tokens if token.special and token.content in _END_OF_TURN]
    return tuple(id_ for id_ in [*named, *by_content] if id_ is not None)
