"""A tokenizer of a directory as a GGUF file's metadata, which is read back and must give the same tokens.

GGUF names a pre-tokenizer instead of describing it, and has no normalizers; which of its names and settings a
tokenizer is, is found by trying them on texts. Where none gives the same tokens it is refused.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pagellm.engine.checks import JsonError, parse_json
from pagellm.engine.errors import CheckpointError, PagellmError, found
from pagellm.engine.files import read_plain
from pagellm.engine.progress import say
from pagellm.engine.tokenizer.bpe import Bpe, CharacterBpe
from pagellm.engine.tokenizer.decoders import byte_of_token
from pagellm.engine.tokenizer.directory import read_directory
from pagellm.engine.tokenizer.families import GGUF_PRETOKENIZERS
from pagellm.engine.tokenizer.gguf_metadata import (
    BYTE,
    CONTROL,
    NORMAL,
    PREFIX,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    read_gguf_metadata,
)
from pagellm.engine.tokenizer.pretokenizers import Pretokenizer
from pagellm.engine.tokenizer.sentencepiece import SentencePieceBpe
from pagellm.engine.tokenizer.spec import TokenizerSpec
from pagellm.engine.tokenizer.tokenizer import Tokenizer

# What tells pre-tokenizers and normalizers apart: scripts, digits, runs of space, contractions, code, marks.
SAMPLE = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n\U0001f680 (normal) \U0001f636\u200d"
    "\U0001f32b\ufe0f (multiple emojis) \u2705 \U0001f999\U0001f999 3 33 333 3333 33333 333333 33"
    "33333 33333333 3.3 3..3 3...3 \u1780\u17b6\u1793\u17cb \u0e01\u0e23\u0e38\u0e07\u0e40\u0e17"
    "\u0e1e \u6211\u60f3\u5728apple\u5de5\u4f5c1314151\u5929\uff5e \u041f\u0440\u0438\u0432\u0435"
    "\u0442, \u043c\u0438\u0440! \uc548\ub155\ud558\uc138\uc694 \u3053\u3093\u306b\u3061\u306f"
    "\u4e16\u754c ------======= \u043d\u0435\u0449\u043e ''''''```````\"\"\"\"......!!!!!!?????? I've"
    " been 'told he's there, 'RE you sure? 'M not sure I'll make it, 'D you like some tea? We'Ve "
    "a'lL  cafe\u0301 caf\u00e9 \ufb01 \u212b \u00a0x\u2003y CamelCaseHTTPServer snake_case_name"
    '\r\n\tdef f(x):\n        return x**2 # 1,234,567.89\n<a href="/x">\\n</a> $100 50% a+b=c '
    "\u0915\u094d\u0937\u0947 \u0627\u0644\u0633\u0644\u0627\u0645 "
)
_SAMPLES = (SAMPLE, "Hello, world!", " leading", "trailing ", "", "\n", "  two  spaces  ", "a")
# Of several names that mean the same, those that llama.cpp itself would give first.
_PREFERRED = ("llama-bpe", "qwen2", "gpt-2", "smollm", "tekken", "gpt-4o", "deepseek-v3", "command-r")
_NEVER = -1e4  # the score of a piece that nothing becomes


def tokenizer_metadata(directory: Path, vocab_size: int) -> dict[str, Any]:
    """The `tokenizer.*` keys of a GGUF file for the tokenizer of a directory; vocab_size: of the model.

    Raises `CheckpointError` if GGUF has none that gives the same tokens.
    """
    spec = read_directory(directory)
    if not spec.vocab:
        return {f"{PREFIX}model": "none"}
    own = Tokenizer(spec)
    common = _common(spec, own)
    reasons, nearly = [], None
    for candidate in _candidates(directory, spec, max(vocab_size, own.vocab_size)):
        metadata = {**candidate, **common}
        try:
            written = Tokenizer(read_gguf_metadata(metadata))
            differing = [text for text in _SAMPLES if own.encode(text) != written.encode(text)]
        except PagellmError as error:
            reasons.append(str(error))
            continue
        if set(own.eos_token_ids) - set(written.eos_token_ids):
            raise CheckpointError(
                f"{directory}: eos_token_id: found {found(list(own.eos_token_ids))}, expected at most three "
                "that are not known as ends of a turn, as many as a GGUF file names"
            )
        if not differing:
            return metadata
        if all(text.startswith(" ") for text in differing):
            nearly = nearly or metadata
        reasons.append(f"other tokens for {found(differing[0])}")
    if nearly is not None:
        say(
            f"{directory}: a text that begins with a space gets other tokens in a GGUF file: one more space "
            "is put before it"
        )
        return nearly
    reason = reasons[0] if reasons else "of none of its kinds"
    raise CheckpointError(
        f"{directory}: tokenizer: found one that GGUF has no form for ({reason}), expected one whose tokens "
        "a pre-tokenizer of its names, or SentencePiece's scores, give"
    )


def _common(spec: TokenizerSpec, own: Tokenizer) -> dict[str, Any]:
    """Roles of tokens and chat templates."""
    metadata: dict[str, Any] = {}
    ends = own.eos_token_ids
    for role, token_id in (("bos", own.bos_token_id), *zip(("eos", "eot", "eom"), ends, strict=False)):
        if token_id is not None:
            metadata[f"{PREFIX}{role}_token_id"] = token_id
    metadata[f"{PREFIX}add_bos_token"] = bool(spec.prefix_ids)
    metadata[f"{PREFIX}add_eos_token"] = bool(spec.suffix_ids)
    for name, template in spec.chat_templates.items():
        metadata["tokenizer.chat_template" + ("" if name == "default" else f".{name}")] = template
    return metadata


def _candidates(directory: Path, spec: TokenizerSpec, size: int) -> Iterator[dict[str, Any]]:
    tokens, types = _tokens(spec, size)
    base = {f"{PREFIX}tokens": tokens, f"{PREFIX}token_type": types}
    if isinstance(spec.model, Bpe):
        base |= {f"{PREFIX}model": "gpt2", f"{PREFIX}merges": _merges(directory)}
        for name in _pre_names(spec, spec.model.ignore_merges):
            yield {**base, f"{PREFIX}pre": name}
        return
    if isinstance(spec.model, CharacterBpe):
        rank_of: dict[str, int] = {}
        for rank, merge in enumerate(_merges(directory)):
            rank_of.setdefault(merge.replace(" ", ""), rank)
        score_of: Mapping[str, float] = {piece: -float(rank) for piece, rank in rank_of.items()}
    elif isinstance(spec.model, SentencePieceBpe):
        score_of = spec.model.scores
    else:
        return
    base |= {
        f"{PREFIX}model": "llama",
        f"{PREFIX}pre": "default",
        f"{PREFIX}scores": [float(score_of.get(token, _NEVER)) for token in tokens],
    }
    if UNKNOWN in types:
        base[f"{PREFIX}unknown_token_id"] = types.index(UNKNOWN)
    for adds_space in (True, False):
        yield {**base, f"{PREFIX}add_space_prefix": adds_space}


def _tokens(spec: TokenizerSpec, size: int) -> tuple[list[str], list[int]]:
    """The tokens by id, and their types; ids that no token has are padding."""
    tokens = [f"[PAD{id_}]" for id_ in range(size)]
    types = [UNUSED] * size
    byte_level = isinstance(spec.model, Bpe)
    for token, id_ in spec.vocab.items():
        is_byte = not byte_level and byte_of_token(token) is not None
        tokens[id_], types[id_] = token, BYTE if is_byte else NORMAL
    for added in spec.added_tokens:
        tokens[added.id] = added.content
        types[added.id] = CONTROL if added.special else USER_DEFINED
    unk_id = getattr(spec.model, "unk_id", None)
    if unk_id is not None and not byte_level:
        types[unk_id] = UNKNOWN
    return tokens, types


def _merges(directory: Path) -> list[str]:
    path = directory / "tokenizer.json"
    if not path.exists():
        lines = (directory / "merges.txt").read_text("utf-8").split("\n")
        return [line for line in lines if line and not line.startswith("#version")]
    try:
        merges = parse_json(read_plain(path).decode("utf-8-sig"))["model"]["merges"]
    except (OSError, ValueError, JsonError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


def _pre_names(spec: TokenizerSpec, ignore_merges: bool) -> list[str]:
    """The names of pre-tokenizers that cut the sample into the same words, the likeliest first.

    ignore_merges: of the tokenizer's model.
    """
    texts = [SAMPLE, spec.normalizer(SAMPLE)]
    expected = [spec.pretokenizer(text) for text in texts]
    families = {
        family
        for family in {named.family for named in GGUF_PRETOKENIZERS.values()}
        if [Pretokenizer.named(family)(text) for text in texts] == expected
    }
    normalizes = texts[0] != texts[1]
    matching = [
        name
        for name, named in GGUF_PRETOKENIZERS.items()
        if named.family in families and not named.characters and name != "default"
    ]

    def order(name: str) -> tuple[bool, bool, int]:
        named = GGUF_PRETOKENIZERS[name]
        rank = _PREFERRED.index(name) if name in _PREFERRED else len(_PREFERRED)
        return named.normalize_nfc != normalizes, named.ignore_merges != ignore_merges, rank

    return sorted(matching, key=order)[:8]
