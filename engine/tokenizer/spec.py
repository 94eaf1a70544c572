"""What a checkpoint says about its tokenizer, whichever files it was read from.

The readers (`tokenizer_json`, `directory`, `gguf_metadata`) make a `TokenizerSpec`; `Tokenizer` is built
from one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pagellm.engine.tokenizer.added_tokens import AddedToken
from pagellm.engine.tokenizer.pretokenizers import Pretokenizer

# Far above any vocabulary; tables are as long as the highest id.
MAX_ID = (1 << 24) - 1


@dataclass(frozen=True, slots=True)
class TokenizerSpec:
    """A byte-level BPE tokenizer, described.

    `eos_token_ids` has the tokenizer's own end token first, then every other id that ends a turn.
    `model_vocab_size` is the number of rows of the model's output, which padding often makes larger than the
    vocabulary. `absence` says why there is no vocabulary, where there is none.
    `chat_templates` are by name; the only one of a model is its "default". `template_tokens` are the tokens
    that they see by role, such as `bos_token`; None: the BOS and the first EOS.
    """

    vocab: Mapping[str, int]
    merges: Sequence[str]
    pretokenizer: Pretokenizer
    added_tokens: tuple[AddedToken, ...] = ()
    normalize_nfc: bool = False
    ignore_merges: bool = False
    unk_token: str | None = None
    bos_token_id: int | None = None
    add_bos_token: bool = False
    eos_token_ids: tuple[int, ...] = ()
    chat_templates: Mapping[str, str] = field(default_factory=dict)
    template_tokens: Mapping[str, str] | None = None
    model_vocab_size: int | None = None
    absence: str = "this model came without a tokenizer"


# Of a checkpoint that brings no tokenizer: it serves token ids, and they decode to nothing.
NO_TOKENIZER = TokenizerSpec(vocab={}, merges=(), pretokenizer=Pretokenizer.named("gpt2"))
